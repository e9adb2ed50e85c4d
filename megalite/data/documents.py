"""Inputs of text: paths and globs -> files -> documents, of .jsonl (one a line) and of .txt."""

import glob
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NamedTuple

from megalite.errors import UserError

SUFFIXES = (".jsonl", ".txt")
SPLIT_ON = ("none", "blank", "line")


def match_paths(pattern: str) -> list[str]:
    """What a path or glob matches, sorted; an existing path is itself, whatever characters are in it."""
    if os.path.exists(pattern):
        return [pattern]
    return sorted(glob.glob(pattern, recursive=True)) if glob.has_magic(pattern) else []


def expand_inputs(patterns: Sequence[str]) -> list[str]:
    """Files of paths and globs, in the order given, each glob sorted, none twice.

    Raises `UserError` for a missing file, a glob without a match, a directory, a suffix that is not in `SUFFIXES`.
    """
    found: dict[str, str] = {}  # real path -> path as given
    for pattern in patterns:
        matches = match_paths(pattern)
        if not matches:
            raise UserError(f'no file matches "{pattern}"' if glob.has_magic(pattern) else f'no such file: "{pattern}"')
        for path in matches:
            if os.path.isdir(path):
                raise UserError(f'"{path}" is a directory: give its files, as "{path.rstrip("/")}/*{SUFFIXES[0]}"')
            if not os.path.isfile(path):
                raise UserError(f'"{path}" is not a regular file')
            if os.path.splitext(path)[1].lower() not in SUFFIXES:
                raise UserError(f'"{path}" is none of {", ".join(SUFFIXES)}: convert or rename it')
            found.setdefault(os.path.realpath(path), path)
    if not found:
        raise UserError("no input files are given")
    return list(found.values())


def name_files(paths: Sequence[str]) -> str:
    """`"a.txt" and 2 more`: for an error that is about all of them."""
    return f'"{paths[0]}"' + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")


def _is_jsonl(path: str) -> bool:
    return path.lower().endswith(".jsonl")


def parse_document(path: str, line: int, raw: bytes, json_key: str) -> str:
    """The text of one raw document that begins at `line` of `path`: one line of .jsonl, or any part of a .txt.

    Raises `UserError` with file:line for invalid UTF-8, broken JSON, a missing key, no string, a lone surrogate.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line += raw.count(b"\n", 0, error.start)
        raise UserError(f"{path}:{line}: invalid UTF-8 ({error.reason})") from error
    if not _is_jsonl(path):
        return text
    if line == 1:
        text = text.removeprefix("\ufeff")  # a byte order mark is no JSON, but Windows tools write one
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "too deep, or a number too long"
        raise UserError(f"{path}:{line}: broken JSON ({reason})") from error
    if not isinstance(row, dict):
        raise UserError(f'{path}:{line}: not a JSON object with a key "{json_key}"')
    if json_key not in row:
        keys = ", ".join(ascii(key) for key in list(row)[:8]) or "none"
        raise UserError(f'{path}:{line}: no key "{json_key}" (its keys: {keys}); say which with --json-key')
    text = row[json_key]
    if not isinstance(text, str):
        raise UserError(f'{path}:{line}: the value of "{json_key}" is not a string but {type(text).__name__}')
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{path}:{line}: a lone surrogate ({text[error.start]!a}) is not text") from error
    return text


def read_pieces(path: str, json_key: str, size: int) -> Iterator[str]:
    """All text of a file in pieces of up to `size` characters (.txt: up to 2 * size bytes), never all at once."""
    line = 1
    with _open(path) as file:
        if _is_jsonl(path):
            for line, raw in enumerate(file, 1):
                if raw.strip():
                    text = parse_document(path, line, raw, json_key)
                    yield from (text[start : start + size] for start in range(0, len(text), size))
            return
        while raw := file.read(size):
            raw += file.readline(size)  # on to the end of the line, so that few words are cut
            if not raw.endswith(b"\n"):  # nor a character: take the continuation bytes of its last one
                tail = file.read(3)
                taken = len(tail) - len(tail.lstrip(bytes(range(0x80, 0xC0))))
                raw += tail[:taken]
                file.seek(taken - len(tail), os.SEEK_CUR)
            yield parse_document(path, line, raw, json_key)
            line += raw.count(b"\n")


def _open(path: str) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


class RawDocument(NamedTuple):
    path: str
    line: int
    raw: bytes


@dataclass
class InputFile:
    """One input, and what reading it through tells."""

    path: str
    size: int = 0  # bytes
    blank_lines: int = 0  # of .jsonl: skipped, no documents
    digest: Any = field(default_factory=hashlib.sha256)

    def documents(self, split_on: str) -> Iterator[RawDocument]:
        """Its documents, not parsed. A .jsonl line is one; `split_on` says what is one in a .txt:

        none: the whole file, every byte of it; line: each line without its end, blank lines left out; blank: what
        stands between blank lines, without the last line's end.
        """
        with _open(self.path) as file:
            if not _is_jsonl(self.path) and split_on == "none":
                raw = file.read()
                self._count(raw)
                yield RawDocument(self.path, 1, raw)
                return
            paragraph: list[bytes] = []
            line = 0
            for line, raw in enumerate(file, 1):
                self._count(raw)
                blank = not raw.strip()
                if _is_jsonl(self.path):
                    if blank:
                        self.blank_lines += 1
                    else:
                        yield RawDocument(self.path, line, raw)
                elif split_on == "blank" and not blank:
                    paragraph.append(raw)
                elif split_on == "blank" and paragraph:
                    yield RawDocument(self.path, line - len(paragraph), _without_end(b"".join(paragraph)))
                    paragraph = []
                elif not blank:
                    yield RawDocument(self.path, line, _without_end(raw))
            if paragraph:
                yield RawDocument(self.path, line + 1 - len(paragraph), _without_end(b"".join(paragraph)))

    def _count(self, raw: bytes) -> None:
        self.size += len(raw)
        self.digest.update(raw)

    def hashed(self) -> dict[str, str | int]:
        """Its entry in the manifest, by reading it through."""
        with _open(self.path) as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            return {"path": self.path, "bytes": file.tell(), "sha256": sha256}

    def record(self) -> dict[str, str | int]:
        """Its entry in the manifest, once `documents` is through."""
        return {"path": self.path, "bytes": self.size, "sha256": self.digest.hexdigest()}


def _without_end(raw: bytes) -> bytes:
    return raw.removesuffix(b"\n").removesuffix(b"\r")
