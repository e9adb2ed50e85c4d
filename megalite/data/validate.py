"""What is wrong with a PREFIX.bin/.idx pair: structure and sizes always, contents when asked, documents to look at.

Every file is read in pieces and believed in nothing, so that a damaged or hostile one costs a line and no memory.
Documents and tokens are numbered from 0.
"""

import glob
import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from megalite.data.index_file import Ascending, BrokenData, IndexFile
from megalite.data.indexed import data_prefix, pair_paths
from megalite.data.progress import Progress
from megalite.data.structure import Report, check_structure, require_file
from megalite.data.tokenizer import Tokenizer
from megalite.errors import UserError

CHUNK_BYTES = 8 << 20
MANIFEST_BYTES = 1 << 28  # a million inputs take half of it
SHOW_TOKENS, SHOW_CHARACTERS = 200, 500


def expand_prefixes(patterns: Sequence[str]) -> list[str]:
    """Prefixes of PREFIX, PREFIX.bin, PREFIX.idx or globs, in the order given, each glob sorted and by its .idx files.

    Raises `UserError` for a glob that matches no .idx. A prefix that isn't there is none of this function's business.
    """
    found = []
    for pattern in patterns:
        if not glob.has_magic(pattern) or os.path.exists(f"{data_prefix(pattern)}.idx"):
            found.append(data_prefix(pattern))
            continue
        matches = sorted(path for path in glob.glob(pattern, recursive=True) if path.endswith(".idx"))
        if not matches:
            raise UserError(f'no .idx file matches "{pattern}"')
        found += map(data_prefix, matches)
    return found


