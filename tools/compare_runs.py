"""Compare the curves of two runs step by step; the exit code is 1 where they are further apart than the tolerance.

python tools/compare_runs.py runs/a runs/b --tolerance 1e-5 --keys loss,grad_norm

A run is its folder, or a file as metrics.jsonl. Differences are relative, to the larger of the two values. A step that
only one of them has counts as a difference, and so does a value that is not finite (null) on either side.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

from megalite.errors import UserError, run_main


def main() -> int:
    options = parse_options()
    found = first, second = [read_metrics(run) for run in options.runs]
    steps = sorted(first.keys() & second.keys())
    if not steps:
        raise UserError(f"{options.runs[0]} and {options.runs[1]} have no step in common")
    pairs = {
        key: [column(metrics, steps, key, run) for metrics, run in zip(found, options.runs, strict=True)]
        for key in options.keys
    }
    print(f"{len(steps):,} steps compared, {steps[0]} to {steps[-1]}; tolerance {options.tolerance:g}")
    same = first.keys() == second.keys()
    for run, lacking in zip(options.runs, (second.keys() - first.keys(), first.keys() - second.keys()), strict=True):
        if lacking:
            print(f"{run} lacks {len(lacking):,} of the other's steps, from {min(lacking)} on")
    width = max(map(len, pairs))
    print(f"{'':{width}}  largest difference  at step  first beyond the tolerance")
    for key, pair in pairs.items():
        apart = [difference(a, b) for a, b in zip(*pair, strict=True)]
        largest = max(apart)
        beyond = next((step for step, each in zip(steps, apart, strict=True) if each > options.tolerance), None)
        same = same and beyond is None
        shown = "none" if beyond is None else f"step {beyond}"
        print(f"{key:{width}}  {largest:<18.3g}  {steps[apart.index(largest)]:<7}  {shown}")
    return 0 if same else 1


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs=2, metavar="RUN", help="a run's folder, or its metrics.jsonl")
    parser.add_argument("--tolerance", type=float, default=1e-5, help="relative difference that is allowed (1e-5)")
    parser.add_argument("--keys", default="loss,grad_norm", help="what to compare, with commas (loss,grad_norm)")
    options = parser.parse_args()
    options.keys = [key for key in options.keys.split(",") if key]
    if not options.keys:
        raise UserError("--keys names nothing to compare")
    if not 0 <= options.tolerance < math.inf:
        raise UserError(f"--tolerance must be 0 or more, not {options.tolerance}")
    return options


def read_metrics(run: str) -> dict[int, dict[str, Any]]:
    """The lines of a run's metrics.jsonl by their steps. Raises UserError where it can't be read or has none."""
    path = Path(run, "metrics.jsonl") if Path(run).is_dir() else Path(run)
    by_step = {}
    try:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                values = json.loads(line)
                by_step[int(values["step"])] = values
            except (ValueError, KeyError, TypeError):
                raise UserError(f'{path}:{number}: no JSON object with a "step"; the run was cut off here') from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; give a run's folder, or its metrics.jsonl") from error
    except UnicodeDecodeError:
        raise UserError(f"{path} is no text; give a run's folder, or its metrics.jsonl") from None
    if not by_step:
        raise UserError(f"{path} is empty: the run logged no step")
    return by_step


def column(metrics: dict[int, dict[str, Any]], steps: list[int], key: str, run: str) -> list[float | None]:
    """The values of `key`; None where one was not finite. Raises UserError where it is missing or no number."""
    values = []
    for step in steps:
        if key not in metrics[step]:
            raise UserError(f"{run}: step {step} has no {key!r}; there are {', '.join(metrics[step])}")
        value = metrics[step][key]
        if isinstance(value, bool) or not isinstance(value, int | float | None):
            raise UserError(f"{run}: step {step}: {key} is no number but {json.dumps(value)}")
        values.append(value)
    return values


def difference(a: float | None, b: float | None) -> float:
    if a is None or b is None or not (math.isfinite(a) and math.isfinite(b)):
        return math.inf
    return abs(a - b) / max(abs(a), abs(b)) if a != b else 0.0


if __name__ == "__main__":
    run_main(main)
