"""From bytes to documents: .jsonl (one a line), .txt and .parquet (one a row), of files or of byte ranges of them.

Whatever is wrong with a document is said where it stands, and reading goes on after it: a `Reject`. What is wrong with
a whole file is a `UserError`.
"""

import codecs
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO, NamedTuple

from megalite.data.inputs import DamagedInput, InputFile, open_text
from megalite.data.parquet import read_rows
from megalite.errors import UserError

SPLIT_ON = ("none", "blank", "line")
# Longer lines and paragraphs are rejected: they and what is made of them take many times that in memory.
MAX_LINE = 2**30
BLOCK = 2**20  # bytes that are read at once where lines don't matter
REJECT_BYTES = 2**20  # of a line that is too long, for who wants to see it
BOM = codecs.BOM_UTF8  # Windows tools write one; it is no text

_JSON_TYPES = {
    type(None): "null", bool: "true or false", int: "a number", float: "a number", list: "an array", dict: "an object"
}  # fmt: skip

Cut = Callable[[str], int]
"""The last place in a text, > 0, where it may be cut without changing its tokens; 0: nowhere."""


class Part(NamedTuple):
    """A byte range of a file as it is on disk; all of it, (path, 0, size), unless the file is `divisible`."""

    path: str
    start: int
    end: int


class Piece(NamedTuple):
    """A document; of a long .txt that is one document, a piece of it."""

    line: int
    """Where the document begins, from 1 at the part's first line (see `first_line`); .parquet: the row, from 1."""
    offset: int
    """Byte of the (decompressed) file where the piece begins; .parquet: the row, from 0."""
    texts: tuple[str, ...]
    """One for each JSON key; .txt: one."""
    last: bool
    """Whether the document ends with this piece, which may then be an empty text."""


class Reject(NamedTuple):
    """A document that is none. What was read of a document whose last piece did not come yet is void with it."""

    line: int
    """As `Piece.line`; where the reason has a place of its own, such as a bad byte, the line of that."""
    reason: str
    raw: bytes
    """The line (split_on blank: the paragraph) as it stands, without its end; the first MiB of one that is too long."""


def divisible(file: InputFile, split_on: str) -> bool:
    """Whether any byte range of a file can be read by itself."""
    return not file.compression and (file.format == "jsonl" or (file.format == "txt" and split_on != "none"))


