"""Muon in the whole program: ranks agree, resuming is exact, and what cannot be is refused."""

import pytest

from megalite.training.checkpoint_reader import Checkpoint, find_checkpoint
from tests.dist.test_pretrain import RELATIVE, assert_same_curve

pytestmark = pytest.mark.dist

MUON = ("--optimizer", "muon", "--zero", "0", "--save-every", "4")


@pytest.fixture(scope="module")
def one_rank(job) -> list[dict]:
    return job.train("muon-one", *MUON)


def test_two_ranks_equal_one(job, one_rank):
    # Each of the 5 iterations multiplies the rounding of small singular values by up to 3.4.
    assert_same_curve(job.train("muon-two", *MUON, launcher="deepspeed", ranks=2), one_rank, 10 * RELATIVE)
    assert one_rank[-1]["eval_loss"] < one_rank[0]["loss"] - 0.1


def test_killed_and_resumed_is_the_same_to_the_bit(job, one_rank):
    job.kill_at("muon-killed", 6, *MUON, saved=4)
    resumed = job.train("muon-killed", *MUON)
    assert "resumed   from" in (job.root / "muon-killed" / "train.log").read_text()
    keys = ("step", "loss", "grad_norm", "eval_loss")
    assert [[line.get(key) for key in keys] for line in resumed] == [
        [line.get(key) for key in keys] for line in one_rank
    ]
    ours, whole = (Checkpoint(find_checkpoint(job.root / name / "checkpoints")) for name in ("muon-killed", "muon-one"))
    name = "blocks.1.mlp.gate_up.weight"
    for key, tensor in ours.tensors(name, ("momentum",)).items():
        assert tensor.equal(whole.tensors(name, ("momentum",))[key]), key
        assert tensor.any(), key
    assert ours.state["adam_step"] == 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--optimizer", "muon", "--zero", "1"),
            "error: training.optimizer: muon works on whole matrices, of which ZeRO-1",
        ),
        (("--zero", "0"), "step-10 was trained with muon, not adamw; set it to that, or start afresh with --no-resume"),
    ],
)
def test_refused_in_one_line(job, one_rank, arguments, message):
    finished = job.run("muon-one", *arguments)
    assert finished.code == 78
    assert message in finished.errors
    assert len(finished.errors.splitlines()) == 1
