"""Text from a checkpoint: the cache, sampling, where it ends, streaming."""

import itertools
import math

import pytest
import torch

from megalite import generation
from megalite.data.tokenizer import Tokenizer
from megalite.errors import UserError
from megalite.generation import Sampling, TextStream, candidates, choose, encode_prompt, generate, sample_seed
from tests.unit.checkpoint_files import MODEL, edit_json, write_checkpoint, write_manifest

pytestmark = pytest.mark.usefixtures("one_thread")
GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir):
    return Tokenizer(tokenizer_dir)


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


def test_a_key_renamed_since_the_run_spoils_no_checkpoint(checkpoint_copy):
    edit_json(checkpoint_copy / "config.json", lambda config: config["training"].update(of_an_older_version=1))
    write_manifest(checkpoint_copy)
    assert generation.open_checkpoint(checkpoint_copy)[0].model == MODEL


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
