"""The decoder beside Hugging Face's Llama and Qwen3, and the promises of `Stage`, one by one."""

import math
from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from megalite.config import ModelConfig
from megalite.layers.attention import KVCache
from megalite.layers.rope import rope_angles
from megalite.layers.sharded_init import InitSpec, draw
from megalite.model.gpt import Stage

BASE = {
    "vocab_size": 61,
    "vocab_multiple": 1,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "intermediate_size": 48,
    "n_positions": 32,
    "rope_theta": 100.0,  # so that 12 positions turn the slow pairs too
    "init_std": 0.2,  # activations of a size at which a mistake shows
}


def make_model(**changes) -> ModelConfig:
    return ModelConfig(**(BASE | changes))


def make_stage(seed: int = 1, activation_checkpointing: str = "none", z_loss: float = 0.0, **changes) -> Stage:
    """A stage whose norms have weights of their own: at 1, a norm in the wrong place would not show."""
    stage = Stage(make_model(**changes), seed=seed, activation_checkpointing=activation_checkpointing, z_loss=z_loss)
    generator = torch.Generator().manual_seed(5)
    for parameter in stage.parameters():
        if parameter.dim() == 1:
            parameter.data.uniform_(0.5, 1.5, generator=generator)
    return stage


def make_batch(b: int = 2, s: int = 12, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """tokens, labels, loss_mask with about a third left out."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(BASE["vocab_size"], (b, s + 1), generator=generator)
    return ids[:, :-1], ids[:, 1:], torch.rand(b, s, generator=generator) > 0.3


def loss_and_gradients(stage: Stage, tokens, labels, mask, **options) -> tuple[Tensor, dict[str, Tensor]]:
    stage.zero_grad()
    loss = stage(tokens, labels=labels, loss_mask=mask, **options)
    loss.backward()
    return loss.detach(), {p.global_name: p.grad.clone() for p in stage.parameters()}


# Against Hugging Face


def to_hugging_face(named: dict[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """Weights, or gradients, by Hugging Face's names: their q, k, v and gate, up are apart, and nothing is padded."""
    heads = (model.num_heads * model.head_size, *[model.kv_heads * model.head_size] * 2)
    theirs = {
        "model.embed_tokens.weight": named["embedding.weight"][: model.vocab_size],
        "model.norm.weight": named["final_norm.weight"],
    }
    if not model.tie_embeddings:
        theirs["lm_head.weight"] = named["head.weight"][: model.vocab_size]
    for i in range(model.num_layers):
        ours, layer = f"blocks.{i}", f"model.layers.{i}"
        theirs[f"{layer}.input_layernorm.weight"] = named[f"{ours}.attention_norm.weight"]
        theirs[f"{layer}.post_attention_layernorm.weight"] = named[f"{ours}.mlp_norm.weight"]
        for name, part in zip("qkv", named[f"{ours}.attention.qkv.weight"].split(heads), strict=True):
            theirs[f"{layer}.self_attn.{name}_proj.weight"] = part
        theirs[f"{layer}.self_attn.o_proj.weight"] = named[f"{ours}.attention.output.weight"]
        gate, up = named[f"{ours}.mlp.gate_up.weight"].chunk(2)
        theirs |= {f"{layer}.mlp.gate_proj.weight": gate, f"{layer}.mlp.up_proj.weight": up}
        theirs[f"{layer}.mlp.down_proj.weight"] = named[f"{ours}.mlp.down.weight"]
        if model.qk_norm:
            for norm in ("q_norm", "k_norm"):
                theirs[f"{layer}.self_attn.{norm}.weight"] = named[f"{ours}.attention.{norm}.weight"]
    return theirs


def hugging_face(stage: Stage) -> torch.nn.Module:
    """Their model with our weights: Llama, or Qwen3 with QK-norm."""
    transformers = pytest.importorskip("transformers")
    model = stage.model
    config_class, model_class = (
        (transformers.Qwen3Config, transformers.Qwen3ForCausalLM)
        if model.qk_norm
        else (transformers.LlamaConfig, transformers.LlamaForCausalLM)
    )
    config = config_class(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.head_size,
        intermediate_size=model.ffn_size,
        max_position_embeddings=model.n_positions,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        rms_norm_eps=model.norm_eps,
        tie_word_embeddings=model.tie_embeddings,
        attention_bias=False,
        attn_implementation="eager",  # another road to the same attention
    )
    theirs = model_class(config)
    weights = to_hugging_face({p.global_name: p.detach() for p in stage.parameters()}, model)
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if model.tie_embeddings else set())
    return theirs


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": False},
        {"num_kv_heads": 2},
        {"num_kv_heads": 1, "tie_embeddings": False},
        {"vocab_multiple": 16},
        {"vocab_multiple": 16, "tie_embeddings": False},
        {"head_dim": 12, "num_kv_heads": 2},
        {"num_heads": 3, "head_dim": 6, "hidden_size": 21},
        {"qk_norm": True},
        {"qk_norm": True, "num_kv_heads": 2, "head_dim": 12, "tie_embeddings": False, "vocab_multiple": 64},
        {"norm_eps": 0.1},
    ],
    ids=str,
)
def test_hugging_face_computes_the_same(changes):
    stage = make_stage(**changes)
    theirs = hugging_face(stage)
    tokens, labels, mask = make_batch()

    logits = stage(tokens)
    their_logits = theirs(tokens).logits
    # fp32 through two layers of sums of up to 64 terms: rounding of 6e-8 that adds up to some 1e-6 of the largest.
    close = {"rtol": 1e-4, "atol": 2e-5}
    torch.testing.assert_close(logits[..., : stage.model.vocab_size].transpose(0, 1), their_logits, **close)

    loss, gradients = loss_and_gradients(stage, tokens, labels, mask)
    their_loss = F.cross_entropy(
        their_logits.flatten(0, 1), labels.masked_fill(~mask, -100).flatten(), reduction="sum", ignore_index=-100
    )
    torch.testing.assert_close(loss, their_loss.detach(), rtol=1e-5, atol=0)
    their_loss.backward()
    ours = to_hugging_face(gradients, stage.model)
    named = dict(theirs.named_parameters())
    assert named.keys() == ours.keys()
    for name, parameter in named.items():
        # Gradients sum over 24 tokens and differ in size from weight to weight: relative to the largest of each.
        scale = parameter.grad.abs().max().item()
        assert scale > 1e-3, name
        torch.testing.assert_close(
            ours[name], parameter.grad, rtol=1e-4, atol=1e-5 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_their_mean_loss_is_our_sum_over_the_valid_tokens():
    """Their own loss, which shifts labels itself, and not only ours from their logits."""
    stage = make_stage()
    tokens, labels, _ = make_batch()
    ids = torch.cat((tokens, labels[:, -1:]), 1)
    loss = stage(tokens, labels=labels, loss_mask=torch.ones_like(tokens, dtype=torch.bool))
    torch.testing.assert_close(loss / tokens.numel(), hugging_face(stage)(ids, labels=ids).loss, rtol=1e-5, atol=0)


# The loss


def test_the_loss_is_a_sum_over_the_mask():
    stage = make_stage()
    tokens, labels, mask = make_batch()
    parts = [stage(tokens, labels=labels, loss_mask=part) for part in (mask, ~mask)]
    torch.testing.assert_close(sum(parts), stage(tokens, labels=labels), rtol=1e-5, atol=0)
    assert stage(tokens, labels=labels, loss_mask=torch.zeros_like(mask)).item() == 0.0


def test_labels_outside_the_mask_do_not_matter():
    stage = make_stage()
    tokens, labels, mask = make_batch()
    want = stage(tokens, labels=labels, loss_mask=mask)
    assert torch.equal(stage(tokens, labels=torch.where(mask, labels, -1), loss_mask=mask), want)


def test_z_loss_is_for_training_alone():
    plain, with_z = make_stage(), make_stage(z_loss=0.1)
    tokens, labels, mask = make_batch()
    log_z = plain(tokens).logsumexp(-1).t()[mask]
    loss = plain(tokens, labels=labels, loss_mask=mask)
    training = with_z(tokens, labels=labels, loss_mask=mask)
    torch.testing.assert_close(training, loss + 0.1 * log_z.square().sum(), rtol=1e-5, atol=0)
    assert torch.equal(with_z.eval()(tokens, labels=labels, loss_mask=mask), loss)


# Causality and generation


def test_a_token_changes_nothing_before_it():
    stage = make_stage(num_kv_heads=2)
    tokens, _, _ = make_batch()
    before = stage(tokens)
    for t in (0, 5, 11):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % stage.model.vocab_size
        after = stage(changed)
        assert torch.equal(after[:t], before[:t])
        assert not torch.isclose(after[t:], before[t:]).all(-1).any()  # and everything from it on


def test_sequences_of_a_batch_do_not_see_each_other():
    stage = make_stage()
    tokens, _, _ = make_batch()
    # Another batch size, another order of sums inside a product.
    torch.testing.assert_close(stage(tokens)[:, :1], stage(tokens[:1]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunks", [[12], [1] * 12, [5, 1, 1, 4, 1]])
@torch.no_grad()
def test_with_a_cache_a_sequence_may_come_in_parts(chunks):
    stage = make_stage(num_kv_heads=2, qk_norm=True)
    tokens, _, _ = make_batch()
    model = stage.model
    caches = [KVCache(2, model.kv_heads, 12, model.head_size, torch.float32, "cpu") for _ in stage.blocks]
    got = torch.cat([stage(part, caches=caches) for part in tokens.split(chunks, 1)])
    # Products of other sizes sum in another order.
    torch.testing.assert_close(got, stage(tokens), rtol=1e-4, atol=1e-5)
    assert caches[0].length == 12


# Padding of the vocabulary


@pytest.mark.parametrize("tied", [True, False])
def test_padding_changes_no_loss_and_no_weight(tied):
    tokens, labels, mask = make_batch()
    plain, padded = (make_stage(vocab_multiple=n, tie_embeddings=tied, z_loss=0.1) for n in (1, 64))
    ours, theirs = (loss_and_gradients(stage, tokens, labels, mask) for stage in (plain, padded))
    # The sum of the softmax has three more zeros in it, which may move its order.
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=0)
    for p, q in zip(plain.parameters(), padded.parameters(), strict=True):
        rows = p.shape[0]
        assert torch.equal(p, q[:rows]), p.global_name
        torch.testing.assert_close(q.grad[:rows], p.grad, rtol=1e-4, atol=1e-5)
        if q.shape != p.shape:
            assert q.shape[0] == 64
            assert torch.equal(q[rows:], torch.zeros_like(q[rows:]))
            assert torch.equal(q.grad[rows:], torch.zeros_like(q[rows:]))


@pytest.mark.parametrize("autocast", [False, True])
def test_padding_is_never_predicted(autocast):
    stage = make_stage(vocab_multiple=64)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = stage(make_batch()[0])
    assert logits.shape == (12, 2, 64)
    assert (logits[..., 61:] == -torch.inf).all()
    assert logits[..., :61].isfinite().all()


# Prefix embeddings


def with_prefix(p: int = 3, **changes) -> tuple[Stage, Tensor, Tensor]:
    """A stage, prefix tokens [b, p], and their embeddings [b, p, h]: as a prefix these must act as those tokens do."""
    stage = make_stage(**changes)
    tokens = make_batch(s=p, seed=9)[0]
    return stage, tokens, stage.embedding(tokens).transpose(0, 1).detach().requires_grad_()


def test_a_prefix_acts_as_tokens_before_the_tokens():
    stage, prefix_tokens, prefix = with_prefix()
    tokens, _, _ = make_batch()
    want = stage(torch.cat((prefix_tokens, tokens), 1))
    got = stage(tokens, prefix_embeddings=prefix)
    assert got.shape == (12, 2, 61)
    torch.testing.assert_close(got, want[3:], rtol=1e-4, atol=1e-5)  # the head's product has another size
    assert not torch.allclose(got, stage(tokens), atol=1e-2)


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_a_prefix_is_outside_the_loss_and_gets_its_gradient(mode):
    stage, prefix_tokens, prefix = with_prefix(tie_embeddings=False, activation_checkpointing=mode)
    tokens, labels, mask = make_batch()
    # By hand: the same embeddings, those of the prefix kept as a leaf, through the blocks.
    everything = torch.cat((prefix_tokens, tokens), 1)
    nowhere = torch.zeros(2, 3, dtype=torch.bool)
    by_hand = loss_and_gradients(
        stage, everything, torch.cat((prefix_tokens, labels), 1), torch.cat((nowhere, mask), 1)
    )
    got = loss_and_gradients(stage, tokens, labels, mask, prefix_embeddings=prefix)
    torch.testing.assert_close(got[0], by_hand[0], rtol=1e-5, atol=0)
    embedding = torch.zeros_like(got[1]["embedding.weight"])
    embedding.index_add_(0, prefix_tokens.flatten(), prefix.grad.flatten(0, 1))
    got[1]["embedding.weight"] += embedding
    for name, gradient in by_hand[1].items():
        torch.testing.assert_close(got[1][name], gradient, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    assert (prefix.grad.abs().amax(-1) > 1e-3).all()


def test_a_prefix_shifts_positions_that_are_given_too():
    stage, _, prefix = with_prefix()
    tokens, _, _ = make_batch()
    positions = torch.arange(12).expand(2, 12)
    default = stage(tokens, prefix_embeddings=prefix)
    assert torch.equal(stage(tokens, positions, prefix_embeddings=prefix), default)
    assert not torch.allclose(stage(tokens, positions * 2, prefix_embeddings=prefix), default, atol=1e-3)


def test_an_empty_prefix_is_none():
    stage, _, prefix = with_prefix()
    tokens, _, _ = make_batch()
    assert torch.equal(stage(tokens, prefix_embeddings=prefix[:, :0]), stage(tokens))


@pytest.mark.parametrize("shape", [(32,), (2, 32), (1, 3, 32), (3, 2, 32), (2, 3, 31), (2, 3, 32, 1)])
def test_a_prefix_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"prefix_embeddings: shape \[.*\], wants \[2, p, 32\]"):
        make_stage()(make_batch()[0], prefix_embeddings=torch.zeros(shape))


def test_n_positions_is_the_limit_of_prefix_cache_and_tokens_together():
    stage = make_stage(n_positions=12)
    tokens, _, _ = make_batch()
    stage(tokens)
    stage(tokens[:, :9], prefix_embeddings=torch.zeros(2, 3, 32))
    with pytest.raises(ValueError, match=r"13 positions, but model\.n_positions is 12"):
        stage(make_batch(s=13)[0])
    with pytest.raises(ValueError, match="13 positions"):
        stage(tokens[:, :10], prefix_embeddings=torch.zeros(2, 3, 32))
    caches = [KVCache(2, 4, 20, 8, torch.float32, "cpu") for _ in stage.blocks]
    with torch.no_grad():
        stage(tokens[:, :8], caches=caches)
        with pytest.raises(ValueError, match="13 positions"):
            stage(tokens[:, :5], caches=caches)


# Initial weights


def weights(stage: Stage) -> dict[str, Tensor]:
    return {p.global_name: p.detach() for p in stage.parameters()}


def plain_stage(seed: int = 1, rounding: torch.dtype = torch.float32, **changes) -> Stage:
    return Stage(make_model(**changes), seed=seed, init_rounding=rounding)


def test_weights_follow_from_seed_and_name_alone():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = weights(plain_stage())
    assert torch.equal(torch.get_rng_state(), state), "the global generator was used"
    torch.manual_seed(2)
    make_stage(seed=7, num_layers=3)  # something else in between
    again = weights(plain_stage())
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name]), name
    for name in reversed(first):  # one by one, in another order
        if first[name].dim() == 2 and "output" not in name and "down" not in name:
            assert torch.equal(draw(name, tuple(first[name].shape), InitSpec(1, 0.2), 0.2), first[name])


