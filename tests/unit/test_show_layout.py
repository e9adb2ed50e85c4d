"""tools/show_layout.py: what it prints of a layout, and what it refuses."""

import runpy
import sys

import pytest

from tests.unit.token_files import ROOT


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs tools/show_layout.py with configs/small.yaml in this process: arguments -> (exit code, stdout, stderr)."""

    def run(arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "path", list(sys.path))  # the script sets sys.path[0]
        config = ["--config", str(ROOT / "configs/small.yaml")]
        monkeypatch.setattr(sys, "argv", ["show_layout.py", *config, *arguments.split()])
        with pytest.raises(SystemExit) as exit_:
            runpy.run_path(str(ROOT / "tools/show_layout.py"), run_name="__main__")
        return exit_.value.code or 0, *capsys.readouterr()

    return run


WHOLE = """\
grid: 16 ranks = pipeline 2 x data 2 x context 1 x tensor 4, tensor fastest
ranks  pipeline  data  context  tensor  node
0-3    0         0     0        0-3     0
4-7    0         1     0        0-3     0-1
8-11   1         0     0        0-3     1
12-15  1         1     0        0-3     2

groups                             ranks
tensor                     4 x 4   [0-3] [4-7] [8-11] [12-15]
context                    16 x 1  [0] [1] [2] [3] [4] [5] [6] [7] [8] [9] ...
zero (data x context)      8 x 2   [0,4] [1,5] [2,6] [3,7] [8,12] [9,13] ...
pipeline                   8 x 2   [0,8] [1,9] [2,10] [3,11] [4,12] [5,13] ...
model (pipeline x tensor)  2 x 8   [0-3,8-11] [4-7,12-15]
of one key/value head      8 x 2   [0-1] [2-3] [4-5] [6-7] [8-9] [10-11] ...
of the tied embedding      8 x 2   [0,8] [1,9] [2,10] [3,11] [4,12] [5,13] ...

stage  parameters  FLOPs  in flight  holds
0      3,261,952   57.6%  2          embedding, layers 0-2
1      1,786,624   42.4%  1          layer 3, head
parameters in all: 5,048,576 (the tied embedding twice)

schedule: 1f1b; micro-batches: 3; sequences in one: 8, in a step of all ranks: 48
stage 0  F0 F1 .  .  B0 -- F2 B1 -- .  B2 --
stage 1  .  F0 B0 -- F1 B1 -- F2 B2 -- .  .
bubble: each stage waits for 33.3% of the time that it works
warning: 1 of 4 tensor groups span nodes, as ranks 4-7 do, and talk in every layer; let parallel.tensor divide \
--gpus-per-node 6
"""


def test_the_whole(command):
    layout = "--parallel.tensor 4 --parallel.pipeline 2 --gradient-accumulation-steps 3"
    code, output, error = command(f"--world-size 16 --gpus-per-node 6 --width 81 {layout}")
    assert (code, error) == (0, "")
    assert output == WHOLE


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        (
            "--world-size 2 --parallel.pipeline 2 --parallel.virtual 2 --gradient-accumulation-steps 2",
            [
                "0      2,524,160   38.4%  2          embedding, layer 0; layer 2",
                "1      2,524,416   61.6%  1.5        layer 1; layer 3, head",
                "schedule: interleaved; micro-batches: 2; sequences in one: 8, in a step of all ranks: 16",
                "stage 1  .    F0.0 F1.0 F0.1 B0.1 ---- F1.1 B1.1 ---- B0.0 ---- B1.0 ---- .    .",
            ],
        ),
        (
            "--world-size 12 --parallel.context 2 --parallel.pipeline 3 --schedule gpipe --global-batch-size 32",
            [
                "grid: 12 ranks = pipeline 3 x data 2 x context 2 x tensor 1, tensor fastest",
                "context                    6 x 2   [0-1] [2-3] [4-5] [6-7] [8-9] [10-11]",
                "zero (data x context)      3 x 4   [0-3] [4-7] [8-11]",
                "of the tied embedding      4 x 2   [0,8] [1,9] [2,10] [3,11]",
                "stage 2  .  .  F0 F1 B0 -- B1 -- .  .  .  .",
            ],
        ),
        (
            "--world-size 1 --tie-embeddings false",
            ["0      5,048,576   100.0%  1          embedding, layers 0-3, head", "parameters in all: 5,048,576"],
        ),
        (
            "--world-size 8 --gpus-per-node 3 --parallel.context 2 --parallel.tensor 2",
            ["warning: 1 of 4 tensor groups span nodes, as ranks 2-3 do, and talk in every layer; let parallel.tensor"
             " divide --gpus-per-node 3"],
        ),
        (
            "--world-size 4 --gpus-per-node 2 --parallel.context 2 --parallel.tensor 2",
            ["warning: 2 of 2 context groups span nodes, as ranks 0,2 do, and talk in every layer; let "
             "parallel.tensor x parallel.context divide --gpus-per-node 2"],
        ),
    ],
)  # fmt: skip
def test_lines(command, arguments, lines):
    code, output, error = command(f"{arguments} --width 200")
    assert (code, error) == (0, "")
    assert [line for line in lines if line not in output.splitlines()] == []


def test_no_warning_where_groups_fit_into_nodes(command):
    _, output, _ = command("--world-size 16 --gpus-per-node 4 --parallel.tensor 2 --parallel.context 2")
    assert "warning" not in output


def test_a_long_schedule_is_cut(command):
    _, output, _ = command("--world-size 4 --parallel.pipeline 4 --gradient-accumulation-steps 40 --width 60")
    lines = output.splitlines()
    assert max(map(len, lines)) == 60
    assert [line.endswith(" ...") for line in lines if line.startswith("stage 0")] == [True]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("--world-size 0", 1, "--world-size must be at least 1, not 0"),
        ("--world-size 8 --width 5", 1, "--width must be at least 40, not 5"),
        ("--world-size 6 --parallel.tensor 4", 78, "parallel.tensor (4) does not divide 6 ranks; start 4 or 8"),
        ("--world-size 8 --parallel.tensor 3", 78, "model.num_heads = 4 is not divisible by parallel.tensor = 3"),
        ("--world-size 8 --parallel.pipeline 8", 78, "= 8 parts, but model.num_layers = 4"),
        (
            "--world-size 4 --parallel.pipeline 2 --parallel.virtual 2 --gradient-accumulation-steps 3",
            78,
            "a step has 3 (training.gradient_accumulation_steps, or what",
        ),
        ("--world-size 2 --parallel.piepline 2", 78, "unknown key; did you mean --parallel.pipeline?"),
    ],
)
def test_refused(command, arguments, code, message):
    found, output, error = command(arguments)
    assert (found, output) == (code, "")
    assert message in error.splitlines()[0]
    assert error.startswith("error: ")
    assert "Traceback" not in error
