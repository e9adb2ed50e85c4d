"""tools/generate.py: its output, and what it says of wrong options and broken checkpoints."""

import io
import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megalite.data.tokenizer import Tokenizer
from tests.unit.checkpoint_files import edit_json, write_json, write_manifest

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs tools/generate.py in this process: arguments -> (exit code, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "path", list(sys.path))  # the script sets sys.path[0]
        monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, arguments)])
        stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        monkeypatch.setattr(sys, "stdout", stdout)
        with pytest.raises(SystemExit) as exit_:
            runpy.run_path(str(ROOT / "tools/generate.py"), run_name="__main__")
        return exit_.value.code, stdout.buffer.getvalue().decode(), capsys.readouterr().err

    return run


def test_command(command, original):
    folder, _ = original
    options = ("--max-new-tokens", 12, "--temperature", 3, "--ignore-eod", "--checkpoint", folder.parent, "--seed", 5)
    code, out, err = command(*options, "--json", "--prompt", "def ", "é", "--prompt", "")
    assert (code, err) == (0, "")
    records = [json.loads(line) for line in out.splitlines()]
    assert [record["prompt"] for record in records] == ["def ", "é", ""]
    tokenizer = Tokenizer(folder / "tokenizer")
    for record in records:
        assert record["finish_reason"] == "length"
        assert len(record["tokens"]) == 12
        assert record["text"] == tokenizer.decode(record["tokens"])
    # The same texts streamed, at once, and in another order.
    want = "\n".join(f"{record['prompt']}{record['text']}\n" for record in records)
    assert command(*options, "--prompt", "def ", "é", "") == (0, want, "")
    assert command(*options, "--prompt", "def ", "é", "", "--no-stream") == (0, want, "")
    code, out, _ = command(*options, "--json", "--num-samples", 2, "--prompt", "é", "def ")
    again = [json.loads(line) for line in out.splitlines()]
    assert (again[0], again[2]) == (records[1], records[0])
    assert again[1] != again[0]


def test_command_says_that_the_limit_is_reached(command, original):
    code, out, err = command("--checkpoint", original[0], "--prompt", "def ", "--max-new-tokens", 100, "--ignore-eod")
    assert code == 0
    assert out.startswith("def ")
    assert len(err.splitlines()) == 1
    assert "of 100 new tokens" in err
    assert "model.n_positions = 64" in err


def one_line(result, words, code=1):
    got, out, err = result
    assert (got, out) == (code, ""), err
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1, err
    assert words in err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--temperature", "-1"], "temperature -1"),
        (["--temperature", "nan"], "temperature nan"),
        (["--temperature", "inf"], "temperature inf"),
        (["--temperature", "1e-30"], "temperature 1e-30"),
        (["--top-k", "-1"], "top-k -1"),
        (["--top-p", "0"], "top-p 0"),
        (["--top-p", "1.5"], "top-p 1.5"),
        (["--top-p", "nan"], "top-p nan"),
        (["--temperature", "0", "--num-samples", "2"], "--num-samples"),
        (["--prompt", "\x00" * 64], "has 65 tokens, but the model's limit is model.n_positions = 64"),
        (["--prompt", "a\udcff"], "is not valid UTF-8"),
    ],
)
def test_wrong_options(command, original, options, words):
    one_line(command("--checkpoint", original[0], "--prompt", "a", *options), words)


