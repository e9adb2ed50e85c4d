"""From the shards of tasks to the final files: all documents in order or shuffled, in one pair or two for each key."""

import hashlib
import json
import mmap
import os
import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np

from megalite.data.indexed import PairWriter, staged, token_dtype
from megalite.data.inputs import InputFile, name_files
from megalite.data.journal import Task, WorkFolder, check_unchanged, combine, hash_file, shard_name
from megalite.data.permutation import KeyedPermutation
from megalite.data.progress import Progress
from megalite.data.workers import Job
from megalite.errors import UserError

BLOCK_BYTES = 8 * 2**20  # of tokens, written at once


class Split:
    """Puts a document into the first part (0) or the second (1) by its number and a seed, as in "98,2".

    With f the second part's share, numbers fall into strata of 1/f documents and one of each, chosen by a hash, goes to
    the second part: the shares hold to within one document, and no period in the data can line up with the choice.
    """

    def __init__(self, text: str, seed: int) -> None:
        self.text, self.seed = text, seed
        try:
            first, second = (Fraction(part.strip()) for part in text.split(","))
        except (ValueError, ZeroDivisionError):
            first = second = Fraction(0)
        if first <= 0 or second <= 0:
            raise UserError(f'split "{text}" is not two positive numbers, such as 98,2')
        self.share = (second / (first + second)).limit_denominator(10**6)  # 10^12 documents times that fit 64 bits
        if not 0 < self.share < 1:
            raise UserError(f'split "{text}" has a share of less than one in a million')
        self.key = int.from_bytes(hashlib.blake2b(f"megalite split {seed}".encode(), digest_size=8).digest(), "little")

    def __call__(self, numbers: np.ndarray) -> np.ndarray:
        """0 or 1 for each of the documents `numbers`, int64 [n]."""
        top, bottom = self.share.numerator, self.share.denominator
        strata = numbers * top // bottom
        starts, ends = -(-strata * bottom // top), -(-(strata + 1) * bottom // top)
        # The finalizer of SplitMix64, as in permutation.KeyedPermutation.
        z = strata.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(self.key)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
        chosen = starts + (z % (ends - starts).astype(np.uint64)).astype(np.int64)
        return (numbers == chosen).astype(np.int8)


@dataclass(frozen=True)
class BuildSummary:
    """One pair of files that `build_indexed` made, or found up to date."""

    prefix: str
    documents: int
    tokens: int
    text_bytes: int  # UTF-8, of the documents
    empty_documents: int  # left out, over all of the input
    blank_lines: int  # of .jsonl, skipped, over all of the input
    rejects: int  # left out with on_error "skip", over all of the input
    up_to_date: bool


@dataclass(frozen=True)
class Output:
    """One pair that is to be written: `part` (0 or 1, of a split) of the documents of json key number `key`."""

    prefix: str
    key: int
    part: int
    facts: dict  # of the manifest; what is there and has others is not this


@dataclass(frozen=True)
class Build:
    """One call of `tokenize.build_indexed`: what is built of what, and how."""

    job: Job
    folder: WorkFolder
    files: list[InputFile]
    tasks: list[Task]
    outputs: list[Output]
    split: Split | None
    shuffle_seed: int | None
    max_reject_fraction: float
    workers: int
    show: bool
    """Whether to report progress."""

    def input_entry(self, file: InputFile, content: dict) -> dict[str, str | int | None]:
        """The manifest's entry of an input; content: what `hash_file` gives."""
        return {"path": self.job.name(file.path), "bytes": file.size, **content}


class Shards:
    """The shards of one json key, one after another: documents 0 .. `count` - 1, at most `limit` of them."""

    def __init__(self, folder: Path, key: int, entries: Sequence[dict], limit: int | None) -> None:
        self.folder, self.key = folder, key
        self.numbers = [entry["task"] for entry in entries]
        counts = [entry["shards"][key]["documents"] for entry in entries]
        self.firsts = np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))
        self.count = int(self.firsts[-1]) if limit is None else min(limit, int(self.firsts[-1]))

    def sizes(self, shard: int) -> np.ndarray:
        """i64 [n, 2] of its documents: tokens and bytes of text; the ones beyond `count` left out."""
        sizes = np.fromfile(self.folder / shard_name(self.numbers[shard], self.key, "docs"), dtype="<i8").reshape(-1, 2)
        return sizes[: max(0, self.count - int(self.firsts[shard]))]

    def tokens(self, shard: int) -> memoryview:
        """Its tokens, mapped."""
        with open(self.folder / shard_name(self.numbers[shard], self.key, "bin"), "rb") as file:
            if not file.seek(0, 2):
                return memoryview(b"")
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def write_in_order(
    shards: Shards, pairs: Sequence[PairWriter], split: Split | None, report: Callable[[int], None]
) -> None:
    """Write all documents to the pairs that they belong to, in their order. report(bytes of tokens written)."""
    itemsize = pairs[0].dtype.itemsize
    for shard in range(len(shards.numbers)):
        sizes, tokens = shards.sizes(shard), shards.tokens(shard)
        if not len(sizes):
            continue
        numbers = int(shards.firsts[shard]) + np.arange(len(sizes))
        part = np.zeros(len(sizes), dtype=np.int8) if split is None else split(numbers)
        ends = np.cumsum(sizes[:, 0]) * itemsize
        # A run ends where the part changes, and where it has filled a block.
        border = np.diff(part) != 0
        border |= np.diff(ends // BLOCK_BYTES) != 0
        borders = [0, *(np.flatnonzero(border) + 1).tolist(), len(sizes)]
        for first, after in pairwise(borders):
            start, end = (int(ends[first - 1]) if first else 0), int(ends[after - 1])
            pairs[part[first]].write(tokens[start:end], sizes[first:after, 0], sizes[first:after, 1])
            report(end - start)


def write_shuffled(
    shards: Shards, pairs: Sequence[PairWriter], split: Split | None, seed: int, report: Callable[[int], None]
) -> None:
    """The same in an order that the seed gives: document perm(j) comes j-th, whichever part it belongs to.

    Memory: the operating system's cache of what is mapped, and a block; a table of 24 bytes a document is mapped too.
    """
    if not shards.count:
        return
    itemsize = pairs[0].dtype.itemsize
    table_path = shards.folder / "table.tmp"
    with open(table_path, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, 24 * shards.count)  # a full disk ends a process that writes what is mapped
    _allow_files(len(shards.numbers))
    table = np.memmap(
        table_path, dtype="<i8", mode="w+", shape=(shards.count, 3)
    )  # start in its shard, end, text bytes
    for shard in range(len(shards.numbers)):
        sizes = shards.sizes(shard)
        rows = table[int(shards.firsts[shard]) : int(shards.firsts[shard]) + len(sizes)]
        rows[:, 1] = np.cumsum(sizes[:, 0]) * itemsize
        rows[:, 0] = rows[:, 1] - sizes[:, 0] * itemsize
        rows[:, 2] = sizes[:, 1]
    maps = [shards.tokens(shard) for shard in range(len(shards.numbers))]
    for documents in _blocks(shards.count, seed):
        rows = np.asarray(table[documents])
        where = np.searchsorted(shards.firsts, documents, side="right") - 1
        part = np.zeros(len(documents), dtype=np.int8) if split is None else split(documents)
        for k, pair in enumerate(pairs):
            mine = np.flatnonzero(part == k).tolist()
            views = [maps[where[i]][rows[i, 0] : rows[i, 1]] for i in mine]
            for first, after in _runs([len(view) for view in views]):
                chosen = rows[mine[first:after]]
                lengths = (chosen[:, 1] - chosen[:, 0]) // itemsize
                block = views[first] if after == first + 1 else b"".join(views[first:after])
                pair.write(block, lengths, chosen[:, 2])
                report(len(block))
    del table
    table_path.unlink()


def _allow_files(count: int) -> None:
    """Raise the limit of open files where `count` more would pass it: what is mapped counts too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 100
    if soft >= wanted or soft == resource.RLIM_INFINITY:
        return
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise UserError(
            f"shuffling needs {wanted} open files, but at most {hard} are allowed: raise that (ulimit -Hn) and run the "
            "same command again to go on"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _blocks(count: int, seed: int, size: int = 65536) -> Iterator[np.ndarray]:
    """perm(0), perm(1), ... in arrays of at most `size`."""
    order = KeyedPermutation(count, seed, 0)
    for start in range(0, count, size):
        yield np.array([order(j) for j in range(start, min(start + size, count))], dtype=np.int64)


def _runs(sizes: list[int]) -> Iterator[tuple[int, int]]:
    """Ranges that together have all of `sizes`, each of at most BLOCK_BYTES or of one element."""
    first = total = 0
    for i, size in enumerate(sizes):
        if i > first and total + size > BLOCK_BYTES:
            yield first, i
            first, total = i, 0
        total += size
    if sizes:
        yield first, len(sizes)


def write_rejects(path: Path, folder: Path, entries: Sequence[dict], names: Callable[[int, int], str]) -> int:
    """Stage PREFIX.rejects.jsonl, with absolute line numbers; returns how many. names(task, part) -> the input's name.

    Without any, nothing is staged. Raises OSError.
    """
    before: dict[str, int] = {}  # lines of an input's earlier parts
    total = 0
    with ExitStack() as stack:
        out = None
        for entry in entries:
            found: dict[int, list[dict]] = {}
            if entry["rejects"]:
                for line in (folder / shard_name(entry["task"], 0, "rejects")).read_bytes().splitlines():
                    reject = json.loads(line)
                    found.setdefault(reject["part"], []).append(reject)
            for index, lines in enumerate(part["lines"] for part in entry["parts"]):
                name = names(entry["task"], index)
                for reject in found.get(index, ()):
                    out = out or stack.enter_context(open(staged(path), "wb"))
                    row = {
                        "file": name,
                        "line": before.get(name, 0) + reject["line"],
                        "reason": reject["reason"],
                        "raw": reject["raw"],
                    }
                    out.write(json.dumps(row).encode() + b"\n")
                    total += 1
                before[name] = before.get(name, 0) + lines
    return total


def assemble(build: Build, entries: list[dict]) -> list[BuildSummary]:
    """From the shards of `entries` (those of the first tasks, in order) to final names. Raises `UserError`."""
    job, folder, outputs = build.job, build.folder, build.outputs
    pairs: list[PairWriter] = []
    rejects_path = Path(f"{folder.prefix}.rejects.jsonl")
    report = Progress("writing", sum(shard["bytes"] for entry in entries for shard in entry["shards"]), show=build.show)
    written = 0

    def advance(size: int) -> None:
        nonlocal written
        written += size
        report.set(written)

    try:
        content = _hash_what_was_read(build, entries)
        dtype = token_dtype(outputs[0].facts["vocab_size"])
        empty = []
        for key in range(len(job.json_keys)):
            mine = [PairWriter(output.prefix, dtype) for output in outputs if output.key == key]
            pairs += mine
            shards = Shards(folder.path, key, entries, build.job.max_documents)
            if build.shuffle_seed is None:
                write_in_order(shards, mine, build.split, advance)
            else:
                write_shuffled(shards, mine, build.split, build.shuffle_seed, advance)
            empty.append(shards.count - sum(pair.documents for pair in mine))
            _refuse_empty(build, mine, shards.count)
        blank = sum(entry["blank_lines"] for entry in entries)
        rejects = write_rejects(
            rejects_path, folder.path, entries, lambda task, part: job.name(build.tasks[task].parts[part].path)
        )
        records = [build.input_entry(file, content[file.path]) for file in build.files]
        for pair, output in zip(pairs, outputs, strict=True):
            counts = {"empty_documents": empty[output.key], "blank_lines": blank, "rejects": rejects}
            pair.finish(output.facts | counts | {"inputs": records})
        for task, _ in zip(build.tasks, entries, strict=False):
            check_unchanged(task)
        folder.begin_commit()
        rejects_path.unlink(missing_ok=True)  # an earlier build's
        if rejects:
            os.replace(staged(rejects_path), rejects_path)
        for pair in pairs:
            pair.commit()
    except OSError as error:
        raise UserError(
            f"cannot write {folder.prefix}: {error.strerror}; mend that and run the same command again to go on"
        ) from error
    finally:
        report.close()
        staged(rejects_path).unlink(missing_ok=True)
        for pair in pairs:
            pair.abort()
    return [
        BuildSummary(
            pair.prefix, pair.documents, pair.tokens, pair.text_bytes, empty[output.key], blank, rejects, False
        )
        for pair, output in zip(pairs, outputs, strict=True)
    ]


def _hash_what_was_read(build: Build, entries: list[dict]) -> dict[str, dict]:
    """What `hash_file` gives for each input, by its path; with `max_documents` some are not read to their end."""
    pieces: dict[str, list[str]] = {}
    reached: dict[str, int] = {}  # bytes
    unfinished = {part.path for task in build.tasks[len(entries) :] for part in task.parts}
    for task, entry in zip(build.tasks, entries, strict=False):
        found = entry["parts"]
        unfinished |= {part.path for part in task.parts[len(found) :]}  # an error came behind the last document taken
        for i, part in enumerate(task.parts):
            reached[part.path] = part.end + (found[i]["tail"] if i < len(found) else 0)
            pieces.setdefault(part.path, []).extend(found[i]["pieces"] if i < len(found) else ())
    return {
        file.path: hash_file(file, reached.get(file.path, 0))
        if file.path in unfinished
        else {"sha256": combine(pieces[file.path])}
        for file in build.files
    }


def _refuse_empty(build: Build, pairs: list[PairWriter], num_documents: int) -> None:
    if not all(pair.documents for pair in pairs):
        build.folder.clear()  # going on from it would end here again
    if not any(pair.documents for pair in pairs):
        names = name_files([build.job.name(file.path) for file in build.files])
        raise UserError(f"no text in {names}: there is nothing to tokenize")
    for pair in pairs:
        if not pair.documents:
            raise UserError(
                f'split "{build.split.text}" leaves {pair.prefix} without a document, of {num_documents}: give it a '
                "larger share, or give more documents (a .txt is one, unless --split-on blank or line)"
            )
