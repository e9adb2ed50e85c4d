"""Builds whose inputs, leftovers and surroundings are against them."""

import json
import os
import resource
import signal
from pathlib import Path

import pytest

from megalite.data import tokenize, workers
from megalite.data.tokenizer import Tokenizer
from megalite.errors import UserError
from tests.unit.token_files import PAIR, build, documents_of, files_in, random_documents, small_tasks, tool, write_jsonl

pytestmark = pytest.mark.usefixtures("working_folder")


@pytest.fixture
def after_task(monkeypatch):
    """Have something happen once the first task is done: after_task(action)."""
    small_tasks(monkeypatch, 1000)
    whole = workers.run_tasks

    def install(action):
        def watched(*arguments):
            for number, entry in enumerate(whole(*arguments)):
                yield entry
                if number == 0:
                    action()

        monkeypatch.setattr(tokenize, "run_tasks", watched)

    install.off = lambda: monkeypatch.setattr(tokenize, "run_tasks", whole)
    return install


def stop():
    raise KeyboardInterrupt


def edit(path, change):
    """Change a file's content, and keep its time: only hashes can tell."""
    status = os.stat(path)
    content = change(Path(path).read_bytes())
    assert content != Path(path).read_bytes()
    Path(path).write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize(
    "change", [lambda raw: raw[: raw.index(b"\n", len(raw) // 2) + 1], lambda raw: raw + b'{"text": "fox"}\n']
)
def test_an_input_that_changes_while_it_is_read(tokenizer_dir, after_task, change):
    write_jsonl("a.jsonl", random_documents(60, 1))
    after_task(lambda: Path("a.jsonl").write_bytes(change(Path("a.jsonl").read_bytes())))
    with pytest.raises(UserError, match=r"a\.jsonl changed while it was read"):
        build(tokenizer_dir, ["a.jsonl"])
    assert not set(PAIR) & set(files_in())


def test_another_end_of_document_is_noticed(tokenizer_dir, tmp_path, after_task):
    content = json.loads(Path(tokenizer_dir, "tokenizer.json").read_text())
    content["added_tokens"] = []
    del content["model"]["vocab"]["<|endoftext|>"]
    content["model"]["vocab"] |= {"<|a|>": 300, "<|b|>": 301}
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|a|>"}')
    write_jsonl("a.jsonl", random_documents(60, 1))
    after_task(stop)
    with pytest.raises(KeyboardInterrupt):
        build(folder, ["a.jsonl"])
    after_task.off()
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|b|>"}')
    with pytest.raises(UserError, match="eod_id: 300 -> 301"):
        build(folder, ["a.jsonl"])


@pytest.mark.parametrize("split_on", ["none", "blank"])
def test_a_change_where_two_tasks_meet_is_noticed(tokenizer_dir, after_task, split_on):
    """The first task ends inside a document, whose rest lies in the second's bytes."""
    name = "a.jsonl" if split_on == "none" else "a.txt"
    row = b'{"text": "%s"}\n' if split_on == "none" else b"%s\n\n"
    Path(name).write_bytes(row % (b"fox " * 300) + row % (b"the " * 100))
    after_task(stop)
    with pytest.raises(KeyboardInterrupt):
        build(tokenizer_dir, [name], split_on=split_on)
    after_task.off()
    edit(name, lambda raw: raw[:1100] + b"dog" + raw[1103:])
    with pytest.raises(UserError, match=f'input "{name}" changed'):
        build(tokenizer_dir, [name], split_on=split_on)


def test_of_a_limited_build_a_change_in_what_was_read_is_noticed(tokenizer_dir, monkeypatch):
    small_tasks(monkeypatch, 1000)
    write_jsonl("a.jsonl", [f"fox {number} " * 10 for number in range(100)])
    write_jsonl("b.jsonl", ["fox"])
    build(tokenizer_dir, ["*.jsonl"], max_documents=10)
    assert build(tokenizer_dir, ["*.jsonl"], max_documents=10)[0].up_to_date
    edit("a.jsonl", lambda raw: raw[:-5] + b"  }]\n")
    assert build(tokenizer_dir, ["*.jsonl"], max_documents=10)[0].up_to_date
    edit("a.jsonl", lambda raw: raw.replace(b"fox 3", b"dog 3", 1))
    with pytest.raises(UserError, match=r'input "a\.jsonl" changed'):
        build(tokenizer_dir, ["*.jsonl"], max_documents=10)


@pytest.mark.parametrize("count", [1, 7, 12, 30, 31])
def test_a_limited_build_takes_the_first_documents_whatever_is_behind(tokenizer_dir, monkeypatch, count):
    small_tasks(monkeypatch, 300)
    texts = [f"fox {number} " * 3 for number in range(31)]
    write_jsonl("a.jsonl", texts)
    with open("a.jsonl", "a") as file:
        file.write("{\n" * 5)
    Path("b.parquet").write_text("no parquet")
    tokenizer = Tokenizer(tokenizer_dir)
    for number in (1, 3):
        build(tokenizer_dir, ["a.jsonl", "b.parquet"], f"out/{number}", max_documents=count, workers=number)
        assert documents_of(f"out/{number}") == [[*tokenizer.encode(text), 0] for text in texts[:count]]
    with pytest.raises(UserError, match=r"a\.jsonl:32: broken JSON"):
        build(tokenizer_dir, ["a.jsonl", "b.parquet"], max_documents=32)
    options = {"on_error": "skip", "max_reject_fraction": 0.5}
    with pytest.raises(UserError, match=r"cannot read b\.parquet"):
        build(tokenizer_dir, ["a.jsonl", "b.parquet"], max_documents=32, **options)


def test_a_folder_that_is_not_ours_is_left_alone(tokenizer_dir):
    write_jsonl("a.jsonl", ["fox"])
    Path("out/x.building/plans").mkdir(parents=True)
    Path("out/x.building/plans/a.txt").write_text("x")
    with pytest.raises(UserError, match=r"out/x\.building is not of a build"):
        build(tokenizer_dir, ["a.jsonl"])
    assert Path("out/x.building/plans/a.txt").read_text() == "x"


def test_what_is_up_to_date_leaves_another_builds_work(tokenizer_dir, after_task):
    write_jsonl("a.jsonl", random_documents(60, 1))
    build(tokenizer_dir, ["a.jsonl"])
    after_task(stop)
    with pytest.raises(KeyboardInterrupt):
        build(tokenizer_dir, ["a.jsonl"], append_eod=False, overwrite=True)
    after_task.off()
    before = sorted(os.listdir("out/x.building"))
    assert build(tokenizer_dir, ["a.jsonl"])[0].up_to_date
    assert sorted(os.listdir("out/x.building")) == before
    assert len(before) > 3


@pytest.mark.parametrize(
    "line",
    [
        "[1]",
        '{"task": [1]}',
        '{"task": "../../x", "shards": []}',
        '{"task": 0, "shards": 3}',
        '{"task": 0}',
        "{",
        "9" * 9999,
    ],
)
def test_a_hostile_journal_is_no_journal(tokenizer_dir, after_task, line):
    write_jsonl("a.jsonl", random_documents(60, 1))
    after_task(stop)
    with pytest.raises(KeyboardInterrupt):
        build(tokenizer_dir, ["a.jsonl"])
    after_task.off()
    with open("out/x.building/journal", "a") as file:
        file.write(line + "\n")
    build(tokenizer_dir, ["a.jsonl"])
    assert files_in() == PAIR


@pytest.mark.parametrize("inputs", ["abc", [1], {"a": 1}, [{"sha256": None}], [{"path": [1]}], None])
def test_a_hostile_manifest_is_one_line(tokenizer_dir, inputs):
    write_jsonl("a.jsonl", ["fox"])
    build(tokenizer_dir, ["a.jsonl"])
    path = Path("out/x.manifest.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"inputs": inputs}))
    with pytest.raises(UserError, match="--overwrite"):
        build(tokenizer_dir, ["a.jsonl"])


def test_rejects_name_their_lines_over_many_parts(tokenizer_dir, monkeypatch):
    small_tasks(monkeypatch, 700)
    rows, bad = [], {}
    for number in range(1, 400):
        if number % 7 == 0:
            rows.append(b"{" if number % 2 else b'{"text": "\xff%d"}' % number)
            bad[number] = rows[-1]
        else:
            rows.append(b'{"text": "fox %d"}' % number)
    Path("a.jsonl").write_bytes(b"\r\n".join(rows))
    for count in (1, 2):
        options = {"on_error": "skip", "max_reject_fraction": 57 / 399, "workers": count}
        assert build(tokenizer_dir, ["a.jsonl"], f"out{count}/x", **options)[0].rejects == len(bad) == 57
    found = [json.loads(line) for line in Path("out1/x.rejects.jsonl").read_text().splitlines()]
    assert {row["line"]: row["raw"].encode("utf-8", "surrogateescape") for row in found} == bad
    assert {row["file"] for row in found} == {"a.jsonl"}
    assert Path("out1/x.rejects.jsonl").read_bytes() == Path("out2/x.rejects.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"57 of 399 documents can't be read.*a\.jsonl:7: broken JSON"):
        build(tokenizer_dir, ["a.jsonl"], on_error="skip", max_reject_fraction=0.14)


def test_far_too_many_rejects_end_a_build_early(tokenizer_dir, monkeypatch):
    small_tasks(monkeypatch, 10_000)
    Path("a.jsonl").write_text('{"txt": "fox"}\n' * 100_000)
    with pytest.raises(UserError, match=r"of [12],\d\d\d documents can't be read, .*; one of them: a\.jsonl:1: no key"):
        build(tokenizer_dir, ["a.jsonl"], on_error="skip")


def test_an_encoder_that_does_not_suit_is_said_by_workers_too(tokenizer_dir, tmp_path):
    content = json.loads(Path(tokenizer_dir, "tokenizer.json").read_text()) | {"normalizer": {"type": "NFC"}}
    folder = tmp_path / "nfc"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(content))
    write_jsonl("a.jsonl", ["fox"])
    run = tool("--input", "a.jsonl", "--tokenizer-dir", folder, "--output-prefix", "out/x", "--encoder", "memo")
    _, err = run.communicate(timeout=60)
    assert (run.returncode, err.count("\n")) == (1, 1), err
    assert "--encoder memo can't be used: it does not suit this tokenizer: it has a normalizer" in err


def test_shuffling_with_few_open_files(tokenizer_dir, monkeypatch):
    small_tasks(monkeypatch, 300)
    write_jsonl("a.jsonl", random_documents(300, 1))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    build(tokenizer_dir, ["a.jsonl"], "whole/x", shuffle_seed=1)
    resource.setrlimit(resource.RLIMIT_NOFILE, (60, hard))
    try:
        build(tokenizer_dir, ["a.jsonl"], shuffle_seed=1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert Path("out/x.bin").read_bytes() == Path("whole/x.bin").read_bytes()
    monkeypatch.setattr(resource, "getrlimit", lambda _: (60, 70))
    with pytest.raises(UserError, match=r"shuffling needs .* open files, but at most 70 are allowed"):
        build(tokenizer_dir, ["a.jsonl"], "few/x", shuffle_seed=1)


def test_a_shuffled_build_is_a_permutation(tokenizer_dir, monkeypatch):
    small_tasks(monkeypatch, 500)
    texts = [f"fox {number}" for number in range(300)]
    write_jsonl("a.jsonl", texts)
    build(tokenizer_dir, ["a.jsonl"], "a/x", shuffle_seed=1, split="9,1", encoder="memo")
    build(tokenizer_dir, ["a.jsonl"], "b/x", shuffle_seed=2)
    build(tokenizer_dir, ["a.jsonl"], "c/x", split="9,1")
    tokenizer = Tokenizer(tokenizer_dir)
    sides = {
        folder: [
            [tokenizer.decode(ids[:-1]) for ids in documents_of(f"{folder}/x-{part}")]
            for part in ("train", "validation")
        ]
        for folder in "ac"
    }
    assert [sorted(side) for side in sides["a"]] == [sorted(side) for side in sides["c"]]
    assert sides["a"][0] != sides["c"][0]
    other = [tokenizer.decode(ids[:-1]) for ids in documents_of("b/x")]
    assert sorted(other) == sorted(texts)
    moved = sum(abs(place - texts.index(text)) for place, text in enumerate(other)) / 300
    assert 75 < moved < 125  # a random order moves each by a third of the length


def test_several_keys_make_several_data_sets(tokenizer_dir, monkeypatch):
    small_tasks(monkeypatch, 500)
    rows = [{"a": f"fox {number}", "b": "the " * (number % 3)} for number in range(100)]
    Path("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summaries = build(tokenizer_dir, ["a.jsonl"], json_keys=["a", "b"], split="4,1", shuffle_seed=3)
    assert [each.prefix for each in summaries] == [
        f"out/x-{key}-{part}" for key in "ab" for part in ("train", "validation")
    ]
    assert [each.empty_documents for each in summaries] == [0, 0, 34, 34]
    tokenizer = Tokenizer(tokenizer_dir)
    order = [tokenizer.decode(ids[:-1]) for ids in documents_of("out/x-a-train")]
    others = [tokenizer.decode(ids[:-1]) for ids in documents_of("out/x-b-train")]
    texts = {row["a"]: row["b"] for row in rows}
    assert others == [texts[text] for text in order if texts[text]]  # the same order, the same side


def test_standard_input(tokenizer_dir):
    write_jsonl("a.jsonl", random_documents(50, 1))
    build(tokenizer_dir, ["a.jsonl"], "whole/x")
    arguments = ["--tokenizer-dir", tokenizer_dir, "--output-prefix", "out/x", "--input", "-"]
    for state in ("wrote in", "up to date"):
        with open("a.jsonl") as file:
            run = tool(*arguments, stdin=file)
            out, err = run.communicate(timeout=60)
        assert (run.returncode, err) == (0, "")
        assert state in out
    assert files_in() == PAIR
    assert Path("out/x.bin").read_bytes() == Path("whole/x.bin").read_bytes()
    assert json.loads(Path("out/x.manifest.json").read_text())["inputs"][0]["path"] == "<stdin>"
    Path("bad.jsonl").write_text('{"text": "fox"}\n{\n')
    with open("bad.jsonl") as file:
        run = tool(*arguments, "--overwrite", stdin=file)
        _, err = run.communicate(timeout=60)
    assert (run.returncode, err.count("\n")) == (1, 1)
    assert err.startswith("error: <stdin>:2: broken JSON")
    assert files_in() == PAIR


def test_a_reader_that_has_seen_enough(tokenizer_dir):
    write_jsonl("a.jsonl", ["fox"])
    run = tool("--tokenizer-dir", tokenizer_dir, "--output-prefix", "out/x", "--input", "a.jsonl")
    run.stdout.close()
    assert run.stderr.read() == ""
    assert run.wait(timeout=60) == 128 + signal.SIGPIPE
    assert files_in() == PAIR


def test_a_prefix_that_cannot_be(tokenizer_dir):
    write_jsonl("a.jsonl", ["fox"])
    with pytest.raises(UserError, match=r"cannot write /proc/x\.building"):
        build(tokenizer_dir, ["a.jsonl"], "/proc/x")
    with pytest.raises(UserError, match="less than one in a million"):
        build(tokenizer_dir, ["a.jsonl"], split="10000000,1")
