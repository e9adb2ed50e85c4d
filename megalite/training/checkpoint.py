"""Saving an engine's state and loading it: by global parameter name, so that a checkpoint belongs to no layout.

`checkpoint_reader.py` tells what a checkpoint holds. It is written as step-N.tmp, forced to disk and renamed, so a
folder named step-N is complete; then `latest` names it. All ranks must see one file system.
"""

import json
import os
import shutil
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor

from megalite.config import CheckpointConfig, Config, ModelConfig
from megalite.data.indexed import atomic_write, sync_folder
from megalite.data.tokenizer import FILES as TOKENIZER_FILES
from megalite.errors import ConfigError, UserError
from megalite.layers.sharded_init import shard, unshard
from megalite.topology import Topology
from megalite.training.checkpoint_reader import (
    FORMAT,
    FORMAT_VERSION,
    MOMENTS,
    Checkpoint,
    find_checkpoint,
    list_checkpoints,
)
from megalite.training.engine import Engine
from megalite.training.meters import first_free

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

    try:
        topology.on_first(_make_folder, temporary)
        files, index = _write_shards(temporary, engine, topology)
        topology.on_first(_write_rest, temporary, files, index, state, config)
        topology.on_first(_publish, temporary, final, output_dir)
    except UserError:
        if topology.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    if topology.rank == 0:
        _prune(output_dir, step, config.checkpoint.keep_last)
    return final


def _make_folder(folder: Path) -> None:
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}") from error


def all_shapes(engine: Engine, topology: Topology) -> list[dict[str, tuple[int, ...]]]:
    """Of each pipeline stage, the parameters that it owns and their global shapes; collective."""
    own = {name: tuple(p.global_shape) for name, p in engine.parameters.items() if engine.owns(name)}
    ranks = topology.grid.ranks[:, 0, 0, 0]
    gathered = topology.gather_objects(own)
    return [gathered[rank] for rank in ranks]


def _write_shards(folder: Path, engine: Engine, topology: Topology) -> tuple[dict[str, dict], dict[str, list]]:
    """The tensor files; returns the manifest's entries and the index.

    Each stage has shards of its own, of which shard k is written by rank k mod their number of its ZeRO group.

    Gathering is collective, one tensor at a time, so a rank that cannot write goes on gathering and fails after. Ranks
    write in a thread, beside each other and beside the gathering of later shards; one shard waits at most.
    """
    stages = all_shapes(engine, topology)
    plans = [plan_shards(shapes) for shapes in stages]
    total = sum(map(len, plans))
    before = sum(map(len, plans[: topology.pipeline_rank]))
    shapes, shards = stages[topology.pipeline_rank], plans[topology.pipeline_rank]
    index: dict[str, list] = {}
    writing: list[Future[dict[str, dict]]] = []
    engine.begin_gather()
    with ThreadPoolExecutor(1) as writer:
        for k, names in enumerate(shards):
            mine = topology.zero_rank == k % topology.grid.zero and topology.tensor_rank == 0
            model_file, optimizer_file = (
                f"{kind}-{before + k + 1:05d}-of-{total:05d}.safetensors" for kind in ("model", "optimizer")
            )
            contents: dict[str, dict[str, Tensor]] = {model_file: {}, optimizer_file: {}}
            for name in names:
                index[name] = [list(shapes[name]), model_file, optimizer_file]
                for key in ("weight", *engine.moments[name]):
                    tensor = _join(engine.gather(name, key), engine.parameters[name], topology)
                    if mine:
                        file, entry = (model_file, name) if key == "weight" else (optimizer_file, f"{name}.{key}")
                        contents[file][entry] = tensor.to("cpu", torch.float32).contiguous()
            if mine:
                wait(writing)
                writing.append(writer.submit(_write_shard, folder, contents))

    def collect() -> dict[str, dict]:
        return {name: entry for part in writing for name, entry in part.result().items()}

    files: dict[str, dict] = {}
    names: dict[str, list] = {}
    for written, entries in topology.gather_objects((topology.together(collect), index)):
        files |= written
        names |= entries
    return files, names


def _join(tensor: Tensor, parameter: torch.nn.Parameter, topology: Topology) -> Tensor:
    """The whole of what the tensor-parallel ranks have parts of; collective."""
    size = topology.grid.tensor
    if size == 1 or parameter.tp_dim is None:
        return tensor
    tensor = tensor.to(topology.device).contiguous()
    parts = [torch.empty_like(tensor) for _ in range(size)]
    torch.distributed.all_gather(parts, tensor, group=topology.tensor_group)
    return unshard(parts, parameter.tp_dim, parameter.tp_segments)


def _write_shard(folder: Path, contents: dict[str, dict[str, Tensor]]) -> dict[str, dict]:
    return {file: _write(folder / file, to_safetensors(tensors)) for file, tensors in contents.items()}


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
        sync_folder(output_dir)
    except OSError as error:
        raise UserError(f"cannot rename {temporary} to {final}: {error.strerror}") from error
    shutil.rmtree(old, ignore_errors=True)
    atomic_write(output_dir / "latest", [final.name.encode() + b"\n"])


def _prune(output_dir: Path, step: int, keep_last: int) -> None:
    """Keep the newest checkpoints up to `step`; what an abandoned run left beyond it is not ours to count."""
    old = [folder for number, folder in list_checkpoints(output_dir) if number <= step]
    for folder in old[:-keep_last]:
        shutil.rmtree(folder, ignore_errors=True)


