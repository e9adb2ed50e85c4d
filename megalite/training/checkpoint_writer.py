"""Writing checkpoints beside training: threads hash and write host copies, rank 0's gives the folder its name.

A checkpoint is written as step-N.tmp, forced to disk and renamed, so a folder named step-N is complete; then `latest`
names it. All ranks must see one file system.
"""

import copy
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megalite.config import Config
from megalite.data.indexed import atomic_write, sync_folder
from megalite.data.tokenizer import FILES as TOKENIZER_FILES
from megalite.errors import UserError
from megalite.topology import Topology
from megalite.training.checkpoint_reader import FORMAT, FORMAT_VERSION, list_checkpoints

LIBRARIES = ("megalite", "deepspeed", "safetensors", "tokenizers", "numpy")
PIECE = 1 << 26  # bytes hashed and written at a time
WRITE_TIMEOUT = timedelta(hours=6)  # how long a rank's thread may wait for another's disk; nobody else waits


@dataclass
class Copies:
    """What a rank writes of a checkpoint: `files` {name: {key: fp32 tensor on the host}}, and what it knows of others.

    index: of this rank's stage, as index.json has it. state: of the run, as state.json has it.
    """

    step: int
    files: dict[str, dict[str, Tensor]]
    index: dict[str, list]
    state: dict[str, Any]


@dataclass
class Saved:
    """A finished checkpoint, and how long it took from the first byte to its name."""

    step: int
    folder: Path
    seconds: float


class Writer:
    """Writes one checkpoint at a time, in a thread of each rank. All methods but `__init__`'s are collective; so is it.

    The threads talk over a group of their own, so training never waits for them.
    """

    def __init__(self, output_dir: Path, topology: Topology, config: Config):
        self.output_dir, self.topology, self.config = output_dir, topology, config
        self._apart = copy.copy(topology)
        self._apart.control_group = dist.new_group(backend="gloo", timeout=WRITE_TIMEOUT)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[Saved] | None = None
        self._asked: tuple[dist.Work, Tensor] | None = None

    def start(self, copies: Copies) -> None:
        """Begin to write; the one before has to be over (`wait`)."""
        assert self._writing is None
        self._writing = self._thread.submit(self._write, copies)

    def poll(self) -> Saved | None:
        """At a step's end: the checkpoint that all ranks have finished since, if any. Raises as `wait` does.

        Ranks have to see it at the same step, or one would leave while others wait for it. So they agree, by a
        reduction that runs beside the next step.
        """
        if self._writing is None:
            return None
        if self._writing.done() and not isinstance(self._writing.exception(), UserError | None):
            return self.wait()  # a defect, of this rank alone: the others' threads wait for it, and never finish
        if self._asked is not None:
            work, finished = self._asked
            work.wait()
            self._asked = None
            if finished.item():
                return self.wait()
        finished = torch.tensor(int(self._writing.done()))
        work = dist.all_reduce(finished, dist.ReduceOp.MIN, group=self.topology.control_group, async_op=True)
        self._asked = work, finished
        return None

    def wait(self) -> Saved | None:
        """Until the checkpoint that is being written, if any, is. Raises UserError on every rank where it could not
        be; the older checkpoints are untouched then, and nothing of the new one stays."""
        if self._writing is None:
            return None
        if self._asked is not None:
            self._asked[0].wait()
            self._asked = None
        writing, self._writing = self._writing, None
        return writing.result()

    def _write(self, copies: Copies) -> Saved:
        started = time.perf_counter()
        final = self.output_dir / f"step-{copies.step}"
        temporary = final.with_name(f"{final.name}.tmp")
        topology = self._apart
        try:
            topology.on_first(_make_folder, temporary)
            written = topology.together(_write_tensors, temporary, copies.files)
            gathered = topology.gather_objects((written, copies.index))
            files = {name: entry for entries, _ in gathered for name, entry in entries.items()}
            index = {name: entry for _, entries in gathered for name, entry in entries.items()}
            topology.on_first(_write_rest, temporary, files, index, copies.state, self.config, _layout(topology))
            topology.on_first(_publish, temporary, final)
        except UserError:
            if topology.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        if topology.rank == 0:
            checkpoint = self.config.checkpoint
            prune(self.output_dir, copies.step, checkpoint.keep_last, checkpoint.keep_every)
        return Saved(copies.step, final, time.perf_counter() - started)


