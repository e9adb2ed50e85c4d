"""What makes a build resumable: its plan, the shards of finished tasks and a journal of them, in PREFIX.building/.

    lock            held by the process that builds
    plan.json       what is built of what; another build does not go on from these shards
    journal         one JSON line for each task whose shards are whole
    000042.0.bin    tokens of task 42 for json key 0
    000042.0.docs   i64 [n, 2] of its documents: tokens with EOD, bytes of text (UTF-8)
    000042.0.rejects  a JSON line for each document of task 42 that was left out
    stdin.jsonl     standard input, put here to be cut into tasks
    table           where each document is, to shuffle them
    committing      from here on, files under final names are this build's

A task is cut by the inputs' sizes alone, writes its shards under temporary names and renames them, and is journalled
after that, so any set of finished tasks can be gone on from, with any number of workers.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from megalite.data.documents import Part, divisible
from megalite.data.indexed import atomic_write
from megalite.data.inputs import InputFile, open_raw
from megalite.errors import UserError

PIECE_BYTES = 2 * 2**20  # inputs are cut and hashed at multiples of this
MAX_TASKS = 4096  # from 8 GB on, tasks grow instead of becoming more
MAX_PARTS = 4096  # of one task: a million empty files are some work too
HASH_BLOCK = 2**20
OWN_NAME = re.compile(
    r"(\d{6,}\.\d+\.(bin|docs|rejects)|plan\.json|journal|table|committing)(\.tmp)?|stdin\.(jsonl|txt)"
)


class Task(NamedTuple):
    number: int
    parts: tuple[Part, ...]
    stamps: tuple[tuple[int, int], ...]
    """(size, mtime_ns) of each part's file when the build began."""