def test_weights_do_not_depend_on_the_depth():
    shallow, deep = weights(plain_stage(num_layers=2)), weights(plain_stage(num_layers=8))
    for name, tensor in shallow.items():
        scaled = name.endswith(("attention.output.weight", "mlp.down.weight"))
        # Output projections have std / sqrt(2 * layers): 2 for four times the layers, a power of two and so exact.
        assert torch.equal(tensor, deep[name] * 2 if scaled else deep[name]), name


def test_other_seeds_and_other_names_draw_other_weights():
    first, second = (
        weights(plain_stage(seed=1, tie_embeddings=False)),
        weights(plain_stage(seed=2, tie_embeddings=False)),
    )
    matrices = [name for name, tensor in first.items() if tensor.dim() == 2]
    for name in matrices:
        assert not torch.isclose(first[name], second[name]).float().mean() > 0.01, name
    for suffix in ("attention.qkv.weight", "mlp.down.weight"):
        assert not torch.equal(first[f"blocks.0.{suffix}"], first[f"blocks.1.{suffix}"])
    assert not torch.equal(first["embedding.weight"], first["head.weight"])


def test_standard_deviations():
    model = ModelConfig(vocab_size=1000, hidden_size=128, num_layers=8, num_heads=4, tie_embeddings=False)
    for name, tensor in weights(Stage(model, seed=3)).items():
        if tensor.dim() == 1:
            assert torch.equal(tensor, torch.ones_like(tensor)), name
            continue
        scaled = name.endswith(("attention.output.weight", "mlp.down.weight"))
        want = 0.02 / math.sqrt(2 * 8) if scaled else 0.02
        valid = tensor[:1000]
        # Over n >= 16384 values the estimate's own deviation is 1 / sqrt(2n) < 0.6 %; 3 % is five of those.
        assert valid.std().item() == pytest.approx(want, rel=0.03), name
        assert abs(valid.mean().item()) < 5 * want / math.sqrt(valid.numel()), name
        assert valid.abs().max() > 3 * want, name  # a normal, not a uniform, distribution