class PartReader:
    """Reads the documents of one part of a file, in order; iterate over it once.

    Lines belong to the part in which they begin. Where `split_on` is "blank", the border between two parts is the first
    blank line that begins at or after the byte border. So any cut of a file into parts gives the same documents.

    `split_on` says what is a document in a .txt: none: the whole file, every byte of it, in pieces that end at a `cut`
    (in one piece where that is None); line: each line without its end, blank lines left out; blank: what stands between
    blank lines, without the last line's end. A .jsonl line of white space is counted, and no document.

    start_offset: go on with the piece that began there (its `offset`), lines counted from there. What follows is the
    same text; where a .txt is read in pieces, they may end elsewhere.

    Raises `UserError` for a file that can't be read, a column that is missing or not text, and several keys of a .txt.
    """

    def __init__(
        self,
        part: Part,
        *,
        json_keys: Sequence[str] = ("text",),
        split_on: str = "none",
        cut: Cut | None = None,
        start_offset: int | None = None,
    ) -> None:
        self.part, self.json_keys, self.split_on, self.cut = part, tuple(json_keys), split_on, cut
        self.file = InputFile(part.path, part.end)
        self.start_offset = start_offset
        if split_on not in SPLIT_ON:
            raise UserError(f'split_on "{split_on}" is none of {", ".join(SPLIT_ON)}')
        if self.file.format == "txt" and len(self.json_keys) != 1:
            raise UserError(f'"{part.path}" has no JSON keys: several need .jsonl or .parquet')
        self.lines = 0
        """Lines consumed; in the end, those that belong to the part."""
        self.blank_lines = 0
        """Of .jsonl: lines of white space."""
        self._stream: BinaryIO | None = None
        self._offset = 0  # of the (decompressed) stream: how far we are
        self._share = 0.0  # of the rows of a .parquet

    @property
    def position(self) -> int:
        """Bytes of the part, as it is on disk, that are consumed; it never falls, and ends at all of them."""
        size = self.part.end - self.part.start
        if self.file.format == "parquet":
            return int(self._share * size)
        if self._stream is None:
            return 0
        if self._stream.closed:
            return size
        done = self._stream.raw.position if self.file.compression else self._offset - self.part.start
        return max(0, min(done, size))

    @property
    def tail(self) -> int:
        """Bytes after the part that were read to end its last line or paragraph."""
        return max(0, self._offset - self.part.end) if divisible(self.file, self.split_on) else 0

    def __iter__(self) -> Iterator[Piece | Reject]:
        if self.file.format == "parquet":
            yield from self._read_rows()
            return
        with open_text(self.file) as self._stream:
            try:
                first = _first_offset(self._stream, self.part, self.split_on, self.start_offset)
                if first is None:
                    return
                self._offset = first
                if self.file.format == "jsonl":
                    yield from self._read_jsonl()
                elif self.split_on == "none":
                    yield from self._read_whole()
                elif self.split_on == "line":
                    yield from self._read_lines()
                else:
                    yield from self._read_paragraphs()
            except DamagedInput as error:
                yield Reject(self.lines + 1, error.reason, b"")
            except OSError as error:
                raise UserError(f"cannot read {self.part.path}: {error.strerror}") from error

    def _owned_lines(self) -> Iterator[tuple[int, bytes]]:
        """(offset, line) of each line that belongs to the part; of one that is too long, MAX_LINE + 1 bytes."""
        readline, paragraphs = self._stream.readline, _has_paragraphs(self.file, self.split_on)
        end = math.inf if self.file.compression else self.part.end
        while self._offset < end or paragraphs:
            raw = readline(MAX_LINE + 1)
            if not raw:
                return
            begin = self._offset
            self._offset += len(raw)
            self.lines += 1
            if len(raw) > MAX_LINE and not raw.endswith(b"\n"):
                self._offset += _skip_line(self._stream)[0]
            yield begin, raw if begin else raw.removeprefix(BOM)
            if begin >= end and _is_blank(raw):  # the border to the next part, of paragraphs
                return

    def _read_jsonl(self) -> Iterator[Piece | Reject]:
        keys = self.json_keys
        for offset, raw in self._owned_lines():
            if len(raw) > MAX_LINE:
                yield _too_long(self.lines, raw)
                continue
            found = _parse_row(raw, keys)
            if isinstance(found, tuple):
                yield Piece(self.lines, offset, found, True)
            elif _is_blank(raw):
                self.blank_lines += 1
            else:
                yield Reject(self.lines, found, _without_end(raw))

    def _read_lines(self) -> Iterator[Piece | Reject]:
        for offset, raw in self._owned_lines():
            if len(raw) > MAX_LINE:
                yield _too_long(self.lines, raw)
            elif not _is_blank(raw):
                yield _document(self.lines, offset, raw)

    def _read_paragraphs(self) -> Iterator[Piece | Reject]:
        paragraph: list[bytes] = []
        begin = line = size = 0
        for offset, raw in itertools.chain(self._owned_lines(), [(0, b"")]):  # a blank line ends the last one too
            if not _is_blank(raw):
                if not paragraph:
                    begin, line, size = offset, self.lines, 0
                size += len(raw)
                if size <= MAX_LINE or not paragraph:
                    paragraph.append(raw)
            elif paragraph:
                whole = b"".join(paragraph)
                yield _document(line, begin, whole) if size <= MAX_LINE else _too_long(line, whole)
                paragraph = []

    def _read_whole(self) -> Iterator[Piece | Reject]:
        decoder = codecs.getincrementaldecoder("utf-8")()
        begin, skipped = self._offset, 0  # where the pending text begins; bytes of it that are no text
        pending: list[str] = []
        characters = wanted = 0
        ended = True  # whether the last line so far has its end
        while raw := self._stream.read(BLOCK):
            if self._offset == 0 and raw.startswith(BOM):
                self._offset = skipped = len(BOM)
                raw = raw[skipped:]
            # A next block is there, so what is pending is not the end. Where there was no place to cut, try again only
            # once there is twice as much, or a long text without any would be searched for ever.
            if self.cut is not None and characters > wanted:
                text = "".join(pending)
                place = self.cut(text)
                if place:
                    yield Piece(1, begin, (text[:place],), False)
                    begin, skipped = begin + skipped + _utf8_size(text[:place]), 0
                pending, characters, wanted = [text[place:]], len(text) - place, 0 if place else 2 * len(text)
            try:
                pending.append(decoder.decode(raw))
            except UnicodeDecodeError as error:
                yield self._bad_byte(error)
                return
            characters += len(pending[-1])
            if characters > MAX_LINE:
                yield Reject(1, "longer than 1 GiB, without a place to cut it: pass --split-on line or blank", b"")
                return
            self._offset += len(raw)
            self.lines += raw.count(b"\n")
            ended = raw.endswith(b"\n")
        try:
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            yield self._bad_byte(error)
            return
        self.lines += not ended
        yield Piece(1, begin, ("".join(pending),), True)

    def _bad_byte(self, error: UnicodeDecodeError) -> Reject:
        line = self.lines + 1 + error.object.count(b"\n", 0, error.start)
        raw = error.object[error.object.rfind(b"\n", 0, error.start) + 1 :].split(b"\n", 1)[0]
        return Reject(line, f"invalid UTF-8 ({error.reason})", _without_end(raw))

    def _read_rows(self) -> Iterator[Piece | Reject]:
        for row, total, found in read_rows(self.part.path, self.json_keys, self.start_offset or 0):
            self.lines = row + 1
            self._share = self.lines / total
            if isinstance(found, tuple):
                yield Piece(row + 1, row, found, True)
            else:
                yield Reject(row + 1, found, b"")
        self._share = 1.0


