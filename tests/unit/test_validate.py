"""Faults of token files, each by name: what the peers write, what damage does, what only a full read tells."""

import json
import os
import random
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from megalite.data.tokenizer import Tokenizer
from megalite.data.validate import show_documents, validate
from tests.unit import pair_files
from tests.unit.pair_files import ids, idx, random_documents

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("working_folder")
DOCUMENTS = [[[5, 6, 0]], [[7, 8], [9, 0]], [[10, 0]]]  # one of two sequences
SIZES, BOUNDS, BIN = pair_files.sizes(DOCUMENTS), pair_files.bounds(DOCUMENTS), ids(DOCUMENTS)
GOOD = idx(SIZES, BOUNDS)


def faults(prefix="x", **options):
    """Kinds; every message is one line that names a file."""
    report = validate(prefix, **options)
    for _, message in report.faults + report.warnings:
        assert "\n" not in message
        assert str(prefix) in message
    assert report.ok == (not report.faults)
    return [kind for kind, _ in report.faults]


def warnings(**options):
    return [kind for kind, _ in validate("x", **options).warnings]


@pytest.mark.parametrize("letter", ["B", "h", "H", "i", "q"])
@pytest.mark.parametrize("writer", [pair_files.megatron, pair_files.neox, pair_files.deepspeed, pair_files.ours])
def test_what_the_peers_write_is_right(writer, letter):
    for seed, chunk_bytes in ((0, 8), (1, 40), (2, 8 << 20)):
        documents = random_documents(seed)
        writer("x", documents, letter)
        report = validate("x", deep=True, chunk_bytes=chunk_bytes)
        assert (report.faults, report.readable) == (
            [("eod", report.faults[0].message)] if writer is pair_files.ours else [],
            True,
        )
        assert (report.documents, report.sequences) == (30, sum(map(len, documents)))
        assert (report.tokens, report.dtype) == (sum(pair_files.sizes(documents)), pair_files.NAMES[letter])
        assert report.writer.startswith("MegaLite" if writer is pair_files.ours else "Megatron-LM, gpt-neox")


@pytest.mark.parametrize(
    ("idx_bytes", "bin_bytes", "kind", "message"),
    [
        (b"", BIN, "not-an-index", "is empty"),
        (GOOD[:33], BIN, "truncated-idx", "less than its header"),
        (GOOD[:-1], BIN, "truncated-idx", "in its document bounds"),
        (GOOD[:70], BIN, "truncated-idx", "in its pointers"),
        (GOOD[:40], BIN, "truncated-idx", "in its lengths"),
        (GOOD + b"\0", BIN, "trailing-idx", "bytes were added"),
        (GOOD + GOOD, BIN, "two-indexes", "a second index from byte 114 on"),
        (b"TNTIDX\0\0" + GOOD[8:], BIN, "old-format", "fairseq"),
        (b"PK\3\4" + GOOD, BIN, "not-an-index", "MMIDIDX"),
        (GOOD[:9] + struct.pack("<Q", 2) + GOOD[17:], BIN, "version", "version 2"),
        (GOOD[:17] + b"\x09" + GOOD[18:], BIN, "dtype", "code 9"),
        (GOOD[:17] + b"\x04" + GOOD[18:], BIN + BIN, "dtype", "says int32, but its pointers are those of tokens of 2"),
        (GOOD[:18] + struct.pack("<Q", 2**63) + GOOD[26:], BIN, "truncated-idx", "9,223,372,036,854,775,808 sequences"),
        (GOOD[:26] + struct.pack("<Q", 2**64 - 1) + GOOD[34:], BIN, "truncated-idx", "in its document bounds"),
        (idx([3, -2, 2, 2], BOUNDS), BIN, "negative-length", "sequence 1 has the length -2"),
        (
            GOOD[:58] + struct.pack("<q", 8) + GOOD[66:],
            BIN,
            "pointers",
            "sequence 1 begins at byte 8 by its pointer, but",
        ),
        (GOOD[:66] + struct.pack("<qq", 0, 4) + GOOD[82:], BIN, "two-indexes", "begin again at 0 at sequence 2"),
        (idx(SIZES, [0]), BIN, "no-document-bounds", "gpt-neox"),
        (idx(SIZES, []), BIN, "bounds", "end at sequence 0, but it has 4"),
        (idx(SIZES, [0, 1, 3]), BIN, "bounds", "end at sequence 3, but it has 4"),
        (idx(SIZES, [1, 2, 4]), BIN, "bounds", "begins at sequence 1, not 0"),
        (idx(SIZES, [0, 3, 1, 4]), BIN, "bounds", "document 2 begins before"),
        (idx(SIZES, [0, -(2**63), 4]), BIN, "bounds", "document 1 begins before"),
        (GOOD, BIN[:17], "truncated-bin", "document 2 (from 0) of 3 is the first"),
        (GOOD, BIN[:12], "truncated-bin", "document 1 (from 0) of 3 is the first"),
        (GOOD, b"", "truncated-bin", "document 0 (from 0) of 3 is the first"),
        (GOOD, BIN + b"\0", "trailing-bin", "has 19 bytes, but x.idx describes 18"),
        (GOOD, BIN + b"\1\0" * 3, "trailing-bin", "another run"),  # as many as documents, but they don't stand there
    ],
)
@pytest.mark.parametrize("chunk_bytes", [8, 8 << 20])
def test_each_fault_has_its_name(idx_bytes, bin_bytes, kind, message, chunk_bytes):
    pair_files.write("x", idx_bytes, bin_bytes)
    assert faults(deep=True, chunk_bytes=chunk_bytes) == [kind]
    assert message in validate("x").faults[0].message


