"""tools/bench_checkpoint.py on a million parameters: every row is there, and what was not saved right ends the run."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.token_files import ROOT

pytestmark = pytest.mark.usefixtures("working_folder")

ROWS = ["ours, save", "ours, load", "ours, export"] + [
    f"{side}, {operation}" for side in ("torch dcp", "torch dcp async", "DeepSpeed") for operation in ("save", "load")
]
# Bytes a parameter: a copy of what is saved, and of what is exported in bf16; DeepSpeed has the weights twice.
SIZES = {"ours, export": 2, "DeepSpeed, save": 16, "DeepSpeed, load": 16}


def bench(*arguments, script=ROOT / "tools/bench_checkpoint.py"):
    """(exit code, standard output, standard error)."""
    command = [sys.executable, str(script), "--output-dir", ".", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    return done.returncode, done.stdout, done.stderr


def test_every_row():
    code, output, error = bench("--parameters", "1e6", "--json", "found.json")
    assert (code, error) == (0, "")
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in output.splitlines() if line[:2] == "| "]
    rows = {name: [float(cell.replace(",", "")) for cell in cells] for name, *cells in lines[2:]}
    assert list(rows) == ROWS
    found = json.loads(Path("found.json").read_text())
    assert found["parameters"] == pytest.approx(1e6, rel=0.05)
    for name, cells in rows.items():
        pause, pause_cpu, seconds, cpu, beyond, own, _, size = cells
        assert min(pause, pause_cpu, seconds, cpu, beyond) > 0
        assert pause <= seconds
        assert own <= beyond + 1  # the sample's place in time is another
        assert size * 1e6 == pytest.approx(SIZES.get(name, 12) * found["parameters"], rel=0.1)
        [run] = found["runs"][name]
        assert run["peak"] > run["state"]
    copies = 12 * found["parameters"] / 2**20
    assert min(rows["ours, save"][5], rows["torch dcp async, save"][5]) > 0.9 * copies
    assert "every load and export gave what was to be saved, to the bit" in output
    assert [path.name for path in Path().iterdir()] == ["found.json"]


def test_another_state_ends_the_run():
    """What is loaded is compared; here all that is given to the engine, and so saved, is made one more."""
    Path("tools").mkdir()
    for name in ("bench_checkpoint.py", "bench_data.py"):
        source = (ROOT / "tools" / name).read_text()
        Path("tools", name).write_text(source.replace(".flatten() for key in KEYS", ".flatten() + 1 for key in KEYS"))
    for name in ("megalite", "kernels", "ds_configs"):
        Path(name).symlink_to(ROOT / name)
    code, output, error = bench("--parameters", "1e6", script=Path("tools/bench_checkpoint.py").resolve())
    assert code == 1
    assert error == "error: ours, load failed: embedding.weight.weight is not what was saved\n"
    assert "| ours" not in output
    assert not list(Path().glob("bench-checkpoint-*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--parameters", "9e11"],
            r"--parameters 9e\+11 needs 28,801\.1 GB of memory, and [\d.]+ GB are free: give fewer",
        ),
        (["--output-dir", "none"], "cannot write to --output-dir none: No such file or directory"),
    ],
)
def test_no_room_is_one_line(arguments, message):
    code, output, error = bench(*arguments)
    assert (code, output) == (1, "")
    assert re.fullmatch(f"error: {message}.*\n", error)
