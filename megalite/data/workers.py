"""The processes that tokenize: one task after another, each into its own shards and a journal entry."""

import json
import multiprocessing
import os
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megalite.data.children import begin_child, deaf_to_interrupts
from megalite.data.documents import PartReader, Piece, Reject, first_line
from megalite.data.encoders import Encoder, open_encoder
from megalite.data.indexed import staged, token_dtype
from megalite.data.journal import Task, check_unchanged, hash_around, hash_pieces, shard_name
from megalite.data.tokenizer import Tokenizer
from megalite.errors import UserError

BATCH_CHARACTERS = 500_000  # encoded at once; large enough for the encoders' batches, small beside a worker's memory
BATCH_DOCUMENTS = 10_000
WAIT_SECONDS = 0.2  # between looks at the workers' counters
ON_ERROR = ("fail", "skip")
Report = Callable[[int, int, int], None]
Counts = Any  # of three integers, shared or not: list[int] or _Slice


@dataclass(frozen=True)
class Job:
    """What a worker has to know."""

    tokenizer_dir: str
    folder: str
    json_keys: tuple[str, ...]
    split_on: str
    append_eod: bool
    encoder: str
    on_error: str
    piece_bytes: int
    """Inputs are hashed in pieces of this size."""
    stdin: str | None = None
    """The file that standard input was put into."""
    max_documents: int | None = None
    """How many a task needs to have at most."""

    def name(self, path: str) -> str:
        """An input as the user knows it."""
        return "<stdin>" if path == self.stdin else path


class _Shard:
    """Tokens of one task for one json key, and the sizes of its documents, under temporary names until `finish`."""

    def __init__(self, folder: str, number: int, key: int, end: bytes) -> None:
        self.paths = [Path(folder, shard_name(number, key, kind)) for kind in ("bin", "docs")]
        self.end = end  # EOD's bytes, or none
        self.file: BinaryIO = open(staged(self.paths[0]), "wb")  # noqa: SIM115 -- closed by finish or abort
        self.bytes = 0
        self.sizes = array("q")  # bytes of tokens, bytes of text, of each document in turn
        self.open = (0, 0)  # of the document whose pieces are being written

    @property
    def documents(self) -> int:
        return len(self.sizes) // 2

    def write(self, encoded: list[bytes], text_bytes: list[int], last: list[bool]) -> None:
        out = []
        open_tokens, open_text = self.open
        for tokens, size, ends in zip(encoded, text_bytes, last, strict=True):
            out.append(tokens)
            open_tokens += len(tokens)
            open_text += size
            if ends:
                if open_tokens:
                    out.append(self.end)
                    open_tokens += len(self.end)
                self.sizes.extend((open_tokens, open_text))
                open_tokens = open_text = 0
        self.open = (open_tokens, open_text)
        block = b"".join(out)
        self.file.write(block)
        self.bytes += len(block)

    def drop_open(self) -> None:
        """Take back the pieces of a document that turned out to be bad."""
        if not self.open[0]:
            return
        self.bytes -= self.open[0]
        self.file.seek(self.bytes)
        self.file.truncate()
        self.open = (0, 0)

    def finish(self, itemsize: int) -> dict[str, int]:
        sizes = np.frombuffer(self.sizes, dtype="<i8").reshape(-1, 2).copy()
        sizes[:, 0] //= itemsize
        with open(staged(self.paths[1]), "wb") as file:
            file.write(sizes.tobytes())
            _to_disk(file)
        _to_disk(self.file)
        self.file.close()
        for path in self.paths:
            os.replace(staged(path), path)
        tokens, text_bytes = sizes.sum(axis=0).tolist()
        empty = int((sizes[:, 0] == 0).sum())
        return {
            "documents": len(sizes), "empty": empty, "tokens": tokens, "text_bytes": text_bytes, "bytes": self.bytes
        }  # fmt: skip

    def abort(self) -> None:
        self.file.close()
        for path in self.paths:
            staged(path).unlink(missing_ok=True)


def _to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