def test_rounding_makes_the_start_of_a_bf16_run_that_of_every_precision():
    exact, rounded = weights(plain_stage()), weights(plain_stage(rounding=torch.bfloat16))
    for name, tensor in rounded.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, exact[name].bfloat16().float()), name


@pytest.mark.parametrize("shape", [(7, 5), (16, 16), (61, 3)])
def test_a_draw_is_the_same_where_torch_makes_bf16_by_default(shape, monkeypatch):
    """As under deepspeed.zero.Init, which wraps torch.zeros so."""
    spec, zeros = InitSpec(1, 0.02, torch.bfloat16), torch.zeros
    want = draw("name", shape, spec, 0.02)
    monkeypatch.setattr(torch, "zeros", lambda *args, **kwargs: zeros(*args, **kwargs).bfloat16())
    assert torch.equal(draw("name", shape, spec, 0.02), want)


# Activation checkpointing


class CountOperators(TorchDispatchMode):
    """Counts the matrix products and attentions that run."""

    def __init__(self):
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("mm", "bmm", "addmm"):
            self.seen["product"] += 1
        elif "attention" in name:
            self.seen["attention_backward" if name.endswith("backward") else "attention"] += 1
        return function(*args, **(kwargs or {}))


MODES = ["none", "selective", "full"]
RECOMPUTED = {"num_layers": 3, "qk_norm": True, "tie_embeddings": False}


