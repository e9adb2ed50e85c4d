"""Ranks that die or hang: the run ends soon, not with 0, and says which rank, where it was and who waits in what."""

import re
import signal
import subprocess
import sys
import time

import psutil
import pytest

from megalite.training.checkpoint_reader import Checkpoint, find_checkpoint
from tests.dist.conftest import REPOSITORY, environment, free_port, interruptible, kill_all

pytestmark = pytest.mark.dist

# A small job with a fault in step 3 of rank `who`; argv: fault, who, time-out in seconds[, far: each rank on
# its own machine]. Faster than in a real run.
PROGRAM = """
import ctypes, os, signal, sys, time
from datetime import timedelta

import torch
import torch.distributed as dist

from megalite.errors import UserError, run_main
from megalite.topology import LaunchEnvironment, Topology
from megalite.training import watchdog
from megalite.training.watchdog import Watchdog

watchdog.BEAT, watchdog.SILENCE, watchdog.LINGER = 0.25, 2.0, 1.0
fault, who, timeout = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
if "far" in sys.argv:
    watchdog._machine = lambda: os.environ["RANK"]


def raise_(error):
    raise error


FAULTS = {
    "kill": lambda topology: os.kill(os.getpid(), signal.SIGKILL),
    "kill, others compute": lambda topology: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda topology: os.kill(os.getpid(), signal.SIGSTOP),
    "loop": lambda topology: endless_loop(),
    "native": lambda topology: ctypes.PyDLL(None).sleep(1000),  # holds the interpreter's lock
    "error": lambda topology: raise_(ValueError("a planted error")),
    "user": lambda topology: raise_(UserError("the disk is full")),
    "interrupt": lambda topology: os.kill(os.getpid(), signal.SIGINT),
    "other collective": lambda topology: dist.barrier(group=topology.control_group),
    "slow": lambda topology: time.sleep(timeout / 2),
}


def endless_loop():
    while True:
        time.sleep(0.01)


def main():
    topology = Topology(LaunchEnvironment.read(), tensor=2, timeout=timedelta(seconds=100))
    with Watchdog(topology, timedelta(seconds=timeout)) as watching:
        for step in range(1, 5):
            for m in range(2):
                watching.at(f"step {step}, forward of micro-batch {m}")
                dist.all_reduce(torch.ones(4), group=topology.tensor_group)
            time.sleep(0.3)
            if step == 3 and fault == "long":
                time.sleep(2 * timeout)  # all compute, and nobody waits
            elif step == 3 and fault == "unmarked":
                for _ in range(20):  # as a checkpoint's are gathered: rank 0 waits for each, and all get on
                    dist.all_reduce(torch.ones(4), group=topology.tensor_group)
                    time.sleep(topology.rank * timeout / 10)
            elif step == 3 and fault == "together":
                time.sleep(topology.rank)  # one has more to clear up
                raise UserError("the loss is nan").everywhere()
            elif step == 3 and fault == "kill, others compute" and topology.rank != who:
                time.sleep(1000)
            elif step == 3 and topology.rank == who:
                FAULTS[fault](topology)
            watching.at(f"step {step}, optimizer")
            dist.all_reduce(torch.ones(4), group=topology.tensor_group)
    topology.close()


try:
    run_main(main, rank=int(os.environ["RANK"]), local_rank=int(os.environ["LOCAL_RANK"]))
except SystemExit as stop:
    os._exit(stop.code or 0)
"""


