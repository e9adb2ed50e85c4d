"""From text to token files: tokens, order, splits, bad arguments, failures half-way."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megalite.data.assemble import Split
from megalite.data.indexed import IndexedDataset
from megalite.data.tokenizer import EOD, Tokenizer
from megalite.errors import UserError
from tests.unit.token_files import (
    PAIR,
    build,
    documents_of,
    files_in,
    random_documents,
    refused,
    small_tasks,
    tool,
    write_jsonl,
)

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("working_folder")


@pytest.mark.parametrize("seed", range(3))
def test_what_is_read_back_is_the_tokenizer_output(tokenizer_dir, seed, monkeypatch):
    small_tasks(monkeypatch, 2000)
    first, second = random_documents(120, seed), random_documents(50, seed + 100)
    write_jsonl("a.jsonl", first)
    write_jsonl("b.jsonl", second)
    summary = build(tokenizer_dir, ["*.jsonl"])
    tokenizer = Tokenizer(tokenizer_dir)
    expected = [[*tokenizer.encode(text), tokenizer.eod_id] for text in first + second if text]
    assert documents_of("out/x") == expected
    assert [tokenizer.decode(ids[:-1]) for ids in expected] == [text for text in first + second if text]
    assert summary[0].documents == len(expected)
    assert summary[0].empty_documents == (first + second).count("")
    assert summary[0].tokens == sum(map(len, expected))
    assert summary[0].text_bytes == sum(len(text.encode()) for text in first + second)


def test_without_eod(tokenizer_dir):
    write_jsonl("a.jsonl", ["the quick", "fox"])
    build(tokenizer_dir, ["a.jsonl"], append_eod=False)
    assert documents_of("out/x") == Tokenizer(tokenizer_dir).encode_batch(["the quick", "fox"])


def test_bytes_do_not_depend_on_workers(tokenizer_dir, monkeypatch):
    small_tasks(monkeypatch, 3000)
    write_jsonl("a.jsonl", random_documents(300, 1))
    Path("b.txt").write_text("\n".join(random_documents(20, 2)), newline="")
    inputs = ["a.jsonl", "b.txt"]
    for workers in (1, 3):
        build(tokenizer_dir, inputs, f"w{workers}/x", workers=workers, split="90,10")
    names = files_in("w1")
    assert len(names) == 6
    assert names == files_in("w3")
    for name in names:
        assert Path("w1", name).read_bytes() == Path("w3", name).read_bytes()


def test_manifest_says_what_it_was_made_of(tokenizer_dir):
    Path("a.jsonl").write_text('\n{"body": "the fox"}\n  \n{"body": ""}\n{"body": "é", "text": 3}')
    summary = build(tokenizer_dir, ["a.jsonl"], json_keys=["body"])[0]
    manifest = json.loads(Path("out/x.manifest.json").read_text())

    def sha256(path):
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()

    assert manifest == {
        "version": 2,
        "tokenizer_sha256": sha256(Path(tokenizer_dir, "tokenizer.json")),
        "vocab_size": 280,
        "dtype": "uint16",
        "eod_id": 0,
        "append_eod": True,
        "options": {
            "json_key": "body",
            "split_on": "none",
            "append_eod": True,
            "split": None,
            "part": 0,
            "split_seed": None,
            "shuffle_seed": None,
            "max_documents": None,
        },
        "inputs": [{"path": "a.jsonl", "bytes": os.path.getsize("a.jsonl"), "sha256": sha256("a.jsonl")}],
        "documents": 2,
        "tokens": summary.tokens,
        "text_bytes": 9,
        "empty_documents": 1,
        "blank_lines": 2,
        "rejects": 0,
        "bin_sha256": sha256("out/x.bin"),
        "idx_sha256": sha256("out/x.idx"),
    }
    assert IndexedDataset("out/x").manifest == manifest


def test_forged_end_of_document_stays_text(tokenizer_dir):
    write_jsonl("a.jsonl", [f"fox{EOD}", EOD])
    build(tokenizer_dir, ["a.jsonl"])
    assert [ids.index(0) == len(ids) - 1 and len(ids) > 1 for ids in documents_of("out/x")] == [True, True]


@pytest.mark.parametrize(("text", "share"), [("98,2", 0.02), ("1,1", 0.5), ("0.3, 0.7", 0.7), ("999,1", 0.001)])
def test_split_keeps_its_shares_for_any_number_of_documents(text, share):
    numbers = np.arange(5000)
    chosen = Split(text, seed=3)(numbers)
    assert (np.abs(np.cumsum(chosen) - (numbers + 1) * share) <= 1).all()
    assert not np.array_equal(chosen, Split(text, seed=4)(numbers))
    assert np.array_equal(chosen[1000:1100], Split(text, seed=3)(numbers[1000:1100]))  # of its number alone


def test_split_sends_each_document_to_one_side(tokenizer_dir, monkeypatch):
    small_tasks(monkeypatch, 100)
    texts = [f"fox {number}" for number in range(200)]
    write_jsonl("a.jsonl", texts)
    summaries = build(tokenizer_dir, ["a.jsonl"], split="95,5")
    assert [each.prefix for each in summaries] == ["out/x-train", "out/x-validation"]
    tokenizer = Tokenizer(tokenizer_dir)
    sides = [[tokenizer.decode(ids[:-1]) for ids in documents_of(each.prefix)] for each in summaries]
    assert [len(side) for side in sides] == [190, 10]
    assert sorted(sides[0] + sides[1]) == sorted(texts)
    assert [text for text in texts if text in sides[0]] == sides[0]


def test_a_side_without_a_document_is_refused(tokenizer_dir):
    write_jsonl("a.jsonl", ["fox"])
    with pytest.raises(UserError, match=r"leaves out/x-(train|validation) without a document, of 1"):
        build(tokenizer_dir, ["a.jsonl"], split="1,1")
    assert files_in() == []
    write_jsonl("a.jsonl", ["fox", "quick"])
    assert [each.documents for each in build(tokenizer_dir, ["a.jsonl"], split="1,1")] == [1, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inputs": []}, "no input files"),
        ({"inputs": [""]}, "no such file"),
        ({"inputs": ["missing.jsonl"]}, "no such file"),
        ({"inputs": ["*.parquet"]}, "no file matches"),
        ({"inputs": ["sub"]}, "sub"),
        ({"inputs": ["a.csv"]}, "is none of .jsonl, .txt"),
        ({"inputs": ["-", "a.jsonl"]}, "goes with no other input"),
        ({"encoder": "fast"}, "encoder"),
        ({"on_error": "ignore"}, "on_error"),
        ({"max_documents": 0}, "max_documents"),
        ({"max_reject_fraction": 1.5}, "max_reject_fraction"),
        ({"json_keys": []}, "json_keys"),
        ({"json_keys": ["a", "a"]}, "json_keys"),
        ({"json_keys": ["a", "../b"]}, "becomes a part of a file's name"),
        ({"inputs": ["pipe.txt"]}, "not a regular file"),
        ({"workers": 0}, "workers must be at least 1"),
        ({"split_on": "page"}, "split_on"),
        ({"split": "98"}, "two positive numbers"),
        ({"split": "98,0"}, "two positive numbers"),
        ({"split": "a,b"}, "two positive numbers"),
        ({"split": "1/0,1"}, "two positive numbers"),
        ({"split": "1,2,3"}, "two positive numbers"),
        ({"split": "nan,inf"}, "two positive numbers"),
        ({"tokenizer_dir": "nowhere"}, "nowhere/tokenizer.json"),
        ({"prefix": "out/"}, "no file name"),
        ({"prefix": "a.jsonl/x"}, "cannot write a.jsonl/x"),
    ],
)
def test_bad_arguments(tokenizer_dir, options, message):
    write_jsonl("a.jsonl", ["fox"])
    Path("a.csv").write_text("x")
    os.mkdir("sub")
    os.mkfifo("pipe.txt")
    refused(message, **{"tokenizer_dir": tokenizer_dir, "inputs": ["a.jsonl"]} | options)


def test_what_exists_is_kept_unless_it_is_the_same_or_may_go(tokenizer_dir):
    write_jsonl("a.jsonl", ["fox", "quick"])
    first = build(tokenizer_dir, ["a.jsonl"])
    before = {name: (Path("out", name).read_bytes(), os.stat(f"out/{name}").st_mtime_ns) for name in PAIR}
    again = build(tokenizer_dir, ["a.jsonl"])
    assert [each.up_to_date for each in first + again] == [False, True]
    assert (again[0].tokens, again[0].documents) == (first[0].tokens, first[0].documents)
    for change, what in (
        ({"json_keys": ["body"]}, "json_key: text -> body"),
        ({"append_eod": False}, "append_eod: True -> False"),
        ({"split_on": "line"}, "split_on: none -> line"),
        ({"shuffle_seed": 1}, "shuffle_seed: None -> 1"),
    ):
        with pytest.raises(UserError, match=f"({what}.*): pass --overwrite"):
            build(tokenizer_dir, ["a.jsonl"], **change)
    write_jsonl("b.jsonl", ["fox"])
    with pytest.raises(UserError, match=r'input "b\.jsonl" is new.*--overwrite'):
        build(tokenizer_dir, ["*.jsonl"])
    write_jsonl("a.jsonl", ["fox", "brown"])  # the same size
    with pytest.raises(UserError, match=r'input "a\.jsonl" changed.*--overwrite'):
        build(tokenizer_dir, ["a.jsonl"])
    assert before == {name: (Path("out", name).read_bytes(), os.stat(f"out/{name}").st_mtime_ns) for name in PAIR}
    assert not build(tokenizer_dir, ["a.jsonl"], overwrite=True)[0].up_to_date
    assert Path("out/x.bin").read_bytes() != before["x.bin"][0]
    os.remove("out/x.manifest.json")
    with pytest.raises(UserError, match="--overwrite"):
        build(tokenizer_dir, ["a.jsonl"])


def test_demo_corpus_is_the_source_of_a_library():
    library = Path("library")
    for name, content in {
        "b.py": b"b = 1\n" * 100_000,
        "a.py": b"a = 1\r\n" * 100_000,
        "copy/a.py": b"a = 1\r\n" * 100_000,
        "short.py": b"x = 1\n",
        "latin.py": b"# \xe9\n" * 100,
        "data.txt": b"text\n" * 100,
        "site-packages/pip.py": b"p = 1\n" * 100,
    }.items():
        (library / name).parent.mkdir(parents=True, exist_ok=True)
        (library / name).write_bytes(content)
    script = str(ROOT / "tools/make_demo_corpus.py")
    program = (
        "import runpy, sys, sysconfig; sysconfig.get_path = lambda name: 'library'; "
        f"sys.argv[0] = {script!r}; runpy.run_path({script!r}, run_name='__main__')"
    )

    def run():
        return subprocess.run([sys.executable, "-c", program, "--output-dir", "demo"], capture_output=True, text=True)

    done = run()
    assert (done.returncode, done.stderr) == (0, "")
    assert "1.3 MB of text, 2 documents" in done.stdout
    rows = [json.loads(line) for line in Path("demo/corpus.jsonl").read_bytes().splitlines()]
    texts = {row["path"]: row["text"] for row in rows}
    assert texts == {"a.py": "a = 1\r\n" * 100_000, "b.py": "b = 1\n" * 100_000}
    written = os.stat("demo/corpus.jsonl").st_mtime_ns
    assert "there already" in run().stdout
    assert os.stat("demo/corpus.jsonl").st_mtime_ns == written

    os.remove("demo/corpus.jsonl")
    (library / "b.py").unlink()
    (library / "copy/a.py").write_bytes(b"x" * 199)
    failed = run()
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr.startswith("error: library has only 0.70 MB of Python source in 1 files")
    assert files_in("demo") == []


def test_command_line(tokenizer_dir):
    write_jsonl("a.jsonl", ["fox", ""])
    arguments = ["--input", "*.jsonl", "--tokenizer-dir", tokenizer_dir, "--output-prefix", "artifacts/data/train"]
    run = tool(*arguments)
    out, err = run.communicate(timeout=60)
    assert (run.returncode, err) == (0, "")
    assert "1 documents" in out
    assert "left out: 1 empty documents" in out
    assert IndexedDataset("artifacts/data/train").num_documents == 1

    Path("a.jsonl").write_text("{")
    run = tool(*arguments, "--overwrite", "--workers", "1")
    out, err = run.communicate(timeout=60)
    assert (run.returncode, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("error: a.jsonl:1: broken JSON")
    assert files_in("artifacts/data") == ["train.bin", "train.idx", "train.manifest.json"]
