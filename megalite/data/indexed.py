"""Megatron's .bin/.idx token files: PREFIX.bin is raw tokens, PREFIX.idx says where sequences and documents begin.

Little-endian layout of the .idx, for N sequences and D = documents + 1 bounds:

    0        9 bytes  magic          18      u64      N                  34+4N   i64[N]  byte pointers into .bin
    9        u64      version = 1    26      u64      D                  34+12N  i64[D]  document starts, in sequences:
    17       u8       dtype code     34      i32[N]   lengths, tokens                    first 0, last N

Format: Megatron-LM, megatron/core/datasets/indexed_dataset.py. We add PREFIX.manifest.json, since the format itself has
no checksum, tokenizer or vocabulary: what it was made of, and the SHA-256 of both files.
"""

import hashlib
import json
import os
import struct
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from megalite.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
MANIFEST_VERSION = 2  # of PREFIX.manifest.json
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, N, D: 34 bytes
# Codes 6 and 7 are floats (and swapped in gpt-neox), so they can't be tokens.
DTYPES = {code: np.dtype(name) for code, name in {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}.items()}
CODES = {dtype: code for code, dtype in DTYPES.items()}


def token_dtype(vocab_size: int) -> np.dtype:
    """The dtype that Megatron stores a vocabulary of this size in: u16 below 65,500, else i32."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


def staged(path: str | Path) -> Path:
    """Where a file is written before it gets its name: beside it, since a rename can't cross file systems."""
    path = Path(path)
    return path.with_name(path.name + ".tmp")


def stage_file(path: str | Path, chunks: Iterable[bytes]) -> str:
    """Write `staged(path)`, down to the disk; returns its SHA-256 (hex). On failure nothing is left. Raises OSError."""
    digest = hashlib.sha256()
    try:
        with open(staged(path), "wb") as file:
            for chunk in chunks:
                digest.update(chunk)
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        staged(path).unlink(missing_ok=True)
        raise
    return digest.hexdigest()


def atomic_write(path: str | Path, chunks: Iterable[bytes]) -> str:
    """Write a file so that `path` only ever holds all of it or what was there before; returns its SHA-256 (hex).

    Raises `UserError` when the disk is full, the folder can't be written, and so on.
    """
    try:
        sha256 = stage_file(path, chunks)
        os.replace(staged(path), path)
        sync_folder(Path(path).parent)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    return sha256


