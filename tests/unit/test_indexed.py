"""The .bin/.idx format, byte by byte, and what the reader says about files that break it."""

import errno
import json
import os
import struct

import numpy as np
import pytest

from megalite.data import indexed
from megalite.data.indexed import IndexedDataset, PairWriter, atomic_write, token_dtype, write_index
from megalite.errors import UserError

LENGTHS = [3, 1, 4]
TOKENS = [5, 6, 0, 7, 8, 9, 10, 0]


def handwritten_idx(lengths, code=8, itemsize=2, version=1, magic=b"MMIDIDX\x00\x00", bounds=None):
    """The layout of reference/data.md, without the code under test."""
    pointers = [sum(lengths[:i]) * itemsize for i in range(len(lengths))]
    bounds = list(range(len(lengths) + 1)) if bounds is None else bounds
    n, d = len(lengths), len(bounds)
    return (
        magic
        + struct.pack("<Q", version)
        + struct.pack("<B", code)
        + struct.pack("<QQ", n, d)
        + struct.pack(f"<{n}i", *lengths)
        + struct.pack(f"<{n}q", *pointers)
        + struct.pack(f"<{d}q", *bounds)
    )


def write_pair(folder, idx=None, bin_=None, name="data"):
    (folder / f"{name}.idx").write_bytes(handwritten_idx(LENGTHS) if idx is None else idx)
    (folder / f"{name}.bin").write_bytes(struct.pack("<8H", *TOKENS) if bin_ is None else bin_)
    return folder / name


def test_write_index_is_the_handwritten_layout(tmp_path):
    for dtype, code, itemsize in (("<u2", 8, 2), ("<i4", 4, 4)):
        write_index(tmp_path / "x.idx", LENGTHS, np.dtype(dtype))
        assert (tmp_path / "x.idx").read_bytes() == handwritten_idx(LENGTHS, code, itemsize)
    write_index(tmp_path / "x.idx", [], np.dtype("<u2"))
    assert (tmp_path / "x.idx").read_bytes() == handwritten_idx([])
    assert os.listdir(tmp_path) == ["x.idx"]


@pytest.mark.parametrize("suffix", ["", ".bin", ".idx"])
def test_reads_what_was_written_by_hand(tmp_path, suffix):
    data = IndexedDataset(str(write_pair(tmp_path)) + suffix)
    assert (data.num_tokens, data.num_documents, data.dtype) == (8, 3, np.dtype("<u2"))
    assert data.sequence_lengths.tolist() == LENGTHS
    assert data.document_starts.tolist() == [0, 1, 2, 3]
    assert data.tokens.tolist() == TOKENS
    assert data.manifest is None


@pytest.mark.parametrize(("code", "letter"), [(1, "B"), (2, "b"), (3, "h"), (4, "i"), (5, "q"), (8, "H")])
def test_reads_every_integer_type(tmp_path, code, letter):
    size = struct.calcsize(f"<{letter}")
    prefix = write_pair(tmp_path, handwritten_idx(LENGTHS, code, size), struct.pack(f"<8{letter}", *TOKENS))
    assert IndexedDataset(prefix).tokens.tolist() == TOKENS


def test_documents_of_several_sequences(tmp_path):
    data = IndexedDataset(write_pair(tmp_path, handwritten_idx(LENGTHS, bounds=[0, 2, 3])))
    assert data.num_documents == 2
    assert data.document_starts.tolist() == [0, 2, 3]


def test_empty_pair_does_not_crash(tmp_path):
    data = IndexedDataset(write_pair(tmp_path, handwritten_idx([]), b""))
    assert (data.num_tokens, data.num_documents, data.tokens.tolist()) == (0, 0, [])


GOOD = handwritten_idx(LENGTHS)


