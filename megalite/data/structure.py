"""The structure of a PREFIX.bin/.idx pair, checked to the last pointer, and the names of what writers get wrong.

The peers' faults come from their sources: Megatron-LM megatron/core/datasets/indexed_dataset.py, gpt-neox and
Megatron-DeepSpeed megatron/data/indexed_dataset.py and their preprocess_data.py. Sequences, documents and tokens are
numbered from 0.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megalite.data.index_file import FLOATS, BrokenData, IndexFile


class Finding(NamedTuple):
    """One thing that was noticed; `kind` is a word to match on, `message` one line: what, where, what to do."""

    kind: str
    message: str


@dataclass
class Report:
    """What `validate` found about one pair; counts are None where the files don't tell."""

    prefix: str
    dtype: str | None = None
    documents: int | None = None
    sequences: int | None = None
    tokens: int | None = None
    bytes: int | None = None  # of .bin
    writer: str | None = None
    manifest: dict | None = None
    faults: list[Finding] = field(default_factory=list)
    warnings: list[Finding] = field(default_factory=list)
    deep: dict[str, Any] | None = None
    readable: bool = False  # documents can be found in it: index and .bin are right, whatever else isn't

    @property
    def ok(self) -> bool:
        return not self.faults

    def fault(self, kind: str, message: str) -> None:
        self.faults.append(Finding(kind, message))

    def warn(self, kind: str, message: str) -> None:
        self.warnings.append(Finding(kind, message))

    def as_json(self) -> dict[str, Any]:
        """For `json.dumps`: without the manifest, which is a file of its own."""
        content = {"prefix": self.prefix, "ok": self.ok} | asdict(self)
        content["manifest"] = self.manifest is not None
        return content | {key: [each._asdict() for each in getattr(self, key)] for key in ("faults", "warnings")}


def check_structure(report: Report, index: IndexFile, bin_path: Path) -> None:
    """Fill in counts, faults and warnings from an index and the size of its .bin, `report.bytes`.

    Raises `BrokenData` for an index of no integer type.
    """
    report.sequences, report.documents = index.num_sequences, max(0, index.num_bounds - 1)
    if index.dtype is None:
        raise _not_integers(report, index)
    report.dtype = index.dtype.name
    cut = _check_sequences(report, index)
    filled = _check_bounds(report, index)
    if report.ok:
        _check_bin_size(report, index, bin_path, filled, cut)


def _not_integers(report: Report, index: IndexFile) -> BrokenData:
    if index.code not in FLOATS:
        return BrokenData("dtype", f"{index.path} has dtype code {index.code}, which no writer uses: build it again")
    tokens = sum(int(piece.sum()) for piece in index.lengths())
    writer = {4: {6: "gpt-neox", 7: "Megatron-LM"}, 8: {6: "Megatron-LM", 7: "gpt-neox"}}
    size = next((size for size in writer if tokens and report.bytes == size * tokens), None)
    report.writer = writer[size][index.code] if size else None
    detail = f"as {report.writer} writes floats of {8 * size} bits, by the size of its .bin" if size else "a float"
    return BrokenData(
        "float",
        f"{index.path} has dtype code {index.code}, {detail} (gpt-neox swaps codes 6 and 7): "
        "it holds no token ids, give another",
    )


def _check_sequences(report: Report, index: IndexFile) -> int | None:
    """Lengths and pointers; returns the first sequence that doesn't lie whole in .bin."""
    itemsize = index.dtype.itemsize
    fitting = {1, 2, 4, 8}  # sizes of a token that all pointers follow from
    negative = wrong = cut = None
    tokens = first = empty = 0
    for lengths, pointers in zip(index.lengths(), index.pointers(), strict=True):
        ends = lengths.cumsum() + tokens
        starts = ends - lengths
        fitting = {size for size in fitting if np.array_equal(pointers, starts * size)}
        if wrong is None and itemsize not in fitting:
            i = int((pointers != starts * itemsize).argmax())
            wrong = first + i, int(pointers[i]), int(starts[i]) * itemsize
        if negative is None and lengths.min() < 0:
            negative = first + int((lengths < 0).argmax()), int(lengths[lengths < 0][0])
        if cut is None and ends[-1] * itemsize > report.bytes:
            cut = first + int((ends * itemsize > report.bytes).argmax())
        empty += int((lengths == 0).sum())
        tokens, first = int(ends[-1]), first + len(lengths)
    report.tokens = tokens
    if negative:
        report.tokens = None
        report.fault(
            "negative-length",
            f"{index.path}: sequence {negative[0]} has the length {negative[1]}; build the data again",
        )
    elif wrong and fitting:
        report.fault(
            "dtype",
            f"{index.path} says {index.dtype.name}, but its pointers are those of tokens of {min(fitting)} byte(s): "
            "its header is damaged; build the data again",
        )
    elif wrong and wrong[1] == 0:
        report.fault(
            "two-indexes",
            f"{index.path}: its pointers begin again at 0 at sequence {wrong[0]}: two indexes were joined without "
            "shifting the second's; join the pairs with tools/merge_data.py",
        )
    elif wrong:
        report.fault(
            "pointers",
            f"{index.path}: sequence {wrong[0]} begins at byte {wrong[1]:,} by its pointer, but at {wrong[2]:,} by the "
            "lengths before it: gaps or another order are not read; build the data again",
        )
    elif empty:
        report.warn("empty-sequences", f"{index.path} has {empty:,} sequence(s) without a token")
    return cut


