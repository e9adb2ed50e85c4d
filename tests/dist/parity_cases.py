"""Run in a process of its own, which has no threads: `results(NAME)`, or python -m tests.dist.parity_cases NAME.

What ranks of `megalite.training.parity` do when one fails; what they send in a step; what they hold.
"""

import json
import os
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megalite.config import Config
from megalite.layers import linear
from megalite.model.gpt import Stage
from megalite.training.forked import prepare, run_forked
from megalite.training.parity import Bench, start_trainer
from megalite.training.parity_cells import Cell, config_of, shrink
from megalite.training.trainer import Trainer
from tests.dist.conftest import run

TIMEOUT = 100
COUNTED = {
    **{f"zero{stage}": Cell(data=2, zero=stage) for stage in "0123"},
    **{f"bf16 zero{stage}": Cell(data=2, zero=stage, precision="bf16") for stage in "123"},
    "tensor": Cell(tensor=2),
    "tensor, selective": Cell(tensor=2, recompute="selective"),
    "tensor, full": Cell(tensor=2, recompute="full"),
    "sequence": Cell(tensor=2, sequence=True),
    "pipeline": Cell(pipeline=2),
    "virtual": Cell(pipeline=2, virtual=2),
    "context": Cell(context=2),
}
# Of ZeRO-3: (stage3_prefetch_bucket_size, stage3_max_live_parameters, stage3_max_reuse_distance)
KNOBS = {
    "resident, at once": (10**9, 10**9, 10**9),
    "resident": (0, 0, 10**9),
    "between": (5000, 10000, 0),
    "streamed": (0, 0, 0),
}


def results(name: str) -> dict:
    """What the function of that name below returns."""
    done = run([sys.executable, "-m", "tests.dist.parity_cases", name], timeout=400)
    assert done.code == 0, done.errors
    return json.loads(done.output)


# When a rank fails


def _on_rank_1(what) -> None:
    """In the second step of rank 1, instead of training."""
    whole = Trainer.train_step

    def train_step(self):
        if self.step == 1 and self.topology.rank == 1:
            what()
        return whole(self)

    Trainer.train_step = train_step


def _raise() -> None:
    raise ValueError("this rank is broken")


def failures(folder: Path) -> dict:
    """By kind: [the problem, seconds, how many children are left]."""
    bench = Bench(shrink(Config()), folder, 15)
    cell = Cell(tensor=2, data=2)
    found = {}
    for name, what in (
        ("raises", _raise),
        ("dies", lambda: os.kill(os.getpid(), 9)),
        ("hangs", partial(time.sleep, 600)),
    ):
        started = time.monotonic()
        problem = bench.run(cell, partial(_on_rank_1, what)).problem
        found[name] = [problem, time.monotonic() - started, _children()]
    found["nothing"] = [bench.run(cell).problem, 0, _children()]
    return found


def _children() -> int:
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return 0
    return 1


# What is sent


OPERATIONS = {
    "allreduce_": "all_reduce",
    "all_reduce": "all_reduce",
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "alltoall_base_": "all_to_all",
    "send": "send",
}
INSIDE = {"linear_reduce": linear._linear_reduce, "gather_linear": linear._gather_linear}


class Log(TorchDispatchMode):
    """Each collective and message that starts on this rank: {(group, operation, bytes given): how often}."""

    def __init__(self, groups: dict[str, str]):
        super().__init__()
        self.groups, self.seen = groups, Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        namespace, name = function._schema.name.split("::")
        if namespace == "megalite":
            with self:
                return INSIDE[name](*args)
        if namespace in ("c10d", "_c10d_functional") and name not in ("wait_tensor", "recv_"):
            group = next(found for argument in reversed(args) if (found := self._name(argument)))
            given = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)][-1].nbytes
            self.seen[self.groups.get(group, "pipeline"), OPERATIONS[name], given] += 1
        return function(*args, **(kwargs or {}))

    @staticmethod
    def _name(argument: Any) -> str | None:
        """Of a group, as an argument of an operator; None of anything else."""
        if isinstance(argument, torch.ScriptObject) and "ProcessGroup" in str(argument._type()):
            return dist.ProcessGroup.unbox(argument).group_name
        return argument if isinstance(argument, str) else None


