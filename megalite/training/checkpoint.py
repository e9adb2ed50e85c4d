"""Saving an engine's state and loading it: by global parameter name, so that a checkpoint belongs to no layout.

`checkpoint_reader.py` tells what a checkpoint holds. It is written as step-N.tmp, forced to disk and renamed, so a
folder named step-N is complete; then `latest` names it. All ranks must see one file system.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor

from megalite.config import Config
from megalite.data.indexed import atomic_write, sync_folder
from megalite.data.tokenizer import FILES as TOKENIZER_FILES
from megalite.errors import ConfigError, UserError
from megalite.topology import Topology
from megalite.training.checkpoint_reader import FORMAT, FORMAT_VERSION, MOMENTS, Checkpoint, list_checkpoints
from megalite.training.engine import Engine

# A shard passes through host memory twice while it is written. Its weights are a third of this.
SHARD_BYTES = 1 << 30


def plan_shards(shapes: dict[str, tuple[int, ...]], limit: int = SHARD_BYTES) -> list[list[str]]:
    """Parameters in order, cut where weight and moments together pass `limit` bytes; one never spans two shards."""
    shards: list[list[str]] = []
    room = 0
    for name, shape in shapes.items():
        size = 4 * (1 + len(MOMENTS)) * torch.Size(shape).numel()
        if not shards or size > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    return shards


def save(
    output_dir: Path, step: int, engine: Engine, topology: Topology, state: dict[str, Any], config: Config
) -> Path:
    """Write output_dir/step-N; collective. Raises UserError on every rank where one could not write; the older
    checkpoints are untouched then, and nothing of the new one stays."""
    final = output_dir / f"step-{step}"
    temporary = output_dir / f"step-{step}.tmp"

    def make_folder() -> None:
        if topology.rank == 0:
            try:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
            except OSError as error:
                raise UserError(f"cannot write {temporary}: {error.strerror}") from error

    try:
        topology.together(make_folder)
        shapes = {name: p.global_shape for name, p in engine.parameters.items()}
        files, index = _write_shards(temporary, shapes, engine, topology)

        def finish() -> None:
            if topology.rank == 0:
                _write_rest(temporary, files, index, state, config)
                _publish(temporary, final, output_dir)

        topology.together(finish)
    except UserError:
        if topology.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    if topology.rank == 0:
        _prune(output_dir, step, config.checkpoint.keep_last)
    return final


def _write_shards(
    folder: Path, shapes: dict[str, tuple[int, ...]], engine: Engine, topology: Topology
) -> tuple[dict[str, dict], dict[str, list]]:
    """The tensor files, shard k by data-parallel rank k mod their number; returns the manifest's entries and the index.

    Gathering is collective, one parameter at a time, so a rank that cannot write goes on gathering and fails after.
    """
    shards = plan_shards(shapes)
    written: dict[str, dict] = {}
    index: dict[str, list] = {}
    failure: UserError | None = None
    engine.begin_gather()
    for k, names in enumerate(shards):
        mine = topology.data_rank == k % topology.grid.data and failure is None
        model_file, optimizer_file = (
            f"{kind}-{k + 1:05d}-of-{len(shards):05d}.safetensors" for kind in ("model", "optimizer")
        )
        weights: dict[str, Tensor] = {}
        moments: dict[str, Tensor] = {}
        for name in names:
            tensors = engine.gather_state(name)
            index[name] = [list(shapes[name]), model_file, optimizer_file]
            if mine:
                tensors = {key: tensor.to("cpu", torch.float32).contiguous() for key, tensor in tensors.items()}
                weights[name] = tensors["weight"]
                moments |= {f"{name}.{key}": tensors[key] for key in MOMENTS}
        if mine:
            try:
                for file, content in ((model_file, weights), (optimizer_file, moments)):
                    written[file] = _write(folder / file, to_safetensors(content))
            except UserError as error:
                failure = error

    def fail() -> None:
        if failure is not None:
            raise failure

    topology.together(fail)
    files: dict[str, dict] = {}
    for part in topology.gather_objects(written):
        files |= part
    return files, index


def _write(path: Path, content: bytes) -> dict:
    return {"sha256": atomic_write(path, [content]), "bytes": len(content)}


def _write_rest(folder: Path, files: dict, index: dict, state: dict, config: Config) -> None:
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
    manifest = {"format": FORMAT, "version": FORMAT_VERSION, "step": state["step"], "files": files}
    _write(folder / "manifest.json", _json(manifest))


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()


def _publish(temporary: Path, final: Path, output_dir: Path) -> None:
    try:
        if final.exists():  # of an abandoned continuation: a run resumed from before it
            shutil.rmtree(final)
        os.replace(temporary, final)
        sync_folder(output_dir)
    except OSError as error:
        raise UserError(f"cannot rename {temporary} to {final}: {error.strerror}") from error
    atomic_write(output_dir / "latest", [final.name.encode() + b"\n"])


def _prune(output_dir: Path, step: int, keep_last: int) -> None:
    """Keep the newest checkpoints up to `step`; what an abandoned run left beyond it is not ours to count."""
    old = [folder for number, folder in list_checkpoints(output_dir) if number <= step]
    for folder in old[:-keep_last]:
        shutil.rmtree(folder, ignore_errors=True)


def set_aside(output_dir: Path) -> Path | None:
    """Move the checkpoints of `output_dir` into a new folder in it, for a run that starts afresh; None if none."""
    found = list_checkpoints(output_dir)
    if not found:
        return None
    number = 1
    while (output_dir / f"replaced-{number}").exists():
        number += 1
    aside = output_dir / f"replaced-{number}"
    try:
        aside.mkdir()
        (output_dir / "latest").unlink(missing_ok=True)
        for _, folder in found:
            os.replace(folder, aside / folder.name)
    except OSError as error:
        raise UserError(f"cannot move the checkpoints of {output_dir} to {aside}: {error.strerror}") from error
    return aside


def check_same_model(checkpoint: Checkpoint, config: Config) -> None:
    """Refuse to continue another model's run: ConfigError naming the keys that differ."""
    theirs, ours = checkpoint.model.model_dump(), config.model.model_dump()
    differing = [f"model.{key} {theirs[key]} there, {ours[key]} here" for key in ours if theirs[key] != ours[key]]
    if differing:
        raise ConfigError(
            f"checkpoint.output_dir: {checkpoint.folder} is of another run ({'; '.join(differing)});"
            " choose another --output-dir, or start afresh with --no-resume"
        )


def load(checkpoint: Checkpoint, engine: Engine, topology: Topology) -> None:
    """Weights and optimizer state into the engine, whatever layout wrote them; collective."""
    topology.together(checkpoint.check_shapes, {n: p.global_shape for n, p in engine.parameters.items()})
    topology.together(checkpoint.verify, topology.rank, topology.world_size)
    engine.begin_load(checkpoint.step)
    for name in engine.parameters:
        engine.load_state(name, checkpoint.tensors(name))
    engine.end_load()
    engine.load_loss_scale_state(checkpoint.state["loss_scale"])