def _check_bounds(report: Report, index: IndexFile) -> int:
    """Document bounds; returns the number of documents that have a sequence."""
    number, last, filled, several = 0, 0, 0, 0
    path, again = index.path, "; build the data again"
    if index.num_bounds == 1 and index.num_sequences:
        report.writer = "gpt-neox or an old Megatron-LM (merge_datasets)"
        report.fault(
            "no-document-bounds",
            f"{path} has no document bounds for its {index.num_sequences:,} sequences, as merge_datasets of gpt-neox "
            "and of old Megatron-LM leaves it: merge the parts again, with tools/merge_data.py",
        )
        return 0
    for bounds in index.bounds():
        steps = np.diff(bounds, prepend=last)
        if number == 0 and bounds[0] != 0:
            report.fault("bounds", f"{path}: its first document begins at sequence {bounds[0]}, not 0{again}")
            return 0
        if (steps < 0).any():
            document = number + int((steps < 0).argmax())
            report.fault("bounds", f"{path}: document {document} begins before the one in front of it{again}")
            return 0
        filled, several = filled + int((steps > 0).sum()), several + int((steps > 1).sum())
        number, last = number + len(bounds), int(bounds[-1])
    if index.num_bounds == 0 or last != index.num_sequences:
        report.fault(
            "bounds",
            f"{path}: its documents end at sequence {last:,}, but it has {index.num_sequences:,} sequences{again}",
        )
        return 0
    if empty := report.documents - filled:
        report.warn("empty-documents", f"{path} has {empty:,} document(s) without a sequence")
    if several:
        report.warn(
            "several-sequences",
            f"{path} has {several:,} document(s) of several sequences (sentences): they are read as one text",
        )
    return filled


def _check_bin_size(report: Report, index: IndexFile, bin_path: Path, filled: int, cut: int | None) -> None:
    itemsize = index.dtype.itemsize
    surplus = report.bytes - report.tokens * itemsize
    what = f"{bin_path} has {report.bytes:,} bytes, but {index.path} describes {report.tokens * itemsize:,}"
    if surplus < 0:
        report.fault(
            "truncated-bin",
            f"{what}: it is truncated, or from another run; document {index.document_of(cut):,} (from 0) of "
            f"{report.documents:,} is the first that is cut; build both again",
        )
    elif surplus and surplus in (filled * itemsize, index.num_sequences * itemsize):
        each = "documents" if surplus == filled * itemsize else "sequences"
        token = _token_left_out(
            bin_path, index, index.document_ends() if each == "documents" else index.sequence_ends()
        )
        if token is None:
            report.fault("trailing-bin", f"{what}: it is from another run, or bytes were added; build both again")
            return
        report.writer = "Megatron-DeepSpeed (--append-eod)"
        report.fault(
            "eod-left-out",
            f"{what}: one token less for each of {surplus // itemsize:,} {each}, the end token {token}, as "
            "Megatron-DeepSpeed's preprocess_data.py --append-eod writes it; every document but the first would begin "
            "too early: tokenize the text again, with tools/preprocess_data.py",
        )
    elif surplus:
        report.fault("trailing-bin", f"{what}: it is from another run, or bytes were added; build both again")


def _token_left_out(bin_path: Path, index: IndexFile, ends: Iterator[np.ndarray]) -> int | None:
    """The id that stands after each of `ends`, which leave it out, if it is the same after the first few thousand."""
    found = set()
    with open(bin_path, "rb") as file:
        for number, end in enumerate(islice((int(end) for piece in ends for end in piece), 4096)):
            file.seek((end + number) * index.dtype.itemsize)
            found.add(file.read(index.dtype.itemsize))
    return int(np.frombuffer(found.pop(), index.dtype)[0]) if len(found) == 1 else None


def require_file(path: Path) -> None:
    if path.is_file():
        return
    prefix = path.with_suffix("")
    if path.suffix == ".idx" and prefix.is_dir():
        raise BrokenData("missing", f'{prefix} is a directory: give PREFIX, or "{prefix}/*.idx"')
    what = "is not a regular file" if path.exists() else "is missing"
    raise BrokenData("missing", f"{path} {what}: indexed data is a pair PREFIX.bin and PREFIX.idx")
