"""The decoder beside Hugging Face's Llama and Qwen3, and the promises of `Stage`, one by one."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megalite.config import ModelConfig
from megalite.layers.attention import KVCache
from megalite.layers.rope import rope_angles
from megalite.model.gpt import Stage
from tests.unit.tiny_model import CHECKPOINTING, loss_and_gradients, make_batch, make_stage

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


@pytest.mark.parametrize("mode", CHECKPOINTING)
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


# Precision


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