class _Rejects:
    """What is left out of a task, written as it comes, under a temporary name until `finish`."""

    def __init__(self, folder: str, number: int) -> None:
        self.path = Path(folder, shard_name(number, 0, "rejects"))
        self.file: BinaryIO | None = None
        self.count = 0

    def write(self, part: int, reject: Reject) -> None:
        self.file = self.file or open(staged(self.path), "wb")  # noqa: SIM115 -- closed by finish or abort
        # Text that gives the bytes back by encode("utf-8", "surrogateescape").
        raw = reject.raw.decode("utf-8", "surrogateescape")
        row = {"part": part, "line": reject.line, "reason": reject.reason, "raw": raw}
        self.file.write(json.dumps(row).encode() + b"\n")
        self.count += 1

    def finish(self) -> None:
        if self.file is not None:
            _to_disk(self.file)
            self.file.close()
            os.replace(staged(self.path), self.path)

    def abort(self) -> None:
        if self.file is not None:
            self.file.close()
            staged(self.path).unlink(missing_ok=True)


class Worker:
    """Does one task after another; `counts`: where it adds bytes of input, tokens and documents done.

    report: called after each batch, where nobody else looks at `counts`.
    """

    def __init__(self, job: Job, counts: Counts, report: Callable[[], None] | None = None) -> None:
        self.job, self.counts, self.report = job, counts, report
        tokenizer = Tokenizer(job.tokenizer_dir)
        self.dtype = token_dtype(tokenizer.vocab_size)
        self.end = np.array([tokenizer.eod_id], dtype=self.dtype).tobytes() if job.append_eod else b""
        self.encoder: Encoder = open_encoder(tokenizer, job.encoder, self.dtype)

    def __call__(self, task: Task) -> dict:
        """Write a task's shards; returns its journal entry.

        At a document that can't be read with on_error "fail", or a file, it stops: "error" in the entry says why, and
        the shards hold what is before. Raises `UserError` where they can't be written.
        """
        shards: list[_Shard] = []
        rejects = _Rejects(self.job.folder, task.number)
        try:
            for key in range(len(self.job.json_keys)):
                shards.append(_Shard(self.job.folder, task.number, key, self.end))
            parts, error = self._read_parts(task, shards, rejects)
            rejects.finish()
            sums = [shard.finish(self.dtype.itemsize) for shard in shards]
        except OSError as failure:
            raise UserError(
                f"cannot write {self.job.folder}: {failure.strerror}; mend that and run the same command again to go on"
            ) from failure
        finally:
            rejects.abort()  # what has its final name is not touched
            for shard in shards:
                shard.abort()
        entry = {
            "task": task.number,
            "shards": sums,
            "blank_lines": sum(part.pop("blank_lines") for part in parts),
            "rejects": rejects.count,
            "input_bytes": sum(part.end - part.start for part in task.parts),
            "parts": parts,
        }
        return entry if error is None else entry | {"error": error}

    def _read_parts(self, task: Task, shards: list[_Shard], rejects: _Rejects) -> tuple[list[dict], str | None]:
        """Encode a task's documents into the shards; returns what there is to say of each part, and of an error."""
        job = self.job
        parts: list[dict] = []
        for index, part in enumerate(task.parts):
            try:
                pieces = hash_pieces(part, job.piece_bytes)
                reader = PartReader(part, json_keys=job.json_keys, split_on=job.split_on, cut=self.encoder.cut)
                for bad in self._read(reader, shards):
                    if job.on_error == "fail":
                        where = f"{job.name(part.path)}:{first_line(part, bad.line, job.split_on)}"
                        return parts, (
                            f"{where}: {bad.reason}; mend it and run this again with --overwrite, or pass --on-error "
                            "skip to leave it out"
                        )
                    rejects.write(index, bad)
                around = hash_around(part, reader.tail)
            except UserError as error:
                return parts, str(error).replace(part.path, job.name(part.path))
            parts.append({
                "lines": reader.lines,
                "blank_lines": reader.blank_lines,
                "pieces": pieces,
                "tail": reader.tail,
                "around": around,
            })  # fmt: skip
        try:
            check_unchanged(task)
        except UserError as error:
            return parts, str(error)
        return parts, None

    def _read(self, reader: PartReader, shards: list[_Shard]) -> Iterator[Reject]:
        """Encode a part's documents into the shards; yields those that can't be."""
        batch: list[Piece] = []
        characters = done = 0
        left = None if self.job.max_documents is None else self.job.max_documents - shards[0].documents

        def flush() -> None:
            nonlocal batch, characters, done
            if not batch:
                return
            last = [piece.last for piece in batch]
            before = sum(shard.bytes for shard in shards)
            for key, shard in enumerate(shards):
                texts = [piece.texts[key] for piece in batch]
                sizes = [len(text) if text.isascii() else len(text.encode()) for text in texts]
                shard.write(self.encoder.encode(texts), sizes, last)
            tokens = (sum(shard.bytes for shard in shards) - before) // self.dtype.itemsize
            self._count(reader.position - done, tokens, sum(last))
            batch, characters, done = [], 0, reader.position

        for piece in reader:
            if left == 0:
                break
            if isinstance(piece, Reject):
                flush()
                for shard in shards:
                    shard.drop_open()
                yield piece
                continue
            batch.append(piece)
            characters += sum(map(len, piece.texts))
            if left is not None:
                left -= piece.last
            if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_DOCUMENTS:
                flush()
        flush()

    def _count(self, *amounts: int) -> None:
        for i, amount in enumerate(amounts):
            self.counts[i] += amount
        if self.report is not None:
            self.report()