@pytest.mark.parametrize(
    ("idx", "bin_", "message"),
    [
        (b"", None, "truncated"),
        (GOOD[:33], None, "truncated"),
        (GOOD[:-1], None, "need 102"),
        (GOOD + b"\0", None, "need 102"),
        (handwritten_idx(LENGTHS, magic=b"MMIDIDY\x00\x00"), None, "MMIDIDX"),
        (handwritten_idx(LENGTHS, version=2), None, "version 2"),
        (handwritten_idx(LENGTHS, code=7), None, "dtype code 7"),
        (handwritten_idx(LENGTHS, code=0), None, "dtype code 0"),
        (GOOD[:18] + struct.pack("<Q", 2**63) + GOOD[26:], None, "need"),
        (GOOD + b"\0\0\0", None, "multimodal"),
        (handwritten_idx(LENGTHS, bounds=[0, 1, 2]), None, "bounds"),
        (handwritten_idx(LENGTHS, bounds=[1, 2, 3]), None, "bounds"),
        (handwritten_idx(LENGTHS, bounds=[0, 2, 1, 3]), None, "bounds"),
        (handwritten_idx(LENGTHS, bounds=[]), None, "bounds"),
        (handwritten_idx([9, -3, 2]), None, "negative"),
        (handwritten_idx(LENGTHS, itemsize=4), None, "pointers"),
        (None, struct.pack("<7H", *TOKENS[:7]), "14 bytes"),
        (None, b"", "0 bytes"),
        (handwritten_idx([2, 1, 4]), None, "16 bytes, but"),  # lengths without the EOD, as Megatron-DeepSpeed writes
    ],
)
def test_a_broken_pair_is_refused_in_one_line_that_names_the_file(tmp_path, idx, bin_, message):
    prefix = write_pair(tmp_path, idx, bin_)
    with pytest.raises(UserError, match=message) as caught:
        IndexedDataset(prefix)
    assert str(prefix) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_a_missing_half_is_named(tmp_path, suffix):
    prefix = write_pair(tmp_path)
    (tmp_path / f"data.{suffix}").unlink()
    with pytest.raises(UserError, match=rf"data\.{suffix} is missing"):
        IndexedDataset(prefix)


@pytest.mark.parametrize("content", ["{", "[]", '{"tokens": 9, "documents": 3, "dtype": "uint16"}', '{"tokens": 8}'])
def test_a_manifest_that_does_not_fit_is_refused(tmp_path, content):
    prefix = write_pair(tmp_path)
    (tmp_path / "data.manifest.json").write_text(content)
    with pytest.raises(UserError, match=r"data\.manifest\.json"):
        IndexedDataset(prefix)


def test_fingerprint_follows_the_content_and_not_the_name(tmp_path):
    manifest = {"tokens": 8, "documents": 3, "dtype": "uint16", "bin_sha256": "aa"}
    prints = {}
    for name, idx, facts in (
        ("a", None, None),
        ("b", None, None),
        ("c", handwritten_idx([4, 0, 4]), None),
        ("d", None, manifest),
        ("e", None, manifest | {"bin_sha256": "bb"}),
    ):
        prefix = write_pair(tmp_path, idx, name=name)
        if facts:
            (tmp_path / f"{name}.manifest.json").write_text(json.dumps(facts))
        prints[name] = IndexedDataset(prefix).fingerprint
    assert prints["a"] == prints["b"]
    assert len({prints[name] for name in "acde"}) == 4


def test_token_dtype_changes_where_megatron_does():
    assert token_dtype(65499) == np.uint16
    assert token_dtype(65500) == np.int32


def test_atomic_write_keeps_the_old_file_when_the_disk_is_full(tmp_path):
    path = tmp_path / "x"
    atomic_write(path, [b"old"])

    def chunks():
        yield b"new"
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(UserError, match="No space left"):
        atomic_write(path, chunks())
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_a_document_too_long_for_the_format_is_refused(tmp_path):
    with pytest.raises(UserError, match="split it"):
        write_index(tmp_path / "x.idx", [2**31], np.dtype("<u2"))


def test_two_writers_of_one_prefix_do_not_mix(tmp_path):
    arguments = np.array([1, 2], dtype="<u2").tobytes(), np.array([2]), np.array([5])
    first = PairWriter(str(tmp_path / "x"), np.dtype("<u2"))
    first.write(*arguments)
    second = PairWriter(str(tmp_path / "x"), np.dtype("<u2"))
    second.write(*arguments)
    with pytest.raises(UserError, match="another process"):
        first.finish({})
    first.abort()
    second.finish({})
    third = PairWriter(str(tmp_path / "x"), np.dtype("<u2"))
    with pytest.raises(UserError, match="another process"):
        second.commit()
    second.abort()
    third.write(*arguments)
    third.finish({})
    third.commit()
    third.abort()
    assert IndexedDataset(tmp_path / "x").tokens.tolist() == [1, 2]
    assert sorted(os.listdir(tmp_path)) == ["x.bin", "x.idx", "x.manifest.json"]


def test_commit_leaves_no_old_index_beside_a_new_bin(tmp_path, monkeypatch):
    write_pair(tmp_path, name="x")
    writer = PairWriter(str(tmp_path / "x"), np.dtype("<u2"))
    writer.write(np.array([1, 2], dtype="<u2").tobytes(), np.array([2]), np.array([5]))
    writer.finish({})

    replace = os.replace

    def interrupted(source, target):
        replace(source, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(indexed.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        writer.commit()
    with pytest.raises(UserError, match=r"x\.idx is missing"):
        IndexedDataset(tmp_path / "x")
