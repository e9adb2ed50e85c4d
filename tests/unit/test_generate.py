"""Text from a checkpoint: the cache, sampling, streaming, and what the command says of broken input."""

import io
import itertools
import json
import math
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megalite import generation
from megalite.config import ModelConfig
from megalite.data.tokenizer import Tokenizer, train_tokenizer
from megalite.errors import UserError
from megalite.generation import Sampling, TextStream, candidates, choose, encode_prompt, generate, sample_seed
from tests.unit.checkpoint_files import write_checkpoint, write_json, write_manifest

ROOT = Path(__file__).resolve().parents[2]
GREEDY = Sampling(temperature=0)
TEXT = "def café(): return '😀👍🏽 你好'\n"
# Large initial weights, so that an untrained model has strong and varied preferences.
MODEL = ModelConfig(
    vocab_size=300,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    intermediate_size=64,
    n_positions=64,
    qk_norm=True,
    init_std=0.5,
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """So small a model gains nothing from more, and threads that wait for each other are slow on busy cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    """Byte-level BPE in which most emoji take several tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "text.txt").write_text(TEXT * 20, encoding="utf-8")
    train_tokenizer([str(folder / "text.txt")], 280, folder / "out")
    return folder / "out"


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir):
    return Tokenizer(tokenizer_dir)


@pytest.fixture(scope="module")
def original(tmp_path_factory, tokenizer_dir):
    folder = tmp_path_factory.mktemp("run") / "step-1"
    return folder, write_checkpoint(folder, MODEL, tokenizer_dir)


@pytest.fixture
def folder(original, tmp_path):
    """A copy of the checkpoint to spoil."""
    return Path(shutil.copytree(original[0], tmp_path / "step-1"))


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