def test_recomputation_changes_no_bit():
    batch = make_batch()
    loss, gradients = loss_and_gradients(make_stage(**RECOMPUTED), *batch)
    for mode in MODES[1:]:
        other_loss, other = loss_and_gradients(make_stage(activation_checkpointing=mode, **RECOMPUTED), *batch)
        assert torch.equal(other_loss, loss)
        for name, gradient in gradients.items():
            assert torch.equal(other[name], gradient), (mode, name)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_selective_repeats_no_product_and_full_repeats_all(kv_heads):
    counts = {}
    for mode in MODES:
        stage = make_stage(activation_checkpointing=mode, num_kv_heads=kv_heads, **RECOMPUTED)
        with CountOperators() as counter:
            loss_and_gradients(stage, *make_batch())
        counts[mode] = counter.seen
    assert counts["none"]["attention"] == 3
    assert counts["none"]["product"] == 3 * (4 * 3 + 1)  # four in each of 3 layers and the head; two more in backward
    assert counts["selective"] == counts["none"]
    # Of a block's four products, backward needs no result of the last, and torch stops before it.
    assert counts["full"] - counts["none"] == {"product": 3 * 3, "attention": 3}


def test_evaluation_does_not_checkpoint():
    stage = make_stage(activation_checkpointing="full", **RECOMPUTED)
    tokens, labels, mask = make_batch()
    with torch.no_grad():
        assert torch.equal(stage(tokens, labels=labels, loss_mask=mask), stage(tokens, None, labels, mask))


