"""tools/bench_data.py on a corpus of a few kilobytes: what is measured, what is compared, what is refused."""

import importlib.util
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.unit.token_files import ROOT, random_documents, write_jsonl

pytestmark = pytest.mark.usefixtures("working_folder")

SMALL = ["--repeats", "1", "--read-megabytes", "0.1", "--read-seconds", "0.01", "--documents", "2000"]
BUILDS = ["(a) encode_batch_fast", "ours, tokenizers", "ours, memo"]  # and gigatoken, where installed


def bench(*arguments, script=ROOT / "tools/bench_data.py"):
    """(exit code, standard output, standard error)."""
    command = [sys.executable, str(script), *map(str, arguments), *SMALL]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


def corpus(count=40):
    write_jsonl("corpus.jsonl", random_documents(count, 1))
    return "corpus.jsonl"


def tables(output):
    """The rows of each section's table, by the section: name -> the other cells."""
    found = {}
    for section in output.split("## ")[1:]:
        lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line[:2] == "| "]
        found[section.partition(":")[0]] = {name: cells for name, *cells in lines[2:]}
    return found


def positive(cells):
    return all(float(cell.replace(",", "")) > 0 for cell in cells)


def test_builds_and_a_peer_that_can_not_run(tokenizer_dir):
    """Two sections; a checkout without preprocess_data.py is said to lack it."""
    (peer := Path("peer/megatron/core/datasets")).mkdir(parents=True)
    code, output, error = bench(
        "memory", "build", "--input", corpus(), "--tokenizer-dir", tokenizer_dir, "--document-megabytes", "0.01",
        "--workers", "1", "--megatron", "peer",
    )  # fmt: skip
    assert (code, error) == (0, "")
    assert f"there is no {peer.resolve().parents[2]}/tools/preprocess_data.py" in output
    rows = tables(output)
    assert list(rows) == ["build", "memory"]
    for cells in rows.values():
        assert list(cells)[:3] == BUILDS
        assert set(cells) <= {*BUILDS, "ours, gigatoken"}
        assert all(len(row) == 4 and positive(row) for row in cells.values())
        assert cells[BUILDS[0]][-1] == "1.00"


def test_reading_and_starting(tokenizer_dir):
    """A peer that fails is left out, with its reason, and the rest is measured."""
    Path("peer/megatron/core/datasets").mkdir(parents=True)
    code, output, error = bench(
        "startup", "read", "--input", corpus(200), "--tokenizer-dir", tokenizer_dir, "--megatron", "peer"
    )
    assert (code, error) == (0, "")
    assert "left out: GPTDataset, samples: exit code 1: ModuleNotFoundError: No module named 'megatron." in output
    rows = tables(output)
    assert list(rows) == ["read", "startup"]
    assert list(rows["read"]) == ["ours, windows", "ours, batches of 8", "ours, batches of 8, by document"]
    assert all(positive([row[0], row[1], row[3]]) for row in rows["read"].values())
    assert list(rows["startup"]) == ["ours, warm", "ours, cold"]
    assert "startup: 2,000 documents" in output


def test_other_tokens_are_a_fault(tokenizer_dir):
    """Builds are held to what `tokenizers` alone gives; here that is made to end documents twice."""
    Path("tools").mkdir()
    for path in (ROOT / "tools").glob("*.py"):
        source = path.read_text().replace("[*ids, tokenizer.eod_id]", "[*ids, tokenizer.eod_id, tokenizer.eod_id]")
        Path("tools", path.name).write_text(source)
    Path("megalite").symlink_to(ROOT / "megalite")
    arguments = ["build", "--input", corpus(), "--tokenizer-dir", tokenizer_dir]
    code, output, error = bench(*arguments, script=Path("tools/bench_data.py").resolve())
    assert code == 1
    assert error == f"error: ours, tokenizers wrote other tokens than {BUILDS[0]}: that is a fault of ours\n"
    assert tables(output) == {"build": {}}


@pytest.fixture
def module(monkeypatch):
    """The tool as a module, without its change of the path."""
    monkeypatch.setattr(sys, "path", sys.path[:])
    spec = importlib.util.spec_from_file_location("bench_data", ROOT / "tools/bench_data.py")
    loaded = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_data", loaded)  # where dataclasses looks for it
    spec.loader.exec_module(loaded)
    return loaded


GRANDCHILD = "import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', sys.argv[1]]))"


def test_processes_below_count(module, tmp_path):
    """Memory and CPU of what a program starts are its own. (So is the tests' memory, which may be more.)"""
    tests = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    work = "import time; b = b'1' * 700_000_000; t = time.process_time()\nwhile time.process_time() < t + 0.3: pass"
    done = module.run([sys.executable, "-c", GRANDCHILD, work], tmp_path)
    assert 700e6 / 2**20 < done.peak < max(900, tests + 100)
    assert 0.3 < done.cpu < 5
    assert done.wall > 0.3


@pytest.mark.parametrize(
    ("work", "reason"),
    [
        ("print('error: no\\n'); sys.exit(3)", "exit code 3: no"),
        ("import os, time; print(os.getpid(), flush=True); time.sleep(60)", "it was stopped after 1 s"),
    ],
)
def test_failure_and_hang(module, tmp_path, monkeypatch, work, reason):
    """A program that hangs is stopped with all that it started."""
    monkeypatch.setattr(module, "RUN_SECONDS", 1)
    with pytest.raises(module._Failed, match=f"^{reason}$"):
        module.run([sys.executable, "-c", GRANDCHILD, f"import sys; {work}"], tmp_path)
    last = (tmp_path / "output.txt").read_text().strip()
    deadline = time.monotonic() + 10
    while last.isdigit() and is_alive(int(last)):
        assert time.monotonic() < deadline


def is_alive(pid):
    """Whether a process is there, and no zombie that waits for a parent to learn of its end."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


def test_a_stop_leaves_nothing(tmp_path):
    command = [sys.executable, str(ROOT / "tools/bench_data.py"), "startup", "--scratch", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        while not list(tmp_path.glob("*/many.idx")):
            assert process.poll() is None
        process.terminate()
        assert process.wait(timeout=20) == 143
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build"], "give --input FILE.jsonl and --tokenizer-dir DIR: only startup does without"),
        (["all", "--input", "none.jsonl", "--tokenizer-dir", "t"], "none.jsonl: No such file or directory; --input"),
        (["memory", "--input", "bad.jsonl", "--tokenizer-dir", "t"], 'bad.jsonl:2: no JSON object with a key "text"'),
        (
            ["build", "--input", "bad.jsonl", "--tokenizer-dir", "t"],
            "encode_batch_fast failed: exit code 1: cannot",
        ),
        (["read", "--input", "bad.jsonl", "--tokenizer-dir", "t"], "cannot prepare the measurement: exit code 1: "),
        (["startup", "--workers", "0"], "--workers must be above 0, not 0"),
        (["startup", "--scratch", "none"], "cannot write to --scratch none: No such file or directory"),
        (["startup", "--megatron", "."], "--megatron: there is no megatron/core/datasets in "),
    ],
)
def test_bad_arguments_are_one_line(arguments, message):
    Path("bad.jsonl").write_text('{"text": "a"}\n{"no": 1}\n')
    code, _, error = bench(*arguments)
    assert code == 1
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