# --- weights and the cache


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_loaded_model_is_the_saved_one(tmp_path, tokenizer_dir, tie_embeddings):
    model = MODEL.model_copy(update={"tie_embeddings": tie_embeddings})
    saved = write_checkpoint(tmp_path / "run/step-7", model, tokenizer_dir)
    checkpoint, _ = generation.open_checkpoint(tmp_path / "run")
    assert checkpoint.folder == tmp_path / "run/step-7"
    loaded = generation.load_model(checkpoint)
    assert (loaded.head.weight is loaded.embedding.weight) == tie_embeddings
    theirs = saved.state_dict()
    assert theirs.keys() == loaded.state_dict().keys()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in loaded.state_dict().items())
    assert not loaded.training
    assert {p.dtype for p in generation.load_model(checkpoint, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


def test_a_key_renamed_since_the_run_spoils_no_checkpoint(folder):
    config = json.loads((folder / "config.json").read_text())
    config["training"]["of_an_older_version"] = 1
    write_json(folder / "config.json", config)
    write_manifest(folder)
    assert generation.open_checkpoint(folder)[0].model == MODEL


def full_logits(stage, tokens):
    """Logits [s, v] without a cache."""
    with torch.inference_mode():
        return stage(torch.tensor([tokens]))[:, 0]


@pytest.mark.parametrize("prompt_length", [1, 2, 17, 40])
def test_cached_decoding_is_full_recomputation(original, tokenizer, prompt_length):
    stage = original[1]
    prompt = torch.randint(1, 280, (prompt_length,), generator=torch.Generator().manual_seed(prompt_length)).tolist()
    result = generate(stage, tokenizer, prompt, max_new_tokens=20, sampling=GREEDY, ignore_eod=True)
    slow = list(prompt)
    for _ in range(20):
        slow.append(int(full_logits(stage, slow)[-1].argmax()))
    assert result.tokens == slow[prompt_length:]
    assert len(set(result.tokens)) > 3
    assert result.finish_reason == "length"

    caches = generation.new_caches(stage, 64)
    with torch.inference_mode():
        steps = [generation.next_logits(stage, torch.tensor([[token]]), caches) for token in slow]
    torch.testing.assert_close(torch.stack(steps), full_logits(stage, slow), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunks", [(40,), (1, 39), (13, 13, 14), (39, 1), (8, 1, 1, 30)])
def test_prompt_in_chunks(original, chunks):
    stage = original[1]
    tokens = torch.randint(1, 280, (1, 40), generator=torch.Generator().manual_seed(5))
    caches = generation.new_caches(stage, 40)
    with torch.inference_mode():
        parts = [stage(part, caches=caches)[:, 0] for part in tokens.split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat(parts), full_logits(stage, tokens[0].tolist()), rtol=1e-4, atol=1e-4)
    with torch.inference_mode():
        last = generation.next_logits(stage, tokens, generation.new_caches(stage, 40), chunk=max(chunks))
    torch.testing.assert_close(last, parts[-1][-1], rtol=1e-4, atol=1e-4)


def test_bf16(original, tokenizer):
    checkpoint, _ = generation.open_checkpoint(original[0])
    stage = generation.load_model(checkpoint, dtype=torch.bfloat16)
    result = generate(stage, tokenizer, [1, 2, 3], max_new_tokens=9, sampling=Sampling(), ignore_eod=True)
    assert len(result.tokens) == 9


# --- sampling


def test_padding_is_never_drawn(original, tokenizer):
    stage = original[1]
    assert stage.model.padded_vocab_size == 384
    logits = full_logits(stage, [5])[-1]
    assert len(logits) == 384
    ids, probabilities = candidates(logits, Sampling(temperature=1e6))
    assert ids.tolist() == list(range(300))
    torch.testing.assert_close(probabilities, torch.full((300,), 1 / 300), rtol=1e-3, atol=0)
    generator = torch.Generator().manual_seed(0)
    drawn = {choose(logits, Sampling(temperature=100), generator) for _ in range(4000)}
    assert max(drawn) == 299
    assert len(drawn) > 280
    # ... nor where there is nothing else to fill the k or the p with.
    few = torch.full((384,), -torch.inf)
    few[[3, 7]] = torch.tensor([0.0, 1.0])
    for sampling in (Sampling(top_k=5), Sampling(top_p=0.99999), Sampling(temperature=1e6, top_k=100, top_p=0.9999)):
        assert sorted(candidates(few, sampling)[0].tolist()) == [3, 7]


def brute_force(logits, sampling):
    """{id: probability}, in plain Python."""
    order = sorted((i for i, x in enumerate(logits) if x > -math.inf), key=lambda i: (-logits[i], i))
    if sampling.top_k:
        order = order[: sampling.top_k]
    weights = [math.exp((logits[i] - logits[order[0]]) / sampling.temperature) for i in order]
    kept, before = [], 0.0
    for i, weight in zip(order, weights, strict=True):
        if before >= sampling.top_p and sampling.top_p < 1:
            break
        kept.append((i, weight))
        before += weight / sum(weights)
    return {i: weight / sum(w for _, w in kept) for i, weight in kept}


@pytest.mark.parametrize("shape", ["normal", "ties", "equal", "one", "one of -inf", "padded"])
def test_candidates_are_those_of_brute_force(shape):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(50, generator=generator) * 3
    if shape == "ties":
        logits = logits.round()
    elif shape == "equal":
        logits = torch.zeros(50)
    elif shape == "one":
        logits[17] = 1000.0
    elif shape == "one of -inf":
        logits = torch.full((50,), -torch.inf)
        logits[17] = -5.0
    elif shape == "padded":
        logits[40:] = -torch.inf
    for temperature, k, p in itertools.product(
        (0.3, 1.0, 4.0), (0, 1, 7, 49, 50, 1000), (1e-9, 0.33, 0.77, 0.9999, 1.0)
    ):
        sampling = Sampling(temperature, k, p)
        ids, probabilities = candidates(logits, sampling)
        want = brute_force(logits.tolist(), sampling)
        assert sorted(ids.tolist()) == sorted(want), sampling
        torch.testing.assert_close(probabilities, torch.tensor([want[i] for i in ids.tolist()]), rtol=1e-4, atol=1e-6)


def test_greedy_and_the_first_of_ties():
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([0.0, 2.0, 2.0, 1.0])
    assert choose(logits, GREEDY, generator) == 1
    assert all(choose(logits, Sampling(top_k=1), generator) == 1 for _ in range(20))
    assert all(choose(logits, Sampling(temperature=1e-6, top_k=2), generator) in (1, 2) for _ in range(20))


def test_draws_follow_the_probabilities():
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
    generator = torch.Generator().manual_seed(0)
    counts = torch.bincount(torch.tensor([choose(logits, Sampling(), generator) for _ in range(4000)]), minlength=4)
    torch.testing.assert_close(counts / 4000, logits.exp(), rtol=0, atol=0.03)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_of_a_diverged_run(bad):
    with pytest.raises(UserError, match="not finite numbers"):
        choose(torch.tensor([0.0, bad, 1.0]), GREEDY, torch.Generator())


def test_seeds(original, tokenizer):
    def text(prompt, seed, sample=0):
        tokens = encode_prompt(tokenizer, prompt, 64)
        seed = sample_seed(seed, prompt, sample)
        return generate(original[1], tokenizer, tokens, max_new_tokens=20, sampling=Sampling(), seed=seed).tokens

    first = text("def ", 1)
    text("other", 1)
    assert text("def ", 1) == first
    assert text("def ", 2) != first
    assert text("def ", 1, sample=1) != first


# --- ends


def test_end_of_document(original, tokenizer, monkeypatch):
    stage = original[1]
    tokens = iter([9, tokenizer.eod_id, 8] * 2)
    monkeypatch.setattr(generation, "choose", lambda *_: next(tokens))
    result = generate(stage, tokenizer, [1], max_new_tokens=3, sampling=GREEDY)
    assert (result.tokens, result.text, result.finish_reason) == ([9], tokenizer.decode([9]), "eod")
    tokens = iter([9, tokenizer.eod_id, 8])
    result = generate(stage, tokenizer, [1], max_new_tokens=3, sampling=GREEDY, ignore_eod=True)
    assert (result.tokens, result.finish_reason) == ([9, tokenizer.eod_id, 8], "length")
    assert "<|endoftext|>" in result.text


@pytest.mark.parametrize(("prompt_length", "new"), [(60, 4), (63, 1), (64, 0)])
def test_stops_at_n_positions(original, tokenizer, prompt_length, new):
    result = generate(original[1], tokenizer, [1] * prompt_length, max_new_tokens=20, sampling=GREEDY, ignore_eod=True)
    assert (len(result.tokens), result.finish_reason) == (new, "length")


def test_prompts(tokenizer):
    plain = tokenizer.encode("def ")
    assert encode_prompt(tokenizer, "def ", 64) == [tokenizer.eod_id, *plain]
    assert encode_prompt(tokenizer, "def ", 64, bos=False) == plain
    assert encode_prompt(tokenizer, "", 64) == encode_prompt(tokenizer, "", 64, bos=False) == [tokenizer.eod_id]
    assert tokenizer.eod_id not in encode_prompt(tokenizer, "<|endoftext|>", 64, bos=False)
    with pytest.raises(UserError, match=r"has 101 tokens, but the model's limit is model.n_positions = 100"):
        encode_prompt(tokenizer, "\x00" * 100, 100)


# --- streaming


def test_streaming_splits_no_character(tokenizer):
    text = "x😀é👍🏽\ufffd你好🇫🇷 ok🦜"
    ids = tokenizer.encode(text)
    assert len(ids) > len(text)  # so that characters are spread over tokens
    stream = TextStream(tokenizer)
    bits = [stream.push(token) for token in ids]
    assert "".join(bits) + stream.flush() == text
    assert "" in bits
    assert "\ufffd" not in "".join(bits).replace("👍🏽\ufffd你", "")
    for end in range(len(ids)):  # a text may also end in the middle of a character
        stream = TextStream(tokenizer)
        bits = [stream.push(token) for token in ids[:end]] + [stream.flush()]
        assert "".join(bits) == tokenizer.decode(ids[:end])


def test_streaming_bytes_that_are_no_text(tokenizer):
    for seed in range(50):
        ids = torch.randint(0, tokenizer.vocab_size, (40,), generator=torch.Generator().manual_seed(seed)).tolist()
        stream = TextStream(tokenizer)
        assert "".join(map(stream.push, ids)) + stream.flush() == tokenizer.decode(ids)


# --- the command


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


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    write_json(path, content)


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
        lambda f: (edit(f / "index.json", lambda c: c[FIRST].__setitem__(1, "../x")), write_manifest(f)),
        "names ../x, which the manifest does not",
    ),
    "index without shape": (
        lambda f: (edit(f / "index.json", lambda c: c.update(x=[1, 2, 3])), write_manifest(f)),
        "index.json does not give the shape",
    ),
    "index of another model": (
        lambda f: (edit(f / "index.json", lambda c: c.pop(FIRST)), write_manifest(f)),
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
        lambda f: (edit(f / "config.json", lambda c: c["model"].update(new=1)), write_manifest(f)),
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
        lambda f: (edit(f / "config.json", lambda c: c["model"].update(vocab_size=279)), write_manifest(f)),
        "its tokenizer has 280 ids, but its model.vocab_size is 279",
    ),
}


def save_other(path):
    save_file(load_file(path) | {FIRST: torch.zeros(2, 3)}, path)


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint(command, folder, damage):
    spoil, words = DAMAGE[damage]
    spoil(folder)
    one_line(command("--checkpoint", folder, "--prompt", "a"), words)


def test_latest_that_is_no_text(command, folder):
    (folder.parent / "latest").write_bytes(b"\xff\xff")
    assert command("--checkpoint", folder.parent, "--prompt", "a", "--max-new-tokens", 1)[0] == 0


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
