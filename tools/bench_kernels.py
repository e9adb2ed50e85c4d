"""Measure each kernel, forward and backward, beside torch eager, torch.compile and Liger (where it is installed).

    python tools/bench_kernels.py --json kernels.json
    python tools/bench_kernels.py --kernels rms_norm,swiglu --no-compile

All do the same on the same numbers: before it is timed, each is held to torch eager in fp32. They take turns, so that
what else the machine does meets them all, and the median counts, with the 20th and 80th percentile. The floor of a pass
is the least time that its bytes or its matrix products take at the rate of a copy, or of a large product, measured in
the same run. Inputs go round over copies of four times the cache, so that none are found there. On a GPU calls are
captured in CUDA graphs, or where that can't be timed by events ("events": launches may then be what is measured). On a
CPU, which runs the kernels' torch references, shapes are smaller (--sizes), and seconds are those that its cores work:
OMP_NUM_THREADS=1 keeps threads that wait out of them. Peak memory: of one call, beyond inputs.
"""

import argparse
import gc
import importlib.util
import itertools
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])
os.environ["KINETO_LOG_LEVEL"] = "99"  # the profiler, which counts memory on a CPU, reports its start to standard error

import torch
from torch import Tensor

from megalite import kernels
from megalite.errors import UserError, run_main
from megalite.kernels.dispatch import OPERATORS
from tools.bench_kernels_cases import SIZES, Case, cases

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Of a result's norm: about four roundings to the dtype, some of them of intermediate results.
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
PEERS = ("eager", "compile", "Liger")
CPU_CACHE = 32 << 20  # bytes, of the larger ones
MOST_COPIES = 256
SAMPLES = 5  # of each in a round
LEAST_SECONDS = 0.002  # of a sample


@dataclass
class Entrant:
    """One of those that take turns."""

    name: str
    run: Callable[[], Any]  # `calls` calls
    calls: int
    timed_by: str
    peak: int  # bytes
    seconds: list[float] = field(default_factory=list)  # a call


