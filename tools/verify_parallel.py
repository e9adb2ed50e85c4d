"""Prove that layouts compute what one process computes: train a tiny copy of a model in each of them, on CPU ranks.

    python tools/verify_parallel.py                                        a covering choice of layouts, up to 8 ranks
    python tools/verify_parallel.py --config my.yaml --only "tp2 pp2"      of another model; cells with that in the name
    python tools/verify_parallel.py --cells full --json full.json          every layout of 8 ranks
    python tools/verify_parallel.py --cells none --self-test               show that mistakes would be noticed

The copy has the options of the config's model (heads in their ratio, QK-norm, tied or not, dropout, z-loss, fused loss,
...) and random data, whose sequences differ in how many tokens count. A cell is a layout (tp: tensor, +sp: with
sequence parallelism, pp: pipeline, v: virtual stages, cp: context, dp: data), a kind of ZeRO (0 to 3, optimizer
offloaded or not), a schedule, recomputation, a precision, and perhaps documents or dropout. It trains three steps with
the real engine, trainer and loader; plain torch trains the same in one process. Compared are every step's loss and
gradient norm, every parameter's gradient of the first step, and every weight after the last.

quick: each pair of sizes (1, 2, more) and kinds of ZeRO that can go together is in some cell. full: each legal layout
of --max-ranks ranks under each kind of ZeRO, in fp32 and in bf16. In both, schedule, recomputation, documents and
dropout are dealt out such that their pairs with everything else occur; not each combination does.
The exit code is 1 if a cell failed, or if a planted mistake was not noticed.
"""

import argparse
import json
import math
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])
os.environ["OMP_NUM_THREADS"] = "1"  # ranks that crowd each other out are several times slower
os.environ["DS_ACCELERATOR"] = "cpu"

from megalite.config import Config
from megalite.config_loader import load_config
from megalite.errors import UserError, run_main
from megalite.training.parity_cells import Cell, full, quick, shrink


def main() -> int:
    options, rest = parse_options()
    config = shrink(load_config(["--config", options.config, *rest]).config)
    cells = choose(config, options)
    if options.list:
        print("\n".join(map(str, cells)))
        return 0
    # Only now: they take seconds to import.
    from megalite.training.parity import Bench

    with tempfile.TemporaryDirectory(prefix="verify-parallel-") as folder:
        results = run_cells(cells, Bench(config, Path(folder), options.timeout)) if cells else []
        if options.json:
            write_json(options.json, results)
        unnoticed = self_test(config, Path(folder, "mistakes"), options.timeout) if options.self_test else 0
    return 1 if unnoticed or any(result.problem for result in results) else 0


def choose(config: Config, options: argparse.Namespace) -> list[Cell]:
    ranks = 2 ** (options.max_ranks.bit_length() - 1)
    cells = {"quick": quick, "full": full, "none": lambda config, ranks: []}[options.cells](config, ranks)
    cells = [cell for cell in cells if options.only in str(cell)]
    if not cells and not options.self_test:
        raise UserError(f"--only {options.only!r}: no cell has that in its name; --list without it shows all")
    return cells


def run_cells(cells: list[Cell], bench) -> list:
    """Results, which are printed as they come."""
    from megalite.training.parity import QUANTITIES, TOLERANCES

    started = time.monotonic()
    allowed = "; ".join(f"{name} {describe(each)}" for name, each in TOLERANCES.items())
    print(f"{len(cells)} cells beside one process; relative differences allowed: {allowed}")
    width, digits = max(len(str(cell)) for cell in cells), len(str(len(cells)))
    heads = "".join(f"{quantity:9}" for quantity in QUANTITIES)
    print(f"{'':{2 * digits + 1}}  {'cell':{width}}  {heads}seconds", flush=True)
    results = []
    for number, cell in enumerate(cells, 1):
        result = bench.run(cell)
        results.append(result)
        values = "".join(f"{result.worst.get(quantity, math.nan):<9.1e}" for quantity in QUANTITIES)
        verdict = "FAILED" if result.problem else "ok"
        print(f"{number:{digits}}/{len(cells)}  {cell!s:{width}}  {values}{result.seconds:7.1f}  {verdict}", flush=True)
        if result.problem:
            print("    " + result.problem.replace("\n", "\n    "), flush=True)
    failed = [result for result in results if result.problem]
    print(f"{len(cells) - len(failed)} of {len(cells)} cells ok, in {time.monotonic() - started:.0f} s", flush=True)
    for result in failed:
        print(f"FAILED {result.cell}: {result.problem.splitlines()[0]}", flush=True)
    return results


def parse_options() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Settings of the config can follow, as for pretrain.py: --model.qk_norm true",
    )
    parser.add_argument("--config", default="configs/small.yaml", help="whose model is copied (configs/small.yaml)")
    parser.add_argument("--max-ranks", type=int, default=8, help="processes of the largest cells, a power of 2 (8)")
    parser.add_argument("--cells", choices=["quick", "full", "none"], default="quick", help="which cells run (quick)")
    parser.add_argument("--only", default="", metavar="TEXT", help="of these the ones with TEXT in their name")
    parser.add_argument("--list", action="store_true", help="print the names of the cells that would run, and exit")
    parser.add_argument("--self-test", action="store_true", help="then plant mistakes, each of which must be noticed")
    parser.add_argument("--timeout", type=float, default=120, help="seconds that a cell may take (120)")
    parser.add_argument("--json", type=Path, help="also write the results here")
    options, rest = parser.parse_known_args()
    if options.max_ranks < 1 or not options.timeout > 0:
        parser.error("--max-ranks is at least 1, --timeout above 0")
    return options, rest


def describe(tolerances: dict[str, float]) -> str:
    if len(set(tolerances.values())) == 1:
        return f"{next(iter(tolerances.values())):g}"
    return ", ".join(f"{quantity} {value:g}" for quantity, value in tolerances.items())


def self_test(config: Config, folder: Path, timeout: float) -> int:
    """Each mistake in a cell that is right without it; returns how many were not noticed by the comparison."""
    from megalite.training.parity import Bench
    from tools.verify_parallel_faults import FAULTS

    folder.mkdir()
    config.model.tie_embeddings = True  # which some of the mistakes are about
    bench = Bench(config, folder, timeout)
    right: dict[Cell, str | None] = {}
    unnoticed = 0
    for fault in FAULTS:
        if fault.cell not in right:
            right[fault.cell] = bench.run(fault.cell).problem
        result = bench.run(fault.cell, fault.plant)
        if right[fault.cell]:
            verdict = f"UNCLEAR: without it too {right[fault.cell].splitlines()[0]}"
        elif not result.worst:
            verdict = f"UNCLEAR: nothing to compare: {result.problem}"
        else:
            verdict = f"noticed: {result.problem}" if result.problem else "NOT NOTICED"
        unnoticed += not verdict.startswith("noticed")
        print(f"mistake  {fault.name}, in {fault.cell}\n    {verdict}", flush=True)
    print(f"{len(FAULTS) - unnoticed} of {len(FAULTS)} mistakes noticed", flush=True)
    return unnoticed


def write_json(path: Path, results: list) -> None:
    rows = [
        {"cell": str(each.cell), **each.worst, "seconds": round(each.seconds, 2), "problem": each.problem}
        for each in results
    ]
    try:
        path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


if __name__ == "__main__":
    run_main(main)