def _make_folder(folder: Path) -> None:
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}") from error


def _write_tensors(folder: Path, files: dict[str, dict[str, Tensor]]) -> dict[str, dict]:
    """The manifest's entries of `files`, which is emptied: a copy is let go once it is written."""
    entries = {}
    for name in list(files):
        tensors = files.pop(name)
        header = _header(tensors)
        size = len(header) + sum(tensor.nbytes for tensor in tensors.values())
        entries[name] = {"sha256": atomic_write(folder / name, _contents(header, tensors)), "bytes": size}
    return entries


def _header(tensors: dict[str, Tensor]) -> bytes:
    """How a safetensors file of fp32 tensors begins (https://github.com/huggingface/safetensors, "Format").

    The library's own `save` would make a second copy of everything first.
    """
    entries, end = {}, 0
    for name, tensor in tensors.items():
        entries[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _contents(header: bytes, tensors: dict[str, Tensor]) -> Iterator[bytes]:
    yield header
    for name in list(tensors):
        view = memoryview(tensors.pop(name).flatten().numpy().astype("<f4", copy=False)).cast("B")
        yield from (view[start : start + PIECE] for start in range(0, len(view), PIECE))


def _write_rest(folder: Path, files: dict, index: dict, state: dict, config: Config, layout: dict) -> None:
    documents = {"index.json": index, "state.json": state, "config.json": config.model_dump()}
    for name, content in documents.items():
        files[name] = _write(folder / name, _json(content))
    try:
        (folder / "tokenizer").mkdir()
        for name in TOKENIZER_FILES:
            source = Path(config.data.tokenizer_dir) / name
            if source.exists():
                files[f"tokenizer/{name}"] = _write(folder / "tokenizer" / name, source.read_bytes())
    except OSError as error:
        raise UserError(f"cannot copy the tokenizer into {folder}: {error.strerror}") from error
    manifest = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "step": state["step"],
        "layout": layout,
        "libraries": library_versions(),
        "files": files,
    }
    _write(folder / "manifest.json", _json(manifest))


def _layout(topology: Topology) -> dict[str, int]:
    """The grid that writes, for people: nothing in a checkpoint depends on it."""
    grid = topology.grid
    sizes = {"pipeline": grid.pipeline, "data": grid.data, "context": grid.context, "tensor": grid.tensor}
    return {"ranks": topology.world_size, **sizes}


def library_versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # megalite, run from its folder
            continue
    return found | {"torch": torch.__version__}  # which names its build, too


def _write(path: Path, content: bytes) -> dict:
    return {"sha256": atomic_write(path, [content]), "bytes": len(content)}


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()


def _publish(temporary: Path, final: Path) -> None:
    """Give the finished folder its name. One that has it already was saved by a run killed before it wrote `latest`."""
    old = final.with_name(f"{final.name}.old")
    try:
        if final.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(final, old)
        try:
            os.replace(temporary, final)
        except OSError:
            if old.exists():
                os.replace(old, final)
            raise
        sync_folder(final.parent)
    except OSError as error:
        raise UserError(f"cannot rename {temporary} to {final}: {error.strerror}") from error
    shutil.rmtree(old, ignore_errors=True)
    atomic_write(final.with_name("latest"), [final.name.encode() + b"\n"])


def prune(output_dir: Path, step: int, keep_last: int, keep_every: int | None) -> None:
    """Keep the newest `keep_last` checkpoints up to `step`, and those of the multiples of `keep_every`.

    What an abandoned run left beyond `step` is not ours to count.
    """
    old = [(number, folder) for number, folder in list_checkpoints(output_dir) if number <= step]
    for number, folder in old[:-keep_last]:
        if keep_every and number % keep_every == 0:
            continue
        doomed = folder.with_name(f"{folder.name}.tmp")  # killed meanwhile, half of it must not pass for a checkpoint
        try:
            os.replace(folder, doomed)
        except OSError:
            continue  # no reason to end a run, and the next save tries again
        shutil.rmtree(doomed, ignore_errors=True)
