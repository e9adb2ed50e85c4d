"""A tokenizer, a checkpoint, a folder to work in and text to train on, for the tests that need one."""

import random
import shutil
from copy import copy
from pathlib import Path

import pytest
import torch

from megalite.data import lanes, streaming
from megalite.data.encoders import open_encoder
from megalite.data.indexed import token_dtype
from megalite.data.tokenizer import Tokenizer, train_tokenizer
from tests.unit.checkpoint_files import MODEL, write_checkpoint
from tests.unit.token_files import WORDS, write_jsonl


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


@pytest.fixture(scope="module")
def encoder(tokenizer_dir):
    tokenizer = Tokenizer(tokenizer_dir)
    return open_encoder(tokenizer, "tokenizers", token_dtype(tokenizer.vocab_size))


@pytest.fixture
def opened_once(monkeypatch, encoder):
    """Opening an encoder checks it, which takes longer than most of these tests."""
    for module in (lanes, streaming):
        monkeypatch.setattr(module, "open_encoder", lambda *_: copy(encoder))


@pytest.fixture
def few_lanes(monkeypatch):
    monkeypatch.setattr(streaming, "LANES", 12)


@pytest.fixture
def corpus(few_lanes):
    rng = random.Random(1)  # numbers: no window is like another
    write_jsonl("a.jsonl", [str(rng.randrange(10 ** rng.randrange(1, 200))) for _ in range(200)])
    return ["a.jsonl"]