def test_the_eod_that_deepspeed_leaves_out():
    documents = [*DOCUMENTS, []]
    pair_files.deepspeed("x", documents, eod=42)
    assert Path("x.bin").stat().st_size == 2 * (9 + 3)
    report = validate("x")
    assert [each.kind for each in report.faults] == ["eod-left-out"]
    assert "3 documents, the end token 42" in report.faults[0].message
    assert "Megatron-DeepSpeed" in report.writer
    sentences = [[[1, 2]], [[3], [4, 5]]]  # and one after each sequence
    ended = [[[1, 2, 9]], [[3, 9], [4, 5, 9]]]
    pair_files.write("x", idx(pair_files.sizes(sentences), pair_files.bounds(sentences)), ids(ended))
    assert "3 sequences, the end token 9" in validate("x").faults[0].message


@pytest.mark.parametrize(
    ("writer", "letter", "name"),
    [
        (pair_files.neox, "f", "as gpt-neox writes floats of 32 bits"),
        (pair_files.neox, "d", "as gpt-neox writes floats of 64 bits"),
        (pair_files.megatron, "f", "as Megatron-LM writes floats of 32 bits"),
        (pair_files.megatron, "d", "as Megatron-LM writes floats of 64 bits"),
    ],
)
def test_floats_are_told_apart_by_their_size(writer, letter, name):
    writer("x", DOCUMENTS, letter=letter)
    assert faults() == ["float"]
    assert name in validate("x").faults[0].message
    Path("x.bin").write_bytes(b"abc")
    assert "a float" in validate("x").faults[0].message


def test_multimodal_data_and_merged_neox_data():
    pair_files.megatron("x", DOCUMENTS, modes=[0, 1, 0, 0])
    assert faults() == ["multimodal"]
    pair_files.neox_merged("x", DOCUMENTS)
    assert faults() == ["no-document-bounds"]
    assert "gpt-neox" in validate("x").writer


def test_what_is_odd_but_readable_is_a_warning():
    pair_files.megatron("x", [[[5, 0]], [], [[], [3, 4]]])
    assert faults() == []
    assert warnings() == ["empty-sequences", "empty-documents", "several-sequences"]
    pair_files.megatron("x", [])
    report = validate("x", deep=True)
    assert (report.ok, report.tokens, report.documents, report.deep["lowest_id"]) == (True, 0, 0, None)


@pytest.mark.parametrize("name", ["x.idx", "x.bin"])
def test_missing_files(name):
    pair_files.megatron("x", DOCUMENTS)
    os.remove(name)
    assert faults() == ["missing"]
    os.mkdir(name)
    assert faults() == ["missing"]
    os.rmdir(name)
    os.mkfifo(name)  # would block whoever opens it
    assert faults() == ["missing"]
    os.mkdir("folder")
    assert "is a directory" in validate("folder").faults[0].message


@pytest.mark.parametrize(
    ("content", "kinds"),
    [
        ("{", ["manifest"]),
        ("[" * 100_000, ["manifest"]),
        ("[]", ["manifest"]),
        ("{}", ["manifest"] * 3),
        ({"tokens": 8}, ["manifest"]),
        ({"documents": "3"}, ["manifest"]),
        ({"dtype": "int32"}, ["manifest"]),
        ({"bin_sha256": 3}, ["manifest"]),
        ({"eod_id": "0"}, ["manifest"]),
        ({"vocab_size": -1}, ["manifest"]),
        ({}, []),
    ],
)
def test_the_manifest_must_fit(content, kinds):
    pair_files.ours("x", DOCUMENTS, **(content if isinstance(content, dict) else {}))
    if isinstance(content, str):
        Path("x.manifest.json").write_text(content)
    assert faults() == kinds


