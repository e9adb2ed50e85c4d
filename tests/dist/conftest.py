"""A tiny real job for tests of the whole program: PyYAML's source, tokenized, and a command to train on it."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml

from megalite.data.tokenize import build_indexed
from megalite.data.tokenizer import train_tokenizer

REPOSITORY = Path(__file__).resolve().parents[2]
PRETRAIN = REPOSITORY / "megalite" / "pretrain.py"
CONFIG = """
model: {vocab_size: 512, hidden_size: 32, num_layers: 2, num_heads: 4, num_kv_heads: 2, intermediate_size: 96,
        n_positions: 32}
data: {block_size: 32}
training: {precision: fp32, per_device_train_batch_size: 2, global_batch_size: 8, max_steps: 10, learning_rate: 0.005,
           warmup_steps: 3, eval_sequences: 10}
logging: {tensorboard: false, log_every: 1}
"""


@dataclass
class Finished:
    """How a command ended."""

    code: int
    output: str
    errors: str


@dataclass
class Job:
    """The tiny job's files; each run gets its own folders under `root`."""

    root: Path
    text: Path
    tokenizer: Path
    config: Path
    accelerator: str = "cpu"

    def command(self, name: str, *arguments: str, launcher: str = "python", ranks: int = 1) -> list[str]:
        prefix = self.root / "data"
        own = ["--config", str(self.config), "--tokenizer-dir", str(self.tokenizer)]
        own += ["--train-files", f"{prefix}-train", "--eval-files", f"{prefix}-validation"]
        own += ["--output-dir", str(self.root / name / "checkpoints"), "--run-dir", str(self.root / name)]
        starters = {
            "python": [sys.executable],
            "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"],
            "deepspeed": [
                str(Path(sys.executable).parent / "deepspeed"),
                "--quiet",
                f"--num_gpus={ranks}",
                f"--master_port={free_port()}",
            ],
        }
        return [*starters[launcher], str(PRETRAIN), *own, *arguments]

    def run(self, name: str, *arguments: str, timeout: float = 180, **options) -> Finished:
        """Train to the end, or to an error."""
        return run(self.command(name, *arguments, **options), timeout, self.accelerator)

    def train(self, name: str, *arguments: str, **options) -> list[dict]:
        """Train, which has to succeed; returns the lines of metrics.jsonl."""
        finished = self.run(name, *arguments, **options)
        assert finished.code == 0, finished.output + finished.errors
        return self.metrics(name)

    def metrics(self, name: str) -> list[dict]:
        path = self.root / name / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def kill_at(self, name: str, step: int, *arguments: str, saved: int, **options) -> None:
        """Start a run, and kill -9 all of its processes once it has logged `step` and its checkpoint of step `saved`,
        which is written beside training, is there."""
        process = subprocess.Popen(
            self.command(name, *arguments, **options),
            env=environment(self.accelerator),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + 120
            path, checkpoint = self.root / name / "metrics.jsonl", self.root / name / "checkpoints" / f"step-{saved}"
            while not path.exists() or path.read_bytes().count(b"\n") < step or not checkpoint.exists():
                assert process.poll() is None, f"the run ended by itself with {process.returncode}"
                assert time.monotonic() < deadline, "the run does not get there"
                time.sleep(0.02)
        finally:
            kill_all(process.pid)
            process.wait()


def kill_all(launcher: int) -> None:
    """kill -9 a launcher and every process below it: its ranks may be in sessions of their own."""
    process = psutil.Process(launcher)
    for each in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()


def run(command: list[str], timeout: float = 180, accelerator: str = "cpu") -> Finished:
    done = subprocess.run(command, env=environment(accelerator), capture_output=True, text=True, timeout=timeout)
    return Finished(done.returncode, done.stdout, done.stderr)


def environment(accelerator: str = "cpu") -> dict[str, str]:
    """No launcher's variables of an outer run, kernels as a user gets them, and one thread a rank."""
    dropped = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TRITON_INTERPRET")
    kept = {key: value for key, value in os.environ.items() if key not in dropped}
    return kept | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": accelerator}


def interruptible() -> None:
    """For preexec_fn: SIGINT and SIGQUIT end the process, which those that run in the background ignore."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    root = tmp_path_factory.mktemp("job")
    # Of a pinned package: the standard library's text, and with it every loss, differs from one Python to the next.
    sources = [Path(yaml.__file__).parent / f"{name}.py" for name in ("constructor", "emitter", "parser", "scanner")]
    documents = [part for source in sources for part in source.read_text().split("\n    def ") if part.strip()]
    text = root / "text.jsonl"
    text.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    train_tokenizer([str(text)], 512, root / "tokenizer")
    build_indexed([str(text)], root / "tokenizer", root / "data", split="95,5", progress=False)
    config = root / "tiny.yaml"
    config.write_text(CONFIG)
    return Job(root, text, root / "tokenizer", config)
