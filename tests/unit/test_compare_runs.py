"""tools/compare_runs.py: what it finds apart, and what it says of files that can't be compared."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.token_files import ROOT

pytestmark = pytest.mark.usefixtures("working_folder")


def write_run(name, losses, first=1, **more):
    """A run's folder; `more` goes into every line."""
    Path(name).mkdir()
    lines = [json.dumps({"step": step, "loss": loss} | more) for step, loss in enumerate(losses, first)]
    Path(name, "metrics.jsonl").write_text("".join(line + "\n" for line in lines))


def compare(*arguments):
    """(exit code, standard output, standard error)."""
    command = [sys.executable, str(ROOT / "tools/compare_runs.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(("tolerance", "code", "beyond"), [("1e-3", 0, "none"), ("1e-6", 1, "step 2")])
def test_largest_difference_and_first_beyond(tolerance, code, beyond):
    write_run("a", [4.0, 3.0, 2.0, 0.0], grad_norm=1.5)
    write_run("b", [4.0, 3.00003, 2.001, 0.0], grad_norm=1.5)
    # A folder, and a file in one.
    found, output, error = compare("a", "b/metrics.jsonl", "--tolerance", tolerance)
    assert (found, error) == (code, "")
    first, _, loss, norm = output.splitlines()
    assert first.startswith("4 steps compared, 1 to 4; tolerance ")
    assert loss.split(maxsplit=3) == ["loss", "0.0005", "3", beyond]
    assert norm.split() == ["grad_norm", "0", "1", "none"]


def test_what_is_not_finite_is_never_within():
    write_run("a", [4.0, None])
    write_run("b", [4.0, None])
    code, output, _ = compare("a", "b", "--keys", "loss", "--tolerance", "1e9")
    assert code == 1
    assert output.splitlines()[-1].split() == ["loss", "inf", "2", "step", "2"]


def test_a_run_that_stopped_early():
    write_run("a", [4.0, 3.0, 2.0])
    write_run("b", [4.0, 3.0])
    code, output, _ = compare("a", "b", "--keys", "loss")
    assert code == 1
    first, second, *_ = output.splitlines()
    assert first == "2 steps compared, 1 to 2; tolerance 1e-05"
    assert second == "b lacks 1 of the other's steps, from 3 on"


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (None, [], "cannot read b: No such file or directory; give a run's folder, or its metrics.jsonl"),
        (b"", [], "b is empty: the run logged no step"),
        (b'{"step": 1, "loss": 4.0}\n{"ste', [], 'b:2: no JSON object with a "step"; the run was cut off here'),
        (b"[1]\n", [], 'b:1: no JSON object with a "step"; the run was cut off here'),
        (b"\xff\xfe", [], "b is no text; give a run's folder, or its metrics.jsonl"),
        (b'{"step": 7, "loss": 4.0}\n', [], "a and b have no step in common"),
        (b'{"step": 1, "loss": 4.0}\n', ["--keys", "loss,lr"], "a: step 1 has no 'lr'; there are step, loss"),
        (b'{"step": 1, "loss": "4"}\n', ["--keys", "loss"], 'b: step 1: loss is no number but "4"'),
        (b"", ["--keys", ","], "--keys names nothing to compare"),
        (b"", ["--tolerance", "nan"], "--tolerance must be 0 or more, not nan"),
    ],
)
def test_refused(content, arguments, message):
    write_run("a", [4.0])
    if content is not None:
        Path("b").write_bytes(content)
    assert compare("a", "b", *arguments) == (1, "", f"error: {message}\n")