def bytes_kept(mode: str) -> int:
    """What a forward pass allocates and does not free."""
    stage = make_stage(activation_checkpointing=mode, **RECOMPUTED)
    tokens, labels, mask = make_batch(b=4, s=32)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss = stage(tokens, labels=labels, loss_mask=mask)
    del loss
    return sum(e.nbytes() for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]")


def test_recomputation_keeps_less():
    kept = {mode: bytes_kept(mode) for mode in MODES}
    hidden = 4 * 32 * 32 * 4  # [s, b, h] in fp32
    assert kept["full"] < kept["selective"] < kept["none"]
    # A block keeps far more than twenty such tensors' worth without, and one, its input, with full recomputation.
    assert kept["none"] - kept["full"] > 3 * 10 * hidden


# Precision


def test_bf16_autocast_trains():
    stage = make_stage(num_kv_heads=2, qk_norm=True, vocab_multiple=16)
    batch = make_batch()
    exact, gradients = loss_and_gradients(stage, *batch)
    for mode in MODES:
        stage.activation_checkpointing = mode
        with torch.autocast("cpu", torch.bfloat16):
            loss, rough = loss_and_gradients(stage, *batch)
        assert loss.dtype == torch.float32
        # bf16 has 8 bits: 0.4 % a rounding, some of which a sum over 16 tokens averages away.
        torch.testing.assert_close(loss, exact, rtol=2e-2, atol=0)
        for name, gradient in rough.items():
            assert gradient.dtype == torch.float32
            error = (gradient - gradients[name]).norm() / gradients[name].norm()
            assert error < 0.1, (mode, name)


