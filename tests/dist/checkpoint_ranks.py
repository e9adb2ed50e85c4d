"""What `test_checkpoints.py` runs in a process of its own, which has imported everything and forks the ranks.

argv: what to do, the folder to do it in, and its argument as JSON; prints the result as JSON.
"""

import contextlib
import copy
import json
import os
import random
import signal
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch

from megalite.config import Config
from megalite.errors import UserError
from megalite.topology import LaunchEnvironment, Topology
from megalite.training.checkpoint_folder import find_resume, prepare_output
from megalite.training.checkpoint_reader import Checkpoint, find_checkpoint, list_checkpoints
from megalite.training.checkpoint_writer import Copies, Writer
from megalite.training.forked import prepare, run_forked
from megalite.training.parity import start_trainer
from megalite.training.trainer import Trainer

TIMEOUT = 240.0
GLOBAL_BATCH = 12  # sequences; over 1, 2, 3 or 4 ranks
BEFORE, AFTER = 2, 3  # steps
# Micro-batches of one sequence; no part of the model divides by three ranks.
CONFIG = {
    "model": {
        "vocab_size": 60, "vocab_multiple": 64, "hidden_size": 32, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2,
        "intermediate_size": 48, "n_positions": 16, "init_std": 0.1, "qk_norm": True,
    },
    "data": {"train_files": ["random"], "block_size": 16},
    "training": {
        "precision": "fp32", "per_device_train_batch_size": 1, "global_batch_size": GLOBAL_BATCH, "max_steps": 100,
        "learning_rate": 1e-2, "lr_schedule": "constant", "adam_eps": 1e-3,
    },
}  # fmt: skip


def config_of(folder: Path, zero: str, parallel: dict, precision: str = "fp32") -> Config:
    changed = copy.deepcopy(CONFIG)
    changed["training"]["precision"] = precision
    checkpoint = {"output_dir": str(folder)}
    return Config.model_validate(
        changed | {"parallel": parallel, "deepspeed": f"ds_configs/zero{zero}.json", "checkpoint": checkpoint}
    )


def save(trainer: Trainer) -> Path:
    trainer.writer.start(trainer.copy_state({}))
    return trainer.writer.wait().folder


def steps(trainer: Trainer, count: int) -> list[float]:
    return [trainer.train_step()["loss"] for _ in range(count)]


def _save(config: Config, ranks: int, rank: int, folder: Path) -> dict:
    """Train, save, and train on: {"losses": those after the save}."""
    trainer = start_trainer(config, rank, ranks, folder / "store")
    steps(trainer, BEFORE)
    save(trainer)
    return {"losses": steps(trainer, AFTER)}


def _load(config: Config, ranks: int, sources: dict[str, str], rank: int, folder: Path) -> dict:
    """Load each of `sources`, save that at once into the config's folder / name, and train: {name: losses}."""
    trainer = start_trainer(config, rank, ranks, folder / "store")
    unread, into = trainer.loader, Path(config.checkpoint.output_dir)
    losses = {}
    for name, source in sources.items():
        trainer.loader = copy.copy(unread)
        trainer.resume(Checkpoint(find_checkpoint(Path(source))), None)
        trainer.writer.output_dir = into / name
        save(trainer)
        losses[name] = steps(trainer, AFTER)
        trainer.loader.close()
    return losses


def matrix(folder: Path, plan: dict) -> dict:
    """plan: {"save" and "load": {name: [ranks, zero, parallel, precision]}}; {"save": {name: losses}, "load": {name:
    {name of what was saved: losses}}}."""
    prepare()
    found: dict = {"save": {}, "load": {}}
    sources = {name: str(folder / "saved" / name) for name in plan["save"]}
    for name, (ranks, *layout) in plan["save"].items():
        config, work = config_of(Path(sources[name]), *layout), folder / f"saving {name}"
        work.mkdir()
        found["save"][name] = run_forked(ranks, partial(_save, config, ranks), work, TIMEOUT)[0]["losses"]
    for name, (ranks, *layout) in plan["load"].items():
        config, work = config_of(folder / "loaded" / name, *layout), folder / f"loading {name}"
        work.mkdir()
        found["load"][name] = run_forked(ranks, partial(_load, config, ranks, sources), work, TIMEOUT)[0]
    return found


def _init_from(config: Config, ranks: int, source: str, rank: int, folder: Path) -> dict:
    """Start a new run from the weights of `source`, and save that at once."""
    trainer = start_trainer(config, rank, ranks, folder / "store")
    trainer.init_from(Checkpoint(find_checkpoint(Path(source))))
    save(trainer)
    return {"losses": steps(trainer, AFTER)}


def init_from(folder: Path, plan: dict) -> dict:
    """plan: {name: [ranks, zero, parallel]}; the losses of each, from the weights that one rank trained."""
    prepare()
    losses = {}
    for name, (ranks, *layout) in {"source": [1, "0", {}], **plan}.items():
        config, work = config_of(folder / name, *layout), folder / f"ranks of {name}"
        work.mkdir()
        action = partial(_save, config, ranks) if name == "source" else None
        action = action or partial(_init_from, config, ranks, str(folder / "source"))
        losses[name] = run_forked(ranks, action, work, TIMEOUT)[0]["losses"]
    return losses


def _fail_to_save(config: Config, ranks: int, fault: str, rank: int, folder: Path) -> dict:
    """Rank 1 cannot write what it has of the second checkpoint: the step at which this rank hears of it, and what."""
    trainer = start_trainer(config, rank, ranks, folder / "store")
    save(trainer)
    steps(trainer, 1)
    copies = trainer.copy_state({})
    if rank == 1:
        copies.files = {"folder": {"no/such/file": {"a": torch.zeros(3)}}, "defect": {"file": {"a": None}}}[fault]
    trainer.writer.start(copies)
    try:
        while trainer.writer.poll() is None:
            steps(trainer, 1)
    except (UserError, AttributeError, RuntimeError) as error:
        everywhere = getattr(error, "on_every_rank", False)
        return {"step": trainer.step, "error": type(error).__name__, "said": str(error), "everywhere": everywhere}
    return {"error": None}


