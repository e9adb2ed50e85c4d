"""A tokenizer, a checkpoint and a folder to work in, for the tests that need one."""

import shutil
from pathlib import Path

import pytest
import torch

from megalite.data.tokenizer import train_tokenizer
from tests.unit.checkpoint_files import MODEL, write_checkpoint
from tests.unit.token_files import WORDS


@pytest.fixture(scope="module")
def one_thread():
    """So small a model gains nothing from more, and threads that wait for each other are slow on busy cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory):
    """Byte-level BPE of 280 ids, in which most emoji take several tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "text.txt").write_text(" ".join(WORDS) * 20, encoding="utf-8")
    train_tokenizer([str(folder / "text.txt")], 280, folder / "out")
    return folder / "out"


@pytest.fixture(scope="session")
def original(tmp_path_factory, tokenizer_dir):
    """A checkpoint's folder, and the model in it: not to be changed."""
    folder = tmp_path_factory.mktemp("run") / "step-1"
    return folder, write_checkpoint(folder, MODEL, tokenizer_dir)


@pytest.fixture
def checkpoint_copy(original, tmp_path):
    """A copy of the checkpoint to spoil."""
    return Path(shutil.copytree(original[0], tmp_path / "step-1"))
