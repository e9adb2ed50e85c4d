"""Pre-train a decoder-only language model.

deepspeed megalite/pretrain.py --config configs/small.yaml
"""

import json
import math
import os
import platform
import sys
from datetime import timedelta
from pathlib import Path

# As a script, this file's own folder stands first on the path, and its modules would pass for top-level ones.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from megalite.config import Config, check, check_schedule, resolve_batch
from megalite.config_ds import read_ds_config
from megalite.config_loader import LoadedConfig, format_config, load_config
from megalite.errors import UserError, run_main


def main() -> int:
    loaded = load_config(sys.argv[1:])
    config = loaded.config
    if loaded.print_config:
        print(format_config(loaded), end="")
        return 0
    check(config)
    ds_config = read_ds_config(config.deepspeed)

    # Only now: torch and DeepSpeed take seconds to import, and a wrong configuration should not.
    from megalite.topology import LaunchEnvironment, Topology

    topology = Topology(
        LaunchEnvironment.read(),
        tensor=config.parallel.tensor,
        pipeline=config.parallel.pipeline,
        timeout=timedelta(minutes=config.training.timeout_minutes),
    )
    # The topology has settled the device, which DeepSpeed asks for at import.
    from megalite.data.loader import TrainLoader
    from megalite.model.gpt import Stage
    from megalite.training import checkpoint
    from megalite.training.engine import DTYPES, Engine
    from megalite.training.meters import Meters
    from megalite.training.trainer import Trainer

    accumulation, global_batch = resolve_batch(config, topology.grid.data)
    train, validation = open_data(config, topology)
    max_steps = steps_to_train(config, len(train), global_batch)
    found = topology.together(find_resume, config)

    engine = Engine(
        config,
        ds_config,
        topology,
        lambda: Stage(
            config.model,
            seed=config.training.seed,
            group=topology.tensor_group,
            activation_checkpointing=config.training.activation_checkpointing,
            z_loss=config.training.z_loss,
            init_rounding=DTYPES[config.training.precision],
        ),
        accumulation,
    )
    loader = TrainLoader(
        train,
        micro_batch=config.training.per_device_train_batch_size,
        accumulation=accumulation,
        dp_rank=topology.data_rank,
        dp_size=topology.grid.data,
        seed=config.training.seed,
    )
    trainer = Trainer(config, topology, engine, loader, validation, max_steps)
    trainer.resume(found)
    run_dir = Path(config.logging.run_dir or f"runs/{Path(loaded.path or 'default').stem}")
    meters = topology.together(
        Meters,
        run_dir,
        topology.rank,
        max_steps=max_steps,
        resumed_step=trainer.step,
        log_every=config.logging.log_every,
        tensorboard=config.logging.tensorboard,
    )
    if topology.rank == 0:
        meters.print(banner(config, topology, engine, len(train), global_batch, max_steps, run_dir))
        if found is not None:
            meters.print(f"resumed from {found.folder}, step {trainer.step}")
        elif config.checkpoint.resume == "none":
            aside = checkpoint.set_aside(trainer.output_dir)
            if aside is not None:
                meters.print(f"starting afresh; the checkpoints that were there are now in {aside}")
        write_run_files(run_dir, loaded, topology)
    result = trainer.fit(meters)
    if topology.rank == 0:
        meters.print(summary(result, trainer.step, validation))
    meters.close()
    topology.close()
    return 0


def open_data(config: Config, topology):
    """(training windows, validation windows or None), after checks that every rank shares."""
    from megalite.data.dataset import WindowDataset
    from megalite.data.sources import cache_prefix, check_tokenizer, index_texts, resolve_files
    from megalite.data.tokenizer import Tokenizer
    from megalite.errors import ConfigError

    data = config.data

    def check_vocabulary() -> Tokenizer:
        tokenizer = Tokenizer(data.tokenizer_dir)
        if tokenizer.vocab_size > config.model.vocab_size:
            raise ConfigError(
                f"model.vocab_size = {config.model.vocab_size}, but the tokenizer in {data.tokenizer_dir} has"
                f" {tokenizer.vocab_size} ids; raise model.vocab_size to at least that, or train a smaller tokenizer"
            )
        return tokenizer

    def open_windows(files: list[str], key: str, tokenizer: Tokenizer) -> WindowDataset:
        prefixes, texts = topology.together(resolve_files, files, key)
        if texts:
            cached = (texts, tokenizer, data.cache_dir, data.json_key)
            build = index_texts if topology.rank == 0 else lambda *args: None
            topology.together(build, *cached, data.num_workers, True)
            prefixes.append(topology.together(cache_prefix, *cached))
        dataset = topology.together(WindowDataset, prefixes, data.block_size, config.model.vocab_size)
        topology.together(check_tokenizer, dataset, tokenizer, key)
        return dataset

    tokenizer = topology.together(check_vocabulary)
    train = open_windows(data.train_files, "data.train_files", tokenizer)
    validation = open_windows(data.eval_files, "data.eval_files", tokenizer) if data.eval_files else None
    return train, validation


