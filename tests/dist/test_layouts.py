"""The whole program in parallel layouts: the curve and the state of one process, killed and resumed, in another layout.

What each layout computes, parameter by parameter, is `tools/verify_parallel.py`'s to show; here are the launcher, the
data, evaluation and checkpoints around it.
"""

import pytest

from tests.dist.test_pretrain import RELATIVE, assert_same_curve, assert_same_state

pytestmark = pytest.mark.dist

# Four layers, for four chunks; micro-batches of one sequence, for enough of them.
MODEL = ("--num-layers", "4", "--per-device-train-batch-size", "1", "--eval-every", "4")
TP2, PP2 = ("--parallel.tensor", "2"), ("--parallel.pipeline", "2")
LAYOUTS = {
    "the issue's: ZeRO-3 x TP2 x PP2 x DP2": (8, (*TP2, "--parallel.sequence", "true", *PP2, "--zero", "3")),
    "virtual stages, ZeRO-2, recompute": (
        2,
        (*PP2, "--parallel.virtual", "2", "--zero", "2", "--activation-checkpointing", "full"),
    ),
    "context x TP, ZeRO-3, key/value heads shared": (
        4,
        ("--parallel.context", "2", *TP2, "--num-kv-heads", "1", "--zero", "3"),
    ),
}


@pytest.fixture(scope="module")
def one_rank(job) -> dict[str, list[dict]]:
    return {
        "": job.train("one", *MODEL, "--zero", "0"),
        "shared": job.train("one-shared", *MODEL, "--zero", "0", "--num-kv-heads", "1"),
    }


@pytest.mark.parametrize("case", LAYOUTS)
def test_a_layout_equals_one_rank(job, one_rank, case):
    ranks, arguments = LAYOUTS[case]
    shared = "shared" in case
    name = f"layout-{ranks}-{shared}"
    metrics = job.train(name, *MODEL, *arguments, launcher="deepspeed", ranks=ranks)
    assert_same_curve(metrics, one_rank["shared" if shared else ""], RELATIVE)
    assert_same_state(job, name, "one-shared" if shared else "one", 10 * RELATIVE)


def test_a_stage_without_blocks(job):
    """Of whose tensor-parallel ranks the second counts nothing in the gradient's norm. bf16 rounds at 2^-9."""
    arguments = ("--precision", "bf16", "--zero", "1", "--max-steps", "3")
    one = job.train("one-bf16", *arguments)
    split = job.train("bare", *arguments, *TP2, *PP2, "--parallel.layers", "2", "0", launcher="torchrun", ranks=4)
    for ours, theirs in zip(split, one, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-2)


def test_killed_and_resumed_in_the_same_layout_to_the_bit(job):
    arguments = (*MODEL, *TP2, *PP2, "--zero", "3", "--save-every", "4", "--dropout", "0.1")
    whole = job.train("whole", *arguments, launcher="torchrun", ranks=4)
    job.kill_at("killed", 6, *arguments, saved=4, launcher="torchrun", ranks=4)
    resumed = job.train("killed", *arguments, launcher="torchrun", ranks=4)
    assert "resumed   from" in (job.root / "killed" / "train.log").read_text()
    keys = ("step", "loss", "grad_norm", "learning_rate", "tokens", "eval_loss")
    pairs = [[[line.get(key) for key in keys] for line in pair] for pair in zip(resumed, whole, strict=True)]
    assert [pair for pair in pairs if pair[0] != pair[1]] == []  # all of them, if there are: where it began, and how far


def test_resumed_in_other_layouts(job, one_rank):
    """Saved by a pipeline of tensor-parallel stages, continued by one rank, and that by context parallel ones."""
    first = (*MODEL, *TP2, *PP2, "--zero", "1", "--save-every", "3")
    job.kill_at("moved", 5, *first, saved=3, launcher="deepspeed", ranks=4)
    job.kill_at("moved", 8, *MODEL, "--zero", "0", "--save-every", "3", saved=6)
    last = (*MODEL, "--parallel.context", "2", *PP2, "--zero", "3")
    assert_same_curve(job.train("moved", *last, launcher="deepspeed", ranks=4), one_rank[""], RELATIVE)


@pytest.mark.parametrize(
    ("parts", "ranks", "arguments"),
    [
        (["parallel.tensor (2) x parallel.pipeline (2) does not divide 2 ranks", "start 4"], 2, (*TP2, *PP2)),
        (["parallel.virtual = 2 takes micro-batches in rounds of parallel.pipeline = 2", "give it 2 or 4"], 2,
         (*PP2, "--parallel.virtual", "2", "--num-layers", "4", "--gradient-accumulation-steps", "3",
          "--global-batch-size", "6")),
        (["parallel.layers = [1, 2] is 3 layers in all", "model.num_layers = 2"], 2, (*PP2, "--parallel.layers", "1", "2")),
    ],
)  # fmt: skip
def test_illegal_layouts_end_at_once_in_one_line(job, parts, ranks, arguments):
    finished = job.run("illegal", *arguments, launcher="torchrun", ranks=ranks, timeout=60)
    assert finished.code != 0
    lines = [line for line in finished.errors.splitlines() if "parallel." in line]
    assert len(lines) == 1, finished.errors
    assert all(part in lines[0] for part in parts), lines[0]
    assert "megalite/errors.py" not in finished.errors  # no traceback of ours; torchrun has one of its own
