"""Pre-train a decoder-only language model.

deepspeed megalite/pretrain.py --config configs/small.yaml
"""

import math
import os
import sys
from contextlib import closing
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

# Threads that wait for each other at once sleep instead of spinning for long: where something else wants a core, a step
# was seen to take a fifth less time, and no more on idle ones. libgomp reads it when torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# As a script, this file's own folder stands first on the path, and its modules would pass for top-level ones.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from megalite.config import Config
from megalite.config_check import check, check_schedule, resolve_batch
from megalite.config_ds import read_ds_config
from megalite.config_loader import LoadedConfig, format_config, load_config
from megalite.errors import ConfigError, run_main
from megalite.model.partition import layers_of_chunks
from megalite.pipeline.schedules import build

if TYPE_CHECKING:
    from megalite.topology import Topology
    from megalite.training.watchdog import Watchdog


def main() -> int:
    loaded = load_config(sys.argv[1:])
    config = loaded.config
    if loaded.print_config:
        print(format_config(loaded), end="")
        return 0
    check(config)
    parallel = config.parallel
    layers = layers_of_chunks(config)
    ds_config = read_ds_config(config.deepspeed)

    # Only now: torch and DeepSpeed take seconds to import, and a wrong configuration should not.
    from megalite.topology import LaunchEnvironment, Topology, slurm_start
    from megalite.training.watchdog import MARGIN, Watchdog

    timeout = timedelta(minutes=config.training.timeout_minutes)
    topology = Topology(
        LaunchEnvironment.read(),
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        context=parallel.context,
        timeout=timeout + MARGIN,
    )
    with Watchdog(topology, timeout) as watchdog:
        topology.together(use_kernels, config.model.kernels, topology.device.type)
        from megalite.training.checkpoint_folder import OutputLock

        output_dir = Path(config.checkpoint.output_dir)
        with topology.together(OutputLock, output_dir, topology.rank == 0, slurm_start()) as lock:
            train(loaded, layers, ds_config, topology, watchdog, lock.notice)
    topology.close()
    return 0


def train(
    loaded: LoadedConfig,
    layers: list[range],
    ds_config: dict,
    topology: "Topology",
    watchdog: "Watchdog",
    lock_notice: str | None,
) -> None:
    """Build what the configuration says, resume, train to the end; collective."""
    config = loaded.config
    parallel = config.parallel
    # The topology has settled the device, which DeepSpeed asks for at import.
    from megalite.data.sources import open_data, open_loader
    from megalite.training import report
    from megalite.training.build import build_chunks
    from megalite.training.checkpoint_folder import find_resume, find_weights, prepare_output
    from megalite.training.engine import Engine
    from megalite.training.meters import Meters
    from megalite.training.requirements import check_training, zero_stage
    from megalite.training.trainer import Trainer

    training = config.training
    topology.together(check_training, config, zero_stage(ds_config), topology.device.type)
    accumulation, global_batch = topology.together(resolve_batch, config, topology.grid.data)
    topology.together(build, parallel.schedule_name, 0, parallel.pipeline, parallel.virtual, accumulation)
    watchdog.at("opening the data")
    sources = open_data(config, topology)
    loader = open_loader(config, topology, sources, accumulation)
    max_steps = topology.together(steps_to_train, config, len(sources.train), global_batch)
    found, branched_from, passed = find_resume(config, topology)
    weights = find_weights(config, topology) if found is None else None

    watchdog.at("building the model, and resuming")
    engine = Engine(config, ds_config, topology, partial(build_chunks, config, topology, layers), accumulation)
    trainer = Trainer(config, topology, engine, loader, sources.validation, max_steps, watchdog.at)
    notice = trainer.resume(found, branched_from) if found is not None else None
    if weights is not None:
        trainer.init_from(weights)
    aside = topology.on_first(prepare_output, trainer.output_dir, trainer.step)

    run_dir = Path(config.logging.run_dir or f"runs/{trainer.output_dir.resolve().name}")
    meters = topology.together(
        Meters,
        run_dir,
        topology.rank,
        max_steps=max_steps,
        resumed_step=trainer.step,
        log_every=config.logging.log_every,
        tensorboard=config.logging.tensorboard,
    )
    topology.on_first(report.write_run_files, run_dir, loaded, topology)
    meters.print(report.banner(config, topology, engine, loader, sources, max_steps, run_dir))
    if aside is not None:
        meters.print(f"moved     checkpoints beyond step {trainer.step}, which were there, to {aside}")
    if found is not None:
        meters.print(f"resumed   from {found.folder}, step {trainer.step}")
    if weights is not None:
        meters.print(f"weights   from {weights.folder}")
    for warning in (lock_notice, *passed, notice):
        if warning is not None:
            meters.print(f"warning   {warning}")
    with closing(loader):
        result = trainer.fit(meters)
    if meters.active:  # the summary reads the validation data once more
        meters.print(report.summary(result, trainer.step, sources.validation, training.eval_sequences))
    meters.close()


def use_kernels(setting: str | dict[str, str], device: str) -> None:
    from megalite import kernels

    try:
        kernels.use(setting)
    except ValueError as error:
        raise ConfigError(f"model.kernels: {error}") from None
    if problem := kernels.problem(device):
        raise ConfigError(f"model.kernels: {problem}")


def steps_to_train(config: Config, windows: int, global_batch: int) -> int:
    training = config.training
    if training.max_steps is not None:
        return training.max_steps
    steps = math.ceil(training.num_train_epochs * windows / global_batch)
    check_schedule(training, steps)
    return steps


if __name__ == "__main__":
    # Under srun each rank speaks until they have met: the first to end has SLURM end the others, who may be silent.
    ranks = [os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")), os.environ.get("LOCAL_RANK", "0")]
    if not all(rank.isdecimal() for rank in ranks):
        ranks = ["0", "0"]  # this process speaks; main says what is wrong
    try:
        run_main(main, rank=int(ranks[0]), local_rank=int(ranks[1]))
    except SystemExit as stop:
        # Without Python's own shutdown: taking down the threads of process groups in its order was seen, rarely, to
        # abort a rank that had finished ("terminate called without an active exception").
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(stop.code or 0)
