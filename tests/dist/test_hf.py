"""Trained here, exported, and trained on by the Hugging Face Trainer; and back: the loss goes on where it was."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

from megalite.data.dataset import WindowDataset
from tests.dist.conftest import REPOSITORY, Job, run

pytestmark = pytest.mark.dist
BLOCK = 32  # tokens in a sequence of the tiny job


@pytest.fixture(scope="module")
def exported(job: Job) -> tuple[Path, float]:
    """An export of a run at tp 2, pp 2 with its vocabulary padded, and the run's last validation loss."""
    options = ["--parallel.tensor", "2", "--parallel.pipeline", "2", "--vocab-multiple", "96"]
    options += ["--tie-embeddings", "false", "--max-steps", "4", "--eval-sequences", "1000"]
    records = job.train("hf", *options, launcher="torchrun", ranks=4)
    output = job.root / "hf" / "export"
    command = [str(REPOSITORY / "tools/export_hf.py"), "--checkpoint", str(job.root / "hf" / "checkpoints")]
    done = run([sys.executable, *command, "--output", str(output), "--verify"])
    assert done.code == 0, done.errors
    assert "verified: transformers" in done.output or not importlib.util.find_spec("transformers")
    return output, records[-1]["eval_loss"]


@pytest.mark.skipif(not importlib.util.find_spec("accelerate"), reason="the Trainer needs accelerate")
def test_their_trainer_goes_on_at_the_same_loss(job, exported, tmp_path):
    """The recipe of docs/huggingface.md, as it stands there."""
    folder, loss = exported
    script, text = tmp_path / "train_hf.py", (REPOSITORY / "docs/huggingface.md").read_text()
    script.write_text(re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1))
    prefix = f"{job.root / 'data'}-validation"
    every = len(WindowDataset([prefix], BLOCK))  # in each batch, whose order does not matter then
    arguments = [str(folder), prefix, str(BLOCK), "--output_dir", str(tmp_path / "out"), "--max_steps", "2"]
    arguments += ["--per_device_train_batch_size", str(every), "--learning_rate", "1e-3", "--logging_steps", "1"]
    arguments += ["--report_to", "none", "--save_strategy", "steps", "--save_steps", "2", "--use_cpu", "true"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    done = run([*launch, str(script), *arguments])
    assert done.code == 0, done.errors
    history = json.loads((tmp_path / "out/checkpoint-2/trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert losses[0] == pytest.approx(loss, abs=1e-4)
    assert losses[1] < losses[0]
    assert (tmp_path / "out/model.safetensors").exists()


def test_we_go_on_at_the_same_loss(job, exported):
    """Back in by import_hf.py, and on at another layout; a step that changes nothing, and the loss is what it was."""
    folder, loss = exported
    imported = job.root / "hf" / "imported"
    command = [sys.executable, str(REPOSITORY / "tools/import_hf.py"), "--model", str(folder)]
    done = run([*command, "--output", str(imported)])
    assert done.code == 0, done.errors
    options = ["--init-from", str(imported), "--tie-embeddings", "false", "--zero", "3"]
    options += ["--max-steps", "1", "--warmup-steps", "0", "--learning-rate", "1e-9", "--eval-sequences", "1000"]
    records = job.train("again", *options, launcher="torchrun", ranks=2)
    assert records[-1]["eval_loss"] == pytest.approx(loss, abs=1e-5)
