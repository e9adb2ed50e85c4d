"""Inputs: which files paths, globs and folders stand for, and what compressed ones hold."""

import gzip
import os
import sys
import tracemalloc
from contextlib import contextmanager
from pathlib import Path

import pytest
import zstandard

from megalite.data.inputs import DamagedInput, InputFile, expand_inputs, is_text, open_text
from megalite.data.sources import resolve_files
from megalite.errors import ConfigError, UserError

pytestmark = pytest.mark.usefixtures("working_folder")


def touch(*paths, text="x"):
    for path in map(Path, paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def expanded(*patterns):
    return [file.path for file in expand_inputs(patterns)]


def test_inputs_are_expanded_in_order_and_once():
    touch("b2.txt", "b1.txt", "a.txt", "[x].txt", "c.TXT")
    os.symlink("a.txt", "link.txt")
    patterns = ["b*.txt", "a.txt", "./b1.txt", "link.txt", "[x].txt", "c.TXT", os.path.abspath("b2.txt")]
    assert expanded(*patterns) == ["b1.txt", "b2.txt", "a.txt", "[x].txt", "c.TXT"]
    touch("a.txt", text="four")
    assert [(file.path, file.size) for file in expand_inputs(["link.txt", "a.txt"])] == [("link.txt", 4)]


def test_a_folder_is_every_file_below_it_that_can_be_read():
    touch("d/b.txt", "d/a.jsonl.gz", "d/z/c.JSONL", "d/z/y/e.parquet", "d/README.md", "d/x.bin", "d/.hidden.txt")
    touch("d/.cache/x.txt", "d/z.txt.zst", "other/o.txt")
    os.symlink("../other", "d/linked")
    os.symlink("..", "d/z/loop")
    os.symlink("y", "d/z/x")
    everything = ["d/a.jsonl.gz", "d/b.txt", "d/linked/o.txt", "d/z.txt.zst", "d/z/c.JSONL", "d/z/x/e.parquet"]
    assert expanded("d") == everything
    assert expanded("d", "d/b.txt", "d/z/y", "other") == everything
    assert expanded("d/z/y", "d/[lz]*/", "d") == [
        "d/z/y/e.parquet",
        "d/linked/o.txt",
        "d/z/c.JSONL",
        "d/a.jsonl.gz",
        "d/b.txt",
        "d/z.txt.zst",
    ]
    assert expanded("other/**", "oth*") == ["other/o.txt"]


def test_folders_that_are_linked_into_each_other_are_listed_once():
    touch("a/1.txt", "b/2.txt")
    os.symlink("../b", "a/b")
    os.symlink("../a", "b/a")
    assert expanded("a") == expanded("a", "b") == ["a/1.txt", "a/b/2.txt"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.jsonl", ("jsonl", "")),
        ("a.b/c.TXT", ("txt", "")),
        ("x.txt.jsonl.gz", ("jsonl", "gz")),
        ("x.TXT.Zst", ("txt", "zst")),
        ("x.parquet", ("parquet", "")),
        ("x.parquet.gz", None),
        ("x.gz", None),
        ("x.json", None),
        ("x.txt.gz.zst", None),
        ("txt", None),
    ],
)
def test_formats(name, kind):
    assert is_text(name) == (kind is not None)
    if kind:
        assert (InputFile(name, 0).format, InputFile(name, 0).compression) == kind


@contextmanager
def without_privileges():
    """root may read everything, and so can't be refused."""
    if os.getuid() != 0:
        yield
        return
    os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("x.txt", 'no such file: "x.txt"'),
        ("*.txt", 'no file matches "*.txt"'),
        ("e.md", '"e.md" is none of .jsonl, .txt, .parquet, or .jsonl/.txt with .gz or .zst: convert or rename it'),
        ("e*", '"e.md" is none of'),
        ("empty", 'no file below the folder "empty" ends in .jsonl, .txt or .parquet'),
        ("pipes/*.txt", '"pipes/fifo.txt" is not a regular file'),
        ("pipes", '"pipes/fifo.txt" is not a regular file'),
        ("links", 'no such file: "links/nowhere.txt"'),
        ("secret.jsonl", "cannot read secret.jsonl: Permission denied"),
        ("secret", "cannot read secret: Permission denied"),
        ("secret/a.txt", "cannot read secret/a.txt: Permission denied"),
        ("a.jsonl/b.txt", "cannot read a.jsonl/b.txt: Not a directory"),
        ("", 'no such file: ""'),
    ],
)
def test_what_cannot_be_read_is_named(pattern, message):
    touch("e.md", "empty/x.md", "links/x.md", "secret.jsonl", "secret/a.txt", "a.jsonl", "pipes/x.md")
    os.mkfifo("pipes/fifo.txt")
    os.symlink("gone.txt", "links/nowhere.txt")
    os.chmod(".", 0o755)
    os.chmod("secret.jsonl", 0)
    os.chmod("secret", 0)
    try:
        with without_privileges(), pytest.raises(UserError) as caught:
            expand_inputs([pattern])
    finally:
        os.chmod("secret", 0o700)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_no_patterns_are_no_input():
    with pytest.raises(UserError, match="no input files are given"):
        expand_inputs([])


