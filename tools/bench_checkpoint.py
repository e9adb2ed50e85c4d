"""Measure save, load and export on the CPU, beside torch.distributed.checkpoint and DeepSpeed's own save.

    python tools/bench_checkpoint.py --parameters 1e9

A Llama of about that many parameters with random weights and moments (AdamW, fp32, ZeRO-1) on one rank; no step is
trained. Every row is a process of its own, with the same state and the same disk:

ours              the trainer's save, the load of --resume, and what tools/export_hf.py does, to bf16. The last two
                  verify all hashes first. All that is written is forced to the disk.
torch dcp         dcp.save and dcp.load of plain tensors {NAME.weight, NAME.exp_avg, NAME.exp_avg_sq}, each with memory
                  of its own, without ZeRO. It forces its files to the disk, and verifies nothing.
torch dcp async   dcp.async_save of the same.
DeepSpeed         save_checkpoint and load_checkpoint of the engine that ours has. It forces nothing to the disk, which
                  is done after it, and counts in all; it verifies nothing.

"Stands still" is how long training would. Where a save goes on beside training, the state is overwritten then, as a
step does. Each load and export is compared with what was to be saved, to the bit, outside of the times; a difference
ends the run. What is read was written a moment ago, so it comes from the page cache, if memory suffices, and as much
memory as copies take was in use a moment ago. On a busy machine CPU seconds tell more than the others.

Memory is beyond the state, which is there before a save and after a load; an export has none. It is the peak that Linux
saw, and, in samples each 5 ms, the part that is no mapped file, whose pages Linux can take back.
"""

import argparse
import ctypes
import gc
import json
import math
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Iterable
from datetime import timedelta
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, Self

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)
os.environ["DS_ACCELERATOR"] = "cpu"

import psutil
import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed import FileStore
from torch.distributed import checkpoint as dcp

from megalite import generation
from megalite.config import Config
from megalite.data.indexed import sync_folder
from megalite.data.tokenizer import train_tokenizer
from megalite.errors import UserError, run_main
from megalite.interop import hf
from megalite.interop.hf_names import parameter_shapes, weight_names
from megalite.topology import LaunchEnvironment, Topology
from megalite.training.checkpoint_folder import find_resume
from megalite.training.forked import RanksFailed, prepare, run_forked
from megalite.training.parity import start_trainer
from tools.bench_data import print_machine, print_table

OURS, DCP, ASYNC, DEEPSPEED = "ours", "torch dcp", "torch dcp async", "DeepSpeed"
OPERATIONS = {OURS: ("save", "load", "export"), **dict.fromkeys((DCP, ASYNC, DEEPSPEED), ("save", "load"))}
KEYS = ("weight", "exp_avg", "exp_avg_sq")
# Bytes needed: (for each parameter, besides). In memory it is the state, of which ZeRO has the weights twice, and the
# copies of a save with what they break up; on the disk DeepSpeed's checkpoint, which has the weights twice.
MEMORY, DISK = (32, 1 << 30), (16, 100 << 20)
ROW_SECONDS, SAMPLE_SECONDS = 3600, 0.005  # no row takes as long, unless it hangs


def main() -> None:
    options = parse_options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as with Ctrl-C, what was started and written goes too
    check_room(options)
    prepare()
    with tempfile.TemporaryDirectory(prefix="bench-checkpoint-", dir=options.output_dir) as folder:
        config = make_config(options.parameters, Path(folder))
        parameters = sum(map(math.prod, parameter_shapes(config.model).values()))
        print_machine(None)
        print(f"deepspeed {version('deepspeed')}; {psutil.virtual_memory().available / 1e9:.1f} GB of memory free")
        shape = ", ".join(f"{key} {value}" for key, value in config.model.model_dump(exclude_unset=True).items())
        print(f"{parameters:,} parameters: {shape}; fp32, AdamW, ZeRO-1, one rank\n", flush=True)
        found: dict[str, list[dict]] = {}
        for turn in range(options.rounds):
            run_sides(f"{turn + 1}/{options.rounds}", config, Path(folder), found)
    report(options, config, parameters, found)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=1e9, metavar="N", help="about so many (1e9)")
    parser.add_argument("--rounds", type=int, default=1, help="runs of each row, of which the medians count (1)")
    parser.add_argument("--output-dir", default=tempfile.gettempdir(), help="on the disk to measure (temporary files')")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything here")
    options = parser.parse_args()
    if not 1e6 <= options.parameters < 1e12 or options.rounds < 1:  # of fewer the model had less ids than its tokenizer
        parser.error("--parameters is at least 1e6 and below 1e12, --rounds at least 1")
    return options