def prepare_output(output_dir: Path, first_step: int) -> Path | None:
    """Make `output_dir` ready for a run that goes on from `first_step` (0: afresh), before it trains for hours.

    Checkpoints beyond that step, of a continuation that the user goes back on, move into a new folder replaced-N,
    which is returned; what a killed save left is removed. Raises UserError where the folder cannot be written.
    """
    beyond = [folder for step, folder in list_checkpoints(output_dir) if step > first_step or first_step == 0]
    aside = None
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        for unfinished in (*output_dir.glob("step-*.tmp"), *output_dir.glob("step-*.old")):
            shutil.rmtree(unfinished, ignore_errors=True)
        with tempfile.TemporaryFile(dir=output_dir):
            pass
        if beyond:
            aside = first_free(output_dir, "replaced-{}")
            aside.mkdir()
            (output_dir / "latest").unlink(missing_ok=True)
            for folder in beyond:
                os.replace(folder, aside / folder.name)
    except OSError as error:
        raise UserError(f"cannot write checkpoint.output_dir {output_dir}: {error.strerror}") from error
    return aside


def choose_resume(config: CheckpointConfig) -> tuple[Path | None, str | None]:
    """(the checkpoint to go on from, the one that this run branched from): None for none.

    --resume PATH branches off PATH on the first start; started again with the same words, the branch goes on from its
    own newest. An output folder that holds some other run is refused.
    """
    output_dir = Path(config.output_dir)
    newest = find_checkpoint(output_dir)
    if config.resume == "none":
        return None, None
    if config.resume == "auto":
        return newest, None
    start = find_checkpoint(Path(config.resume))
    if start is None:
        raise ConfigError(f"--resume {config.resume}: there is no checkpoint (a step-N folder with manifest.json)")
    branch = str(start.resolve())
    if newest is not None and _branched_from(newest) == branch:
        return newest, branch
    if newest is not None and start.resolve().parent != output_dir.resolve():
        raise ConfigError(
            f"checkpoint.output_dir: {output_dir} holds another run ({newest.name}); to continue"
            f" {config.resume} choose an --output-dir of its own"
        )
    return start, branch


def _branched_from(folder: Path) -> str | None:
    try:
        return Checkpoint(folder).state.get("branched_from")
    except UserError:  # a damaged newest is what --resume with an older one is for
        return None


def find_resume(config: Config, topology: Topology) -> tuple[Checkpoint | None, str | None]:
    """The checkpoint to go on from, opened and checked (None: afresh), and what the run branched off; collective."""
    # Rank 0 looks: on a network file system another node may see an older listing.
    path, branched_from = topology.on_first(choose_resume, config.checkpoint)
    if path is None:
        return None, None
    found = topology.together(Checkpoint, path)
    topology.together(check_same_model, found, config.model)
    topology.together(check_same_optimizer, found, config.training.optimizer)
    return found, branched_from or found.state.get("branched_from")


def check_same_model(checkpoint: Checkpoint, model: ModelConfig) -> None:
    """Refuse to continue another model's run: ConfigError naming what differs.

    Compared is what the weights and their meaning depend on, in effect, not in spelling.
    """
    theirs, ours = _identity(checkpoint.model), _identity(model)
    differing = [f"model.{key} {theirs[key]} there, {ours[key]} here" for key in ours if theirs[key] != ours[key]]
    if differing:
        raise ConfigError(
            f"checkpoint.output_dir: {checkpoint.folder} is of another run ({'; '.join(differing)});"
            " choose another --output-dir, or start afresh with --no-resume"
        )


def check_same_optimizer(checkpoint: Checkpoint, optimizer: str) -> None:
    """Refuse, with a ConfigError, to go on with an optimizer that keeps other moments."""
    if checkpoint.optimizer != optimizer:
        raise ConfigError(
            f"training.optimizer: {checkpoint.folder} was trained with {checkpoint.optimizer}, not {optimizer}; set it"
            " to that, or start afresh with --no-resume"
        )


def _identity(model: ModelConfig) -> dict[str, Any]:
    effective = {"num_kv_heads": model.kv_heads, "head_dim": model.head_size, "intermediate_size": model.ffn_size}
    return model.model_dump(exclude={"init_std", "n_positions", "attention", "kernels", "fused_loss"}) | effective


def load(checkpoint: Checkpoint, engine: Engine, topology: Topology) -> None:
    """Weights and optimizer state into the engine, whatever layout wrote them; collective."""
    shapes = {name: shape for stage in all_shapes(engine, topology) for name, shape in stage.items()}
    topology.together(checkpoint.check_shapes, shapes)
    topology.together(checkpoint.verify, topology.rank, topology.world_size)
    engine.begin_load(checkpoint.state["adam_step"])
    place = topology.grid.tensor, topology.tensor_rank
    for name, parameter in engine.parameters.items():
        tensors = checkpoint.tensors(name, engine.moments[name])
        split = parameter.tp_dim, parameter.tp_segments
        engine.load_state(name, {key: shard(tensor, *split, *place) for key, tensor in tensors.items()})
    engine.end_load()
    engine.load_loss_scale_state(checkpoint.state["loss_scale"])
