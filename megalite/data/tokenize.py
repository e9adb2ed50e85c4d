"""Text to token files: inputs -> tasks -> shards, written by worker processes -> PREFIX.bin, .idx and .manifest.json.

Inputs are cut into tasks by their sizes alone (`journal`); each task's shards follow from its bytes, the tokenizer and
the options (`workers`), and are read in order (`assemble`). So the output does not depend on the number of workers, on
the encoder, or on where the build was stopped and gone on with.
"""

import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megalite.data import journal
from megalite.data.assemble import Build, BuildSummary, Output, Split, assemble
from megalite.data.documents import SPLIT_ON, first_line
from megalite.data.encoders import ENCODERS
from megalite.data.indexed import MANIFEST_VERSION, IndexedDataset, pair_paths
from megalite.data.inputs import InputFile, expand_inputs
from megalite.data.journal import Task, WorkFolder, describe_changes, hash_file, plan_tasks, shard_name
from megalite.data.progress import Progress
from megalite.data.tokenizer import Tokenizer
from megalite.data.workers import ON_ERROR, Job, run_tasks
from megalite.errors import UserError

MIN_SEEN = 1000  # documents before the share of rejects can end a build early
STDIN_FORMATS = ("jsonl", "txt")


def build_indexed(
    inputs: Sequence[str],
    tokenizer_dir: str | Path,
    output_prefix: str | Path,
    *,
    json_keys: Sequence[str] = ("text",),
    split_on: str = "none",
    workers: int = 2,
    encoder: str = "auto",
    split: str | None = None,
    append_eod: bool = True,
    shuffle_seed: int | None = None,
    seed: int = 1234,
    max_documents: int | None = None,
    on_error: str = "fail",
    max_reject_fraction: float = 0.01,
    stdin_format: str = "jsonl",
    overwrite: bool = False,
    progress: bool = True,
) -> list[BuildSummary]:
    """Tokenize text (files, folders, globs; "-": standard input) into PREFIX.bin/.idx and PREFIX.manifest.json.

    With `split`, PREFIX-train and PREFIX-validation; with several json keys, PREFIX-KEY for each. The output's bytes
    follow from the inputs, the tokenizer and the options alone, not from `workers` (1: this process) or `encoder`.
    Each document ends with EOD if `append_eod`; empty ones are left out and counted; with `shuffle_seed` they are
    written in an order drawn from it; `max_documents` takes the first of the input.

    An interrupted build goes on where it was (PREFIX.building holds what is done). What is there and was made of the
    same is left alone ("up to date"); anything else is refused, with what changed, unless `overwrite`. Final names
    appear only when all is written.

    A document that can't be read ends the build (on_error "fail"), or is left out, counted and written to
    PREFIX.rejects.jsonl ("skip"), up to `max_reject_fraction` of all documents.

    Raises `UserError` for anything wrong with the inputs (file:line), the options or the disk, and for a dead worker.
    """
    _check_options(workers, split_on, encoder, on_error, max_documents, max_reject_fraction, json_keys, stdin_format)
    if str(output_prefix).endswith(("/", os.sep)) or not str(output_prefix):
        raise UserError(f'output prefix "{output_prefix}" has no file name: give FOLDER/NAME')
    tokenizer = Tokenizer(tokenizer_dir)
    named = list(inputs)
    from_stdin = "-" in named
    if from_stdin and len(named) > 1:
        raise UserError('standard input ("-") goes with no other input: give one or the other')
    files = [] if from_stdin else expand_inputs(named)

    folder = WorkFolder(str(output_prefix))
    finished = False
    try:
        stdin = None
        if from_stdin:
            stdin = str(folder.path / f"stdin.{stdin_format}")
            files = [_spool_stdin(stdin, progress)]
        job = Job(
            tokenizer_dir=str(tokenizer_dir),
            folder=str(folder.path),
            json_keys=tuple(json_keys),
            split_on=split_on,
            append_eod=append_eod,
            encoder=encoder,
            on_error=on_error,
            piece_bytes=journal.PIECE_BYTES,
            stdin=stdin,
            max_documents=max_documents,
        )
        options = {
            "split_on": split_on,
            "append_eod": append_eod,
            "split": split,
            "split_seed": None if split is None else seed,
            "shuffle_seed": shuffle_seed,
            "max_documents": max_documents,
        }
        build = Build(
            job,
            folder,
            files,
            list(plan_tasks(files, split_on)),
            _outputs(str(output_prefix), tokenizer, tuple(json_keys), split, options),
            None if split is None else Split(split, seed),
            shuffle_seed,
            max_reject_fraction,
            workers,
            progress,
        )
        done = None if overwrite else _find_done(build)
        if isinstance(done, list):
            finished = folder.committing  # else what is in the folder is of another build, that may go on
            return done
        plan = {
            "version": MANIFEST_VERSION,
            "tokenizer_sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size,
            "eod_id": tokenizer.eod_id,
            "options": options | {"json_keys": list(json_keys)},
            "inputs": [{"path": job.name(file.path), "bytes": file.size} for file in files],
        }
        entries = folder.open_journal(plan, build.tasks, discard=overwrite, threads=workers)
        if done is not None and not folder.committing:
            raise UserError(done)
        if on_error == "fail":
            entries = {number: entry for number, entry in entries.items() if not entry["rejects"]}
        summaries = assemble(build, _tokenize(build, entries))
        finished = True
        return summaries
    except KeyboardInterrupt:
        if folder.has_work:
            print(f"stopped; the same command goes on from {folder.path}", file=sys.stderr)
        raise
    finally:
        folder.close(remove=finished or not folder.has_work)


