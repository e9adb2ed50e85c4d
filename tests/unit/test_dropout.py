"""Dropout: the share that is dropped, the same masks in every layout, nothing to keep for recomputation."""

import pytest
import torch

from megalite.config import ModelConfig
from megalite.layers.dropout import Dropout
from megalite.model.gpt import Stage

S, B, H = 64, 6, 96
SAMPLES = torch.arange(1000, 1000 + B)
X = torch.ones(S, B, H)


def mask(samples=SAMPLES, first=0, site=3, seed=1, probability=0.25, x=X) -> torch.Tensor:
    return Dropout(probability, seed, samples, first)(x, site)


@pytest.mark.parametrize("probability", [0.1, 0.25, 0.9])
def test_share_and_scale(probability):
    y = mask(probability=probability)
    n = y.numel()
    kept = (y > 0).sum().item()
    assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / (1 - probability)).item()}
    # Five standard deviations of a binomial count: the masks are fixed, so this is no gamble.
    assert abs(kept - n * (1 - probability)) < 5 * (n * probability * (1 - probability)) ** 0.5


def test_a_part_of_the_batch_or_of_the_sequence_has_its_part_of_the_mask():
    whole = mask()
    assert torch.equal(mask(SAMPLES[2:4], x=X[:, 2:4]), whole[:, 2:4])
    assert torch.equal(mask(first=16, x=X[16:48]), whole[16:48])


@pytest.mark.parametrize("change", [{"seed": 2}, {"site": 4}, {"samples": SAMPLES + B}, {"first": S}])
def test_masks_of_other_places_are_independent(change):
    agree = ((mask() > 0) == (mask(**change) > 0)).float().mean().item()
    assert abs(agree - (0.75**2 + 0.25**2)) < 0.02


def test_rows_and_columns_of_one_mask_are_independent():
    keep = (mask() > 0).float().reshape(-1, H)
    correlation = torch.corrcoef(keep.t()).fill_diagonal_(0.0).abs().max().item()
    assert correlation < 6 / keep.shape[0] ** 0.5


def test_the_gradient_is_dropped_where_the_value_is():
    x = X.clone().requires_grad_()
    y = Dropout(0.25, 1, SAMPLES, 0)(x, 3)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


MODEL = {"vocab_size": 32, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 32, "dropout": 0.2}


@pytest.mark.parametrize("recompute", ["none", "selective", "full", "offload"])
def test_the_model_drops_in_training_alone_and_the_same_under_recomputation(recompute):
    model = ModelConfig(**MODEL)
    tokens = torch.arange(24).view(2, 12) % 32
    samples = torch.tensor([5, 9])
    plain, other = Stage(model, seed=1), Stage(model, seed=1, activation_checkpointing=recompute)
    losses = []
    for stage in (plain, other):
        loss = stage(tokens, labels=tokens, samples=samples)
        loss.backward()
        losses.append(loss)
    assert torch.equal(*losses)
    for a, b in zip(plain.parameters(), other.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    assert not torch.equal(plain(tokens, labels=tokens, samples=samples + 1), losses[0])
    plain.eval()
    without = Stage(ModelConfig(**MODEL | {"dropout": 0.0}), seed=1)
    assert torch.equal(plain(tokens, labels=tokens), without(tokens, labels=tokens))
    with pytest.raises(ValueError, match=r"model\.dropout needs the number of each sequence"):
        other(tokens, labels=tokens)