def steps_to_train(config: Config, windows: int, global_batch: int) -> int:
    training = config.training
    if training.max_steps is not None:
        return training.max_steps
    steps = math.ceil(training.num_train_epochs * windows / global_batch)
    check_schedule(training, steps)
    return steps


def find_resume(config: Config):
    """The checkpoint to go on from, opened and checked; None to start afresh."""
    from megalite.training.checkpoint import check_same_model
    from megalite.training.checkpoint_reader import Checkpoint, find_checkpoint

    resume = config.checkpoint.resume
    if resume == "none":
        return None
    path = find_checkpoint(Path(config.checkpoint.output_dir if resume == "auto" else resume))
    if path is None:
        if resume != "auto":
            raise UserError(f"--resume {resume}: there is no checkpoint (a step-N folder with manifest.json)")
        return None
    found = Checkpoint(path)
    check_same_model(found, config)
    return found


def banner(config: Config, topology, engine, windows: int, global_batch: int, max_steps: int, run_dir: Path) -> str:
    """What is about to run, in a few lines."""
    from megalite.model.flops import count_parameters, predict_memory

    model, training, data = config.model, config.training, config.data
    memory = predict_memory(
        model,
        zero_stage=engine.zero_stage,
        offload=engine.offload,
        data_parallel=topology.grid.data,
        low_precision=training.precision != "fp32",
        micro_batch=training.per_device_train_batch_size,
        sequence=data.block_size,
        recompute=training.activation_checkpointing,
    )
    tokens = global_batch * data.block_size
    epochs = max_steps * global_batch / windows
    zero = f"ZeRO-{engine.zero_stage}{' with CPU offload' if engine.offload else ''}"
    return "\n".join(
        [
            f"MegaLite  {count_parameters(model) / 1e6:,.2f} M parameters: {model.num_layers} layers, hidden"
            f" {model.hidden_size}, {model.num_heads} heads ({model.kv_heads} KV), vocabulary {model.vocab_size}",
            f"layout    {topology.world_size} x {topology.device.type}: data {topology.grid.data}, tensor"
            f" {topology.grid.tensor}, pipeline {topology.grid.pipeline}; {zero}, {training.precision}, activation"
            f" checkpointing {training.activation_checkpointing}",
            f"batch     {training.per_device_train_batch_size} sequences a device x {engine.accumulation} accumulated x"
            f" {topology.grid.data} ranks = {global_batch} of {data.block_size} tokens = {tokens:,} tokens a step",
            f"run       {max_steps:,} steps = {max_steps * tokens:,} tokens = {epochs:.2f} epochs of"
            f" {windows:,} sequences",
            f"memory    about {memory['total'] / 2**30:.2f} GiB a device predicted: {memory['states'] / 2**30:.2f}"
            f" weights, gradients and optimizer, {memory['activations'] / 2**30:.2f} activations",
            f"writes    {config.checkpoint.output_dir} (checkpoints), {run_dir} (metrics)",
        ]
    )


def write_run_files(run_dir: Path, loaded: LoadedConfig, topology) -> None:
    """config.yaml, with where each value came from, and environment.json."""
    import torch

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


def summary(result: dict, step: int, validation) -> str:
    """The last line: how good the model is, beside what knowing only token frequencies would give."""
    from megalite.data.sources import unigram_entropy

    loss = result["eval_loss"]
    if loss is None:
        return f"done at step {step}" + (f": training loss {result['loss']:.4f}" if result["loss"] else "")
    return (
        f"done at step {step}: validation loss {loss:.4f} nats a token (perplexity {math.exp(loss):.1f});"
        f" the unigram entropy of the validation data is {unigram_entropy(validation):.4f}"
    )


if __name__ == "__main__":
    ranks = [os.environ.get(name, "0") for name in ("RANK", "LOCAL_RANK")]
    if not all(rank.isdecimal() for rank in ranks):
        ranks = ["0", "0"]  # this process speaks; main says what is wrong
    run_main(main, rank=int(ranks[0]), local_rank=int(ranks[1]))