def sync_folder(folder: Path) -> None:
    """Make the renames in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def index_chunks(lengths: Sequence[np.ndarray], dtype: np.dtype) -> Iterator[bytes]:
    """The content of an .idx whose every sequence is one document; `lengths`: arrays [n] in tokens, in a row."""
    count = sum(map(len, lengths))
    if any(len(each) and not 0 <= int(each.min()) <= int(each.max()) < 2**31 for each in lengths):
        raise UserError("a document of 2^31 tokens or more does not fit the .idx format: split it")
    yield HEADER.pack(MAGIC, VERSION, CODES[dtype], count, count + 1)
    yield from (each.astype("<i4").tobytes() for each in lengths)
    pointer = 0
    for each in lengths:
        ends = pointer + np.cumsum(each, dtype="<i8") * dtype.itemsize
        yield (ends - each.astype("<i8") * dtype.itemsize).tobytes()
        pointer = int(ends[-1]) if len(ends) else pointer
    for start in range(0, count + 1, 2**20):
        yield np.arange(start, min(start + 2**20, count + 1), dtype="<i8").tobytes()


def write_index(path: str | Path, lengths: Sequence[int] | np.ndarray, dtype: np.dtype) -> str:
    """Write an .idx whose every sequence is one document, atomically; `lengths` [N] in tokens. Returns its SHA-256."""
    return atomic_write(path, index_chunks([np.asarray(lengths, dtype=np.int64)], dtype))


def pair_paths(prefix: str) -> list[Path]:
    """The files of one data set: .bin, .idx, manifest."""
    return [Path(prefix + suffix) for suffix in (".bin", ".idx", ".manifest.json")]


class PairWriter:
    """Writes a PREFIX.bin/.idx pair and its manifest; nothing gets its final name before `commit`.

    write, ..., write, finish, commit; then, or at any point before, abort, which leaves no temporary file.
    Raises OSError.
    """

    def __init__(self, prefix: str, dtype: np.dtype) -> None:
        self.prefix, self.dtype = prefix, dtype
        self.paths = pair_paths(prefix)
        self.documents = self.tokens = 0
        self.text_bytes: int | None = 0  # None: not known, and left out of the manifest
        self._lengths: list[np.ndarray] = []
        self._digest = hashlib.sha256()
        staged(self.paths[0]).unlink(missing_ok=True)  # a killed run's
        self._file = open(staged(self.paths[0]), "xb")  # noqa: SIM115 -- closed by abort

    def write(self, tokens: bytes, lengths: np.ndarray, text_bytes: np.ndarray) -> None:
        """Append n documents: their tokens, of this dtype, one after another; lengths and UTF-8 sizes, int64 [n].

        A document of length 0 is left out.
        """
        self._file.write(tokens)
        self._digest.update(tokens)
        kept = lengths[lengths > 0]
        small = len(kept) and int(kept.max()) < 2**31  # else `finish` refuses it
        self._lengths.append(kept.astype("<i4") if small else kept)
        self.documents += len(kept)
        self.tokens += int(lengths.sum())
        self.text_bytes += int(text_bytes.sum())

    def append(self, tokens: bytes) -> None:
        """Append tokens of documents whose index `finish` is given; the caller sets the counts."""
        self._file.write(tokens)
        self._digest.update(tokens)

    def finish(self, facts: dict, index: Iterable[bytes] | None = None) -> None:
        """Bring everything to the disk, still under temporary names; `facts` are the manifest's other entries.

        `index`: the .idx in chunks, where the documents came by `append`.
        """
        self._file.flush()
        os.fsync(self._file.fileno())
        self._refuse_if_taken()
        if index is None:
            index = index_chunks(self._lengths, self.dtype)
        index_sha256 = stage_file(self.paths[1], index)
        text_bytes = {} if self.text_bytes is None else {"text_bytes": self.text_bytes}
        manifest = facts | {
            "dtype": self.dtype.name,
            "documents": self.documents,
            "tokens": self.tokens,
            **text_bytes,
            "bin_sha256": self._digest.hexdigest(),
            "idx_sha256": index_sha256,
        }
        stage_file(self.paths[2], [(json.dumps(manifest, indent=2) + "\n").encode()])

    def commit(self) -> None:
        """Give the files their names: .bin, .idx, manifest."""
        self._refuse_if_taken()
        for path in self.paths[1:]:  # an old index beside a new .bin could look like a pair
            path.unlink(missing_ok=True)
        for path in self.paths:
            os.replace(staged(path), path)
        sync_folder(self.paths[0].parent)

    def abort(self) -> None:
        """Close, and remove what has no final name yet."""
        if self._is_mine():
            for path in self.paths:
                staged(path).unlink(missing_ok=True)
        self._file.close()

    def _refuse_if_taken(self) -> None:
        if not self._is_mine():
            raise UserError(f"another process is writing {self.prefix}.bin too: let it finish, then run this again")

    def _is_mine(self) -> bool:
        """Whether the temporary file is still the one that was opened here: another run begins by removing it."""
        path = staged(self.paths[0])
        return path.exists() and path.stat().st_ino == os.fstat(self._file.fileno()).st_ino


def _is_place(bounds: Sequence[int], i: int) -> bool:
    """Whether bounds[i] is the first of the rising `bounds` that is i or more, found without a search."""
    return i < len(bounds) and bounds[i] == i and (i == 0 or bounds[i - 1] < i)


def data_prefix(path: str | Path) -> str:
    """PREFIX of PREFIX, PREFIX.bin or PREFIX.idx."""
    path = str(path)
    return path[:-4] if path.endswith((".bin", ".idx")) else path


class IndexedDataset:
    """Memory-mapped reader of one PREFIX.bin/.idx pair; nothing is copied into memory.

    Attributes: `tokens` [num_tokens] of `dtype`, the whole .bin; `sequence_lengths` i32 [N], in tokens;
    `document_starts` i64 [num_documents + 1], in sequences; `manifest`, the content of PREFIX.manifest.json, or None.

    Raises `UserError` when a file is missing, or is not this format, or the two don't belong together.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = data_prefix(prefix)
        self.bin_path, self.idx_path, self.manifest_path = pair_paths(self.prefix)
        for path in (self.idx_path, self.bin_path):
            if not path.is_file():
                raise UserError(f"{path} is missing: indexed data is a pair PREFIX.bin and PREFIX.idx")
        try:
            self._read_index()
            self._map_tokens()
        except OSError as error:
            raise UserError(f"cannot read {self.prefix}.bin/.idx: {error.strerror}") from error
        self.manifest = self._read_manifest()

    def _read_index(self) -> None:
        size = self.idx_path.stat().st_size
        if size < HEADER.size:
            raise self._broken(f"has {size} bytes, less than its header of {HEADER.size}: it is truncated")
        # 34 + 4N is not a multiple of 8, so these views are unaligned; numpy reads them all the same.
        index = np.memmap(self.idx_path, dtype=np.uint8, mode="r")
        magic, version, code, num_sequences, num_bounds = HEADER.unpack(index[: HEADER.size].tobytes())
        if magic != MAGIC:
            raise UserError(f"{self.idx_path} is not an index of tokens (it doesn't begin with MMIDIDX): give another")
        if version != VERSION:
            raise UserError(f"{self.idx_path} has format version {version}, this program reads {VERSION}: convert it")
        if code not in DTYPES:
            raise UserError(f"{self.idx_path} has dtype code {code}, no integer type: it holds no tokens, give another")
        expected = HEADER.size + 12 * num_sequences + 8 * num_bounds
        if num_sequences and size == expected + num_sequences:
            raise UserError(f"{self.idx_path} is multimodal (it has a mode for each sequence): give text-only data")
        if size != expected:
            raise self._broken(
                f"has {size} bytes, but {num_sequences} sequences and {num_bounds} document bounds need {expected}"
            )
        self.dtype = DTYPES[code]
        lengths_end = HEADER.size + 4 * num_sequences
        pointers_end = lengths_end + 8 * num_sequences
        self.sequence_lengths = index[HEADER.size : lengths_end].view("<i4")
        pointers = index[lengths_end:pointers_end].view("<i8")
        # To bisect: a memoryview reads one number in a third of the time that numpy takes, and copies nothing, as
        # np.searchsorted does with what is unaligned. It reads in the machine's byte order: little-endian.
        self._pointers = memoryview(np.asarray(index))[lengths_end:pointers_end].cast("q")
        self._bounds = memoryview(np.asarray(index))[pointers_end:].cast("q")
        self.document_starts = index[pointers_end:].view("<i8")
        self.num_documents = num_bounds - 1
        self.num_tokens = int(self.sequence_lengths.sum(dtype=np.int64))
        starts = self.document_starts
        if num_bounds == 0 or starts[0] != 0 or starts[-1] != num_sequences or bool((starts[1:] < starts[:-1]).any()):
            raise self._broken(f"has document bounds that don't rise from 0 to its {num_sequences} sequences")
        if num_sequences and self.sequence_lengths.min() < 0:
            raise self._broken("has a negative sequence length")
        # Windows read .bin as one stream, so the first and the last pointer are enough to notice a writer that left
        # gaps or another order; `document_breaks` looks at those that it uses.
        last = (self.num_tokens - int(self.sequence_lengths[-1])) * self.dtype.itemsize if num_sequences else 0
        if num_sequences and (pointers[0] != 0 or pointers[-1] != last):
            raise self._broken("has byte pointers that don't follow from its lengths")

    def _map_tokens(self) -> None:
        size, expected = self.bin_path.stat().st_size, self.num_tokens * self.dtype.itemsize
        if size != expected:
            raise UserError(
                f"{self.bin_path} has {size} bytes, but {self.idx_path} describes {expected}: "
                "it is truncated or from another run; build both again"
            )
        # mmap refuses an empty file.
        self.tokens = np.memmap(self.bin_path, dtype=self.dtype, mode="r") if size else np.empty(0, self.dtype)

    def _read_manifest(self) -> dict | None:
        if not self.manifest_path.exists():
            return None
        try:
            manifest = json.loads(self.manifest_path.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{self.manifest_path} is not readable JSON: build the data again, or remove it") from error
        if not isinstance(manifest, dict):
            raise UserError(f"{self.manifest_path} is not a JSON object: build the data again, or remove it")
        for key, found in (("tokens", self.num_tokens), ("documents", self.num_documents), ("dtype", self.dtype.name)):
            if manifest.get(key) != found:
                raise UserError(
                    f"{self.manifest_path} says {key} = {manifest.get(key)}, but {self.idx_path} has {found}: "
                    "they are from different runs; build the data again"
                )
        return manifest

    def document_breaks(self, start: int, end: int) -> list[int]:
        """Where documents begin inside tokens start .. end - 1, as tokens of the .bin: start < each < end, rising.

        A document without tokens begins with the next one, and is not listed apart. O(log N) whatever the size.
        Raises `UserError` where the byte pointers contradict the .bin.
        """
        pointers, bounds, size = self._pointers, self._bounds, self.dtype.itemsize
        first = bisect_right(pointers, start * size)  # sequences first .. last - 1 begin there
        reach = min(first + end - start, len(pointers))  # enough, but for sequences without tokens; and it is near
        if reach < len(pointers) and pointers[reach] < end * size:
            reach = len(pointers)
        last = bisect_left(pointers, end * size, first, reach)
        # Which of them begin a document? Usually each sequence is one: then its number is its place in the bounds.
        low = bisect_left(bounds, first) if not _is_place(bounds, first) else first
        high = bisect_left(bounds, last, low) if not _is_place(bounds, last) else last
        breaks = sorted({pointers[sequence] // size for sequence in bounds[low:high]})
        if breaks and not start < breaks[0] <= breaks[-1] < end:
            raise self._broken(f"has byte pointers that don't rise near token {start}")
        return breaks

    def _broken(self, what: str) -> UserError:
        return UserError(f"{self.idx_path} {what}; build the data again")

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of both files' hashes in the manifest; of what it lacks: the .idx itself, the .bin's size."""
        manifest = self.manifest or {}
        index = manifest.get("idx_sha256")
        if not index:  # 1.6 s at 50 million documents
            with open(self.idx_path, "rb") as file:
                index = hashlib.file_digest(file, "sha256").hexdigest()
        shard = manifest.get("bin_sha256") or f"{self.num_tokens * self.dtype.itemsize} bytes"
        return hashlib.sha256(f"{index} {shard}".encode()).hexdigest()

    def __repr__(self) -> str:
        return f"IndexedDataset({self.prefix!r}, documents={self.num_documents:,}, tokens={self.num_tokens:,})"