def _check_options(
    workers: int,
    split_on: str,
    encoder: str,
    on_error: str,
    max_documents: int | None,
    max_reject_fraction: float,
    json_keys: Sequence[str],
    stdin_format: str,
) -> None:
    if workers < 1:
        raise UserError(f"workers must be at least 1, not {workers}")
    for name, value, choices in (
        ("split_on", split_on, SPLIT_ON),
        ("encoder", encoder, ENCODERS),
        ("on_error", on_error, ON_ERROR),
        ("stdin_format", stdin_format, STDIN_FORMATS),
    ):
        if value not in choices:
            raise UserError(f'{name} "{value}" is none of {", ".join(choices)}')
    if max_documents is not None and max_documents < 1:
        raise UserError(f"max_documents must be at least 1, not {max_documents}")
    if not 0 <= max_reject_fraction <= 1:
        raise UserError(f"max_reject_fraction must be between 0 and 1, not {max_reject_fraction}")
    if not json_keys or len(set(json_keys)) < len(json_keys):
        raise UserError("json_keys: give at least one key, and each once")
    for key in json_keys if len(json_keys) > 1 else ():
        if not re.fullmatch(r"[\w-][\w.-]*", key):
            raise UserError(f"json key {key!a} becomes a part of a file's name: it may have letters, digits, _ . and -")


def _outputs(
    prefix: str, tokenizer: Tokenizer, json_keys: tuple[str, ...], split: str | None, options: dict
) -> list[Output]:
    outputs = []
    for number, key in enumerate(json_keys):
        for part, ending in enumerate(("",) if split is None else ("-train", "-validation")):
            facts = {
                "version": MANIFEST_VERSION,
                "tokenizer_sha256": tokenizer.sha256,
                "vocab_size": tokenizer.vocab_size,
                "eod_id": tokenizer.eod_id,
                "append_eod": options["append_eod"],
                "options": options | {"json_key": key, "part": part},
            }
            middle = f"-{key}" if len(json_keys) > 1 else ""
            outputs.append(Output(f"{prefix}{middle}{ending}", number, part, facts))
    return outputs