def first_line(part: Part, line: int, split_on: str, start_offset: int | None = None) -> int:
    """The line of the file, from 1, that a reader of a part calls `line`. Reads all that is before the part."""
    file = InputFile(part.path, part.end)
    if file.format == "parquet" or not (part.start or start_offset):
        return line
    with open_text(file) as stream:
        left = _first_offset(stream, part, split_on, start_offset) or 0
    with open_text(file) as stream:
        while left and (raw := stream.read(min(left, BLOCK))):
            left -= len(raw)
            line += raw.count(b"\n")
    return line


def read_pieces(file: InputFile, json_key: str, size: int) -> Iterator[str]:
    """All text of a file in pieces of up to `size` characters, never all of it at once.

    Raises `UserError` with file:line for a document that is none.
    """
    for piece in PartReader(Part(file.path, 0, file.size), json_keys=(json_key,), cut=len):
        if isinstance(piece, Reject):
            raise UserError(f"{file.path}:{piece.line}: {piece.reason}")
        text = piece.texts[0]
        yield from (text[start : start + size] for start in range(0, len(text), size))


def _first_offset(stream: BinaryIO, part: Part, split_on: str, start_offset: int | None) -> int | None:
    """Move a stream to the first line that belongs to a part, and say where that is; None if there is none."""
    file = InputFile(part.path, part.end)
    if start_offset is not None:
        if not file.compression:
            return stream.seek(start_offset)
        left = start_offset
        while left and (raw := stream.read(min(left, BLOCK))):
            left -= len(raw)
        return start_offset
    if not divisible(file, split_on):
        return 0
    offset = part.start
    if offset == 0 or offset >= part.end:
        return offset if offset < part.end else None
    stream.seek(offset - 1)
    offset += _skip_line(stream, part.end - offset + 1)[0] - 1
    if not _has_paragraphs(file, split_on):
        return offset if offset < part.end else None
    while offset < part.end:
        size, blank = _skip_line(stream, part.end - offset)
        offset += size
        if blank:
            return offset if size else None
    return None


def _skip_line(stream: BinaryIO, enough: float = math.inf) -> tuple[int, bool]:
    """Read to the end of a line, or through `enough` bytes of one that is not blank: (bytes read, whether it is blank).

    Lines of any length take no more than BLOCK bytes of memory.
    """
    size, blank = 0, True
    while raw := stream.readline(BLOCK):
        size += len(raw)
        blank = blank and _is_blank(raw)
        if raw.endswith(b"\n") or (size >= enough and not blank):
            break
    return size, blank


def _has_paragraphs(file: InputFile, split_on: str) -> bool:
    return file.format == "txt" and split_on == "blank"


def _is_blank(raw: bytes) -> bool:
    return not raw or raw.isspace()


def _without_end(raw: bytes) -> bytes:
    return raw.removesuffix(b"\n").removesuffix(b"\r")


def _utf8_size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _too_long(line: int, raw: bytes) -> Reject:
    return Reject(line, "longer than 1 GiB", raw[:REJECT_BYTES])


def _document(line: int, offset: int, raw: bytes) -> Piece | Reject:
    """Lines of a .txt, the first of them `line`, as one document."""
    raw = _without_end(raw)
    try:
        return Piece(line, offset, (raw.decode("utf-8"),), True)
    except UnicodeDecodeError as error:
        return Reject(line + raw.count(b"\n", 0, error.start), f"invalid UTF-8 ({error.reason})", raw)


def _parse_row(raw: bytes, keys: Sequence[str]) -> tuple[str, ...] | str:
    """The texts of a line of .jsonl, or in words why it has none."""
    try:
        row = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return f"invalid UTF-8 ({error.reason})"
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "too deep, or a number too long"
        return f"broken JSON ({reason})"
    if not isinstance(row, dict):
        return f'not a JSON object with a key "{keys[0]}"'
    for key in keys:
        if key not in row:
            names = ", ".join(ascii(name) for name in list(row)[:8]) or "none"
            return f'no key "{key}" (its keys: {names}); say which with --json-key'
        text = row[key]
        if not isinstance(text, str):
            return f'the value of "{key}" is {_JSON_TYPES[type(text)]}, not a string'
        if b"\\u" in raw and not text.isascii():  # UTF-8 has no surrogates, so only an escape can make one
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                return f"a lone surrogate ({text[error.start]!a}) is not text"
    return tuple([row[key] for key in keys])
