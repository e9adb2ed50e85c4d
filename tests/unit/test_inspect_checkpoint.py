"""tools/inspect_checkpoint.py: what it shows, verifies and compares."""

import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from megalite.errors import run_main
from tests.unit.checkpoint_files import write_manifest
from tools import inspect_checkpoint

MODEL_FILE = "model-00001-of-00002.safetensors"
NAME = "embedding.weight"


@pytest.fixture
def command(capsys, monkeypatch):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["inspect_checkpoint.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            run_main(inspect_checkpoint.main)
        said = capsys.readouterr()
        return stop.value.code, said.out, said.err

    return run


def change(folder, value):
    tensors = load_file(folder / MODEL_FILE)
    tensors[NAME].view(-1)[:2] = value
    save_file(tensors, folder / MODEL_FILE)
    write_manifest(folder)


def test_it_shows_every_tensor(command, original):
    folder, stage = original
    code, out, _ = command(folder.parent, "--verify")
    assert code == 0
    norm = torch.linalg.vector_norm(stage.embedding.weight.detach(), dtype=torch.float64).item()
    for words in (
        f"{sum(p.numel() for p in stage.parameters()):,} parameters",
        "step 1, of which 1 were applied; 0 tokens; next is sample 8",
        "have the size and SHA-256",
        "384 x 32",
        f"norm {norm:.6g}",
        "all numbers are finite",
    ):
        assert words in out
    assert all(parameter.global_name in out for parameter in stage.parameters())
    assert out.count("exp_avg_sq") == len(list(stage.parameters()))
    assert NAME not in command(folder, "--only", "blocks.0.")[1]


def test_numbers_that_are_lost_are_counted(command, checkpoint_copy):
    change(checkpoint_copy, torch.tensor([torch.nan, torch.inf]))
    code, out, _ = command(checkpoint_copy)
    assert code == 1
    assert "2 of 12,288 not finite (1 NaN)" in out
    assert "2 numbers are not finite" in out


def test_diff(command, original, checkpoint_copy):
    code, out, _ = command("--diff", original[0], checkpoint_copy)
    assert code == 0
    assert "are the same to the bit" in out
    weight = load_file(checkpoint_copy / MODEL_FILE)[NAME].view(-1)[:2]
    change(checkpoint_copy, weight + torch.tensor([0.0, 0.25]))
    code, out, _ = command("--diff", original[0], checkpoint_copy)
    assert code == 1
    assert [line.split()[0] for line in out.splitlines() if "relative" in line] == [NAME]
    assert "largest 0.25" in out
    assert "1 of " in out.splitlines()[-1]


def test_what_it_refuses(command, original, checkpoint_copy, tmp_path):
    path = checkpoint_copy / MODEL_FILE
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    shutil.copytree(original[0], tmp_path / "whole")
    for arguments, words in (
        ((checkpoint_copy, "--verify"), f"{MODEL_FILE} has another content"),
        ((tmp_path / "nowhere",), "there is no checkpoint"),
        ((), "give one checkpoint, or --diff and two"),
        ((original[0], tmp_path), "give one checkpoint, or --diff and two"),
        ((original[0], "--only", "nothing"), "no parameter has 'nothing' in its name"),
    ):
        code, _, err = command(*arguments)
        assert code == 1
        assert len(err.splitlines()) == 1
        assert words in err
