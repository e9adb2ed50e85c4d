"""An .idx read in pieces: memory stays the same for any number of documents, and nothing in the file is believed.

`IndexedDataset` maps whole files to train on; merging and validating pass through them once, and take no file's word.
Sequences, documents and tokens are numbered from 0.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megalite.data.indexed import DTYPES, HEADER, MAGIC, VERSION
from megalite.errors import UserError

PIECE = 1 << 20  # entries of an array at a time: 8 MiB of pointers
OLD_MAGIC = b"TNTIDX\x00\x00"  # fairseq's, and Megatron's before "mmap"
FLOATS = (6, 7)  # f64, f32 in Megatron's files, f32, f64 in gpt-neox's


class BrokenData(UserError):
    """A file of a pair is not what the format says; `kind` is one word for what is wrong."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class IndexFile:
    """The header of an .idx, and its three arrays as iterators over pieces.

    Attributes: `code` and `dtype` of the tokens (None: no integer type, or an unknown one); `num_sequences`;
    `num_bounds`, documents + 1.

    Raises `BrokenData` when the header is not this format's, or the file's size not what the header asks for.
    """

    def __init__(self, path: Path, piece: int = PIECE) -> None:
        self.path, self.piece = path, piece
        try:
            with open(path, "rb") as file:
                self.size = os.fstat(file.fileno()).st_size
                self._read_header(file.read(HEADER.size))
            self._pointers_at = HEADER.size + 4 * self.num_sequences
            self._bounds_at = self._pointers_at + 8 * self.num_sequences
            self._check_size()
        except OSError as error:
            raise BrokenData("unreadable", f"cannot read {path}: {error.strerror}") from error

    def _read_header(self, header: bytes) -> None:
        if header.startswith(OLD_MAGIC):
            raise BrokenData(
                "old-format",
                f"{self.path} has the old format of fairseq and Megatron ({OLD_MAGIC[:6].decode()}, their "
                "implementations lazy and cached): tokenize the text again, or convert it to mmap with their tools",
            )
        if not header.startswith(MAGIC[: len(header)]) or not header:
            raise BrokenData(
                "not-an-index",
                f"{self.path} is not an index of tokens (it doesn't begin with {MAGIC[:7].decode()}): give another"
                if header
                else f"{self.path} is empty: build the data again",
            )
        if len(header) < HEADER.size:
            raise BrokenData(
                "truncated-idx",
                f"{self.path} has {self.size} bytes, less than its header of {HEADER.size}: it is truncated; "
                "build the data again",
            )
        _, version, self.code, self.num_sequences, self.num_bounds = HEADER.unpack(header)
        if version != VERSION:
            raise BrokenData(
                "version", f"{self.path} has format version {version}, this program reads {VERSION}: convert it"
            )
        self.dtype = DTYPES.get(self.code)

    def _at(self, offset: int, count: int) -> bytes:
        if offset >= self.size:
            return b""
        with open(self.path, "rb") as file:
            file.seek(offset)
            return file.read(count)

    def _check_size(self) -> None:
        needs = self._bounds_at + 8 * self.num_bounds
        what = (
            f"{self.path} has {self.size:,} bytes, but its {self.num_sequences:,} sequences and {self.num_bounds:,} "
            f"document bounds need {needs:,}"
        )
        if self.size < needs:
            part = "pointers" if self.size < self._bounds_at else "document bounds"
            part = "lengths" if self.size < self._pointers_at else part
            raise BrokenData("truncated-idx", f"{what}: it is truncated, in its {part}; build the data again")
        if self._at(needs, len(MAGIC)) == MAGIC:
            raise BrokenData(
                "two-indexes",
                f"{self.path} holds a second index from byte {needs:,} on: it was made by joining files; "
                "join the pairs with tools/merge_data.py",
            )
        if self.num_sequences and self.size == needs + self.num_sequences:
            raise BrokenData(
                "multimodal",
                f"{self.path} is multimodal (it has a mode for each of its {self.num_sequences:,} sequences): "
                "give text-only data",
            )
        if self.size > needs:
            raise BrokenData("trailing-idx", f"{what}: bytes were added, or its header is damaged; build it again")

    def lengths(self) -> Iterator[np.ndarray]:
        """Tokens of each sequence, int64, in pieces."""
        for piece in self._array(HEADER.size, "<i4", self.num_sequences):
            yield piece.astype(np.int64)

    def pointers(self) -> Iterator[np.ndarray]:
        """Byte in .bin at which each sequence begins, int64, in pieces."""
        return self._array(self._pointers_at, "<i8", self.num_sequences)

    def bounds(self, start: int = 0) -> Iterator[np.ndarray]:
        """Sequence at which each document begins, and the end of the last, int64, in pieces, from number `start` on."""
        return self._array(self._bounds_at + 8 * start, "<i8", max(0, self.num_bounds - start))

    def sequence_ends(self) -> Iterator[np.ndarray]:
        """Token at which each sequence ends, exclusive, int64, in pieces."""
        tokens = 0
        for lengths in self.lengths():
            ends = lengths.cumsum() + tokens
            yield ends
            tokens = int(ends[-1])

    def document_ends(self) -> Iterator[np.ndarray]:
        """Token at which each document that has tokens ends, exclusive, int64, in pieces; where the index is right."""
        return _rising(self._all_ends())

    def _all_ends(self) -> Iterator[np.ndarray]:
        bounds = Ascending(_rising(self.bounds(1)))
        sequences = 0
        for ends in self.sequence_ends():
            yield ends[bounds.take(sequences + len(ends)) - sequences - 1]
            sequences += len(ends)

    def document_of(self, sequence: int) -> int:
        """The document that a sequence belongs to; where the bounds are right."""
        return sum(int(np.searchsorted(piece, sequence, side="right")) for piece in self.bounds()) - 1

    def place_of(self, token: int) -> tuple[int, int]:
        """The document that a token belongs to, and the token's place in it; where the index is right."""
        document = self.document_of(
            sum(int(np.searchsorted(ends, token, side="right")) for ends in self.sequence_ends())
        )
        return document, token - self.document_tokens(document)[0]

    def document_tokens(self, document: int) -> tuple[int, int]:
        """The tokens [first, end) of one document; where the index is right."""
        start, end = (int.from_bytes(self._at(self._bounds_at + 8 * (document + i), 8), "little") for i in (0, 1))
        return self._token_at(start), self._token_at(end)

    def _token_at(self, sequence: int) -> int:
        """The token at which a sequence begins; the end of the last, for their number."""
        last = sequence == self.num_sequences
        if last and not sequence:
            return 0
        pointer = int.from_bytes(self._at(self._pointers_at + 8 * (sequence - last), 8), "little")
        length = int.from_bytes(self._at(HEADER.size + 4 * (sequence - last), 4), "little")
        return pointer // self.dtype.itemsize + (length if last else 0)

    def _array(self, offset: int, dtype: str, count: int) -> Iterator[np.ndarray]:
        itemsize = np.dtype(dtype).itemsize
        try:
            with open(self.path, "rb") as file:
                file.seek(offset)
                while count:
                    wanted = min(count, self.piece)
                    raw = file.read(wanted * itemsize)
                    if len(raw) != wanted * itemsize:
                        raise BrokenData("unreadable", f"{self.path} became shorter while it was read: start again")
                    yield np.frombuffer(raw, dtype=dtype)
                    count -= wanted
        except OSError as error:
            raise BrokenData("unreadable", f"cannot read {self.path}: {error.strerror}") from error


class Ascending:
    """Hands out ascending numbers, which come in pieces, up to one limit after the other."""

    def __init__(self, pieces: Iterator[np.ndarray]) -> None:
        self._pieces = pieces
        self._left = np.empty(0, np.int64)

    def take(self, limit: int) -> np.ndarray:
        """All numbers up to `limit`, itself included, that were not handed out before."""
        found = []
        while True:
            count = int(np.searchsorted(self._left, limit, side="right"))
            found.append(self._left[:count])
            self._left = self._left[count:]
            if len(self._left) or (piece := next(self._pieces, None)) is None:
                return np.concatenate(found)
            self._left = piece


def _rising(pieces: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """Numbers that never fall, without those that are not above the one before; 0 stands before the first."""
    last = 0
    for piece in pieces:
        if len(piece):
            yield piece[np.diff(piece, prepend=last) > 0]
            last = int(piece[-1])
