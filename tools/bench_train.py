"""Measure training steps on this machine, and beside them, if asked, those of the Hugging Face Trainer.

    python tools/bench_train.py --shape small --against hf
    python tools/bench_train.py --shape llama-1b --steps 50 --warmup 5
    python tools/bench_train.py --shape small --profile

A shape is a file of configs/; any setting of it can be given after the options, as `--precision fp32`. Data is random
tokens, read by each side's own loader. Every run is a fresh process, one device, and the sides take turns (ours, hf,
ours, hf, ...), so that what else the machine does meets both. Step times are those from one step's end to the next,
and their median counts. The Trainer trains transformers' LlamaForCausalLM with the same shape, batch, precision
(fp32, or bf16 by autocast over fp32 weights), fused AdamW, clipping and recomputation (full); nobody has dropout.

On a CPU that others use too, most of the ratio may be that pretrain.py, and so our side, makes waiting threads sleep
soon: start with GOMP_SPINCOUNT=10000 in the environment to let both do so, or with OMP_NUM_THREADS=1 and look at the
CPU seconds.
"""

import argparse
import itertools
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from datetime import timedelta
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from megalite.config import Config
from megalite.config_check import check, resolve_batch
from megalite.config_ds import read_ds_config
from megalite.config_loader import load_config
from megalite.errors import ConfigError, UserError, run_main
from megalite.model.flops import flops_per_token, peak_tflops

PARTS = ("data", "forward", "backward", "optimizer")
PARTS_STEPS = 3  # measured with a synchronisation around each part, after the others
LARGEST_DATA = 1 << 24  # tokens; windows repeat after that
RUN_SECONDS = 3600


def main() -> None:
    options, rest = parse_options()
    config = load_config(["--config", f"configs/{options.shape}.yaml", *rest]).config
    config.data.train_files = config.data.train_files or ["random"]
    check(config)
    if options.row:  # in a process of its own
        print(json.dumps((run_ours if options.row == "ours" else run_hf)(options, config)))
        return
    if options.against and (config.training.optimizer != "adamw" or config.training.precision == "fp16"):
        raise ConfigError("--against: the Trainer is measured with AdamW in fp32 or bf16")
    with tempfile.TemporaryDirectory(prefix="bench-train-") as folder:
        data = write_data(config, Path(folder, "random"), options.steps + options.warmup + PARTS_STEPS)
        found = take_turns(options, rest, data)
    if not options.profile:
        report(options, config, found)


def parse_options() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="small", help="NAME of configs/NAME.yaml")
    parser.add_argument("--against", choices=["hf", "hf-compiled"], help="measure the Hugging Face Trainer too")
    parser.add_argument("--steps", type=int, default=20, help="steps measured in each run")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side")
    parser.add_argument("--peak-tflops", type=float, help="of the device, for MFU; default: known GPUs")
    parser.add_argument("--json", type=Path, help="also write everything here")
    parser.add_argument("--profile", action="store_true", help="print the operators of our step that take longest")
    parser.add_argument("--row", choices=["ours", "hf", "hf-compiled"], help=argparse.SUPPRESS)
    parser.add_argument("--tokens", help=argparse.SUPPRESS)
    options, rest = parser.parse_known_args()
    if min(options.steps, options.rounds) < 1 or options.warmup < 0:
        parser.error("--steps and --rounds are at least 1, --warmup at least 0")
    return options, rest