@pytest.mark.parametrize(
    ("name", "package", "extra"), [("a.jsonl.zst", "zstandard", "zstd"), ("a.parquet", "pyarrow", "parquet")]
)
def test_a_missing_package_is_said_before_anything_starts(monkeypatch, name, package, extra):
    touch(name)
    assert expanded(name) == [name]
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        UserError, match=rf'^reading "{name}" needs the package {package}: pip install "megalite\[{extra}\]"$'
    ):
        expand_inputs([name])


def pack(suffix, data):
    if suffix == ".gz":
        return gzip.compress(data, mtime=0)
    return zstandard.ZstdCompressor(write_checksum=True).compress(data)


SKIPPABLE = bytes.fromhex("502a4d18") + b"\3\0\0\0abc"  # a zstd frame that holds no data, as pzstd writes them


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_all_members_of_a_compressed_file_are_read(suffix):
    parts = [b"", b"one\n" * 5000, b"", os.urandom(300_000), b"two", b""]
    data = b"".join(pack(suffix, part) for part in parts)
    Path("a.txt" + suffix).write_bytes(data + b"\0" * 5000 if suffix == ".gz" else SKIPPABLE + data + SKIPPABLE)
    with open_text(expand_inputs(["."])[0]) as file:
        assert file.read() == b"".join(parts)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_what_is_before_the_damage_can_be_read(suffix):
    whole = b"".join(b"%d\n" % i for i in range(30_000))
    packed = pack(suffix, whole)
    path = Path("a.txt" + suffix)

    def read(data):
        path.write_bytes(data)
        found = []
        with open_text(InputFile(str(path), len(data))) as file, pytest.raises(DamagedInput) as caught:
            found.extend(iter(file.readline, b""))
        assert whole.startswith(b"".join(found))
        assert str(caught.value) == f"{path}: {caught.value.reason}"
        return len(b"".join(found)) / len(whole), caught.value.reason.removeprefix("truncated or corrupt ")

    kind = {".gz": "gzip", ".zst": "zstd"}[suffix]
    assert read(b"") == (0, f"{kind} (it is empty)")
    for size in (1, 3, 10, len(packed) // 2, len(packed) - 1):
        share, reason = read(packed[:size])
        assert reason == f"{kind} (it breaks off)"
    assert share > 0.9 if suffix == ".gz" else share > 0.1
    assert read(packed + packed[:1])[1] == f"{kind} (it breaks off)"
    assert read(b"no such thing")[0] == read(b"\0" * 100)[0] == 0
    share, reason = read(packed + b"no such thing")
    assert share > 0.7  # the chunk with the damage is lost
    assert reason.startswith(kind)
    spoiled = bytearray(packed)
    spoiled[len(packed) // 2] ^= 0x55
    with pytest.raises(DamagedInput), open_text(InputFile(str(path), path.write_bytes(spoiled))) as file:
        file.read()


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_memory_is_bounded_whatever_a_file_unpacks_to(suffix):
    """300 MB of zeros are 300 KB of gzip and 10 KB of zstd."""
    packed = pack(suffix, bytes(30_000_000)) * 10 if suffix == ".gz" else pack(suffix, bytes(300_000_000))
    Path("a.txt" + suffix).write_bytes(packed)
    tracemalloc.start()
    try:
        with open_text(expand_inputs(["."])[0]) as file:
            assert sum(map(len, iter(lambda: file.read(10**6), b""))) == 300_000_000
        assert tracemalloc.get_traced_memory()[1] < 140_000_000
    finally:
        tracemalloc.stop()


def test_files_to_train_on_are_sorted_into_pairs_and_texts():
    touch("a.bin", "a.idx", "b[1].bin", "b[1].idx", "c.txt", "d.jsonl", "e.manifest.json", "f.txt.gz")
    assert resolve_files(["*"], "key") == (["a", "b[1]"], ["c.txt", "d.jsonl", "f.txt.gz"])
    assert resolve_files(["d.jsonl", "c.*", "d*"], "key") == ([], ["d.jsonl", "c.txt"])
    assert resolve_files(["b[1]", "a.idx", "a", "b[1].bin"], "key") == (["b[1]", "a"], [])


@pytest.mark.parametrize(
    ("pattern", "error", "message"),
    [
        ("*.bin", ConfigError, r"key: \*\.bin matches no indexed data \(\.bin, \.idx\) and no text"),
        ("x", ConfigError, r"key: x: no such indexed data \(x\.idx does not exist\); build it"),
        ("x.txt", UserError, r'no such file: "x\.txt"'),
        ("*.txt", UserError, r'no file matches "\*\.txt"'),
    ],
)
def test_what_matches_nothing_is_named(pattern, error, message):
    touch("e.manifest.json")
    with pytest.raises(error, match=message):
        resolve_files([pattern], "key")


def test_what_a_build_left_is_no_input_of_a_folder_or_glob():
    touch("f/a.jsonl", "f/x.rejects.jsonl", "f/x.building/stdin.jsonl")
    assert expanded("f") == expanded("f/*") == ["f/a.jsonl"]
    assert expanded("f/x.rejects.jsonl") == ["f/x.rejects.jsonl"]  # who names it means it
