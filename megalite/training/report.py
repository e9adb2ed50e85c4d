"""What a run says of itself at its start and its end, and the files that tell what ran."""

import json
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megalite.config import Config
from megalite.config_loader import LoadedConfig, format_config
from megalite.data.blend import Blend
from megalite.data.dataset import WindowDataset
from megalite.data.loader import TrainLoader
from megalite.data.sources import Sources, unigram_entropy
from megalite.data.streaming import StreamingLoader
from megalite.errors import UserError
from megalite.model.flops import count_parameters, predict_memory
from megalite.topology import Grid, Topology
from megalite.training.engine import Engine
from megalite.training.trainer import perplexity


def banner(
    config: Config,
    topology: Topology,
    engine: Engine,
    loader: TrainLoader | StreamingLoader,
    sources: Sources,
    max_steps: int,
    run_dir: Path,
) -> str:
    """What is about to run, in a few lines."""
    model, training, data = config.model, config.training, config.data
    memory = predict_memory(
        model,
        zero_stage=engine.zero_stage,
        offload=engine.offload,
        data_parallel=topology.grid.zero,
        low_precision=training.precision != "fp32",
        micro_batch=training.per_device_train_batch_size,
        sequence=data.block_size,
        recompute=training.activation_checkpointing,
        tensor=topology.grid.tensor,
        sequence_parallel=config.parallel.sequence,
        context=topology.grid.context,
        pipeline=topology.grid.pipeline,
    )
    global_batch = loader.global_batch
    tokens = global_batch * data.block_size
    samples = max_steps * global_batch
    zero = f"ZeRO-{engine.zero_stage}{' with CPU offload' if engine.offload else ''}"
    return "\n".join(
        [
            f"MegaLite  {count_parameters(model) / 1e6:,.2f} M parameters: {model.num_layers} layers, hidden"
            f" {model.hidden_size}, {model.num_heads} heads ({model.kv_heads} KV), vocabulary {model.vocab_size}",
            f"layout    {topology.world_size} x {topology.device.type}: {_layout(config, topology.grid)}; {zero},"
            f" {training.precision}, activation checkpointing {training.activation_checkpointing}",
            *_pipeline(config, loader.accumulation),
            f"batch     {training.per_device_train_batch_size} sequences a device x {loader.accumulation} accumulated x"
            f" {topology.grid.data} ranks = {global_batch} of {data.block_size} tokens = {tokens:,} tokens a step",
            f"run       {max_steps:,} steps = {max_steps * tokens:,} tokens: {_passes(sources, samples)};"
            f" {_validation(sources.validation)}",
            *(_blend(sources.blend, samples) if sources.blend else []),
            *_dropped([each for each in (sources.train, *sources.validation.values()) if not isinstance(each, list)]),
            f"memory    about {memory['total'] / 2**30:.2f} GiB a device predicted: {memory['states'] / 2**30:.2f}"
            f" weights, gradients and optimizer, {memory['activations'] / 2**30:.2f} activations"
            + (f"; on the host {memory['host'] / 2**30:.2f} of activations" if memory["host"] else ""),
            f"writes    {config.checkpoint.output_dir} (checkpoints), {run_dir} (metrics)",
        ]
    )


def _layout(config: Config, grid: Grid) -> str:
    sequence = " with sequence parallelism" if config.parallel.sequence and grid.tensor > 1 else ""
    context = f", context {grid.context}" if grid.context > 1 else ""
    return f"data {grid.data}, tensor {grid.tensor}{sequence}{context}, pipeline {grid.pipeline}"


def _pipeline(config: Config, micro_batches: int) -> list[str]:
    parallel = config.parallel
    if parallel.pipeline == 1:
        return []
    # Of the ideal step, which none of the schedules waits in (arXiv:2104.04473, section 2.2).
    bubble = (parallel.pipeline - 1) / (micro_batches * parallel.virtual)
    parts = f", {parallel.virtual} parts of the model on each" if parallel.virtual > 1 else ""
    return [
        f"pipeline  {parallel.pipeline} stages{parts}, {parallel.schedule_name}, {micro_batches} micro-batches: stages"
        f" wait {100 * bubble / (1 + bubble):.0f} % of the time" + ("; more micro-batches lower it" * (bubble > 0.5))
    ]


def _passes(sources: Sources, samples: int) -> str:
    if isinstance(sources.train, list):
        size = sum(file.size for file in sources.train)
        return f"straight from {len(sources.train)} files of text, {size / 1e6:,.1f} MB"
    windows = len(sources.train)
    passes = "in a blend" if sources.blend else f"{samples / windows:.2f} epochs"
    return f"{passes} of {windows:,} sequences"


def _validation(sets: dict[str, WindowDataset]) -> str:
    sizes = [f"{len(dataset):,}{name and f' ({name})'}" for name, dataset in sets.items()]
    return f"{' + '.join(sizes)} sequences of validation data" if sizes else "no validation data"


def _blend(blend: Blend, samples: int) -> list[str]:
    """A line for each source; epochs are of the whole run."""
    epochs = blend.epochs(samples)
    rows = zip(blend.names, blend.fractions, blend.windows, strict=True)
    return [
        f"blend     {fraction:.2%} {name}: {windows:,} sequences, {epochs[name]:.2f} epochs"
        for name, fraction, windows in rows
    ]


def _dropped(datasets: list[WindowDataset]) -> list[str]:
    """What no window holds: windows overlap by a token, and none crosses from one source into the next."""
    tails = []
    for dataset in datasets:
        for source, windows in zip(dataset.sources, np.diff(dataset.ends, prepend=0).tolist(), strict=True):
            tails.append(source.num_tokens - (windows * dataset.block_size + 1 if windows else 0))
    tokens, sources = sum(tails), sum(tail > 0 for tail in tails)
    of = f"{sources} sources" if sources > 1 else "a source"
    return [f"dropped   {tokens:,} tokens at the end of {of}, less than a sequence in each"] if tokens else []


def write_run_files(run_dir: Path, loaded: LoadedConfig, topology: Topology) -> None:
    """config.yaml, with where each value came from, and environment.json."""
    environment = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if topology.device.type == "cuda" else platform.processor() or "cpu",
        "world_size": topology.world_size,
        "threads": torch.get_num_threads(),
        "command": sys.argv,
    }
    try:
        (run_dir / "config.yaml").write_text(format_config(loaded))
        (run_dir / "environment.json").write_text(json.dumps(environment, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {run_dir}: {error.strerror}") from error


def summary(result: dict[str, Any], step: int, validation: dict[str, WindowDataset], eval_sequences: int | None) -> str:
    """The last lines: how good the model is on each set, beside what knowing only token frequencies would give."""
    if not validation:
        return f"done at step {step}" + (f": training loss {result['loss']:.4f}" if result["loss"] else "")
    lines = [
        f"{name and f'{name}: '}validation loss {loss:.4f} nats a token (perplexity {perplexity(loss):.1f});"
        f" without context, at best {unigram_entropy(validation[name], eval_sequences):.4f} (unigram entropy)"
        for name, loss in result.get("eval_losses", {"": result["eval_loss"]}).items()
    ]
    if "eval_losses" in result:
        lines = [f"validation loss {result['eval_loss']:.4f} over all sets", *lines]
    return f"done at step {step}: " + "\n  ".join(lines)