def validate(
    prefix: str | Path,
    *,
    deep: bool = False,
    vocab_size: int | None = None,
    eod_id: int | None = None,
    tokenizer: Tokenizer | None = None,
    progress: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
) -> Report:
    """Check one pair's structure and sizes; `deep` reads all of it too: hashes, ids below the vocabulary, EOD endings.

    The vocabulary and the EOD come from the argument, else the tokenizer, else the manifest. Never raises for what is
    in the files: faults are in the report.
    """
    report = Report(data_prefix(prefix))
    bin_path, idx_path, manifest_path = pair_paths(report.prefix)
    try:
        for path in (idx_path, bin_path):
            require_file(path)
        report.bytes = bin_path.stat().st_size
        index = IndexFile(idx_path, max(1, chunk_bytes // 8))
        check_structure(report, index, bin_path)
        report.readable = report.ok
        report.writer = report.writer or "Megatron-LM, gpt-neox or Megatron-DeepSpeed (their files are alike)"
        _check_manifest(report, manifest_path, tokenizer)
        if deep and report.readable:
            known = report.manifest or {}
            vocab_size = vocab_size or (tokenizer.vocab_size if tokenizer else _count(known, "vocab_size"))
            if eod_id is None:
                eod_id = tokenizer.eod_id if tokenizer else _count(known, "eod_id")
            _check_contents(report, index, bin_path, _Tally(vocab_size, eod_id), progress, chunk_bytes)
    except BrokenData as error:
        report.fault(error.kind, str(error))
    except OSError as error:
        report.fault("unreadable", f"cannot read {error.filename or report.prefix}: {error.strerror}")
    return report


def _count(manifest: dict, key: str) -> int | None:
    value = manifest.get(key)
    return value if type(value) is int and value >= 0 else None


def _check_manifest(report: Report, path: Path, tokenizer: Tokenizer | None) -> None:
    if not path.exists():
        return
    again = "build the data again, or remove it"
    try:
        require_file(path)
        if path.stat().st_size > MANIFEST_BYTES:
            raise ValueError("too long")
        manifest = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        report.fault("manifest", f"{path} is not readable JSON: {again}")
        return
    if not isinstance(manifest, dict):
        report.fault("manifest", f"{path} is not a JSON object: {again}")
        return
    report.manifest = manifest
    report.writer = "MegaLite (merged)" if "merged_from" in manifest else "MegaLite"
    for key in ("tokens", "documents", "dtype"):
        if (found := getattr(report, key)) is not None and manifest.get(key) != found:
            says = repr(manifest.get(key))[:40]
            report.fault("manifest", f"{path} says {key} = {says}, but the files have {found}: {again}")
    for key in ("bin_sha256", "idx_sha256", "tokenizer_sha256"):
        if key in manifest and not (isinstance(manifest[key], str) and re.fullmatch("[0-9a-f]{64}", manifest[key])):
            report.fault("manifest", f"{path}: {key} is not a SHA-256: {again}")
    for key in ("vocab_size", "eod_id"):
        if key in manifest and _count(manifest, key) is None:
            report.fault("manifest", f"{path}: {key} is not a number of 0 or more: {again}")
    if tokenizer and manifest.get("tokenizer_sha256", tokenizer.sha256) != tokenizer.sha256:
        report.fault(
            "tokenizer",
            f"{path} names another tokenizer than the one in {tokenizer.folder}: give the one it was made with",
        )


# --------------------------------------------------------------------------------------------------------- contents


@dataclass
class _Tally:
    """What one pass over the tokens finds; places are numbers of tokens in the .bin."""

    vocab_size: int | None
    eod_id: int | None
    tokens: int = 0
    documents: int = 0  # that have tokens
    ended: int = 0  # of them, by EOD
    eods: int = 0  # wherever they stand
    outside: int = 0
    ids: tuple[int, int] | None = None  # lowest, highest
    last_ids: tuple[int, int] | None = None  # the same, of the documents' last tokens
    first_outside: tuple[int, int] | None = None  # place, id
    first_open: int | None = None  # the place of the first last token that is no EOD

    def add(self, tokens: np.ndarray, lasts: np.ndarray) -> None:
        """The next tokens, and the places of those among them that end a document."""
        self.ids = _widen(self.ids, tokens)
        if self.ids[0] < 0 or (self.vocab_size is not None and self.ids[1] >= self.vocab_size):
            outside = tokens < 0
            if self.vocab_size is not None:
                outside |= tokens >= self.vocab_size
            self.outside += int(outside.sum())
            if self.first_outside is None:
                self.first_outside = self.tokens + int(outside.argmax()), int(tokens[outside.argmax()])
        final = tokens[lasts - self.tokens]
        self.documents += len(final)
        self.last_ids = _widen(self.last_ids, final)
        if self.eod_id is not None:
            is_eod = final == self.eod_id
            self.ended += int(is_eod.sum())
            self.eods += int((tokens == self.eod_id).sum())
            if self.first_open is None and not is_eod.all():
                self.first_open = int(lasts[is_eod.argmin()])
        self.tokens += len(tokens)

    def counts(self) -> dict[str, int | None]:
        lowest, highest = self.ids or (None, None)
        known, last = self.eod_id is not None, self.last_ids
        return {
            "vocab_size": self.vocab_size,
            "lowest_id": lowest,
            "highest_id": highest,
            "ids_outside": self.outside,
            "eod_id": self.eod_id,
            "documents_with_tokens": self.documents,
            "documents_ending_in_eod": self.ended if known else None,
            "eod_inside_documents": self.eods - self.ended if known else None,
            "same_last_id": last[0] if last and last[0] == last[1] else None,
        }


def _widen(span: tuple[int, int] | None, values: np.ndarray) -> tuple[int, int] | None:
    """(lowest, highest) of `span` and `values`."""
    if not len(values):
        return span
    both = [int(values.min()), int(values.max()), *(span or ())]
    return min(both), max(both)


def _check_contents(
    report: Report, index: IndexFile, bin_path: Path, tally: _Tally, progress: bool, chunk_bytes: int
) -> None:
    """Hashes, the range of ids, and the tokens that documents end with; one pass over .bin and the index."""
    itemsize = index.dtype.itemsize
    digest, ends = hashlib.sha256(), Ascending(index.document_ends())
    bar = Progress("reading", report.bytes, show=progress)
    with open(bin_path, "rb") as file:
        while tally.tokens < report.tokens:
            count = min(max(1, chunk_bytes // itemsize), report.tokens - tally.tokens)
            tokens = _read_tokens(file, bin_path, index, count)
            digest.update(tokens)
            tally.add(tokens, ends.take(tally.tokens + count) - 1)
            bar.set(tally.tokens * itemsize)
    bar.close()
    with open(index.path, "rb") as file:
        idx_sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    report.deep = {"bin_sha256": digest.hexdigest(), "idx_sha256": idx_sha256} | tally.counts()
    for key, path in (("bin_sha256", bin_path), ("idx_sha256", index.path)):
        if (report.manifest or {}).get(key, report.deep[key]) != report.deep[key]:
            report.fault(
                key, f"{path} differs from the {key} in its manifest: it is damaged or changed; build it again"
            )
    _check_ids(report, index, bin_path, tally)
    _check_endings(report, index, bin_path, tally)


def _check_ids(report: Report, index: IndexFile, bin_path: Path, tally: _Tally) -> None:
    size = tally.vocab_size
    if size is not None and size - 1 > np.iinfo(index.dtype).max:
        report.warn("dtype", f"{index.path}: {index.dtype.name} can't hold a vocabulary of {size:,}: ids may be cut")
    if tally.first_outside:
        document, place = index.place_of(tally.first_outside[0])
        wrong = f"not below the vocabulary of {size:,}" if tally.first_outside[1] >= 0 else "negative"
        report.fault(
            "vocabulary",
            f"{bin_path}: token {place:,} of document {document:,} is {tally.first_outside[1]}, {wrong} "
            f"({tally.outside:,} such in all): damaged, or made with another tokenizer",
        )


def _check_endings(report: Report, index: IndexFile, bin_path: Path, tally: _Tally) -> None:
    if tally.first_open is not None:
        counts = (
            f"{bin_path}: {tally.ended:,} of {tally.documents:,} documents end in the EOD {tally.eod_id}, document "
            f"{index.place_of(tally.first_open)[0]:,} is the first that doesn't"
        )
        if (report.manifest or {}).get("append_eod") is True:
            report.fault("eod", f"{counts}, and its manifest says that all do: it is damaged; build it again")
        elif tally.ended:
            report.warn("eod", f"{counts}: a mix of sources with and without, or another EOD")
    if tally.eods > tally.ended:
        inside = tally.eods - tally.ended
        report.warn("eod-inside", f"{bin_path} has the EOD {tally.eod_id} {inside:,} time(s) inside documents")


def _read_tokens(file: BinaryIO, path: Path, index: IndexFile, count: int) -> np.ndarray:
    raw = file.read(count * index.dtype.itemsize)
    if len(raw) != count * index.dtype.itemsize:
        raise BrokenData("unreadable", f"{path} became shorter while it was read: start again")
    return np.frombuffer(raw, index.dtype)


# ------------------------------------------------------------------------------------------------------------- show


class Shown(NamedTuple):
    """One document, decoded as far as it is shown; safe to print."""

    document: int
    tokens: int
    text: str


def show_documents(report: Report, tokenizer: Tokenizer, count: int) -> list[Shown]:
    """The first `count` documents of a pair without a fault in its structure, and as many spread over the others.

    Long ones are cut, and what a terminal might obey is escaped.
    """
    bin_path, idx_path, _ = pair_paths(report.prefix)
    index = IndexFile(idx_path)
    others = report.documents - count
    numbers = list(range(min(count, report.documents)))
    numbers += sorted({count + others * i // count for i in range(count)}) if others > 0 else []
    shown = []
    with open(bin_path, "rb") as file:
        for number in numbers:
            start, end = index.document_tokens(number)
            file.seek(start * index.dtype.itemsize)
            ids = _read_tokens(file, bin_path, index, min(end - start, SHOW_TOKENS))
            text = _decode(tokenizer, ids.tolist())
            cut = end - start > SHOW_TOKENS or len(text) > SHOW_CHARACTERS
            shown.append(Shown(number, end - start, text[:SHOW_CHARACTERS] + " ..." * cut))
    return shown


def _decode(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The text of ids, of which some may be none of the tokenizer's, in printable characters."""
    known = groupby(ids, lambda token: 0 <= token < tokenizer.vocab_size)
    text = "".join(
        tokenizer.decode([*run]) if good else "".join(f"<id {token}>" for token in run) for good, run in known
    )
    # isprintable is false for controls, line ends, and the marks that turn the direction of writing.
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
