"""Trains a cell on CPU ranks with the real engine and trainer, and compares it with plain torch in one process.

Reference and ranks are forked from a process that has imported everything and started no thread; a cell then takes
seconds. They tell their results through files.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from megalite.config import Config
from megalite.config_check import resolve_batch
from megalite.config_ds import read_ds_config
from megalite.data.batch import Batch, document_fields
from megalite.data.loader import TrainLoader
from megalite.layers.sharded_init import shard
from megalite.model.gpt import Stage
from megalite.model.partition import layers_of_chunks
from megalite.topology import LaunchEnvironment, Topology
from megalite.training.build import build_chunks
from megalite.training.checkpoint_reader import MOMENTS
from megalite.training.engine import DTYPES, Engine, make_optimizer
from megalite.training.forked import RanksFailed, prepare, run_forked
from megalite.training.parity_cells import BETA1, GLOBAL_BATCH, STEPS, Cell, config_of
from megalite.training.trainer import Trainer

QUANTITIES = ("loss", "norm", "gradient", "weight")
# Largest relative difference that is allowed; of a tensor to its largest element. docs/parallelism.md has the reasons.
TOLERANCES = {
    "fp32": dict.fromkeys(QUANTITIES, 1e-5),
    "bf16": {"loss": 2e-3, "norm": 2e-2, "gradient": 6e-2, "weight": 4e-2},
}
# So that a tiny model too is partitioned (all but its norms), fetched ahead, released and reduced in several buckets.
TINY = {
    "reduce_bucket_size": 5000,
    "stage3_param_persistence_threshold": 40,
    "stage3_prefetch_bucket_size": 5000,
    "stage3_max_live_parameters": 20000,
    "sub_group_size": 8000,
}

Fault = Callable[[], None]


@dataclass
class Result:
    """How far a cell is from its reference; `problem`: what is wrong with it, None if nothing is."""

    cell: Cell
    worst: dict[str, float] = field(default_factory=dict)  # by quantity
    seconds: float = 0.0
    problem: str | None = None


class RandomWindows:
    """A dataset of random tokens, where sequences differ in how many of their labels count (none, of one in eight)."""

    def __init__(self, config: Config):
        self.config, self.fingerprint = config, "random"

    def __len__(self) -> int:
        return 16 * GLOBAL_BATCH

    def batch(self, indices: list[int]) -> Batch:
        block, rows = self.config.data.block_size, [np.random.default_rng((7, index)) for index in indices]
        windows = np.stack([row.integers(self.config.model.vocab_size, size=block + 1) for row in rows])
        counted = np.stack([row.random(block) < (index % 8) / 7 for row, index in zip(rows, indices, strict=True)])
        positions = documents = None
        if self.config.data.mask_documents:
            breaks = [sorted(set(row.integers(1, block, size=2).tolist())) for row in rows]
            positions, documents = document_fields(breaks, block)
        return Batch.from_windows(windows, counted, positions=positions, documents=documents)


class Bench:
    """Runs cells and keeps the references, in a folder of its own. config: of `parity_cells.shrink`."""

    def __init__(self, config: Config, folder: Path, timeout: float):
        self.config, self.folder, self.timeout = config, folder, timeout
        self.runs = 0
        prepare()

    def run(self, cell: Cell, fault: Fault | None = None) -> Result:
        """Train a cell and compare; fault: called first on every rank."""
        started = time.monotonic()
        result = Result(cell)
        config = config_of(cell, self.config)
        try:
            reference = self._reference(cell, config)
            reports = self._run(cell.ranks, partial(_train, config, reference, cell.ranks, fault))
            result.problem = _judge(result, reports, json.loads(reference.with_suffix(".json").read_text()))
        except RanksFailed as failure:
            result.problem = str(failure)
        result.seconds = time.monotonic() - started
        return result

    def _reference(self, cell: Cell, config: Config) -> Path:
        layers, arithmetic, variant = cell.reference
        path = self.folder / f"reference-{layers}-{arithmetic}-{variant}.safetensors"
        if not path.exists():
            self._run(1, partial(_train_plainly, config, arithmetic, path))
        return path

    def _run(self, ranks: int, function: Callable[[int, Path], dict]) -> list[dict]:
        self.runs += 1
        folder = self.folder / f"run-{self.runs}"
        folder.mkdir()
        return run_forked(ranks, function, folder, self.timeout)


def start_trainer(config: Config, rank: int, ranks: int, store: Path, zero: dict[str, Any] | None = None) -> Trainer:
    """A rank's trainer, as `pretrain.py` makes it, on random data; collective.

    store: a file, not there yet, by which the `ranks` meet. zero: settings for zero_optimization instead of `TINY`.
    """
    parallel, training = config.parallel, config.training
    topology = Topology(
        LaunchEnvironment(rank, rank, ranks, launched=True),
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        context=parallel.context,
        timeout=timedelta(hours=1),  # the process has a deadline of its own
        store=dist.FileStore(str(store), ranks),
    )
    ds_config = read_ds_config(config.deepspeed)
    ds_config["zero_optimization"] |= TINY if zero is None else zero
    layers = layers_of_chunks(config)
    accumulation, _ = resolve_batch(config, topology.grid.data)
    engine = Engine(config, ds_config, topology, partial(build_chunks, config, topology, layers), accumulation)
    loader = TrainLoader(
        RandomWindows(config),
        micro_batch=training.per_device_train_batch_size,
        accumulation=accumulation,
        dp_rank=topology.data_rank,
        dp_size=topology.grid.data,
        seed=training.seed,
    )
    return Trainer(config, topology, engine, loader, {}, STEPS)


def _train(config: Config, reference: Path, ranks: int, fault: Fault | None, rank: int, folder: Path) -> dict[str, Any]:
    """A rank of a cell: {"losses", "norms", "gradient": {name: difference}, "weight": {name: difference}}."""
    if fault is not None:
        fault()
    trainer = start_trainer(config, rank, ranks, folder / "store")
    engine, topology = trainer.engine, trainer.topology
    want = load_file(reference)
    report: dict[str, Any] = {"losses": [], "norms": []}

    def differences(kind: str, key: str, scale: float) -> dict[str, float]:
        engine.begin_gather()
        found = {}
        for name, parameter in engine.parameters.items():
            full = want[f"{kind} {name}"]
            place = topology.grid.tensor, topology.tensor_rank
            part = shard(full, parameter.tp_dim, parameter.tp_segments, *place)
            difference = ((engine.gather(name, key) * scale - part).abs().max() / full.abs().max()).item()
            found[name] = math.inf if math.isnan(difference) else difference  # nan compares with nothing
        return found

    for step in range(STEPS):
        record = trainer.train_step()
        report["losses"].append(record["loss"])
        report["norms"].append(record["grad_norm"])
        if step == 0:
            # Adam's first moment is a mean of the clipped gradients, of which there was one.
            report["gradient"] = differences("gradient", MOMENTS[0], 1 / (1 - BETA1))
    report["weight"] = differences("weight", "weight", 1.0)
    trainer.loader.close()
    topology.close()
    return report


def _train_plainly(config: Config, arithmetic: str, path: Path, rank: int, folder: Path) -> dict:
    """The reference: torch alone, the whole model and the whole global batch in one process.

    bf16: a bf16 copy computes, its gradients go to fp32 masters, as under ZeRO-1 to 3. autocast: as under ZeRO-0.
    """
    training = config.training
    stage = Stage(config.model, seed=training.seed, z_loss=training.z_loss, init_rounding=DTYPES[training.precision])
    masters = {parameter.global_name: parameter for parameter in stage.parameters()}
    optimizer = make_optimizer(masters, training)
    works = stage
    if arithmetic == "bf16":
        works = Stage(config.model, seed=training.seed, z_loss=training.z_loss, init_rounding=torch.bfloat16).bfloat16()
    copies = list(zip(masters.values(), works.parameters(), strict=True)) if works is not stage else []
    loader = TrainLoader(
        RandomWindows(config), micro_batch=1, accumulation=GLOBAL_BATCH, dp_rank=0, dp_size=1, seed=training.seed
    )
    said: dict[str, Any] = {"losses": [], "norms": [], "names": list(masters)}
    tensors: dict[str, Tensor] = {}
    for step in range(STEPS):
        batches = loader.next_step()
        valid = sum(batch.loss_mask.sum().item() for batch in batches)
        loss_sum = 0.0
        for number, batch in enumerate(batches, step * GLOBAL_BATCH):
            with torch.autocast("cpu", torch.bfloat16, enabled=arithmetic == "autocast"):
                loss = works(
                    batch.tokens,
                    batch.positions,
                    batch.labels,
                    batch.loss_mask,
                    documents=batch.documents,
                    samples=torch.tensor([number]),
                )
            (loss / valid).backward()
            loss_sum += loss.item()
            for master, copy in copies:
                master.grad = copy.grad.float() + (0 if master.grad is None else master.grad)
                copy.grad = None
        norm = math.sqrt(sum(master.grad.double().square().sum().item() for master in masters.values()))
        torch.nn.utils.clip_grads_with_norm_(masters.values(), training.max_grad_norm, torch.tensor(norm))
        if step == 0:
            tensors |= {f"gradient {name}": master.grad.clone() for name, master in masters.items()}
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for master, copy in copies:
                copy.copy_(master)
        said["losses"].append(loss_sum / valid)
        said["norms"].append(norm)
    tensors |= {f"weight {name}": master.detach().clone() for name, master in masters.items()}
    loader.close()
    path.with_suffix(".json").write_text(json.dumps(said))
    save_file(tensors, path)
    return {}


def _judge(result: Result, reports: list[dict], want: dict) -> str | None:
    """Fill in the worst differences; returns what is wrong first of each quantity, None if nothing is."""
    tolerances = TOLERANCES[result.cell.precision]
    problems = []
    for quantity, key in (("loss", "losses"), ("norm", "norms")):
        apart = [
            max(abs(value - right) / right for value in values)
            for right, *values in zip(want[key], *(report[key] for report in reports), strict=True)
        ]
        result.worst[quantity] = max(apart)
        wrong = [step for step, each in enumerate(apart) if not each <= tolerances[quantity]]
        if wrong:
            problems.append(f"{quantity} of step {wrong[0] + 1} is {apart[wrong[0]]:.1e} off")
    for quantity in ("gradient", "weight"):
        # The rank that is furthest off, by parameter in the model's order.
        apart = {}
        for name in want["names"]:
            found = [(report[quantity][name], rank) for rank, report in enumerate(reports) if name in report[quantity]]
            apart[name] = max(found, default=(math.inf, 0))  # no rank has it
        result.worst[quantity] = max(difference for difference, _ in apart.values())
        wrong = [name for name, (difference, _) in apart.items() if not difference <= tolerances[quantity]]
        if wrong:
            difference, rank = apart[wrong[0]]
            others = f", and {len(wrong) - 1} others" if len(wrong) > 1 else ""
            problems.append(f"{quantity} of {wrong[0]} is {difference:.1e} off on rank {rank}{others}")
    return "; ".join(problems) or None
