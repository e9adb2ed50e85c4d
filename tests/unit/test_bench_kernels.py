"""tools/bench_kernels.py at a size at which it only shows that it works, and the least work that it reckons with."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

from megalite.kernels.dispatch import OPERATORS
from tests.unit.token_files import ROOT
from tools.bench_kernels_cases import SIZES, cases

TINY = ["--tokens", "4", "--rounds", "1"]


def bench(*arguments, command=(str(ROOT / "tools/bench_kernels.py"),)):
    """(exit code, standard output, standard error)."""
    done = subprocess.run(
        [sys.executable, *command, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    return done.returncode, done.stdout, done.stderr


def test_every_kernel_is_measured(tmp_path):
    code, output, error = bench(*TINY, "--no-compile", "--json", tmp_path / "found.json")
    assert (code, error) == (0, "")
    found = json.loads((tmp_path / "found.json").read_text())
    assert {row["kernel"] for row in found["rows"]} == set(OPERATORS)
    for row in found["rows"]:
        assert list(row["entrants"]) == ["ours", "eager"]
        assert row["problems"] == {}
        unit = "flops" if row["kernel"] == "linear_cross_entropy" else "bytes"
        for each in row["entrants"].values():
            assert 0 < each["p20"] <= each["seconds"] <= each["p80"]
            assert each["of_floor"] == pytest.approx(row[unit] / found["rates"][unit] / each["seconds"])
            assert len(each["samples"]) == 5
    lines = [line for line in output.splitlines() if line.startswith("| ")]
    assert len(lines) == 2 + len(found["rows"])
    # Of 4 tokens with 512 fp32 numbers: the result alone, and nothing that stays.
    peak = {(row["shape"], row["pass"]): row["entrants"]["eager"]["peak_bytes"] for row in found["rows"]}
    assert 8192 <= peak["4 x 512", "forward"] < 3 * 8192


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a compiler on a CPU")
def test_beside_compiled(tmp_path):
    code, output, _ = bench(*TINY, "--kernels", "swiglu", "--json", tmp_path / "found.json")
    assert code == 0, output
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert [list(row["entrants"]) for row in rows] == [["ours", "eager", "compile"]] * 2


WRONG = """
import sys
import tools.bench_kernels as bench
right = bench.kernels.swiglu
bench.kernels.swiglu = lambda gate, up: right(gate, up) * {factor}
sys.path[0] = ""
bench.run_main(bench.main)
"""


@pytest.mark.parametrize("factor", [1.0001, "float('nan')"])
def test_other_numbers_are_not_timed(factor):
    command = ("-c", WRONG.format(factor=factor))
    code, output, error = bench(*TINY, "--kernels", "swiglu", "--no-compile", command=command)
    assert code == 1
    assert "swiglu 4 x 1408 forward   ours     left out: differs from eager in fp32: result 1 by " in output
    assert "swiglu 4 x 1408 forward   eager    " in output
    assert "| swiglu | 4 x 1408 | forward  | - " in output
    assert error.startswith("error: ours was not measured: swiglu 4 x 1408: differs from eager in fp32: result 1 by ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kernels", "rope,gelu"], f"--kernels: no kernel is called 'gelu'; there are {', '.join(OPERATORS)}"),
        (["--rounds", "0"], "--rounds must be at least 1, and --tokens at least 2"),
        (["--tokens", "1"], "--rounds must be at least 1, and --tokens at least 2"),
    ],
)
def test_refused(arguments, message):
    assert bench(*arguments) == (1, "", f"error: {message}\n")


# The least time on an H100 for bf16, at the 3.0 TB/s of a copy and 798 TFLOP/s of a product, worked out by hand; in us.
FLOORS = {
    ("rms_norm", "8192 x 2048"): {"forward": 22, "backward": 34},
    ("rms_norm", "8192 x 2048, residual"): {"forward": 45, "backward": 45},
    ("rms_norm", "8192 x 4096"): {"forward": 45, "backward": 67},
    ("rms_norm", "8192 x 4096, residual"): {"forward": 89, "backward": 89},
    ("rms_norm", "8192 x 8192"): {"forward": 89, "backward": 134},
    ("rms_norm", "8192 x 8192, residual"): {"forward": 179, "backward": 179},
    ("softmax", "16 x 4096 x 4096, causal"): {"forward": 268, "backward": 358},
    ("cross_entropy", "8192 x 32000"): {"forward": 175, "both": 524},
    ("cross_entropy", "8192 x 131072"): {"forward": 716, "both": 2147},
    ("linear_cross_entropy", "8192 x 2048 x 32000"): {"forward": 1346, "both": 4037},
    ("linear_cross_entropy", "8192 x 2048 x 131072"): {"forward": 5511, "both": 16534},
    ("linear_cross_entropy", "8192 x 4096 x 32000"): {"forward": 2691, "both": 8073},
    ("linear_cross_entropy", "8192 x 4096 x 131072"): {"forward": 11023, "both": 33068},
    ("linear_cross_entropy", "8192 x 8192 x 32000"): {"forward": 5382, "both": 16146},
    ("linear_cross_entropy", "8192 x 8192 x 131072"): {"forward": 22045, "both": 66136},
    ("rope", "8192 x (32 + 8) x 128"): {"forward": 56, "backward": 56},
    ("swiglu", "8192 x 11008"): {"forward": 180, "backward": 301},
}


def test_least_work():
    found = {}
    for kernel in OPERATORS:
        for case in cases(kernel, SIZES["full"], torch.bfloat16, torch.device("cpu")):
            rate = {"bytes": 3.0e12, "flops": 798e12}[case.unit]
            found[case.kernel, case.shape] = {name: round(1e6 * work / rate) for name, work in case.work.items()}
    assert found == FLOORS