def start(tmp_path, *arguments: str) -> tuple[list[int], list[str]]:
    """Run PROGRAM on two ranks without a launcher that would end the other; (exit codes, stderr) of each."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = []
    for rank in ("0", "1"):
        with open(tmp_path / rank, "w") as log:
            own = {"RANK": rank, "LOCAL_RANK": rank, "PYTHONPATH": str(REPOSITORY)}
            command = [sys.executable, str(program), *arguments]
            own_environment = environment() | shared | own
            ranks.append(subprocess.Popen(command, env=own_environment, stderr=log, preexec_fn=interruptible))
    try:
        codes = [process.wait(timeout=100) for process in ranks]
    except subprocess.TimeoutExpired:
        pytest.fail("still running\n" + "\n".join((tmp_path / rank).read_text() for rank in ("0", "1")))
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    return codes, [(tmp_path / rank).read_text() for rank in ("0", "1")]


def one_error(text: str) -> str:
    """The one line of error that is in it. (torch may complain, too, of connections that break.)"""
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, text
    assert "Traceback" not in text
    return lines[0]


RANK = [f"rank {rank} (stage 0, data 0, context 0, tensor {rank})" for rank in (0, 1)]


@pytest.mark.parametrize("who", [0, 1])
def test_killed(tmp_path, who):
    codes, errors = start(tmp_path, "kill", str(who), "30")
    other = 1 - who
    assert codes[who] == -signal.SIGKILL
    assert codes[other] == 70
    line = rf"error: {re.escape(RANK[who])} is gone \(pid .*\): killed, or crashed, last seen at .*"
    assert re.fullmatch(line, one_error(errors[other]))


@pytest.mark.parametrize(
    ("fault", "who", "parts"),
    [
        ("stop", 1, ["hangs: its process is stopped", "rank 0 waits in all_reduce (tensor group)"]),
        # Rank 0 serves the store by which the ranks tell each other.
        ("stop", 0, ["serves the ranks' store and hangs: its process is stopped", "rank 1 waits in all_reduce"]),
        (
            "loop",
            1,
            ["hangs: step 3, forward of micro-batch 1, in no communication", "waits in all_reduce (tensor group) for"],
        ),
        ("native", 1, ["hangs: its process lets no other thread run", "waits in all_reduce (tensor group)"]),
    ],
)
def test_hanging(tmp_path, fault, who, parts):
    codes, errors = start(tmp_path, fault, str(who), "3")
    assert codes[1 - who] == 70
    assert codes[who]
    line = one_error("".join(errors))
    assert line.startswith(f"error: {RANK[who]} ")
    for part in parts:
        assert part in line
    assert "last seen at step" in line or fault == "loop"
    assert re.search(r"^rank +for +doing +in communication$", "".join(errors), re.M)
    # Where in Python it hangs; a stopped process cannot say.
    assert ("in endless_loop" if fault == "loop" else "program.py") in errors[who] or fault == "stop"


def test_waiting_for_each_other(tmp_path):
    codes, errors = start(tmp_path, "other collective", "1", "3")
    assert codes == [70, 70]
    line = one_error("".join(errors))
    assert "the ranks wait for each other: rank 0 waits in all_reduce (tensor group) for rank 1; " in line
    assert "rank 1 waits in barrier (control group) for rank 0" in line


@pytest.mark.parametrize(("fault", "who"), [("kill", 0), ("kill", 1), ("kill, others compute", 0)])
def test_killed_on_another_machine(tmp_path, fault, who):
    """Its process cannot be seen, but it says nothing more; rank 0 takes the store with it, which shows at once."""
    codes, errors = start(tmp_path, fault, str(who), "300", "far")
    other = 1 - who
    assert codes[other] == 70
    line = one_error(errors[other])
    assert line.startswith(f"error: {RANK[who]} ")
    assert "does not answer: it is gone or frozen, or its machine is" in line


@pytest.mark.parametrize("fault", ["slow", "long", "unmarked"])
def test_whoever_gets_on_is_left_alone(tmp_path, fault):
    assert start(tmp_path, fault, "1", "4") == ([0, 0], ["", ""])


@pytest.mark.parametrize(
    ("fault", "codes", "line"),
    [
        ("error", [70, 1], f"error: {RANK[1]} failed at step 3, forward of micro-batch 1: ValueError: a planted error"),
        ("user", [70, 1], "error: rank 1: the disk is full"),
        ("together", [1, 1], "error: the loss is nan"),
        ("interrupt", [70, 130], "interrupted"),
    ],
)
def test_an_error_is_told_by_who_raised_it(tmp_path, fault, codes, line):
    found, errors = start(tmp_path, fault, "1", "30")
    assert found == codes
    text = "".join(errors)
    assert [told for told in text.splitlines() if re.search("error: |interrupted", told)] == [line]
    assert text.count("Traceback") == (fault == "error")


def train_until(job, name: str, step: int, launcher: str, do) -> tuple[int, str, float]:
    """Train on two ranks; once `step` is logged, do(process of rank 1). (exit code, output, seconds from then on)."""
    arguments = ["--max-steps", "100000", "--lr-schedule", "constant", "--save-every", "3"]
    arguments += ["--training.timeout_minutes", "0.1"]
    log, metrics = job.root / f"{name}.log", job.root / name / "metrics.jsonl"
    with open(log, "w") as file:
        process = subprocess.Popen(
            job.command(name, *arguments, launcher=launcher, ranks=2),
            env=environment(),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 120
        while not metrics.exists() or metrics.read_bytes().count(b"\n") < step:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, "the run does not get there"
            time.sleep(0.02)
        do(next(child for child in psutil.Process(process.pid).children(recursive=True) if is_rank(child, 1)))
        began = time.monotonic()
        code = process.wait(timeout=60)
        return code, log.read_text(), time.monotonic() - began
    finally:
        if process.poll() is None:
            kill_all(process.pid)
            process.wait()


def is_rank(process: psutil.Process, rank: int) -> bool:
    return process.environ().get("RANK") == str(rank)


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_a_run_whose_rank_is_killed(job, launcher):
    name = f"killed-rank-{launcher}"
    # The line of step 6 is written once that one is copied, for which the checkpoint of step 3 has to be finished.
    code, output, seconds = train_until(job, name, 6, launcher, lambda rank: rank.kill())
    assert code
    assert seconds < 30
    # The launcher may be the first to see it; it then says so, and ends the ranks that would.
    named = {"deepspeed": r"--local_rank=1.* exits with return code = -9", "torchrun": r"rank +: 1 \(local_rank: 1\)"}
    assert re.search(rf"rank 1 \(stage 0, data 1, .*\) is gone|{named[launcher]}", output), output
    latest = Checkpoint(find_checkpoint(job.root / name / "checkpoints"))
    latest.verify(0, 1)
    assert latest.state["step"] >= 3


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_a_run_whose_rank_is_stopped(job, launcher):
    # Some seconds of training: each second a rank says where it is.
    code, output, seconds = train_until(job, f"stopped-rank-{launcher}", 40, launcher, lambda rank: rank.suspend())
    assert code
    assert seconds < 30
    assert re.search(
        r"error: rank 1 \(stage 0, data 1, .*\) hangs: its process is stopped \(pid .*\), last seen at (step|eval).*;"
        r" rank 0 waits in \w+ \((zero|sum) group\)",
        output,
    ), output