def check_room(options: argparse.Namespace) -> None:
    """Refuse what does not fit, before it is half done."""
    try:
        disk = shutil.disk_usage(options.output_dir).free
        tempfile.TemporaryFile(dir=options.output_dir).close()
    except OSError as error:
        raise UserError(f"cannot write to --output-dir {options.output_dir}: {error.strerror}") from error
    for what, free, (each, besides) in (
        ("of memory", psutil.virtual_memory().available, MEMORY),
        (f"in --output-dir {options.output_dir}", disk, DISK),
    ):
        if free < (needed := each * options.parameters + besides):
            sizes = f"needs {needed / 1e9:,.1f} GB {what}, and {free / 1e9:,.1f} GB are free"
            raise UserError(f"--parameters {options.parameters:.3g} {sizes}: give fewer, or make room")


def make_config(parameters: float, folder: Path) -> Config:
    """A Llama with about so many parameters, at least 8 layers, and a hidden size that is a power of 2."""
    # With the widths below an embedding has 16 h^2 parameters, and a layer 14.5 h^2.
    hidden = 2 ** int(math.log2(math.sqrt(parameters / (16 + 8 * 14.5))))
    heads = max(8, hidden // 64)
    model = {"vocab_size": 16 * hidden, "hidden_size": hidden, "intermediate_size": 4 * hidden}
    model |= {"num_layers": round((parameters / hidden**2 - 16) / 14.5), "num_heads": heads, "num_kv_heads": heads // 4}
    data = {"train_files": ["random"], "tokenizer_dir": str(folder / "tokenizer"), "block_size": 8}
    training = {"precision": "fp32", "per_device_train_batch_size": 1, "max_steps": 2}
    sections = {"model": model, "data": data, "training": training, "deepspeed": "ds_configs/zero1.json"}
    return Config.model_validate(sections | {"checkpoint": {"output_dir": str(folder / "checkpoint")}})


def run_sides(turn: str, config: Config, folder: Path, found: dict[str, list[dict]]) -> None:
    """Every row once, in a process of its own; its figures are added to `found`, by "side, operation"."""
    for side, operations in OPERATIONS.items():
        for operation in operations:
            name = f"{side}, {operation}"
            with tempfile.TemporaryDirectory(dir=folder) as private:
                try:
                    [done] = run_forked(1, partial(measure, side, operation, config), Path(private), ROW_SECONDS)
                except RanksFailed as failure:
                    last = str(failure).splitlines()[-1].removeprefix("megalite.errors.UserError: ")
                    raise UserError(f"{name} failed: {last}") from failure
            found.setdefault(name, []).append(done)
            print(
                f"{turn}  {name:22}  pause {done['pause']:.2f} s  all {done['seconds']:.2f} s  cpu {done['cpu']:.2f} s"
                f"  process at most {done['peak'] / 2**20:,.0f} MiB, state {done['state'] / 2**20:,.0f} MiB"
                f"  read from the disk {done['read'] / 1e6:,.0f} MB  load {os.getloadavg()[0]:.0f}",
                flush=True,
            )
        for made in ("checkpoint", "export"):
            shutil.rmtree(folder / made, ignore_errors=True)


def report(options: argparse.Namespace, config: Config, parameters: int, found: dict[str, list[dict]]) -> None:
    """A table of medians, as Markdown has it, and everything as JSON."""
    header = ["side, operation", "stands still, s", "its CPU, s", "in all, s", "CPU, s"]
    header += ["peak beyond the state, MiB", "without mapped files, MiB", "bytes a parameter", "on the disk, MB"]
    lines = []
    for name, runs in found.items():
        at = {key: median(run[key] for run in runs) for key in runs[0]}
        cells = [f"{at[key]:,.2f}" for key in ("pause", "pause_cpu", "seconds", "cpu")]
        cells += [f"{at[key] / 2**20:,.1f}" for key in ("beyond", "beyond_own")]
        lines.append([name, *cells, f"{at['beyond_own'] / parameters:.1f}", f"{at['bytes'] / 1e6:,.1f}"])
    print_table(header, lines)
    print("every load and export gave what was to be saved, to the bit", flush=True)
    if options.json:
        try:
            content = {"parameters": parameters, "model": config.model.model_dump(), "runs": found}
            options.json.write_text(json.dumps(content, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {options.json}: {error.strerror}") from error


class Watch:
    """Times a block, and watches the memory of this process meanwhile."""

    def __init__(self, config: Config):
        self.copies = 12 * sum(map(math.prod, parameter_shapes(config.model).values()))  # bytes

    def __enter__(self) -> Self:
        torch.ones(self.copies, dtype=torch.uint8)  # a virtual machine is slow to find memory that was not in use
        self.before = resident()
        self.own_peak, self.pause, self.ended = self.before[1], None, threading.Event()
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
        self.sampler = threading.Thread(target=self._sample)
        self.sampler.start()
        self.read, self.cpu, self.started = counter("io", "read_bytes"), time.process_time(), time.perf_counter()
        return self

    def _sample(self) -> None:
        while not self.ended.wait(SAMPLE_SECONDS):
            self.own_peak = max(self.own_peak, resident(settle=False)[1])

    def _taken(self) -> tuple[float, float]:
        """Seconds since the beginning: (by the clock, of CPU)."""
        return time.perf_counter() - self.started, time.process_time() - self.cpu

    def training_goes_on(self, state: Iterable[Tensor] = ()) -> None:
        """End of the pause. Then `state` is overwritten, which must not change what is saved."""
        self.pause = self._taken()
        for tensor in state:
            tensor.zero_()

    def __exit__(self, *_: Any) -> None:
        self.all = self._taken()
        self.ended.set()
        self.sampler.join()
        self.read, self.peak = counter("io", "read_bytes") - self.read, counter("status", "VmHWM")
        self.own_peak = max(self.own_peak, resident(settle=False)[1])

    def figures(self, state: tuple[int, int], folder: Path) -> dict[str, float]:
        """The row's. state: `resident` with the state in place, and nothing else. folder: what was written or read."""
        (pause, pause_cpu), (seconds, cpu) = self.pause or self.all, self.all
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        times = {"pause": pause, "pause_cpu": pause_cpu, "seconds": seconds, "cpu": cpu, "read": self.read}
        beyond = {"beyond": max(0, self.peak - state[0]), "beyond_own": max(0, self.own_peak - state[1])}
        return times | beyond | {"peak": self.peak, "state": state[0], "bytes": size}


def resident(settle: bool = True) -> tuple[int, int]:
    """Bytes of this process in memory: (all, without mapped files). settle: give back what is free first."""
    if settle:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
    return counter("status", "VmRSS"), counter("status", "RssAnon")


def counter(file: str, key: str) -> int:
    """Bytes, of this process, from /proc."""
    number, unit = re.search(rf"^{key}:\s*(\d+)(.*)$", Path("/proc/self", file).read_text(), re.MULTILINE).groups()
    return int(number) * (1024 if unit == " kB" else 1)


def sync(folder: Path) -> None:
    """Force files and folders to the disk; no work where they are."""
    for path in (folder, *folder.rglob("*")):
        sync_folder(path)  # with a file it does the same


def measure(side: str, operation: str, config: Config, rank: int, private: Path) -> dict[str, float]:
    """A row's figures. private: an empty folder."""
    output = Path(config.checkpoint.output_dir)
    if operation == "export":
        return export(config, output, output.with_name("export"))
    if side in (DCP, ASYNC):
        return run_dcp(operation, side == ASYNC, config, output, private)
    trainer = start_trainer(config, 0, 1, private / "store", {})
    engine = trainer.engine
    if operation == "load":
        with Watch(config) as watch:
            if side == OURS:
                found, branched_from, _ = find_resume(config, trainer.topology)
                trainer.resume(found, branched_from)
                del found  # and with it the mapped files
            # Pickles: they are read as this tool wrote them itself a moment ago, in a folder of its own.
            elif engine.engine.load_checkpoint(str(output))[0] is None:
                raise UserError("DeepSpeed found no checkpoint")
        done = watch.figures(resident(), output)
        if engine.adam_step != 1:
            raise UserError("the optimizer's step is not what was saved")
        engine.begin_gather()
        for name, parameter in engine.parameters.items():
            check(name, "weight", parameter.detach())  # what forward uses, beside the master
            for key in KEYS:
                check(name, key, engine.gather(name, key))
        return done
    engine.begin_load(1)
    for name, parameter in engine.parameters.items():
        engine.load_state(name, {key: random_tensor(name, key, parameter.shape).flatten() for key in KEYS})
    engine.end_load()
    (private / "text.txt").write_text(__doc__)
    train_tokenizer([str(private / "text.txt")], 300, config.data.tokenizer_dir)
    trainer.step = 1
    with Watch(config) as watch:
        if side == OURS:
            trainer.writer.start(trainer.copy_state({}))
            masters = engine.adam.state.items()
            watch.training_goes_on(each for master, moments in masters for each in (master.data, *moments.values()))
            trainer.writer.wait()
        else:
            engine.engine.save_checkpoint(str(output))
            watch.training_goes_on()
        sync(output)
    return watch.figures(watch.before, output)


def run_dcp(operation: str, beside: bool, config: Config, output: Path, private: Path) -> dict[str, float]:
    """torch.distributed.checkpoint at its best: of plain tensors, each with memory of its own."""
    store = FileStore(str(private / "store"), 1)
    Topology(LaunchEnvironment(0, 0, 1, launched=True), timeout=timedelta(hours=1), store=store)
    shapes = {(name, key): shape for name, shape in parameter_shapes(config.model).items() for key in KEYS}
    if operation == "save":
        state = {".".join(place): random_tensor(*place, shape) for place, shape in shapes.items()}
        with Watch(config) as watch:
            if beside:
                future = dcp.async_save(state, checkpoint_id=output)
                watch.training_goes_on(state.values())
                future.result()
            else:
                dcp.save(state, checkpoint_id=output)
            sync(output)
        return watch.figures(watch.before, output)
    state = {".".join(place): torch.zeros(shape) for place, shape in shapes.items() if place[1] == "weight"}
    with Watch(config) as watch:
        # As ours, the moments are made when they are loaded. Its .metadata is a pickle: see `measure`.
        state |= {".".join(place): torch.zeros(shape) for place, shape in shapes.items() if place[1] != "weight"}
        dcp.load(state, checkpoint_id=output)
    done = watch.figures(resident(), output)
    for place in shapes:
        check(*place, state[".".join(place)])
    return done


def export(config: Config, checkpoint: Path, output: Path) -> dict[str, float]:
    """What tools/export_hf.py does."""
    with Watch(config) as watch:
        found, tokenizer = generation.open_checkpoint(checkpoint)
        found.verify()
        hf.export_model(found, tokenizer, output, torch.bfloat16)
    files = [safe_open(path, framework="pt") for path in output.glob("*.safetensors")]
    places = {name: file for file in files for name in file.keys()}  # noqa: SIM118  it is no dictionary
    for ours, theirs in weight_names(config.model).items():
        weight = torch.cat([places[name].get_tensor(name) for name in theirs])
        if not weight.equal(random_tensor(ours, "weight", weight.shape).bfloat16()):
            raise UserError(f"{ours} is not what was saved")
    return watch.figures(watch.before, output)


def random_tensor(name: str, key: str, shape: tuple[int, ...]) -> Tensor:
    """A weight or moment of the state that all sides save: fp32 from [0, 1)."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name}.{key}".encode()))
    return torch.empty(shape).uniform_(generator=generator)


def check(name: str, key: str, tensor: Tensor) -> None:
    """Whether it is what all sides save, to the bit."""
    if not tensor.equal(random_tensor(name, key, tensor.shape)):
        raise UserError(f"{name}.{key} is not what was saved")


if __name__ == "__main__":
    run_main(main)
