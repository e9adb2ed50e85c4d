"""Files to read documents from: parquet, compressed ones that break off, unreadable ones, and text to train on."""

import json
import os
import random
import tracemalloc
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from megalite.data import documents
from megalite.data.documents import Part, PartReader, Piece, Reject, first_line, read_pieces
from megalite.data.inputs import InputFile
from megalite.errors import UserError
from tests.unit.part_files import GOOD, cut_anywhere, read, store, whole

pytestmark = pytest.mark.usefixtures("working_folder")


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("split_on", ["none", "line", "blank"])
@pytest.mark.parametrize("format", ["jsonl", "txt"])
def test_a_file_that_breaks_off_gives_what_is_before(suffix, split_on, format):
    name = f"a.{format}{suffix}"
    rng = random.Random(7)
    rows = [json.dumps({"text": str(rng.random())}).encode() + b"\n" * (1 + i % 2) for i in range(4000)]
    store(name, b"".join(rows))
    packed = Path(name).read_bytes()
    everything = read(name, None, split_on=split_on)[0]
    for size in [0, 1, 5, *rng.choices(range(len(packed)), k=10), len(packed) - 1]:
        found, reader = read(name, packed[:size], split_on=split_on, cut=cut_anywhere)
        bad = found.pop()
        assert isinstance(bad, Reject)
        assert bad.reason.startswith(f"truncated or corrupt {'gzip' if suffix == '.gz' else 'zstd'} (")
        assert bad.line == reader.lines + 1
        if format == "txt" and split_on == "none":
            assert not any(each.last for each in found)
        else:
            assert found == everything[: len(found)]
    if (format, split_on) != ("txt", "none") and suffix == ".gz":
        assert len(found) > 0.97 * len(everything)
    assert read(name, b"no such thing\n", split_on=split_on)[0][0].line == 1


@pytest.mark.parametrize("kind", ["string", "large_string", "dictionary"])
def test_rows_of_a_parquet(kind):
    strings = pyarrow.array(["é" * i if i % 7 else None for i in range(300)])
    column = strings.dictionary_encode() if kind == "dictionary" else strings.cast(kind)
    table = pyarrow.table({"n": list(range(300)), "b": ["x"] * 200 + [None] + ["y"] * 99, "text": column})
    parquet.write_table(table, "a.parquet", row_group_size=130)
    found, reader = read("a.parquet", None)
    assert found[0] == Reject(1, 'the value of "text" is null', b"")
    assert found[8] == Piece(9, 8, ("é" * 8,), True)
    assert [each.line for each in found] == list(range(1, 301))
    assert sum(isinstance(each, Reject) for each in found) == 43
    assert (reader.lines, reader.blank_lines) == (300, 0)
    assert first_line(whole("a.parquet"), 9, "none") == 9
    found, _ = read("a.parquet", None, json_keys=("b", "text"))
    assert found[199:202] == [
        Piece(200, 199, ("x", "é" * 199), True),
        Reject(201, 'the value of "b" is null', b""),
        Piece(202, 201, ("y", "é" * 201), True),
    ]


def test_text_of_a_parquet_that_is_no_utf8():
    offsets = pyarrow.array([0, 1, 2, 3], pyarrow.int32()).buffers()[1]
    column = pyarrow.Array.from_buffers(pyarrow.string(), 3, [None, offsets, pyarrow.py_buffer(b"a\xffb")])
    parquet.write_table(pyarrow.table({"text": column}), "a.parquet")
    found, _ = read("a.parquet", None)
    assert found == [
        Piece(1, 0, ("a",), True),
        Reject(2, "invalid UTF-8 (invalid start byte)", b""),
        Piece(3, 2, ("b",), True),
    ]


def test_memory_is_bounded_whatever_the_row_groups_of_a_parquet():
    rng = random.Random(8)
    table = pyarrow.table({"text": [rng.randbytes(3000).hex() for _ in range(6000)]})
    parquet.write_table(table, "a.parquet", use_dictionary=False, row_group_size=6000)
    assert os.path.getsize("a.parquet") > 17_000_000
    tracemalloc.start()  # sees what is read; pyarrow's own pool holds what is decoded
    before = pyarrow.total_allocated_bytes()
    try:
        held = max(pyarrow.total_allocated_bytes() - before for _ in PartReader(whole("a.parquet")))
        assert tracemalloc.get_traced_memory()[1] < 12_000_000
    finally:
        tracemalloc.stop()
    assert 0 < held < 12_000_000


def test_an_empty_parquet_has_no_rows():
    parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), "a.parquet")
    assert read("a.parquet", None)[0] == []


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ({"body": ["x"], "n": [1]}, "a.parquet: no column \"text\" (its columns: 'body', 'n'); say which"),
        ({"text": [1]}, 'a.parquet: column "text" is not text but int64'),
        ({"text": [b"x"]}, 'a.parquet: column "text" is not text but binary'),
        ({"text": [["x"]]}, 'a.parquet: column "text" is not text but list<'),
        ({"text": [{"text": "x"}]}, 'a.parquet: column "text" is not text but struct<'),
        ({"text": [None]}, 'a.parquet: column "text" is not text but null'),
        (b"", "cannot read a.parquet: "),
        (b"PAR1 no such thing PAR1", "cannot read a.parquet: "),
        (None, "cannot read a.parquet: "),
        ("gone", "cannot read a.parquet: No such file or directory"),
    ],
)
def test_a_parquet_without_text_is_refused(column, message):
    parquet.write_table(pyarrow.table(column if isinstance(column, dict) else {"text": ["fox"] * 99}), "a.parquet")
    size = os.path.getsize("a.parquet")
    if isinstance(column, bytes):
        Path("a.parquet").write_bytes(column)
    elif column == "gone":
        os.remove("a.parquet")
    elif column is None:  # damage within
        content = bytearray(Path("a.parquet").read_bytes())
        content[6:40] = b"\xff" * 34
        Path("a.parquet").write_bytes(content)
    with pytest.raises(UserError) as caught:
        list(PartReader(Part("a.parquet", 0, size)))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz", "a.jsonl.zst"])
def test_a_file_that_cannot_be_read_is_named(name):
    for reason in ("No such file or directory", "Is a directory"):
        with pytest.raises(UserError, match=f"^cannot read {name}: {reason}$"):
            list(PartReader(Part(name, 0, 5)))
        os.mkdir(name) if reason.startswith("No") else None


@pytest.mark.parametrize("size", [1, 3, 100, 10**6])
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl", "a.jsonl.zst", "a.parquet"])
def test_pieces_to_train_a_tokenizer_on(monkeypatch, name, size):
    monkeypatch.setattr(documents, "BLOCK", 64)
    rows = ["wörter und 日本語 👩‍👧 " * 9, "", "\r\n", "x" * 99]
    if "jsonl" in name:
        store(name, b"\n\n".join(json.dumps({"body": row}).encode() for row in rows))
    elif name == "a.parquet":
        parquet.write_table(pyarrow.table({"body": rows}), name)
    else:
        store(name, "".join(rows).encode())
    pieces = list(read_pieces(InputFile(name, os.path.getsize(name)), "body", size))
    assert "".join(pieces) == "".join(rows)
    assert 0 < max(map(len, pieces)) <= size


def test_training_stops_at_what_is_no_document():
    Path("a.jsonl").write_bytes(GOOD * 2 + b"\n{\n")
    with pytest.raises(UserError, match=r"^a\.jsonl:4: broken JSON \(Expecting property name enclosed"):
        list(read_pieces(InputFile("a.jsonl", 99), "text", 10))
