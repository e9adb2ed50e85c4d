"""Builds that are killed, interrupted, out of disk, or gone on with: the same bytes, or one line and nothing lost."""

import contextlib
import errno
import hashlib
import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from megalite.data import tokenize, workers
from megalite.data.journal import WorkFolder
from megalite.errors import UserError
from tests.dist.conftest import interruptible
from tests.unit.token_files import PAIR, build, files_in, random_documents, small_tasks, tool, write_jsonl

pytestmark = pytest.mark.usefixtures("working_folder")


def hashes(folder="out"):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(folder).iterdir()}


def corpus():
    """Two files of many tasks, one of them with lines to reject."""
    write_jsonl("a.jsonl", random_documents(60, 1))
    lines = Path("a.jsonl").read_text().splitlines()
    lines[3:3] = ["{broken", '{"text": null}']
    lines[40:40] = ["[]"]
    Path("b.jsonl").write_text("\n".join(lines))


OPTIONS = {
    "split": "80,20",
    "shuffle_seed": 5,
    "on_error": "skip",
    "max_reject_fraction": 0.2,
    "encoder": "memo",
}


def in_a_child(run, die_at):
    """Run in a forked process that kills itself at the die_at-th change of the file system; its exit status."""
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    calls = 0

    def deadly(function):
        def wrapped(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return wrapped

    for name in ("replace", "fsync", "unlink", "rmdir"):
        setattr(os, name, deadly(getattr(os, name)))
    status = 1
    with contextlib.suppress(BaseException):
        run()
        status = 0
    os._exit(status)


def test_killed_at_any_point_it_goes_on_to_the_same_bytes(tokenizer_dir, monkeypatch):
    small_tasks(monkeypatch, 1500)
    corpus()

    def run():
        build(tokenizer_dir, ["*.jsonl"], **OPTIONS)

    run()
    expected = hashes()
    assert len(expected) == 7
    assert "x.rejects.jsonl" in expected
    for name in files_in():
        os.remove(f"out/{name}")
    rng = random.Random(0)
    killed, status = 0, None
    while status != 0:
        status = in_a_child(run, rng.randrange(1, 10 + 2 * killed))
        if status:
            assert os.WTERMSIG(status) == signal.SIGKILL
            killed += 1
        for name in files_in():
            if name.endswith(".manifest.json"):  # what has all its names is whole
                stem = name.removesuffix(".manifest.json")
                assert hashes_of(stem).items() <= expected.items()
    assert killed >= 20
    assert hashes() == expected


def hashes_of(stem):
    names = [stem + suffix for suffix in (".bin", ".idx", ".manifest.json")]
    return {name: hashlib.sha256(Path("out", name).read_bytes()).hexdigest() for name in names}


def test_killed_with_its_workers_at_random_times(tokenizer_dir):
    write_jsonl("a.jsonl", ["the quick brown fox " * 400 + str(i) for i in range(2500)])  # 5 tasks
    arguments = ["--input", "a.jsonl", "--tokenizer-dir", tokenizer_dir, "--shuffle-seed", 1, "--encoder", "memo"]
    build(tokenizer_dir, ["a.jsonl"], "whole/x", shuffle_seed=1)
    rng, patience, killed = random.Random(1), 0.5, 0
    while True:
        run = tool(*arguments, "--output-prefix", "out/x")
        try:
            _, err = run.communicate(timeout=patience * rng.random())
        except subprocess.TimeoutExpired:
            run.kill()
            run.communicate(timeout=20)
            patience, killed = patience * 1.4, killed + 1
            continue
        assert (run.returncode, err) == (0, "")
        break
    assert hashes() == hashes("whole")
    assert killed > 3


def stopped_half_way(tokenizer_dir, monkeypatch, inputs=("a.jsonl",), **options):
    """A build that ended after some tasks."""
    small_tasks(monkeypatch, 1000)
    whole, count = workers.run_tasks, 0

    def some(*arguments):
        nonlocal count
        for entry in whole(*arguments):
            yield entry
            count += 1
            if count == 3:
                raise KeyboardInterrupt

    monkeypatch.setattr(tokenize, "run_tasks", some)
    with pytest.raises(KeyboardInterrupt):
        build(tokenizer_dir, list(inputs), **options)
    monkeypatch.setattr(tokenize, "run_tasks", whole)
    assert files_in() == ["x.building"]


def test_it_goes_on_and_does_only_what_is_left(tokenizer_dir, monkeypatch, capsys):
    write_jsonl("a.jsonl", random_documents(60, 1))
    stopped_half_way(tokenizer_dir, monkeypatch)
    assert capsys.readouterr().err == "stopped; the same command goes on from out/x.building\n"
    done = []
    whole = workers.run_tasks

    def watched(job, tasks, *rest):
        for entry in whole(job, tasks, *rest):
            done.append(entry["task"])
            yield entry

    monkeypatch.setattr(tokenize, "run_tasks", watched)
    build(tokenizer_dir, ["a.jsonl"], workers=1, encoder="memo")
    assert min(done) == 3
    build(tokenizer_dir, ["a.jsonl"], "whole/x")
    assert hashes() == hashes("whole")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"append_eod": False}, "append_eod: True -> False"),
        ({"split": "9,1"}, "split: None -> 9,1"),
        ({"max_documents": 5}, "max_documents: None -> 5"),
        ("content", 'input "a.jsonl" changed'),
        ("size", 'input "a.jsonl" changed'),
        ("new", 'input "b.jsonl" is new'),
        ("tokenizer", "the tokenizer"),
    ],
)
def test_a_changed_build_is_refused_with_what_changed(tokenizer_dir, monkeypatch, tmp_path, change, what):
    texts = random_documents(60, 1)
    write_jsonl("a.jsonl", texts)
    stopped_half_way(tokenizer_dir, monkeypatch)
    inputs, options = ["a.jsonl"], change if isinstance(change, dict) else {}
    if change == "content":
        status = os.stat("a.jsonl")
        Path("a.jsonl").write_bytes(Path("a.jsonl").read_bytes().replace(b"quick", b"QUICK", 1))
        os.utime("a.jsonl", ns=(status.st_atime_ns, status.st_mtime_ns))
    elif change == "size":
        write_jsonl("a.jsonl", [*texts, "fox"])
    elif change == "new":
        write_jsonl("b.jsonl", ["fox"])
        inputs.append("b.jsonl")
    elif change == "tokenizer":
        folder = tmp_path / "other"
        folder.mkdir()
        content = json.loads(Path(tokenizer_dir, "tokenizer.json").read_text())
        (folder / "tokenizer.json").write_text(json.dumps(content, indent=1))
        tokenizer_dir = folder
    before = sorted(os.listdir("out/x.building"))
    with pytest.raises(UserError, match=r"out/x\.building holds an interrupted build of something else") as caught:
        build(tokenizer_dir, inputs, **options)
    assert what in str(caught.value)
    assert sorted(os.listdir("out/x.building")) == before
    build(tokenizer_dir, inputs, overwrite=True, **options)
    build(tokenizer_dir, inputs, "whole/x", **options)
    assert hashes() == hashes("whole")


