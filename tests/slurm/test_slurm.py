"""Training under SLURM: two nodes against one, a rank that dies, mistakes, and the batch script's own refusals."""

import os
import re
import shutil
import subprocess
import sys
import time

import pytest

from tests.dist.conftest import REPOSITORY

SCRIPT = REPOSITORY / "tools" / "slurm" / "train.sbatch"


def arguments(job, name: str, *more: str) -> list[str]:
    """pretrain.py's: configs/small.yaml on the tiny job's data, the same 8 sequences a step in every layout."""
    own = job.command(name)[2:]
    own[own.index("--config") + 1] = "configs/small.yaml"
    step = ["--vocab-size", "512", "--per-device-train-batch-size", "2", "--global-batch-size", "8"]
    steps = ["--max-steps", "4", "--warmup-steps", "2", "--eval-sequences", "4"]
    return [*own, *step, *steps, "--tensorboard", "false", "--log-every", "1", *more]


@pytest.mark.slurm
def test_two_nodes_train_as_one(cluster, job, tmp_path):
    job.train("one-rank", *arguments(job, "one-rank"))
    job.train("one-node", *arguments(job, "one-node", "--parallel.tensor", "2"), launcher="torchrun", ranks=4)
    log = tmp_path / "log"
    number = cluster.submit(log, *arguments(job, "two-nodes", "--parallel.tensor", "2"))
    finished = cluster.wait(number, log, timeout=300)
    assert finished.code == 0, finished.output
    assert "they meet at n1:" in finished.output
    assert "data 2, tensor 2, pipeline 1" in finished.output
    one_rank, one_node, two_nodes = (job.metrics(name) for name in ("one-rank", "one-node", "two-nodes"))
    assert len(one_rank) == 4
    losses, norms = ([line[key] for line in one_node] for key in ("loss", "grad_norm"))
    assert losses == pytest.approx([line["loss"] for line in one_rank], rel=1e-5, abs=0)
    # The same sums in the same order: no more than where the ranks stand has changed.
    assert [line["loss"] for line in two_nodes] == pytest.approx(losses, rel=1e-6, abs=0)
    assert [line["grad_norm"] for line in two_nodes] == pytest.approx(norms, rel=1e-6, abs=0)


@pytest.mark.slurm
def test_a_killed_rank_ends_the_job(cluster, job, tmp_path):
    log = tmp_path / "log"
    number = cluster.submit(log, *arguments(job, "killed", "--max-steps", "10000"))
    deadline = time.monotonic() + 120
    while not job.metrics("killed"):
        assert cluster.job(number)["JobState"] in ("PENDING", "RUNNING"), log.read_text()
        assert time.monotonic() < deadline, "the run does not get there"
        time.sleep(0.1)
    ranks = cluster.ranks()
    assert sorted(ranks) == [0, 1, 2, 3]
    ranks[1].suspend()  # and a rank that notices nothing does not hold the others
    ranks[2].kill()
    finished = cluster.wait(number, log, timeout=25)
    assert finished.code != 0
    assert "task 2: Killed" in finished.output
    assert not cluster.ranks()


@pytest.mark.slurm
def test_a_mistake_ends_the_job_with_one_line_a_rank(cluster, job, tmp_path):
    number = cluster.submit(tmp_path / "log", *arguments(job, "mistake", "--model.hidden_size", "250"))
    finished = cluster.wait(number, tmp_path / "log", timeout=60)
    # The first rank to say so ends the others, some of them perhaps before they do.
    assert finished.code in (78, 128 + 15), finished.output
    assert "Exited with exit code 78" in finished.output
    lines = [line for line in finished.output.splitlines() if re.match(r"\d: ", line) and "slurmstepd" not in line]
    message = "model.hidden_size = 250 is not divisible by model.num_heads = 4"
    assert 1 <= sum(message in line for line in lines) <= 4, finished.output
    assert all("error: " in line for line in lines), finished.output


MEET = """
import os, sys, torch, torch.distributed as dist
from megalite.topology import LaunchEnvironment
here = LaunchEnvironment.read()
dist.init_process_group("gloo")
total = torch.ones(1)
dist.all_reduce(total)
print(here.rank, here.local_rank, here.world_size, os.environ["MASTER_ADDR"], os.uname().nodename, int(total))
sys.stdout.flush()
os._exit(0)  # as pretrain.py: process groups' threads were seen to abort an interpreter that ends
"""


@pytest.mark.slurm
def test_srun_by_hand_needs_no_variables(cluster):
    done = cluster.login("srun", "--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=2", sys.executable, "-c", MEET)
    assert done.code == 0, done.errors
    assert sorted(done.output.splitlines()) == ["0 0 4 n1 n1 4", "1 1 4 n1 n1 4", "2 0 4 n1 n2 4", "3 1 4 n1 n2 4"]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "this is a batch script: sbatch tools/slurm/train.sbatch --config ..."),
        ({"SLURM_JOB_ID": "1", "PYTHON": "no-python"}, f"there is no no-python in {REPOSITORY}: run make demo there"),
        (
            {"SLURM_JOB_ID": "1", "SLURM_NTASKS_PER_NODE": "8", "SLURM_GPUS_PER_NODE": "h100:4"},
            "8 tasks for 4 GPUs a node: sbatch --ntasks-per-node 4 --gpus-per-node 4",
        ),
        (
            {"SLURM_JOB_ID": "1", "SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_NODELIST": "x[1-2]", "PATH": "no-scontrol"},
            "scontrol finds no host in SLURM_JOB_NODELIST=x[1-2]",
        ),
    ],
)
def test_the_script_refuses_what_cannot_work(variables, message):
    kept = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    done = subprocess.run(
        [shutil.which("bash"), SCRIPT],
        cwd=REPOSITORY,
        env=kept | {"PYTHON": sys.executable} | variables,
        capture_output=True,
        text=True,
        timeout=10,
    )
    assert done.returncode == 78, done.stderr
    assert f"error: {message}" in done.stderr


def test_the_script_runs_in_the_repository_alone(tmp_path):
    variables = os.environ | {"SLURM_JOB_ID": "1"}
    done = subprocess.run(["bash", SCRIPT], cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=10)
    assert done.returncode == 78
    assert done.stderr == f"error: {tmp_path} is not the repository's root: submit from there\n"