# ------------------------------------------------------------------------------------------------------------ processes


def _start_worker(job: Job, counters: Any, slots: Any) -> None:
    global _worker
    begin_child()
    with slots.get_lock():
        slot = slots.value
        slots.value += 1
    try:
        # Each has counters of its own, without a lock that it could die with.
        _worker = Worker(job, _Slice(counters, 3 * slot))
    except UserError as error:
        _worker = _Failed(error)


class _Slice:
    """Three of the shared counters."""

    def __init__(self, counters: Any, first: int) -> None:
        self.counters, self.first = counters, first

    def __getitem__(self, i: int) -> int:
        return self.counters[self.first + i]

    def __setitem__(self, i: int, value: int) -> None:
        self.counters[self.first + i] = value


class _Failed:
    """Stands for a worker that could not be made: says why when it is given work."""

    def __init__(self, error: UserError) -> None:
        self.error = error

    def __call__(self, task: Task) -> dict:
        raise self.error


def _run(task: Task) -> dict:
    return _worker(task)


def _submit(pool: ProcessPoolExecutor, task: Task) -> Future[dict]:
    """Hand a task to the pool, which may start a worker for it."""
    with deaf_to_interrupts():
        return pool.submit(_run, task)


def run_tasks(job: Job, tasks: Iterator[Task], workers: int, report: Report) -> Iterator[dict]:
    """Do tasks with several processes; yields what `Worker` gives for each as they are finished, in no certain order.

    Few are handed out ahead, so a consumer that stops early (and closes this generator) leaves little undone.
    report(bytes, tokens, documents) is called every now and then with what all tasks together have done.
    """
    if workers == 1:
        counts = [0, 0, 0]
        yield from map(Worker(job, counts, lambda: report(*counts)), tasks)
        return
    # spawn: the tokenizer's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    counters = context.Array("q", 3 * workers, lock=False)
    arguments = (job, counters, context.Value("i", 0))
    not_ours = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=arguments)
    pending: set[Future[dict]] = set()
    finished = False
    try:
        while True:
            while len(pending) < 2 * workers and (task := next(tasks, None)) is not None:
                pending.add(_submit(pool, task))
            if not pending:
                break
            done, pending = wait(pending, WAIT_SECONDS, FIRST_COMPLETED)
            for future in done:
                yield future.result()
            report(*(sum(counters[i::3]) for i in range(3)))
        finished = True
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process died, perhaps for want of memory: run the same command again to go on, with fewer "
            "--workers"
        ) from error
    finally:
        if not finished:  # what they are at is not wanted; shards under temporary names do no harm
            for process in set(multiprocessing.active_children()) - not_ours:
                process.kill()
        pool.shutdown(cancel_futures=True)
