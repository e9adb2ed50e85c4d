"""An engine's state to host copies and back: by global parameter name, so that a checkpoint belongs to no layout.

`checkpoint_writer.py` writes the copies beside training, `checkpoint_reader.py` reads them, and `checkpoint_folder.py`
finds the checkpoint to go on from.
"""

import itertools
from typing import Any

import torch
from torch import Tensor

from megalite.layers.sharded_init import unshard
from megalite.topology import Topology
from megalite.training.checkpoint_reader import MOMENTS, Checkpoint
from megalite.training.checkpoint_writer import Copies
from megalite.training.engine import Engine

# Of weights and moments together: a file of weights is a third, one of moments two thirds of this.
SHARD_BYTES = 6 << 30
# Below this, more files are no faster.
LEAST_SHARD_BYTES = 64 << 20


def plan_shards(shapes: dict[str, tuple[int, ...]], writers: int = 1, limit: int = SHARD_BYTES) -> list[list[str]]:
    """Parameters in order, cut where weight and moments together pass `limit` bytes, or before, so that `writers` ranks
    have one each; a parameter never spans two shards."""
    sizes = {name: 4 * (1 + len(MOMENTS)) * torch.Size(shape).numel() for name, shape in shapes.items()}
    limit = min(limit, max(LEAST_SHARD_BYTES, -(-sum(sizes.values()) // writers)))
    shards: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not shards or size > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    return shards


def all_shapes(engine: Engine, topology: Topology) -> list[dict[str, tuple[int, ...]]]:
    """Of each pipeline stage, the parameters that it owns and their global shapes; collective."""
    own = {name: tuple(p.global_shape) for name, p in engine.parameters.items() if engine.owns(name)}
    ranks = topology.grid.ranks[:, 0, 0, 0]
    gathered = topology.gather_objects(own)
    return [gathered[rank] for rank in ranks]


def host_copies(step: int, engine: Engine, topology: Topology, state: dict[str, Any]) -> Copies:
    """What this rank has to write of a checkpoint, copied to the host; collective.

    Each stage has shards of its own, of which each of its ranks takes its share. They are gathered a parameter at a
    time, so a rank holds its shards and never the model. state: what state.json holds.
    """
    grid = topology.grid
    writers, writer = grid.zero * grid.tensor, topology.zero_rank * grid.tensor + topology.tensor_rank
    stages = all_shapes(engine, topology)
    plans = [plan_shards(shapes, writers) for shapes in stages]
    total = sum(map(len, plans))
    before = sum(map(len, plans[: topology.pipeline_rank]))
    shapes, shards = stages[topology.pipeline_rank], plans[topology.pipeline_rank]
    copies = Copies(step, {}, {}, state)
    engine.begin_gather()
    for k, names in enumerate(shards):
        model_file, optimizer_file = (
            f"{kind}-{before + k + 1:05d}-of-{total:05d}.safetensors" for kind in ("model", "optimizer")
        )
        for name in names:
            copies.index[name] = [list(shapes[name]), model_file, optimizer_file]
            for key in ("weight", *engine.moments[name]):
                tensor = _join(engine.gather(name, key), engine.parameters[name], topology)
                if k % writers == writer:
                    file, entry = (model_file, name) if key == "weight" else (optimizer_file, f"{name}.{key}")
                    # A copy even of what is on the host in fp32 already: training goes on to change that.
                    host = torch.empty(tensor.shape, dtype=torch.float32)
                    copies.files.setdefault(file, {})[entry] = host.copy_(tensor)
    return copies


def _join(tensor: Tensor, parameter: torch.nn.Parameter, topology: Topology) -> Tensor:
    """The whole of what the tensor-parallel ranks have parts of; collective."""
    size = topology.grid.tensor
    if size == 1 or parameter.tp_dim is None:
        return tensor
    tensor = tensor.to(topology.device).contiguous()
    parts = [torch.empty_like(tensor) for _ in range(size)]
    torch.distributed.all_gather(parts, tensor, group=topology.tensor_group)
    return unshard(parts, parameter.tp_dim, parameter.tp_segments)


def load(checkpoint: Checkpoint, engine: Engine, topology: Topology) -> None:
    """Weights and optimizer state into the engine, whatever layout wrote them; collective."""
    _load(checkpoint, engine, topology, checkpoint.state["adam_step"], engine.moments)
    engine.load_loss_scale_state(checkpoint.state["loss_scale"])


def load_weights(checkpoint: Checkpoint, engine: Engine, topology: Topology) -> None:
    """Weights alone, with the optimizer as before its first step; collective."""
    _load(checkpoint, engine, topology, 0, dict.fromkeys(engine.parameters, ()))


def _load(
    checkpoint: Checkpoint, engine: Engine, topology: Topology, adam_step: int, moments: dict[str, tuple[str, ...]]
) -> None:
    """Each rank reads of each tensor the part that it keeps."""
    stages = all_shapes(engine, topology)
    shapes = dict(itertools.chain.from_iterable(stage.items() for stage in stages))
    topology.together(checkpoint.check_shapes, shapes)
    engine.begin_load(adam_step)

    def read() -> None:
        for name in engine.parameters:
            engine.load_state(name, checkpoint.tensors(name, moments[name], engine.part(name)))

    topology.together(read)
    engine.end_load()
