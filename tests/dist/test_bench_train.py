"""The benchmark of training steps, at a size at which it only shows that it works."""

import importlib.util
import json
import sys

import pytest

from tests.dist.conftest import REPOSITORY, run

pytestmark = pytest.mark.dist

TINY = ["--num-layers", "1", "--block-size", "16", "--per-device-train-batch-size", "2"]
COMMAND = [
    sys.executable,
    str(REPOSITORY / "tools/bench_train.py"),
    "--shape",
    "small",
    "--rounds",
    "1",
    "--warmup",
    "1",
]


@pytest.mark.skipif(not importlib.util.find_spec("accelerate"), reason="the Trainer needs accelerate")
def test_both_sides_are_measured(tmp_path):
    path = tmp_path / "found.json"
    done = run([*COMMAND, "--steps", "2", "--against", "hf", "--peak-tflops", "2", "--json", str(path), *TINY])
    assert done.code == 0, done.output + done.errors
    found = json.loads(path.read_text())
    ours, theirs = found["summary"]["ours"], found["summary"]["hf"]
    assert all(len(found["runs"][side][0]["step_seconds"]) == 2 for side in ("ours", "hf"))
    assert found["summary"]["ratio"] == ours["tokens_per_second"] / theirs["tokens_per_second"]
    assert f"ours / hf: {found['summary']['ratio']:.2f}" in done.output
    flops = found["flops_per_token"]
    assert flops["6N+12Lhs"] - flops["6N"] == 12 * 256 * 16  # one layer
    assert ours["mfu"]["6N"] == pytest.approx(ours["tokens_per_second"] * flops["6N"] / 2e12)
    assert 0 <= ours["parts"]["data"] < ours["parts"]["forward"] + ours["parts"]["backward"]
    assert all(ours["parts"][part] > 0 for part in ("forward", "backward", "optimizer"))


def test_profile_counts_operators():
    done = run([*COMMAND, "--steps", "1", "--profile", *TINY])
    assert done.code == 0, done.output + done.errors
    assert "aten::mm" in done.output
    assert "in a step: 0 kernel launches" in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--against", "hf", "--optimizer", "muon"], "--against: the Trainer is measured with AdamW in fp32 or bf16"),
        (["--optimizer", "muon"], "ours: exit code 78: training.optimizer: muon works on whole matrices"),
    ],
)
def test_refused(arguments, message):
    done = run([*COMMAND, *arguments, *TINY])
    assert done.code in (1, 78)
    assert f"error: {message}" in done.errors
