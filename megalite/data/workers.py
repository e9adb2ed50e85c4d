"""The processes that tokenize: one task after another, each into its own shards and a journal entry."""

import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megalite.data.documents import PartReader, Piece, Reject, first_line
from megalite.data.encoders import Encoder, open_encoder
from megalite.data.indexed import staged, token_dtype
from megalite.data.journal import Task, hash_pieces, shard_name
from megalite.data.tokenizer import Tokenizer
from megalite.errors import UserError

BATCH_CHARACTERS = 500_000  # encoded at once; large enough for the encoders' batches, small beside a worker's memory
BATCH_DOCUMENTS = 10_000
WAIT_SECONDS = 0.2  # between looks at the workers' counters
ON_ERROR = ("fail", "skip")
Report = Callable[[int, int, int], None]


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

    def name(self, path: str) -> str:
        """An input as the user knows it."""
        return "<stdin>" if path == self.stdin else path


class _BadDocument(Exception):
    """Ends a task with --on-error fail."""


class _Shard:
    """Tokens of one task for one json key, and the sizes of its documents, under temporary names until `finish`."""

    def __init__(self, folder: str, number: int, key: int, end: bytes) -> None:
        self.paths = [Path(folder, shard_name(number, key, kind)) for kind in ("bin", "docs")]
        self.end = end  # EOD's bytes, or none
        self.file: BinaryIO = open(staged(self.paths[0]), "wb")  # noqa: SIM115 -- closed by finish or abort
        self.bytes = 0
        self.sizes: list[tuple[int, int]] = []  # (bytes of tokens, bytes of text) of each document
        self.open = (0, 0)  # of the document whose pieces are being written

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
                self.sizes.append((open_tokens, open_text))
                open_tokens = open_text = 0
        self.open = (open_tokens, open_text)
        block = b"".join(out)
        self.file.write(block)
        self.bytes += len(block)

    def drop_open(self) -> None:
        """Take back the pieces of a document that turned out to be bad."""
        self.bytes -= self.open[0]
        self.file.seek(self.bytes)
        self.file.truncate()
        self.open = (0, 0)

    def finish(self, itemsize: int) -> dict[str, int]:
        sizes = np.array(self.sizes, dtype="<i8").reshape(-1, 2)
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


class Worker:
    """Does one task after another; `counters` are shared: bytes of input, tokens, documents done so far.

    report: called with them after each batch, where nobody else looks at them.
    """

    def __init__(self, job: Job, counters: Any, report: Report | None = None) -> None:
        self.job, self.counters, self.report = job, counters, report
        tokenizer = Tokenizer(job.tokenizer_dir)
        self.dtype = token_dtype(tokenizer.vocab_size)
        self.end = np.array([tokenizer.eod_id], dtype=self.dtype).tobytes() if job.append_eod else b""
        self.encoder: Encoder = open_encoder(tokenizer, job.encoder, self.dtype)

    def __call__(self, task: Task) -> dict:
        """Write a task's shards; returns its journal entry, or {"task", "error"} for a bad document."""
        job = self.job
        shards: list[_Shard] = []
        try:
            for key in range(len(job.json_keys)):
                shards.append(_Shard(job.folder, task.number, key, self.end))
            pieces, lines, blank_lines, rejects = [], [], 0, []
            for index, part in enumerate(task.parts):
                pieces.append(hash_pieces(part, job.piece_bytes))
                reader = PartReader(part, json_keys=job.json_keys, split_on=job.split_on, cut=self.encoder.cut)
                for bad in self._read(reader, shards):
                    if job.on_error == "fail":
                        where = f"{job.name(part.path)}:{first_line(part, bad.line, job.split_on)}"
                        raise _BadDocument(f"{where}: {bad.reason}; mend it, or pass --on-error skip to leave it out")
                    rejects.append({"part": index, "line": bad.line, "reason": bad.reason, "raw": _readable(bad.raw)})
                lines.append(reader.lines)
                blank_lines += reader.blank_lines
            if rejects:
                path = Path(job.folder, shard_name(task.number, 0, "rejects"))
                with open(staged(path), "wb") as file:
                    file.writelines(json.dumps(reject).encode() + b"\n" for reject in rejects)
                    _to_disk(file)
                os.replace(staged(path), path)
            sums = [shard.finish(self.dtype.itemsize) for shard in shards]
        except _BadDocument as error:
            return {"task": task.number, "error": str(error)}
        except OSError as error:
            raise UserError(
                f"cannot write {job.folder}: {error.strerror}; mend that and run the same command again to go on"
            ) from error
        finally:
            for shard in shards:
                shard.abort()  # what has its final name is not touched
        return {
            "task": task.number,
            "shards": sums,
            "lines": lines,
            "blank_lines": blank_lines,
            "rejects": len(rejects),
            "input_bytes": sum(part.end - part.start for part in task.parts),
            "pieces": pieces,
        }

    def _read(self, reader: PartReader, shards: list[_Shard]) -> Iterator[Reject]:
        """Encode a part's documents into the shards; yields those that can't be."""
        batch: list[Piece] = []
        characters = done = 0

        def flush() -> None:
            nonlocal batch, characters, done
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
            if isinstance(piece, Reject):
                flush()
                for shard in shards:
                    shard.drop_open()
                yield piece
                continue
            batch.append(piece)
            characters += sum(map(len, piece.texts))
            if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_DOCUMENTS:
                flush()
        flush()

    def _count(self, *amounts: int) -> None:
        with self.counters.get_lock():
            for i, amount in enumerate(amounts):
                self.counters[i] += amount
        if self.report is not None:
            self.report(*self.counters)


def _readable(raw: bytes) -> str:
    """Text that gives the bytes back by encode("utf-8", "surrogateescape")."""
    return raw.decode("utf-8", "surrogateescape")


# ------------------------------------------------------------------------------------------------------------ processes


def _start_worker(job: Job, counters: Any) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _worker = Worker(job, counters)


def _die_with_parent() -> None:
    multiprocessing.parent_process().join()  # a killed parent leaves its workers waiting for work for ever
    os._exit(1)


def _run(task: Task) -> dict:
    return _worker(task)


def _submit(pool: ProcessPoolExecutor, task: Task) -> Future[dict]:
    """Hand a task to the pool, which may start a worker for it.

    Ctrl-C reaches the whole group, and the parent alone answers it: a worker inherits that SIGINT is blocked, and so is
    deaf to it even while it still starts.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(_run, task)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def run_tasks(job: Job, tasks: Iterator[Task], workers: int, report: Report) -> Iterator[dict]:
    """Do tasks with several processes; yields their journal entries as they are finished, in no certain order.

    Few are handed out ahead, so a consumer that stops early (and closes this generator) leaves little undone.
    report(bytes, tokens, documents) is called every now and then with what all tasks together have done.
    """
    # spawn: the tokenizer's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    counters = context.Array("q", 3)
    if workers == 1:
        yield from map(Worker(job, counters, report), tasks)
        return
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(job, counters))
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
            report(*counters)
        finished = True
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process died, perhaps for want of memory: run the same command again to go on, with fewer "
            "--workers"
        ) from error
    finally:
        if not finished:  # what they are at is not wanted; shards under temporary names do no harm
            for process in multiprocessing.active_children():
                process.kill()
        pool.shutdown(cancel_futures=True)
