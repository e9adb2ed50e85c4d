"""Documents to tokenize, in the working folder, and what came of them."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from megalite.data import journal
from megalite.data.indexed import IndexedDataset
from megalite.data.tokenize import build_indexed
from megalite.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "<|endoftext|>",
    "naïve",
    "日本語",
    "👩\u200d👧",
    "\t\r\n\n",
    "",
    "don't\x00",
    "é",
]
PAIR = ["x.bin", "x.idx", "x.manifest.json"]


def write_jsonl(path, texts):
    Path(path).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def random_documents(count, seed):
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randrange(0, 80))) for _ in range(count)]


def documents_of(prefix):
    data = IndexedDataset(prefix)
    ends = data.sequence_lengths.cumsum().tolist()
    assert data.document_starts.tolist() == list(range(len(ends) + 1))
    starts = [0, *ends[:-1]] if ends else []
    return [data.tokens[start:end].tolist() for start, end in zip(starts, ends, strict=True)]


def build(tokenizer_dir, inputs, prefix="out/x", **options):
    return build_indexed(inputs, tokenizer_dir, prefix, **{"workers": 1, "progress": False} | options)


def refused(message, *arguments, **options):
    """`build` raises a `UserError` of one line that holds `message`, and leaves no file."""
    with pytest.raises(UserError) as caught:
        build(*arguments, **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert files_in() == []


def small_tasks(monkeypatch, size):
    """Cut inputs into tasks of `size` bytes."""
    monkeypatch.setattr(journal, "PIECE_BYTES", size)


def tool(*arguments, **options):
    """Start tools/preprocess_data.py."""
    command = [sys.executable, str(ROOT / "tools/preprocess_data.py"), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def files_in(folder="out"):
    return sorted(os.listdir(folder)) if os.path.isdir(folder) else []