def plan_tasks(files: Sequence[InputFile], split_on: str) -> Iterator[Task]:
    """Cut inputs into tasks of about the same size: ranges of a file where it can be cut, small files together."""
    total = sum(file.size for file in files)
    unit = PIECE_BYTES * max(1, -(-total // (PIECE_BYTES * MAX_TASKS)))
    number, parts, stamps, size = 0, [], [], 0
    for file in files:
        step = unit if divisible(file, split_on) else max(1, file.size)
        for start in range(0, max(1, file.size), step):
            part = Part(file.path, start, min(start + step, file.size))
            if parts and (size + part.end - part.start > unit or len(parts) == MAX_PARTS):
                yield Task(number, tuple(parts), tuple(stamps))
                number, parts, stamps, size = number + 1, [], [], 0
            parts.append(part)
            stamps.append((file.size, file.mtime_ns))
            size += part.end - part.start
    if parts:
        yield Task(number, tuple(parts), tuple(stamps))


def check_unchanged(task: Task) -> None:
    """Raises `UserError` where an input of a task is not the file any more that it was when the build began."""
    for part, stamp in zip(task.parts, task.stamps, strict=True):
        try:
            status = os.stat(part.path)
            same = (status.st_size, status.st_mtime_ns) == stamp
        except OSError:
            same = False
        if not same:
            raise UserError(f"{part.path} changed while it was read: let it be whole, then run the same command again")


def hash_pieces(part: Part, size: int) -> list[str]:
    """SHA-256 (hex) of each `size` bytes of a part, or of what is there of it now."""
    digests = []
    try:
        with open_raw(part.path) as file:
            file.seek(part.start)
            left = part.end - part.start
            while left or not digests:
                digest, in_piece = hashlib.sha256(), min(left, size)
                left -= in_piece
                while in_piece and (block := file.read(min(HASH_BLOCK, in_piece))):
                    digest.update(block)
                    in_piece -= len(block)
                digests.append(digest.hexdigest())
    except OSError as error:
        raise UserError(f"cannot read {part.path}: {error.strerror}") from error
    return digests


def hash_around(part: Part, tail: int) -> list[str]:
    """Of the byte before a part, which says whether a line begins with it, and of `tail` bytes after it."""
    before = hash_pieces(Part(part.path, part.start - 1, part.start), 1) if part.start else []
    after = hash_pieces(Part(part.path, part.end, part.end + tail), tail) if tail else []
    return before + after


def combine(pieces: list[str]) -> str:
    """A file's hash from its pieces': that of the only one, else the SHA-256 of their hashes in a row."""
    return pieces[0] if len(pieces) == 1 else hashlib.sha256(bytes.fromhex("".join(pieces))).hexdigest()


def hash_file(file: InputFile, read_bytes: int | None = None) -> dict[str, str | int | None]:
    """What the manifest says of an input's content; read_bytes: only so much of it was read."""
    if read_bytes is None:
        return {"sha256": combine(hash_pieces(Part(file.path, 0, file.size), PIECE_BYTES))}
    read = combine(hash_pieces(Part(file.path, 0, read_bytes), PIECE_BYTES)) if read_bytes else None
    return {"sha256": None, "read_bytes": read_bytes, "read_sha256": read}


def describe_changes(before: dict, now: dict) -> str:
    """In words, how two plans (or what manifests say of one) differ; empty if they don't."""
    found = []
    for key in now.keys() | before.keys():
        old, new = before.get(key), now.get(key)
        if old == new:
            continue
        if key == "inputs":
            found += _describe_inputs(old or [], new or [])
        elif isinstance(old, dict) and isinstance(new, dict):
            found += [f"{name}: {old.get(name)} -> {new.get(name)}" for name in new if old.get(name) != new.get(name)]
        elif key == "tokenizer_sha256":
            found.append("the tokenizer")
        else:
            found.append(f"{key}: {old} -> {new}")
    return ", ".join(sorted(found))


def _describe_inputs(old: Any, new: list[dict]) -> list[str]:
    if not isinstance(old, list) or not all(isinstance(each, dict) and "path" in each for each in old):
        return ["the inputs are not recorded as they should be"]
    before, now = ({str(each["path"]): each for each in inputs} for inputs in (old, new))
    found = [f'input "{path}" changed' for path in before.keys() & now.keys() if before[path] != now[path]]
    found += [f'input "{path}" is new' for path in now.keys() - before.keys()]
    found += [f'input "{path}" is gone' for path in before.keys() - now.keys()]
    rest = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return [*sorted(found)[:2], sorted(found)[2] + rest] if len(found) > 2 else found or ["the order of the inputs"]


class WorkFolder:
    """PREFIX.building, locked by this process from the beginning to `close`.

    Raises `UserError` when another process holds it, or it can't be written.
    """

    def __init__(self, prefix: str) -> None:
        self.path = Path(f"{prefix}.building")
        self.prefix = prefix
        self._journal: BinaryIO | None = None
        try:
            self._lock = self._take_lock()
        except BlockingIOError:
            raise UserError(f"another process is building {prefix}: let it finish, or stop it") from None
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}") from error

    def _take_lock(self) -> BinaryIO:
        path = self.path / "lock"
        while True:
            self.path.mkdir(parents=True, exist_ok=True)
            if not path.exists() and any(self.path.iterdir()):
                raise UserError(f"{self.path} is not of a build, but a build keeps its work there: move it away")
            with contextlib.ExitStack() as opened:
                lock = opened.enter_context(open(path, "ab"))
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if path.exists() and os.path.samestat(path.stat(), os.fstat(lock.fileno())):
                    opened.pop_all()
                    return lock
            # The process before us removed the folder between our opening the file and locking it.

    def open_journal(self, plan: dict, tasks: Sequence[Task], *, discard: bool, threads: int) -> dict[int, dict]:
        """The journal entries, by task, of an earlier run of the same plan, to go on from; none: this run begins.

        discard: begin anew where the plan or an input has changed, instead of raising `UserError` with what changed.
        """
        number_of_parts = {task.number: len(task.parts) for task in tasks}
        found = self._read_entries()
        entries = {
            number: entry
            for number, entry in found.items()
            if number_of_parts.get(number) == len(entry["parts"])
            and len(entry["shards"]) == len(plan["options"]["json_keys"])
        }
        before = self._read_plan()
        if before is not None and found:
            changed = describe_changes(before, plan) or self._changed_inputs(entries, tasks, threads)
            if changed and not discard:
                raise UserError(
                    f"{self.path} holds an interrupted build of something else ({changed}): restore that and run it "
                    "again, or pass --overwrite to begin anew"
                )
            if changed:
                entries = {}
        else:
            entries = {}
        try:
            if not entries:
                self.clear()
                atomic_write(self.path / "plan.json", [json.dumps(plan).encode()])
            lines = [json.dumps(entry).encode() + b"\n" for entry in entries.values()]
            atomic_write(self.path / "journal", lines)  # without the line that a kill left unfinished
            self._journal = open(self.path / "journal", "ab")  # noqa: SIM115 -- held until close
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}") from error
        return entries

    def record(self, entry: dict) -> None:
        """Journal a finished task, down to the disk. Raises OSError."""
        self._journal.write(json.dumps(entry).encode() + b"\n")
        self._journal.flush()
        os.fsync(self._journal.fileno())

    @property
    def has_work(self) -> bool:
        """Whether there is anything to go on from."""
        return bool(self._read_entries())

    @property
    def committing(self) -> bool:
        """Whether an earlier run of the plan that is here had begun to give files their final names."""
        return (self.path / "committing").exists()

    def begin_commit(self) -> None:
        (self.path / "committing").touch()

    def clear(self) -> None:
        """Remove all that earlier runs left, but the lock and what came by standard input in this one."""
        for path in self._own_files():
            if not path.name.startswith("stdin."):
                path.unlink(missing_ok=True)

    def _own_files(self) -> list[Path]:
        """What builds put here, but for the lock; nothing else is touched."""
        return [path for path in self.path.iterdir() if OWN_NAME.fullmatch(path.name)]

    def close(self, *, remove: bool) -> None:
        """Let go of the folder; remove: it is not needed again."""
        if self._journal is not None:
            self._journal.close()
        if remove:
            with contextlib.suppress(OSError):
                for path in self._own_files():
                    path.unlink()
                (self.path / "lock").unlink()  # last: a folder without it is not ours
                self.path.rmdir()
        self._lock.close()

    def _read_plan(self) -> dict | None:
        try:
            plan = json.loads((self.path / "plan.json").read_bytes())
        except (OSError, ValueError, RecursionError):
            return None
        return plan if isinstance(plan, dict) else None

    def _read_entries(self) -> dict[int, dict]:
        """Whole lines of the journal whose shards are there."""
        try:
            lines = (self.path / "journal").read_bytes().split(b"\n")[:-1]
        except OSError:
            return {}
        entries = {}
        for line in lines:
            with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
                entry = json.loads(line)
                if self._is_whole(entry):
                    entries[entry["task"]] = entry
        return entries

    def _is_whole(self, entry: dict) -> bool:
        """Whether an entry is as a worker makes it, and its shards are there; may raise anything where it is not."""
        number, shards, parts = entry["task"], entry["shards"], entry["parts"]
        counts = [number, entry["blank_lines"], entry["rejects"], entry["input_bytes"]]
        counts += [shard[name] for shard in shards for name in ("documents", "empty", "tokens", "text_bytes", "bytes")]
        counts += [part[name] for part in parts for name in ("lines", "tail")]
        if not all(type(count) is int and count >= 0 for count in counts):
            return False
        if not all(isinstance(digest, str) for part in parts for name in ("pieces", "around") for digest in part[name]):
            return False
        expected = {shard_name(number, 0, "rejects"): None} if entry["rejects"] else {}
        for key, shard in enumerate(shards):
            expected[shard_name(number, key, "bin")] = shard["bytes"]
            expected[shard_name(number, key, "docs")] = 16 * shard["documents"]
        found = {self.path / name: size for name, size in expected.items()}
        return all(path.is_file() and size in (None, path.stat().st_size) for path, size in found.items())

    def _changed_inputs(self, entries: dict[int, dict], tasks: Sequence[Task], threads: int) -> str:
        """Which inputs of finished tasks are no longer what they were, by their hashes; empty: none."""

        def changed(task: Task) -> set[str]:
            recorded = entries[task.number]["parts"]
            return {
                part.path
                for part, then in zip(task.parts, recorded, strict=True)
                if hash_pieces(part, PIECE_BYTES) != then["pieces"] or hash_around(part, then["tail"]) != then["around"]
            }

        with ThreadPoolExecutor(threads) as pool:  # hashing releases the interpreter's lock
            found = set().union(*pool.map(changed, [task for task in tasks if task.number in entries]))
        names = [f'input "{path}" changed' for path in sorted(found)]
        return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def shard_name(number: int, key: int, kind: str) -> str:
    return f"{number:06d}.{key}.{kind}"