def fail_to_save(folder: Path, plan: dict) -> list[dict]:
    """plan: {"fault": name, "layout": [ranks, zero, parallel]}; what each rank says."""
    prepare()
    ranks, *layout = plan["layout"]
    work = folder / "work"
    work.mkdir()
    action = partial(_fail_to_save, config_of(folder / "out", *layout), ranks, plan["fault"])
    return run_forked(ranks, action, work, 60)


def _one_rank() -> Topology:
    return Topology(LaunchEnvironment(0, 0, 1, launched=False), timeout=timedelta(seconds=TIMEOUT))


def _save_without_end(folder: Path) -> None:
    """Checkpoint after checkpoint, each with its own numbers, from the newest that is there on."""
    writer = Writer(folder, _one_rank(), config_of(folder, "1", {}))
    newest = find_checkpoint(folder)
    step = Checkpoint(newest).step if newest else 0
    prepare_output(folder, step)
    index = {f"p{n}": [[64, 64], f"model-{n}.safetensors", f"optimizer-{n}.safetensors"] for n in range(4)}
    while True:
        step += 1
        files = {
            file: {key: torch.full((64, 64), float(step)) for key in keys}
            for name, (_, model, optimizer) in index.items()
            for file, keys in ((model, [name]), (optimizer, [f"{name}.exp_avg", f"{name}.exp_avg_sq"]))
        }
        data = {"fingerprint": "", "seed": 0, "consumed_samples": 0}
        writer.start(Copies(step, files, index, {"step": step, "adam_step": step, "tokens": 0, "data": data}))
        writer.wait()


def _fork(function) -> int:
    process = os.fork()
    if process:
        return process
    try:
        function()
    except BaseException:  # told by the exit code
        sys.excepthook(*sys.exc_info())
        os._exit(1)
    os._exit(0)


def kill_while_saving(folder: Path, kills: int) -> list[list[int]]:
    """What is there after each kill -9 at a random moment of endless saving: the steps, all verified and complete."""
    moments, seen = random.Random(1), []
    for _ in range(kills):
        process = _fork(partial(_save_without_end, folder))
        try:
            before = list_checkpoints(folder)
            deadline = time.monotonic() + 60
            while list_checkpoints(folder) == before:
                assert not os.waitpid(process, os.WNOHANG)[0], "it ended by itself"
                assert time.monotonic() < deadline, "it saves nothing"
                time.sleep(0.002)
            time.sleep(moments.uniform(0, 0.1))  # one save, about
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
        steps = []
        for step, path in list_checkpoints(folder):
            checkpoint = Checkpoint(path)
            checkpoint.verify()
            assert all((weight == step).all() for _, weight in checkpoint.weights())
            steps.append(checkpoint.step)
        unfinished = len(list(folder.glob("step-*.tmp")))
        seen.append([unfinished, *steps])
    return seen


def _train_to(last: int, folder: Path, log: Path) -> None:
    """One rank of ZeRO-1, saving each second step in the background, from the newest checkpoint on; logs the losses."""
    config = config_of(folder, "1", {})
    config.model.dropout = 0.1
    store = log.with_name(f"store-{os.getpid()}")
    trainer = start_trainer(config, 0, 1, store)
    found, branched_from, _ = find_resume(config, trainer.topology)
    if found is not None:
        trainer.resume(found, branched_from)
    prepare_output(folder, trainer.step)
    while trainer.step < last:
        loss = trainer.train_step()["loss"]
        with open(log, "a") as file:
            file.write(json.dumps([trainer.step, loss]) + "\n")
        trainer.writer.poll()
        if trainer.step % 2 == 0:
            trainer.writer.wait()
            trainer.writer.start(trainer.copy_state({}))
    trainer.writer.wait()


def kill_and_resume(folder: Path, plan: dict) -> dict:
    """Train to a step in one go, and with kill -9 at random moments: {"whole": losses, "killed": {step: all losses of
    it}, "kills": how many came before the end}."""
    prepare()
    folder.mkdir(exist_ok=True)

    def losses(name: str) -> list[list]:
        path = folder / f"{name}.log"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("]")]

    whole = _fork(partial(_train_to, plan["steps"], folder / "whole", folder / "whole.log"))
    assert os.waitpid(whole, 0)[1] == 0, "the whole run failed"
    moments, kills, done = random.Random(2), 0, False
    while not done:
        process = _fork(partial(_train_to, plan["steps"], folder / "killed", folder / "killed.log"))
        logged, more = len(losses("killed")), moments.randint(1, 4)
        moment = moments.uniform(0, 0.1)
        while not done and (kills == plan["kills"] or len(losses("killed")) < logged + more):
            ended, status = os.waitpid(process, os.WNOHANG)
            assert status == 0, "a resumed run failed"
            done = bool(ended)
            time.sleep(0.002)
        if not done:
            time.sleep(moment)
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            kills += 1
    return {"whole": losses("whole"), "killed": losses("killed"), "kills": kills}


if __name__ == "__main__":
    what, where, argument = sys.argv[1:]
    actions = {
        "matrix": matrix,
        "init_from": init_from,
        "fail_to_save": fail_to_save,
        "kill_while_saving": kill_while_saving,
        "kill_and_resume": kill_and_resume,
    }
    result = actions[what](Path(where), json.loads(argument))
    print(json.dumps(result))