def test_a_line_that_was_skipped_fails_a_build_that_goes_on_strictly(tokenizer_dir, monkeypatch):
    lines = [json.dumps({"text": text}) for text in random_documents(60, 1)]
    lines[1] = "{"
    Path("a.jsonl").write_text("\n".join(lines))
    stopped_half_way(tokenizer_dir, monkeypatch, on_error="skip", max_reject_fraction=1.0)
    with pytest.raises(UserError, match=r"a\.jsonl:2: broken JSON"):
        build(tokenizer_dir, ["a.jsonl"])
    assert build(tokenizer_dir, ["a.jsonl"], on_error="skip", max_reject_fraction=1.0)[0].rejects == 1


def test_two_builds_of_one_prefix(tokenizer_dir):
    write_jsonl("a.jsonl", ["fox"])
    other = WorkFolder("out/x")
    with pytest.raises(UserError, match="another process is building out/x"):
        build(tokenizer_dir, ["a.jsonl"])
    other.close(remove=False)
    build(tokenizer_dir, ["a.jsonl"])
    assert files_in() == PAIR


@pytest.mark.parametrize("where", ["megalite.data.indexed.PairWriter.write", "megalite.data.indexed.PairWriter.finish"])
def test_a_full_disk_leaves_what_was_there(tokenizer_dir, monkeypatch, where):
    write_jsonl("a.jsonl", ["fox"])
    build(tokenizer_dir, ["a.jsonl"])
    before = hashes()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(where, full)
        with pytest.raises(UserError, match=r"cannot write out/x: No space left on device"):
            build(tokenizer_dir, ["a.jsonl"], append_eod=False, overwrite=True)
    assert files_in() == ["x.bin", "x.building", *PAIR[1:]]
    assert hashes_of("x") == before
    build(tokenizer_dir, ["a.jsonl"], append_eod=False, overwrite=True)
    assert files_in() == PAIR