def _spool_stdin(path: str, show: bool) -> InputFile:
    """Put standard input into a file, where it can be cut into tasks and read again by a build that goes on."""
    if sys.stdin is None or sys.stdin.isatty():
        raise UserError('the input is "-", but nothing is piped in')
    report = Progress("reading standard input", 0, show=show)
    try:
        with open(path, "wb") as file:
            while block := sys.stdin.buffer.read1(2**20):
                file.write(block)
                report.set(file.tell())
        status = os.stat(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    report.close()
    return InputFile(path, status.st_size, status.st_mtime_ns)


# ---------------------------------------------------------------------------------------------------- what is there


def _find_done(build: Build) -> list[BuildSummary] | str | None:
    """What is under the final names: all that was to be built, or something else (in words), or None for nothing."""
    outputs = build.outputs
    existing = [path for output in outputs for path in pair_paths(output.prefix) if path.exists()]
    if not existing:
        return None
    found: list[BuildSummary] = []
    inputs: list[dict] = []
    other = f"{existing[0]} exists and was made differently"
    way_out = "pass --overwrite to replace it, or choose another --output-prefix"
    for output in outputs:
        if not all(path.is_file() for path in pair_paths(output.prefix)):
            return f"{existing[0]} exists, but not all of {output.prefix}.bin, .idx and .manifest.json: {way_out}"
        try:
            manifest = IndexedDataset(output.prefix).manifest or {}
        except UserError as error:
            return f"{error}; {way_out}"
        changed = describe_changes({key: manifest.get(key) for key in output.facts}, output.facts)
        recorded = manifest.get("inputs")
        if not changed and not inputs:
            inputs = _hash_inputs(build, recorded if isinstance(recorded, list) else [])
        if not changed and recorded != inputs:
            changed = describe_changes({"inputs": recorded}, {"inputs": inputs})
        if changed:
            return f"{other} ({changed}): {way_out}"
        names = ("documents", "tokens", "text_bytes", "empty_documents", "blank_lines", "rejects")
        counts = [manifest.get(name) for name in names]
        if not all(isinstance(count, int) for count in counts):
            return f"{other} ({output.prefix}.manifest.json lacks counts): {way_out}"
        if counts[-1] and build.job.on_error == "fail":
            return f"{other} ({counts[-1]} documents were left out by --on-error skip): {way_out}"
        found.append(BuildSummary(output.prefix, *counts, up_to_date=True))
    return found


def _hash_inputs(build: Build, recorded: list[dict]) -> list[dict]:
    """The manifest's entry of each input now; one that was not read to its end (max_documents) only so far."""
    partly = {
        each["path"]: each["read_bytes"]
        for each in recorded
        if isinstance(each, dict) and isinstance(each.get("path"), str) and type(each.get("read_bytes")) is int
    }
    with ThreadPoolExecutor(build.workers) as pool:  # hashing releases the interpreter's lock
        contents = pool.map(lambda file: hash_file(file, partly.get(build.job.name(file.path))), build.files)
        return [build.input_entry(file, content) for file, content in zip(build.files, contents, strict=True)]


# --------------------------------------------------------------------------------------------------------- the work


def _tokenize(build: Build, entries: dict[int, dict]) -> list[dict]:
    """Do what is not in `entries`, and journal it; returns the entries of all tasks that are needed, in order."""
    tasks, limit = build.tasks, build.job.max_documents
    total = sum(part.end - part.start for task in tasks for part in task.parts)
    start = sum(entry["input_bytes"] for entry in entries.values())
    report = Progress("tokenizing", total, start=start, show=build.show)
    stopped: dict[int, dict] = {}  # entries of tasks that an error ended, with what they have before it
    leading = taken = 0  # tasks from the first that are all done, and their documents

    def enough() -> bool:
        """Whether the leading tasks have what is needed; raises the error that came before that."""
        nonlocal leading, taken
        while leading < len(tasks) and (limit is None or taken < limit):
            entry = entries.get(leading)
            if entry is None and limit is not None and leading in stopped:
                entry = stopped[leading]
                if taken + _documents(entry) < limit:
                    raise UserError(entry["error"])
                entries[leading] = entry
            if entry is None:
                return False
            taken += _documents(entry)
            leading += 1
        return True

    left = (task for task in tasks if task.number not in entries)
    work = run_tasks(
        build.job,
        left,
        build.workers,
        lambda done, tokens, count: report.set(start + done, documents=count, tokens=tokens),
    )
    try:
        _refuse_rejects(build, entries, total)
        while not enough():
            entry = next(work)
            if "error" in entry:
                stopped[entry["task"]] = entry
                if limit is None:  # else it may be behind the last document that is taken
                    raise UserError(entry["error"])
            else:
                build.folder.record(entry)
                entries[entry["task"]] = entry
                if limit is None:
                    _refuse_rejects(build, entries, total)
    except OSError as error:
        raise UserError(f"cannot write {build.folder.path}: {error.strerror}") from error
    finally:
        work.close()
        report.close()
    needed = {task.number: entries[task.number] for task in tasks[:leading]}
    _refuse_rejects(build, needed, 0)
    return list(needed.values())


def _documents(entry: dict) -> int:
    return entry["shards"][0]["documents"]


def _refuse_rejects(build: Build, entries: dict[int, dict], total: int) -> None:
    """Raise `UserError` where too many documents are left out; before the end, of as many as `total` bytes will have.

    That is an estimate from what is read, so the limit is doubled until the end (total: 0).
    """
    rejects = sum(entry["rejects"] for entry in entries.values())
    seen = rejects + sum(map(_documents, entries.values()))
    if not rejects or (total and seen < MIN_SEEN):
        return
    read = sum(entry["input_bytes"] for entry in entries.values())
    share = rejects / seen * (read / total / 2 if total else 1)
    if share <= build.max_reject_fraction:
        return
    number = next(number for number in sorted(entries) if entries[number]["rejects"])
    first = next(_rejects_of(build.job, build.tasks[number], entries[number]))
    raise UserError(
        f"{rejects:,} of {seen:,} documents can't be read, more than --max-reject-fraction "
        f"{build.max_reject_fraction:g} allows; one of them: {first}"
    )


def _rejects_of(job: Job, task: Task, entry: dict) -> Iterator[str]:
    """Each document of a task that was left out: where it is, and why."""
    with open(Path(job.folder, shard_name(task.number, 0, "rejects")), "rb") as file:
        for row in map(json.loads, file):
            part = task.parts[row["part"]]
            yield f"{job.name(part.path)}:{first_line(part, row['line'], job.split_on)}: {row['reason']}"