def test_a_bf16_model_runs_too():
    """As ZeRO 1 to 3 have it: the parameters themselves in bf16."""
    stage = make_stage(num_kv_heads=2, qk_norm=True)
    tokens, labels, mask = make_batch()
    exact = stage(tokens, labels=labels, loss_mask=mask)
    loss, gradients = loss_and_gradients(stage.bfloat16(), tokens, labels, mask)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=2e-2, atol=0)
    assert {gradient.dtype for gradient in gradients.values()} == {torch.bfloat16}


def test_rope_tells_positions_apart_under_autocast():
    """bf16 has no odd numbers above 256."""
    with torch.autocast("cpu", torch.bfloat16):
        cos, sin = rope_angles(torch.arange(250, 2300)[None], 64, 10000.0)
    assert cos.shape == (2050, 1, 1, 32)
    assert cos.dtype == sin.dtype == torch.float32
    assert len(torch.stack((cos, sin), -1)[:, 0, 0, 0].unique(dim=0)) == 2050
    exact = torch.arange(250, 2300, dtype=torch.float64)  # pair 0 turns by one radian a position
    torch.testing.assert_close(cos[:, 0, 0, 0].double(), exact.cos(), rtol=0, atol=1e-5)


def test_rope_depends_on_distance_alone():
    stage = make_stage()
    tokens, _, _ = make_batch()
    positions = torch.arange(12).expand(2, 12)
    # fp32 angles of a thousand radians are good to 6e-5.
    torch.testing.assert_close(stage(tokens, positions + 1000), stage(tokens, positions), rtol=1e-2, atol=5e-3)


def test_the_meta_device_draws_nothing_and_keeps_the_names():
    with torch.device("meta"):
        stage = Stage(make_model(), seed=0)
    assert all(p.is_meta for p in stage.parameters())
    names = [p.global_name for p in stage.parameters()]
    assert names == [name for name, _ in stage.named_parameters()]