def test_a_real_write_error_is_one_line(tokenizer_dir):
    """The kernel refuses files over 20 kB: EFBIG, in the midst of a shard."""
    write_jsonl("a.jsonl", ["the quick brown fox " * 5000] * 4)

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    arguments = ["--input", "a.jsonl", "--tokenizer-dir", tokenizer_dir, "--output-prefix", "out/x"]
    run = tool(*arguments, preexec_fn=limit)
    out, err = run.communicate(timeout=60)
    assert (run.returncode, out) == (1, "")
    assert err == (
        "error: cannot write out/x.building: File too large; mend that and run the same command again to go on\n"
    )
    assert files_in() == []


def test_a_killed_worker_ends_the_run(tokenizer_dir, monkeypatch):
    small_tasks(monkeypatch, 2000)
    write_jsonl("a.jsonl", ["fox " * 50] * 20_000)

    def kill_one():
        while not (children := multiprocessing.active_children()):
            time.sleep(0.01)
        time.sleep(1.0)
        os.kill(children[0].pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    with pytest.raises(UserError, match="a worker process died"):
        build(tokenizer_dir, ["a.jsonl"], workers=2)
    killer.join()
    assert files_in() in ([], ["x.building"])
    assert multiprocessing.active_children() == []


INTERRUPTED_WHILE_STARTING = """
import signal, threading, time
from megalite.data.children import deaf_to_interrupts
other = threading.Thread(target=time.sleep, args=(60,), daemon=True)
other.start()
try:
    with deaf_to_interrupts():
        signal.pthread_kill(other.ident, signal.SIGINT)
        time.sleep(0.2)
        print("started")
except KeyboardInterrupt:
    print("interrupted")
"""


def test_an_interrupt_waits_until_workers_have_started():
    """It may be another thread, which does not block it, that hears it."""
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_WHILE_STARTING], preexec_fn=interruptible, capture_output=True
    )
    assert done.stdout.split() == [b"started", b"interrupted"]


@pytest.mark.parametrize("tasks", [0, 1])  # while the workers start, and when they are at it
def test_an_interrupted_run_says_how_to_go_on(tokenizer_dir, tasks):
    write_jsonl("a.jsonl", ["fox " * 500] * 20_000)
    run = tool(
        *("--input", "a.jsonl", "--tokenizer-dir", tokenizer_dir, "--output-prefix", "out/x", "--encoder", "memo"),
        start_new_session=True,
        preexec_fn=interruptible,
    )
    journal = Path("out/x.building/journal")
    while not journal.exists() or journal.read_bytes().count(b"\n") < tasks:
        assert run.poll() is None
        time.sleep(0.02)
    os.killpg(run.pid, signal.SIGINT)  # as Ctrl-C does
    _, err = run.communicate(timeout=30)
    assert run.returncode == 130
    err = "".join(line for line in err.splitlines(True) if not line.startswith("tokenizing: "))  # on a slow machine
    go_on = "stopped; the same command goes on from out/x.building\n"
    assert err in ([go_on + "interrupted\n"] if tasks else ["interrupted\n", go_on + "interrupted\n"])
    assert files_in() == (["x.building"] if go_on in err else [])


def test_workers_do_not_outlive_a_killed_run(tokenizer_dir):
    write_jsonl("a.jsonl", ["fox " * 500] * 20_000)
    arguments = ["--input", "a.jsonl", "--tokenizer-dir", tokenizer_dir, "--output-prefix", "out/x"]
    run = tool(*arguments, "--encoder", "tokenizers")
    deadline = time.monotonic() + 30
    started = []
    while len(started) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
        started = [each for each in psutil.Process(run.pid).children() if "spawn_main" in " ".join(each.cmdline())]
    time.sleep(1.0)  # until they have started their watch
    run.kill()
    run.wait(timeout=10)  # communicate would wait for workers that live on: they hold the pipes
    _, alive = psutil.wait_procs(started, timeout=10)
    for worker in alive:
        worker.kill()
    run.communicate(timeout=10)
    assert len(started) == 2
    assert alive == []
    assert not set(PAIR) & set(files_in())
