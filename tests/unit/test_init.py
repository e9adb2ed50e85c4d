"""Initial weights: they follow from the seed and a weight's name, and have the deviations they should."""

import math

import pytest
import torch
from torch import Tensor

from megalite.config import ModelConfig
from megalite.layers.sharded_init import InitSpec, draw
from megalite.model.gpt import Stage
from tests.unit.tiny_model import make_model, make_stage


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


def test_the_meta_device_draws_nothing_and_keeps_the_names():
    with torch.device("meta"):
        stage = Stage(make_model(), seed=0)
    assert all(p.is_meta for p in stage.parameters())
    names = [p.global_name for p in stage.parameters()]
    assert names == [name for name, _ in stage.named_parameters()]