def write_data(config: Config, prefix: Path, steps: int) -> Path:
    """Indexed data of random tokens, enough for so many steps of one rank."""
    import numpy as np

    from megalite.data.indexed import PairWriter, token_dtype

    _, batch = resolve_batch(config, 1)
    tokens = min(steps * batch, max(LARGEST_DATA // config.data.block_size, 2 * batch)) * config.data.block_size + 1
    dtype = token_dtype(config.model.vocab_size)
    ids = np.random.default_rng(1).integers(0, config.model.vocab_size, tokens).astype(dtype)
    writer = PairWriter(str(prefix), dtype)
    writer.write(ids.tobytes(), np.array([tokens]), np.array([tokens]))
    writer.finish({})
    writer.commit()
    return prefix


def take_turns(options: argparse.Namespace, rest: list[str], data: Path) -> dict[str, list[dict[str, Any]]]:
    """What the runs of each side found, ours before the other's in each round."""
    sides = ["ours", *([options.against] if options.against and not options.profile else [])]
    found: dict[str, list[dict]] = {side: [] for side in sides}
    for turn in range(1 if options.profile else options.rounds):
        for side in sides:
            command = [sys.executable, __file__, *sys.argv[1:], "--row", side, "--tokens", str(data)]
            errors = None if options.profile else subprocess.PIPE
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, text=True, timeout=RUN_SECONDS)
            *printed, last = done.stdout.splitlines() or [""]
            if done.returncode:
                why = ((done.stderr or "").strip().splitlines() or ["it printed nothing"])[-1]
                raise UserError(f"{side}: exit code {done.returncode}: {why.removeprefix('error: ')}")
            for line in printed if options.profile else ():
                print(line)
            run = json.loads(last)
            found[side].append(run)
            if not options.profile:
                print(f"{turn + 1}/{options.rounds}  {side:11}  {run['tokens_per_second']:,.0f} tokens/s", flush=True)
    return found


def report(options: argparse.Namespace, config: Config, found: dict[str, list[dict]]) -> None:
    """Medians over the runs, as a table, and everything as JSON."""
    first = found["ours"][0]
    training, sequence = config.training, config.data.block_size
    accumulation, batch = resolve_batch(config, 1)
    full, bare = flops_per_token(config.model, sequence), flops_per_token(config.model, 0)
    counts = {"6N+12Lhs": full, "6N+6Lhs, causal": (full + bare) / 2, "6N": bare}
    peak = options.peak_tflops or peak_tflops(first["device"])
    print(
        f"\n{options.shape}: {first['device']}, {first['threads']} threads, torch {first['torch']}, Python"
        f" {platform.python_version()}; {training.precision}, sequences of {sequence}, {batch} a step in"
        f" {accumulation} micro-batches, recompute {training.activation_checkpointing}, compile {training.compile},"
        f" {config.deepspeed}; medians of {options.rounds} runs of {options.steps} steps\n"
    )
    summary: dict[str, dict] = {}
    for side, runs in found.items():
        rate = median(run["tokens_per_second"] for run in runs)
        summary[side] = {
            "tokens_per_second": rate,
            "tflops": {name: rate * count / 1e12 for name, count in counts.items()},
            "mfu": {name: rate * count / 1e12 / peak if peak else None for name, count in counts.items()},
            "cpu_seconds": median(run["cpu_seconds"] for run in runs),
            "peak_memory_bytes": median(run["peak_memory_bytes"] for run in runs),
        }
        if "parts" in runs[0]:
            summary[side]["parts"] = {part: median(run["parts"][part] for run in runs) for part in PARTS}
        line = summary[side]
        shown = (
            f"{name} {line['tflops'][name]:.3g} TFLOP/s" + (f" = {line['mfu'][name]:.1%}" if peak else "")
            for name in counts
        )
        print(
            f"{side:11}  {rate:,.0f} tokens/s, {line['cpu_seconds']:.3f} s of CPU a step, peak memory"
            f" {line['peak_memory_bytes'] / 2**20:,.0f} MiB"
        )
        print(12 * " " + "; ".join(shown))
        if "parts" in line:
            print(12 * " " + "a step: " + ", ".join(f"{part} {1e3 * line['parts'][part]:.1f} ms" for part in PARTS))
    if options.against:
        ours, theirs = ([run["tokens_per_second"] for run in found[side]] for side in ("ours", options.against))
        summary["ratio"] = median(ours) / median(theirs)
        each = ", ".join(f"{a / b:.2f}" for a, b in zip(ours, theirs, strict=True))
        print(f"\nours / {options.against}: {summary['ratio']:.2f} (by round: {each})")
    if options.json:
        settings = {"shape": options.shape, "peak_tflops": peak, "flops_per_token": counts}
        content = settings | {"config": config.model_dump(), "summary": summary, "runs": found}
        try:
            options.json.write_text(json.dumps(content, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {options.json}: {error.strerror}") from error


def run_ours(options: argparse.Namespace, config: Config) -> dict[str, Any]:
    """The training loop's own steps, as pretrain.py makes it."""
    import os

    os.environ["GOMP_SPINCOUNT"] = "10000"  # as pretrain.py does

    import torch

    from megalite import kernels
    from megalite.data.dataset import WindowDataset
    from megalite.data.loader import TrainLoader
    from megalite.topology import LaunchEnvironment, Topology

    topology = Topology(LaunchEnvironment.read(), timeout=timedelta(minutes=30))
    from megalite.training.build import build_chunks
    from megalite.training.engine import Engine
    from megalite.training.requirements import check_training, zero_stage
    from megalite.training.trainer import Trainer

    kernels.use(config.model.kernels)
    training, ds_config = config.training, read_ds_config(config.deepspeed)
    check_training(config, zero_stage(ds_config), topology.device.type)
    accumulation, batch = resolve_batch(config, 1)

    loader = TrainLoader(
        WindowDataset([options.tokens], config.data.block_size),
        micro_batch=training.per_device_train_batch_size,
        accumulation=accumulation,
        dp_rank=0,
        dp_size=1,
        seed=training.seed,
        prefetch=config.data.prefetch,
        device=topology.device,
    )
    chunks = partial(build_chunks, config, topology, [range(config.model.num_layers)])
    engine = Engine(config, ds_config, topology, chunks, accumulation)
    trainer = Trainer(config, topology, engine, loader, {}, 10 * (options.warmup + options.steps))
    with closing(loader):
        for _ in range(options.warmup):
            trainer.train_step()
        ends = [now()]
        if options.profile:
            profile(trainer.train_step, options.steps, topology.device)
        for _ in range(0 if options.profile else options.steps):
            trainer.train_step()
            ends.append(now())
        found = describe(torch, topology.device, ends, batch * config.data.block_size)
        return found | {"parts": measure_parts(trainer, topology.device)}


def measure_parts(trainer, device) -> dict[str, float]:
    """Median seconds that each part takes in a step, over the micro-batches."""
    seconds: dict[str, list[float]] = {part: [] for part in PARTS}
    for part, owner, name in (
        ("data", trainer.loader, "next_step"),
        ("forward", trainer.engine, "forward"),
        ("backward", trainer.engine, "backward"),
        ("optimizer", trainer.engine, "step"),
    ):
        function = getattr(owner, name)

        def watched(*args, _function=function, _part=part):
            before = timed(None, device)[1]
            result, after = timed(lambda: _function(*args), device)
            seconds[_part][-1] += after - before
            return result

        setattr(owner, name, watched)
    for _ in range(PARTS_STEPS):
        for each in seconds.values():
            each.append(0.0)
        trainer.train_step()
    return {part: median(each) for part, each in seconds.items()}


def timed(function: Callable | None, device) -> tuple[Any, float]:
    """(what it returns, the time when the device had done it)."""
    import torch

    result = function() if function else None
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter()


def profile(step: Callable, steps: int, device) -> None:
    """Run the steps under torch.profiler; print the operators that take longest, and how many there are in a step."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profiler(activities=activities, record_shapes=True) as recorded:
        for _ in range(steps):
            step()
    averages = recorded.key_averages()
    key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    print(averages.table(sort_by=key, row_limit=25, max_name_column_width=60))
    launches = sum(event.count for event in averages if "LaunchKernel" in event.key)
    operators = sum(event.count for event in averages if event.key.startswith("aten::"))
    print(f"in a step: {launches / steps:,.0f} kernel launches, {operators / steps:,.0f} aten operators")
    by_shape = recorded.key_averages(group_by_input_shape=True)
    print(by_shape.table(sort_by=key, row_limit=25, max_name_column_width=40, max_shapes_column_width=70))


def run_hf(options: argparse.Namespace, config: Config) -> dict[str, Any]:
    """transformers' Trainer at the same work."""
    import logging

    import torch

    try:
        import accelerate  # noqa: F401  the Trainer wants it
        from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
    except ImportError as error:
        raise UserError(f'{error.name} is not installed: pip install "megalite[hf]"') from error
    from megalite.data.dataset import WindowDataset

    model, training = config.model, config.training
    logging.getLogger("transformers").setLevel(logging.ERROR)
    accumulation, batch = resolve_batch(config, 1)
    windows = WindowDataset([options.tokens], config.data.block_size)
    ends: list[tuple[float, float]] = []

    class Samples(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(windows)

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            tokens = torch.from_numpy(windows[index][:-1])
            return {"input_ids": tokens, "labels": tokens}  # shifted by the model

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs) -> None:
            ends.append(now())

    on_gpu = torch.cuda.is_available()
    torch.manual_seed(training.seed)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=model.padded_vocab_size,
            hidden_size=model.hidden_size,
            intermediate_size=model.ffn_size,
            num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_heads,
            num_key_value_heads=model.kv_heads,
            head_dim=model.head_size,
            max_position_embeddings=model.n_positions,
            rms_norm_eps=model.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
            tie_word_embeddings=model.tie_embeddings,
            attention_dropout=0.0,
            use_cache=False,
        )
    )
    with tempfile.TemporaryDirectory(prefix="bench-hf-") as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=training.per_device_train_batch_size,
            gradient_accumulation_steps=accumulation,
            max_steps=options.warmup + options.steps,
            learning_rate=training.learning_rate,
            lr_scheduler_type="cosine",
            optim="adamw_torch_fused",
            adam_beta1=training.adam_beta1,
            adam_beta2=training.adam_beta2,
            adam_epsilon=training.adam_eps,
            weight_decay=training.weight_decay,
            max_grad_norm=training.max_grad_norm,
            bf16=training.precision == "bf16",
            gradient_checkpointing=training.activation_checkpointing == "full",
            torch_compile=options.row == "hf-compiled",
            dataloader_num_workers=2 if on_gpu else 0,
            use_cpu=not on_gpu,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            seed=training.seed,
        )
        if arguments.n_gpu > 1:
            arguments._n_gpu = 1  # it would take all there are, and as many batches
        Trainer(model=llama, args=arguments, train_dataset=Samples(), callbacks=[Clock()]).train()
    ends = ends[options.warmup - 1 :] if options.warmup else ends
    device = torch.device("cuda" if on_gpu else "cpu")
    return describe(torch, device, ends, batch * config.data.block_size)


def now() -> tuple[float, float]:
    """The time, and how long the CPUs have worked for this process: the second tells more on a busy machine."""
    return time.perf_counter(), time.process_time()


def describe(torch, device, ends: list[tuple[float, float]], tokens: int) -> dict[str, Any]:
    """The figures of a run whose steps, of so many tokens each, ended at `ends`, after that of the last warm-up."""
    seconds, cpu_seconds = (
        [end - begin for begin, end in itertools.pairwise(times)] for times in zip(*ends, strict=True)
    )
    on_gpu = device.type == "cuda"
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "tokens_per_second": tokens / median(seconds) if seconds else None,
        "cpu_seconds": median(cpu_seconds) if seconds else None,
        "step_seconds": seconds,
        "peak_memory_bytes": torch.cuda.max_memory_allocated(device) if on_gpu else resident,
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.processor() or "CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    run_main(main)