def test_no_gpu(command, original, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    one_line(command("--checkpoint", original[0], "--prompt", "a", "--device", "cuda"), "torch finds no GPU")


def truncate(path, keep=1000):
    path.write_bytes(path.read_bytes()[:keep])


MODEL_FILE, FIRST = "model-00001-of-00002.safetensors", "embedding.weight"
DAMAGE = {
    "no folder": (shutil.rmtree, "there is no checkpoint"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "there is no checkpoint"),
    "manifest cut": (lambda f: truncate(f / "manifest.json", 50), "manifest.json is not JSON"),
    "manifest of bytes": (lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe\x00"), "manifest.json is not JSON"),
    "manifest nested": (lambda f: (f / "manifest.json").write_text("[" * 10**6), "manifest.json is not JSON"),
    "manifest a list": (lambda f: write_json(f / "manifest.json", [1]), "manifest.json is not a JSON object"),
    "manifest of another": (lambda f: write_manifest(f, format="x"), "is not a MegaLite checkpoint's"),
    "newer": (lambda f: write_manifest(f, version=2), "checkpoint format 2, this version reads 1"),
    "files a list": (lambda f: write_manifest(f, files=["x"]), "does not give the size and SHA-256"),
    "files without size": (lambda f: write_manifest(f, files={"x": {}}), "does not give the size and SHA-256"),
    "outside": (
        lambda f: write_manifest(f, files={"../x": {"bytes": 0, "sha256": ""}}),
        "names a file outside its folder: ../x",
    ),
    "absolute": (
        lambda f: write_manifest(f, files={"/etc/passwd": {"bytes": 0, "sha256": ""}}),
        "names a file outside its folder: /etc/passwd",
    ),
    "null byte": (lambda f: write_manifest(f, files={"a\0": {"bytes": 0, "sha256": ""}}), "has no bytes"),
    "weights cut": (lambda f: truncate(f / MODEL_FILE), f"{MODEL_FILE} has 1000 bytes, the manifest"),
    "weights cut before": (lambda f: (truncate(f / MODEL_FILE), write_manifest(f)), f"{MODEL_FILE} cannot give"),
    "weights empty": (lambda f: (truncate(f / MODEL_FILE, 0), write_manifest(f)), f"{MODEL_FILE} cannot give"),
    "weights a link": (
        lambda f: (shutil.move(f / MODEL_FILE, f.parent / "x"), (f / MODEL_FILE).symlink_to(f.parent / "x")),
        f"{MODEL_FILE} has no bytes",
    ),
    "index elsewhere": (
        lambda f: (edit_json(f / "index.json", lambda c: c[FIRST].__setitem__(1, "../x")), write_manifest(f)),
        "names ../x, which the manifest does not",
    ),
    "index without shape": (
        lambda f: (edit_json(f / "index.json", lambda c: c.update(x=[1, 2, 3])), write_manifest(f)),
        "index.json does not give the shape",
    ),
    "index of another model": (
        lambda f: (edit_json(f / "index.json", lambda c: c.pop(FIRST)), write_manifest(f)),
        "not a checkpoint of this model: embedding.weight is missing",
    ),
    "other tensor than the index says": (
        lambda f: (save_other(f / MODEL_FILE), write_manifest(f)),
        "embedding.weight is [2, 3]",
    ),
    "config without model": (
        lambda f: (write_json(f / "config.json", {}), write_manifest(f)),
        "config.json has no model",
    ),
    "config of a newer model": (
        lambda f: (edit_json(f / "config.json", lambda c: c["model"].update(new=1)), write_manifest(f)),
        "(model.new: Extra inputs are not permitted)",
    ),
    "tokenizer gone": (lambda f: shutil.rmtree(f / "tokenizer"), "tokenizer.json has no bytes"),
    "without tokenizer": (
        lambda f: (shutil.rmtree(f / "tokenizer"), write_manifest(f)),
        "holds no tokenizer",
    ),
    "tokenizer broken": (
        lambda f: (truncate(f / "tokenizer/tokenizer.json"), write_manifest(f)),
        "tokenizer.json is not a tokenizer",
    ),
    "tokenizer of another": (
        lambda f: (edit_json(f / "config.json", lambda c: c["model"].update(vocab_size=279)), write_manifest(f)),
        "its tokenizer has 280 ids, but its model.vocab_size is 279",
    ),
}


def save_other(path):
    save_file(load_file(path) | {FIRST: torch.zeros(2, 3)}, path)


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint(command, checkpoint_copy, damage):
    spoil, words = DAMAGE[damage]
    spoil(checkpoint_copy)
    one_line(command("--checkpoint", checkpoint_copy, "--prompt", "a"), words)


def test_latest_that_is_no_text(command, checkpoint_copy):
    (checkpoint_copy.parent / "latest").write_bytes(b"\xff\xff")
    assert command("--checkpoint", checkpoint_copy.parent, "--prompt", "a", "--max-new-tokens", 1)[0] == 0


def test_process(original):
    """As its own process: neither DeepSpeed nor the engine is loaded, and a reader that goes away is no error."""
    code = (
        "import sys, megalite.generation; print(sorted({'deepspeed', 'megalite.training.engine'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("[]\n", "")
    command = [sys.executable, ROOT / "tools/generate.py", "--checkpoint", original[0], "--prompt", "a", "--ignore-eod"]
    with subprocess.Popen(
        [*command, "--max-new-tokens", "20"], cwd="/", stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1
