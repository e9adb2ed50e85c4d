"""A two-node SLURM on this machine: cluster.sh makes it; here it is waited for, given commands and taken down."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.dist.conftest import REPOSITORY, Finished, environment
from tests.dist.conftest import job as job  # the fixture

NAMESPACES = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
PROBE = "ip link add name bridge type bridge && ip link add name left type veth peer name right"


def why_not() -> str | None:
    """Why this machine cannot have a SLURM of its own; None where it can."""
    if os.geteuid() != 0:
        return "a SLURM of two nodes on one machine needs root, for their namespaces"
    missing = [name for name in ("slurmctld", "slurmd", "srun", "munged", "ip") if not shutil.which(name)]
    if missing:
        return f"no {', '.join(missing)}: apt-get install -y --no-install-recommends slurm-wlm munge iproute2"
    probe = subprocess.run([*NAMESPACES, "sh", "-c", PROBE], capture_output=True, text=True, timeout=30)
    if probe.returncode:
        return f"this machine gives no namespaces with networks: {probe.stderr.strip()}"
    return None


@dataclass
class Cluster:
    """The running cluster; `controller` is the first process of its controller, which is also the login node."""

    folder: Path
    controller: int

    def login(self, *command: str, timeout: float = 60, **variables: str) -> Finished:
        """Run a command as on the login node, in the repository's root."""
        enter = ["nsenter", f"--target={self.controller}", "--net", "--uts", "--mount", "--pid", "--"]
        done = subprocess.run(
            [*enter, "env", f"--chdir={REPOSITORY}", *command],
            env=environment() | {"SLURM_CONF": str(self.folder / "slurm.conf"), "PYTHON": sys.executable} | variables,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        return Finished(done.returncode, done.stdout, done.stderr)

    def submit(self, log: Path, *arguments: str) -> str:
        """sbatch tools/slurm/train.sbatch on two nodes with two tasks each; returns the job's number."""
        layout = ["--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=0"]
        done = self.login("sbatch", "--parsable", *layout, f"--output={log}", "tools/slurm/train.sbatch", *arguments)
        assert done.code == 0, done.errors
        return done.output.strip()

    def job(self, number: str) -> dict[str, str]:
        """What SLURM says of a job: JobState, ExitCode, Restarts, ..."""
        shown = self.login("scontrol", "--oneliner", "show", "job", number)
        assert shown.code == 0, shown.errors
        return dict(field.split("=", 1) for field in shown.output.split() if "=" in field)

    def wait(self, number: str, log: Path, timeout: float) -> Finished:
        """Until the job has ended; what it wrote, and the code that it ended with."""
        deadline = time.monotonic() + timeout
        while (job := self.job(number))["JobState"] in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"):
            assert time.monotonic() < deadline, f"{job}\n{log.read_text() if log.exists() else 'no log'}"
            time.sleep(0.1)
        code, _, signal = job["ExitCode"].partition(":")
        return Finished(int(code) or -int(signal), log.read_text(), "")

    def ranks(self) -> dict[int, psutil.Process]:
        """The processes of the tasks that run now, by rank; not their children."""
        found = {}
        for process in psutil.Process(self.controller).children(recursive=True):
            try:
                if process.parent().name() == "slurmstepd" and "SLURM_STEP_ID" in (said := process.environ()):
                    found[int(said["SLURM_PROCID"])] = process
            except (psutil.NoSuchProcess, AttributeError):
                continue
        return found


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := why_not():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("slurm")
    # Whatever ends this process ends the cluster: the kernel kills unshare with it, and unshare's child with unshare.
    start = ["setpriv", "--pdeathsig", "KILL", *NAMESPACES, str(Path(__file__).parent / "cluster.sh"), str(folder)]
    with open(folder / "cluster.out", "w") as out:
        process = subprocess.Popen(start, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    try:
        deadline = time.monotonic() + 60
        while not (folder / "ready").exists():
            assert process.poll() is None, logs(folder)
            assert time.monotonic() < deadline, logs(folder)
            time.sleep(0.05)
        yield Cluster(folder, psutil.Process(process.pid).children()[0].pid)
    finally:
        below = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.kill()
        process.wait()
        _, left = psutil.wait_procs(below, timeout=10)
        assert not left, f"outlived the cluster: {left}"


def logs(folder: Path) -> str:
    files = sorted([*folder.glob("*.log"), *folder.glob("*.out")])
    return "the cluster does not start\n" + "\n".join(f"--- {file.name}\n{file.read_text()[-2000:]}" for file in files)
