"""tools/verify_parallel.py: a covering choice of layouts is right, and what is wrong is noticed, named and ends."""

import json
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.dist.conftest import REPOSITORY, environment, interruptible, run
from tests.dist.parity_cases import results

pytestmark = pytest.mark.dist

CONFIGS = REPOSITORY / "configs"
TOOL = [sys.executable, str(REPOSITORY / "tools" / "verify_parallel.py"), "--config", str(CONFIGS / "small.yaml")]


def test_quick_cells_are_right_and_mistakes_are_noticed(tmp_path):
    done = run([*TOOL, "--self-test", "--json", str(tmp_path / "cells.json")], timeout=900)
    assert done.code == 0, done.output + done.errors
    rows = json.loads((tmp_path / "cells.json").read_text())
    assert len(rows) > 30
    assert all(0 < row["gradient"] < 0.1 and row["problem"] is None for row in rows)
    assert re.search(r"^10 of 10 mistakes noticed$", done.output, re.MULTILINE)


@pytest.mark.parametrize("only", ["tp4+sp", "pp2 v2"])
def test_another_model(only):
    """Untied, and with fewer keys than tensor-parallel ranks; with QK-norm, the fused loss and z-loss."""
    options = ["--config", str(CONFIGS / "llama-8b.yaml"), "--max-ranks", "4", "--only", only]
    options += ["--model.qk_norm", "true", "--model.fused_loss", "true", "--z-loss", "0.01"]
    done = run([*TOOL, *options], timeout=300)
    assert done.code == 0, done.output + done.errors
    assert done.output.count(" ok\n") > 1


def test_a_failing_cell_is_shown_and_fails_the_command(tmp_path):
    """Here because it has no time."""
    report = tmp_path / "cells.json"
    done = run([*TOOL, "--max-ranks", "1", "--only", "zero0", "--timeout", "0.01", "--json", str(report)], timeout=120)
    assert done.code == 1
    assert "FAILED zero0 fp32: no end after 0.01 s; the ranks were in" in done.output
    assert "0 of 1 cells ok" in done.output
    assert json.loads(report.read_text())[0]["problem"].startswith("no end after 0.01 s")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "tp3"], "error: --only 'tp3': no cell has that in its name"),
        (["--model.n_positions", "few"], 'error: --model.n_positions: model.n_positions: got "few"'),
    ],
)
def test_mistakes_of_the_user_are_one_line(options, message):
    done = run([*TOOL, *options], timeout=60)
    assert done.code != 0
    assert done.errors.startswith(message)
    assert done.errors.count("\n") == 1


def test_ctrl_c_leaves_nothing_behind(tmp_path):
    own = environment() | {"TMPDIR": str(tmp_path)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([*TOOL, "--only", "dp"], env=own, preexec_fn=interruptible, **pipes)
    try:
        children, deadline = [], time.monotonic() + 120
        while len(children) < 2:  # the ranks of a cell; the reference is one
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            children = psutil.Process(process.pid).children()
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert (process.returncode, errors) == (130, "interrupted\n")
    assert not [child for child in children if child.is_running()]
    assert not list(tmp_path.glob("verify-parallel-*"))


@pytest.fixture(scope="module")
def failures() -> dict:
    return results("failures")


def test_a_rank_that_raises_shows_its_traceback(failures):
    problem, seconds, children = failures["raises"]
    assert problem.startswith("rank 1 failed (exit code 1)\nTraceback")
    assert problem.endswith("ValueError: this rank is broken")  # and not what the others met when it had gone
    assert (seconds < 12, children) == (True, 0)


def test_a_rank_that_dies_is_named(failures):
    problem, seconds, children = failures["dies"]
    assert problem == "rank 1 was killed by SIGKILL"
    assert (seconds < 12, children) == (True, 0)


def test_a_rank_that_hangs_ends_its_cell_which_says_what_all_were_doing(failures):
    problem, _, children = failures["hangs"]
    first, *ranks = problem.splitlines()
    assert first == "no end after 15 s; the ranks were in"
    assert [line.partition(":")[0] for line in ranks] == ["rank 0", "rank 1", "rank 2", "rank 3"]
    assert "train_step (dist/parity_cases.py" in ranks[1]
    assert all(re.search(r"reduce|wait", line) for line in (ranks[0], ranks[2], ranks[3]))
    assert children == 0


def test_cells_after_a_failed_one_run(failures):
    assert failures["nothing"] == [None, 0, 0]