def _count(config: Config, ranks: int, zero: dict | None, evaluate: bool, rank: int, folder: Path) -> dict:
    """What a rank starts in its fourth step; in which steps ZeRO-3 found its fetches to be others than before."""
    trainer = start_trainer(config, rank, ranks, folder / "store", zero)
    engine, topology = trainer.engine, trainer.topology
    invalidated = []
    if engine.zero_stage == 3:
        coordinator = type(engine.optimizer.parameter_offload.get_param_coordinator())
        whole = coordinator._invalidate_trace
        coordinator._invalidate_trace = lambda self: (invalidated.append(trainer.step + 1), whole(self))
    for _ in range(3):
        trainer.train_step()
    if evaluate:
        with engine.evaluation():
            trainer.executor.evaluate(trainer.loader.next_step())
    names = ("control", "tensor", "context", "zero", "model", "sum")
    with Log({getattr(topology, f"{name}_group").group_name: name for name in names}) as log:
        trainer.train_step()
    trainer.loader.close()
    topology.close()
    sizes = {name: getattr(p, "ds_numel", p.numel()) for name, p in engine.parameters.items()}
    return {
        "seen": [[*key, times] for key, times in sorted(log.seen.items())],
        "invalidated": invalidated,
        "sizes": sizes,
        "layers": sum(len(chunk.blocks) for chunk in engine.chunks),
        "micro_batches": trainer.loader.accumulation,
        "sequences": trainer.loader.micro_batch,
    }


def counts(folder: Path) -> dict:
    """Of each rank, by case; ZeRO-3 also by how it is set, and after an evaluation."""
    prepare()
    config, found = shrink(Config()), {}
    cases = [(name, cell, None) for name, cell in COUNTED.items()]
    cases += [(name, Cell(data=2, zero="3"), zero3(*knobs)) for name, knobs in KNOBS.items()]
    together = Cell(tensor=2, sequence=True, pipeline=2, data=2, zero="3")
    cases += [("together", together, zero3(*KNOBS["resident"])), ("evaluated", Cell(data=2, zero="3"), None)]
    for name, cell, zero in cases:
        count = partial(_count, config_of(cell, config), cell.ranks, zero, name == "evaluated")
        found[name] = _run(folder / name, cell.ranks, count)
    return found


def zero3(prefetch: int, live: int, reuse: int) -> dict:
    return {
        "stage3_param_persistence_threshold": 0,
        "stage3_prefetch_bucket_size": prefetch,
        "stage3_max_live_parameters": live,
        "stage3_max_reuse_distance": reuse,
    }


# What is held


def _hold(config: Config, rank: int, folder: Path) -> dict:
    """Bytes that a rank has allocated for its part of the model, after two steps; and the most it ever gathered."""
    trainer = start_trainer(config, rank, 8, folder / "store", zero3(*KNOBS["streamed"]))
    optimizer = trainer.engine.optimizer
    most = _watch_gathered(optimizer)
    for _ in range(2):
        trainer.train_step()
    parameters = list(trainer.engine.parameters.values())
    states = [value for state in trainer.engine.adam.state.values() for value in state.values()]
    held = {
        "parameters": [parameter.ds_tensor for parameter in parameters],
        "gathered": [parameter.data for parameter in parameters],
        "gradients": [optimizer.grad_partitions_flat_buffer],
        "optimizer": [*optimizer.fp32_partitioned_groups_flat, *(each for each in states if each.dim())],
    }
    trainer.loader.close()
    trainer.topology.close()
    return {name: _allocated(tensors) for name, tensors in held.items()} | {"most gathered": most[0]}


def _watch_gathered(optimizer) -> list[int]:
    """[the most elements of parameters that were whole at a time], kept up to date."""
    coordinator = type(optimizer.parameter_offload.get_param_coordinator())
    whole, most = coordinator.fetch_sub_module, [0]

    def fetch(self, *args, **kwargs) -> None:
        whole(self, *args, **kwargs)
        most[0] = max(most[0], self._PartitionedParameterCoordinator__n_available_params)

    coordinator.fetch_sub_module = fetch
    return most


def _allocated(tensors: list[torch.Tensor]) -> int:
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def memory(folder: Path) -> dict:
    """By precision, a list by rank; and the number of parameters of the whole model."""
    prepare()
    config, found = shrink(Config()), {}
    for precision in ("fp32", "bf16"):
        cell = config_of(Cell(tensor=2, pipeline=2, data=2, zero="3", precision=precision), config)
        cell.model.num_layers, cell.model.tie_embeddings = 4, False  # as much on both stages
        found[precision] = _run(folder / precision, 8, partial(_hold, cell))
    found["whole"] = _run(folder / "whole", 1, partial(_size, cell))[0]
    return found


def _size(config: Config, rank: int, folder: Path) -> dict:
    stage = Stage(config.model, seed=0)
    sizes = {parameter.global_name: parameter.numel() for parameter in stage.parameters()}
    return {"parameters": sum(sizes.values()), "largest": max(sizes.values())}


def _run(folder: Path, ranks: int, function) -> list[dict]:
    folder.mkdir()
    return run_forked(ranks, function, folder, TIMEOUT)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="parity-cases-") as name:
        print(json.dumps({"failures": failures, "counts": counts, "memory": memory}[sys.argv[1]](Path(name))))