def test_no_changed_byte_goes_unnoticed_in_full():
    pair_files.ours("x", DOCUMENTS)
    assert faults(deep=True) == []
    rng = random.Random(0)
    for name in ("x.idx", "x.bin"):
        content = Path(name).read_bytes()
        for i in range(len(content)):
            Path(name).write_bytes(content[:i] + bytes([content[i] ^ rng.randrange(1, 256)]) + content[i + 1 :])
            assert faults(deep=True), f"byte {i} of {name}"
        Path(name).write_bytes(content)
    assert faults(deep=True) == []


def test_hostile_files_cost_a_line_and_no_memory():
    rng = random.Random(1)
    tracemalloc.start()
    for _ in range(300):
        sequences, documents = (rng.choice([0, 1, 2, 2**31, 2**62, rng.randrange(20)]) for _ in range(2))
        header = struct.pack("<9sQBQQ", b"MMIDIDX", 1, rng.choice([1, 4, 5, 6, 8]), sequences, documents)
        size = 12 * sequences + 8 * documents if sequences + documents < 100 else rng.randrange(200)
        numbers = [rng.choice([0, 1, 2, -1, 2**31 - 1, -(2**31), rng.randrange(9)]) for _ in range(size // 4)]
        pair_files.write("x", header + struct.pack(f"<{len(numbers)}i", *numbers), rng.randbytes(rng.randrange(40)))
        Path("x.manifest.json").write_bytes(rng.choice([b"{}", b"\xff", b'{"tokens": 1e999}', b"9" * 9999]))
        assert validate("x", deep=True).faults
    with open("x.idx", "wb") as file:  # sparse: next to nothing on disk, 20 MB by its size
        file.write(struct.pack("<9sQBQQ", b"MMIDIDX", 1, 8, 10**6, 10**6 + 1))
        file.truncate(34 + 20 * 10**6 + 8)
    os.remove("x.manifest.json")
    assert faults(chunk_bytes=1 << 16) == ["bounds"]
    assert tracemalloc.get_traced_memory()[1] < 4e6
    tracemalloc.stop()


@pytest.mark.parametrize("chunk_bytes", [8, 24, 8 << 20])
@pytest.mark.parametrize("seed", range(3))
def test_what_a_full_read_counts(seed, chunk_bytes):
    documents = random_documents(seed)
    pair_files.megatron("x", documents)
    whole = [[token for sequence in document for token in sequence] for document in documents]
    filled = [tokens for tokens in whole if tokens]
    ended = sum(tokens[-1] == 0 for tokens in filled)
    report = validate("x", deep=True, vocab_size=40, eod_id=0, chunk_bytes=chunk_bytes)
    assert report.deep == {
        "bin_sha256": pair_files.sha256("x.bin"),
        "idx_sha256": pair_files.sha256("x.idx"),
        "vocab_size": 40,
        "lowest_id": min(map(min, filled)),
        "highest_id": max(map(max, filled)),
        "ids_outside": sum(token >= 40 for tokens in filled for token in tokens),
        "eod_id": 0,
        "documents_with_tokens": len(filled),
        "documents_ending_in_eod": ended,
        "eod_inside_documents": sum(tokens.count(0) for tokens in filled) - ended,
        "same_last_id": None,
    }
    document, place = next((d, t) for d, tokens in enumerate(whole) for t, token in enumerate(tokens) if token >= 40)
    assert f"token {place} of document {document} is {whole[document][place]}, not below" in report.faults[0].message
    without = next(d for d, tokens in enumerate(whole) if tokens and tokens[-1])
    found = {each.kind: each.message for each in report.warnings}
    assert f"{ended} of {len(filled)} documents end in the EOD 0, document {without} is the first" in found["eod"]
    assert ("eod-inside" in found) == (report.deep["eod_inside_documents"] > 0)


def test_negative_ids_and_a_vocabulary_that_does_not_fit():
    pair_files.megatron("x", [[[5, -3, 0]]], letter="i")
    report = validate("x", deep=True)
    assert [each.kind for each in report.faults] == ["vocabulary"]
    assert "token 1 of document 0 is -3, negative (1 such in all)" in report.faults[0].message
    pair_files.megatron("x", DOCUMENTS, letter="H")
    assert faults(deep=True, vocab_size=100_000, eod_id=99_999) == []
    assert warnings(deep=True, vocab_size=100_000) == ["several-sequences", "dtype"]


def test_endings_count_against_what_the_manifest_says():
    pair_files.ours("x", [[[5, 0]], [[0, 7]]])
    assert faults() == []
    assert faults(deep=True) == ["eod"]
    pair_files.ours("x", [[[5, 0]], [[0, 7]]], append_eod=False)
    assert (faults(deep=True), warnings(deep=True)) == ([], ["eod", "eod-inside"])
    pair_files.ours("x", [[[5, 3]], [[1, 3]]], append_eod=False, eod_id=None)
    assert (faults(deep=True), warnings(deep=True)) == ([], [])
    assert validate("x", deep=True).deep["same_last_id"] == 3
    pair_files.ours("x", [[[5, 3]], [[59, 60]]], append_eod=False)  # the vocabulary is 60
    assert faults(deep=True) == ["vocabulary"]


def test_another_tokenizer_is_noticed(tokenizer_dir):
    tokenizer = Tokenizer(tokenizer_dir)
    pair_files.ours("x", DOCUMENTS, tokenizer_sha256=tokenizer.sha256)
    assert faults(deep=True, tokenizer=tokenizer) == []
    assert validate("x", deep=True, tokenizer=tokenizer).deep["vocab_size"] == tokenizer.vocab_size
    pair_files.ours("x", DOCUMENTS)
    assert faults(tokenizer=tokenizer) == ["tokenizer"]


def test_documents_are_shown_safely(tokenizer_dir):
    tokenizer = Tokenizer(tokenizer_dir)
    evil = "\x1b]0;owned\x07\r\n\u202eabc\u200b é日"
    documents = [[tokenizer.encode(f"fox {number}")] for number in range(20)]
    documents[0], documents[1] = [tokenizer.encode(evil)], [tokenizer.encode("the quick " * 400)]
    documents[2], documents[3] = [[5, 60_000, 6]], []
    pair_files.megatron("x", documents)
    shown = show_documents(validate("x"), tokenizer, 4)
    assert [each.document for each in shown] == [0, 1, 2, 3, 4, 8, 12, 16]
    assert shown[0].text == "\\x1b]0;owned\\x07\\r\\n\\u202eabc\\u200b é日"
    assert shown[1].text.endswith(" ...")
    assert len(shown[1].text) <= 504
    assert shown[1].tokens == len(documents[1][0])
    assert "<id 60000>" in shown[2].text
    assert (shown[3].tokens, shown[3].text) == (0, "")
    assert shown[-1].text == "fox 16"
    assert len(show_documents(validate("x"), tokenizer, 50)) == 20


def test_memory_does_not_follow_the_number_of_documents():
    count = 300_000
    lengths = np.ones(count, "<i4")
    header = struct.pack("<9sQBQQ", b"MMIDIDX", 1, 8, count, count + 1)
    bounds = np.arange(count + 1, dtype="<i8").tobytes()
    pair_files.write(
        "x", header + lengths.tobytes() + (np.arange(count) * 2).astype("<i8").tobytes() + bounds, bytes(2 * count)
    )
    tracemalloc.start()
    assert faults(deep=True, eod_id=1, vocab_size=0, chunk_bytes=1 << 14) == []
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e6  # the index has 6


def tool(*arguments, **environment):
    command = [sys.executable, str(ROOT / "tools/validate_data.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ | environment)


def test_command_line(tokenizer_dir):
    tokenizer = Tokenizer(tokenizer_dir)
    pair_files.ours("part-1", [[[*tokenizer.encode("fox é"), 0]]], tokenizer_sha256=tokenizer.sha256, vocab_size=280)
    pair_files.megatron("part-2", DOCUMENTS)
    done = tool("part-*", "--deep", "--show", 1, "--tokenizer-dir", tokenizer_dir, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert "part-1: ok; uint16, 1 documents" in done.stdout
    assert "1 of 1 end in EOD 0" in done.stdout
    assert "fox \\xe9<|endoftext|>" in done.stdout

    Path("part-2.bin").write_bytes(BIN[:-1])
    done = tool("part-1", "part-2.idx", "missing", "--json", "--show", 2, "--tokenizer-dir", tokenizer_dir)
    assert (done.returncode, done.stderr) == (1, "")
    result = json.loads(done.stdout)
    assert result["ok"] is False
    assert [each["ok"] for each in result["prefixes"]] == [True, False, False]
    first, second, third = result["prefixes"]
    assert (first["manifest"], first["dtype"], first["tokens"], first["deep"]) == (
        True,
        "uint16",
        len(tokenizer.encode("fox é")) + 1,
        None,
    )
    assert first["show"][0]["text"] == "fox é<|endoftext|>"
    assert [fault["kind"] for fault in second["faults"] + third["faults"]] == ["truncated-bin", "missing"]
    done = tool("part-2", "missing")
    assert (done.returncode, done.stderr) == (1, "")
    assert "fault (truncated-bin): part-2.bin has 17 bytes" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing-*"], 'no .idx file matches "nothing-*"'),
        (["x", "--show", "1"], "--show needs --tokenizer-dir"),
        (["x", "--vocab-size", "0"], "at least 1"),
        (["x", "--tokenizer-dir", "nowhere"], "cannot read nowhere/tokenizer.json"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message):
    done = tool(*arguments, "--json")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert message in done.stderr