def main() -> None:
    options = parse_options()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    dtype = DTYPES[options.dtype or ("bf16" if on_gpu else "fp32")]
    sizes = SIZES[options.sizes or ("full" if on_gpu else "reduced")]
    sizes = replace(sizes, tokens=options.tokens or sizes.tokens)
    kernels.use("triton" if on_gpu else "auto")
    if options.compile:
        from torch._functorch import config

        config.donated_buffer = False  # else a compiled function refuses a second backward
    liger, why_not = find_liger(on_gpu)
    found = describe(device, dtype) | {"sizes": vars(sizes), "rounds": options.rounds, "liger": why_not or "measured"}
    print(", ".join(f"{key} {value}" for key, value in found.items() if not isinstance(value, dict)))
    # A graph can't be captured on the default stream, and backward runs where forward ran.
    with torch.cuda.stream(torch.cuda.Stream()) if on_gpu else nullcontext():
        found["rates"] = rates = measure_rates(device, dtype, options.rounds)
        per_second = f"copy {rates['bytes'] / 1e9:,.1f} GB/s, matrix product {rates['flops'] / 1e12:.3g} TFLOP/s"
        print(per_second, end="\n\n", flush=True)
        rows = found["rows"] = []
        for kernel in options.kernels:
            for case in cases(kernel, sizes, dtype, device):
                functions = {"ours": case.ours, "eager": case.eager}
                if options.compile:
                    torch._dynamo.reset()  # one function may have only so many graphs
                    functions["compile"] = torch.compile(case.eager, dynamic=False)
                if liger and case.liger:
                    functions["Liger"] = partial(case.liger, liger)
                rows += measure(case, functions, device, dtype, rates, options.rounds)
    print_table(rows)
    if options.json:
        try:
            options.json.write_text(json.dumps(found, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {options.json}: {error.strerror}") from error
    faults = {f"{row['kernel']} {row['shape']}: {row['problems']['ours']}" for row in rows if "ours" in row["problems"]}
    if faults:
        raise UserError(f"ours was not measured: {'; '.join(sorted(faults))}")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", default=",".join(OPERATORS), metavar="LIST", help="with commas; default: all")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--sizes", choices=SIZES, help="default: full on a GPU, reduced on a CPU")
    parser.add_argument("--tokens", type=int, help="instead of 8192 (full) or 256 (reduced)")
    parser.add_argument("--rounds", type=int, default=5, help=f"in which each is timed {SAMPLES} times (5)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write everything here")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    options = parser.parse_args()
    options.kernels = [name for name in options.kernels.split(",") if name]
    for name in options.kernels:
        if name not in OPERATORS:
            raise UserError(f"--kernels: no kernel is called {name!r}; there are {', '.join(OPERATORS)}")
    if options.rounds < 1 or (options.tokens is not None and options.tokens < 2):
        raise UserError("--rounds must be at least 1, and --tokens at least 2")
    return options


def find_liger(on_gpu: bool) -> tuple[Any, str | None]:
    """(Liger's functions, None) or (None, why not)."""
    if not importlib.util.find_spec("liger_kernel"):
        return None, "not installed"
    if not on_gpu and not kernels.dispatch.INTERPRETED:
        return None, "needs a GPU"
    from liger_kernel.transformers import functional

    return functional, None


def describe(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    on_gpu = device.type == "cuda"
    ran = "interpreted Triton" if kernels.dispatch.INTERPRETED else "Triton" if on_gpu else "torch"
    return {
        "device": torch.cuda.get_device_name() if on_gpu else platform.processor() or "CPU",
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "dtype": str(dtype).removeprefix("torch."),
        "ours": ran,
    }


def measure_rates(device: torch.device, dtype: torch.dtype, rounds: int) -> dict[str, float]:
    """Bytes a second of a copy (read and written), and operations a second of a large matrix product."""
    on_gpu = device.type == "cuda"
    source = torch.zeros((512 if on_gpu else 128) << 20, dtype=torch.uint8, device=device)
    copy, side = torch.empty_like(source), 8192 if on_gpu else 1024
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    entrants = [
        enter("copy", lambda _: copy.copy_(source), [None], device),
        enter("product", lambda _: torch.mm(a, b), [None], device),
    ]
    take_turns(entrants, device, rounds)
    of_copy, of_product = (median(each.seconds) for each in entrants)
    return {"bytes": 2 * source.numel() / of_copy, "flops": 2 * side**3 / of_product}


def measure(
    case: Case, functions: dict[str, Callable], device: torch.device, dtype: torch.dtype, rates: dict, rounds: int
) -> list[dict[str, Any]]:
    """A row for each pass of a case."""
    expected, failure = attempt(numbers, case, case.eager, dtype, torch.float32)
    wrong = dict.fromkeys(functions, f"eager in fp32: {failure}") if failure else {}
    for name, function in () if failure else functions.items():
        difference, failure = attempt(compare, case, function, dtype, expected)
        if difference or failure:
            wrong[name] = difference or failure
    del expected
    rows = []
    for which, work in case.work.items():
        entrants, problems = [], dict(wrong)
        for name in (name for name in functions if name not in wrong):
            entrant, failure = attempt(prepare, case, which, name, functions[name], device)
            if failure:
                problems[name] = failure
            else:
                entrants.append(entrant)
        take_turns(entrants, device, rounds)
        floor = work / rates[case.unit]
        row = {"kernel": case.kernel, "shape": case.shape, "pass": which, case.unit: work, "floor_seconds": floor}
        rows.append(row | {"entrants": {each.name: summary(each, floor) for each in entrants}, "problems": problems})
        for name in functions:
            result = rows[-1]["entrants"].get(name)
            text = in_words(result) if result else f"left out: {problems[name]}"
            print(f"{case.kernel} {case.shape} {which:8}  {name:7}  {text}", flush=True)
        entrants = entrant = None  # the next ones need their memory
        gc.collect()
    return rows


def attempt(function: Callable, *arguments: Any) -> tuple[Any, str | None]:
    """(what it returns, None) or (None, the first line of what it raises): who fails does not end the others."""
    try:
        return function(*arguments), None
    except Exception as error:
        return None, f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def numbers(
    case: Case, function: Callable, dtype: torch.dtype, computed_in: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Results and gradients by name, from the same inputs and upstream gradients for all."""
    inputs = make_inputs(case, True, computed_in)
    results = call(function, inputs)
    upstream = [torch.randn(y.shape, device=y.device).to(dtype).to(y.dtype) if y.dim() else None for y in results]
    gradients = torch.autograd.grad(results, [inputs[name] for name in case.differentiable], upstream)
    names = (f"gradient of {name}" for name in case.differentiable)
    found = {f"result {number}": y for number, y in enumerate(results, 1)} | dict(zip(names, gradients, strict=True))
    return {name: x.detach().float() for name, x in found.items()}


def compare(case: Case, function: Callable, dtype: torch.dtype, expected: dict[str, Tensor]) -> str | None:
    """What differs from eager in fp32, and by how much of its norm."""
    actual = numbers(case, function, dtype)
    for name, want in expected.items():
        error = float((actual[name] - want).norm() / want.norm())
        if not error <= TOLERANCE[dtype]:  # nan too
            return f"differs from eager in fp32: {name} by {error:.1e}"
    return None


def make_inputs(case: Case, differentiable: bool, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    torch.manual_seed(1)
    inputs = case.make()
    if dtype is not None:
        inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
    for name in case.differentiable if differentiable else ():
        x = inputs[name]
        # No leaf, as in a model: cross-entropy writes its gradient over what is none.
        inputs[name] = x + torch.zeros((), dtype=x.dtype, device=x.device, requires_grad=True)
    return inputs


def call(function: Callable, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    results = function(**inputs)
    return results if isinstance(results, tuple) else (results,)


def prepare(case: Case, which: str, name: str, function: Callable, device: torch.device) -> Entrant:
    """What does one pass of a case, on states enough to come out of no cache."""
    of_training = "backward" in case.work

    def make_state() -> Any:
        inputs = make_inputs(case, of_training or which == "both")
        if which != "backward":
            return inputs
        results = call(function, inputs)
        return results, [inputs[name] for name in case.differentiable], [torch.randn_like(y) for y in results]

    def run_pass(state: Any) -> Any:
        if which == "forward":
            return call(function, state)
        if which == "both":
            return torch.autograd.grad(call(function, state), [state[name] for name in case.differentiable])
        return torch.autograd.grad(*state, retain_graph=True)

    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else CPU_CACHE
    size = sum(x.nbytes for x in make_inputs(case, False).values())
    states = [make_state() for _ in range(min(MOST_COPIES, math.ceil(4 * cache / size)))]
    return enter(name, run_pass, states, device)


def enter(name: str, call_once: Callable[[Any], Any], states: list, device: torch.device) -> Entrant:
    """Warm up, measure the memory and about how long a call takes, and make a sample long enough to be timed."""
    for state in states[:2] * 2:
        call_once(state)
    peak = measure_peak(partial(call_once, states[0]), device)
    once = clock(lambda: [call_once(state) for state in states], device) / len(states)
    calls = max(len(states), math.ceil(LEAST_SECONDS / once))

    def run() -> list:
        kept = [None] * len(states)  # else results would go where the last ones were, perhaps still in the cache
        for number in range(calls):
            kept[number % len(states)] = call_once(states[number % len(states)])
        return kept

    if device.type != "cuda":
        return Entrant(name, run, calls, "CPU time", peak)
    graph = capture(run)
    return Entrant(name, graph.replay, calls, "graph", peak) if graph else Entrant(name, run, calls, "events", peak)


def capture(run: Callable) -> torch.cuda.CUDAGraph | None:
    """None where that cannot be: what waits for the GPU is not even tried, as a broken capture leaves traces."""
    graph = torch.cuda.CUDAGraph()
    try:
        torch.cuda.set_sync_debug_mode("error")
        run()
    except RuntimeError:
        return None
    finally:
        torch.cuda.set_sync_debug_mode("default")
    try:
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            run()
    except RuntimeError:
        return None
    return graph


def take_turns(entrants: list[Entrant], device: torch.device, rounds: int) -> None:
    for _ in range(rounds):
        for each in entrants:
            each.seconds += [clock(each.run, device) / each.calls for _ in range(SAMPLES)]


def clock(run: Callable, device: torch.device) -> float:
    """Seconds that the device takes; on a CPU those that its cores work, as others may keep them busy too."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    before = time.process_time()
    run()
    return time.process_time() - before


def measure_peak(run: Callable, device: torch.device) -> int:
    """The most bytes that one call holds beyond what there was before, results included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        kept = run()  # to the end, or what it frees would be counted
    del kept
    changes = (event.nbytes() for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]")
    return max(itertools.accumulate(changes, initial=0))


def summary(entrant: Entrant, floor: float) -> dict[str, Any]:
    cuts = quantiles(entrant.seconds, n=5, method="inclusive")
    middle = median(entrant.seconds)
    return {
        "seconds": middle,
        "p20": cuts[0],
        "p80": cuts[-1],
        "of_floor": floor / middle,
        "peak_bytes": entrant.peak,
        "timed_by": entrant.timed_by,
        "samples": entrant.seconds,
    }


def in_words(result: dict[str, Any]) -> str:
    peak = f"peak {mebibytes(result)} MiB"
    return f"{microseconds(result)} us  {result['of_floor']:.2f} of the floor  {peak}  {result['timed_by']}"


def mebibytes(result: dict[str, Any]) -> str:
    return f"{result['peak_bytes'] / 2**20:,.1f}"


def microseconds(result: dict[str, Any]) -> str:
    middle, low, high = (f"{1e6 * result[key]:,.1f}" for key in ("seconds", "p20", "p80"))
    return f"{middle} ({low} / {high})"


def print_table(rows: list[dict[str, Any]]) -> None:
    """Ours in figures, the others by how much faster ours is; as Markdown has it."""
    header = ["kernel", "shape", "pass", "ours, us (p20 / p80)", "of the floor", "peak MiB", *(f"x {p}" for p in PEERS)]
    lines = []
    for row in rows:
        ours, line = row["entrants"].get("ours"), [row["kernel"], row["shape"], row["pass"]]
        if not ours:
            lines.append([*line, *["-"] * (3 + len(PEERS))])
            continue
        peers = [row["entrants"].get(name) for name in PEERS]
        ratios = [f"{peer['seconds'] / ours['seconds']:.2f}" if peer else "-" for peer in peers]
        lines.append([*line, microseconds(ours), f"{ours['of_floor']:.2f}", mebibytes(ours), *ratios])
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
    print()
    for line in (header, ["-" * width for width in widths], *lines):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |")
    print("x NAME: how many times as fast as NAME ours is; -: not measured", flush=True)


if __name__ == "__main__":
    run_main(main)
