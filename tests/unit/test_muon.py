"""Muon against its formula in float64, against torch's own, and beside AdamW; what it may not be combined with."""

import pytest
import torch

from megalite.config import Config
from megalite.errors import ConfigError
from megalite.training import muon
from megalite.training.muon import COEFFICIENTS, orthogonalise, split
from megalite.training.optimizer import decay_groups, make_optimizer
from megalite.training.requirements import check_training
from tests.unit.tiny_model import loss_and_gradients, make_batch, make_stage

MATRICES = ("attention.qkv", "attention.output", "mlp.gate_up", "mlp.down")


def options(**changes):
    return Config.model_validate({"training": {"optimizer": "muon"} | changes}).training


@pytest.mark.parametrize("shape", [(5, 5), (3, 40), (40, 3), (1, 7), (24, 16)])
@pytest.mark.parametrize("steps", [1, 5])
def test_orthogonalise_keeps_singular_vectors_and_moves_the_values(shape, steps):
    """Exactly the polynomial of the singular values, as their vectors stay: fp64 rounding is all there may be."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    a, b, c = COEFFICIENTS
    s = s / s.norm()
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    torch.testing.assert_close(orthogonalise(matrix, steps, torch.float64), u @ torch.diag(s) @ vt, rtol=0, atol=1e-12)
    if steps == 5:
        assert 0.68 < s.min() <= s.max() < 1.14


def test_orthogonalise_of_zeros_and_of_bf16():
    assert torch.equal(orthogonalise(torch.zeros(3, 4), 5, torch.float32), torch.zeros(3, 4))
    matrix = torch.randn(32, 48, generator=torch.Generator().manual_seed(0))
    exact, rough = (orthogonalise(matrix, 5, dtype) for dtype in (torch.float64, torch.bfloat16))
    assert rough.dtype == exact.dtype == torch.float32
    # 8 bits through 15 products, of which each step makes the error of small singular values up to 3.4 times as large.
    assert (rough - exact).norm() / exact.norm() < 0.05


def test_matrices_of_blocks_go_to_muon_and_all_else_to_adamw():
    parameters = {p.global_name: p for p in make_stage(qk_norm=True, tie_embeddings=False).parameters()}
    matrices, rest = split(parameters)
    assert set(matrices) == {f"blocks.{i}.{name}.weight" for i in range(2) for name in MATRICES}
    assert set(rest) == set(parameters) - set(matrices)
    assert {"embedding.weight", "head.weight", "final_norm.weight", "blocks.0.attention.q_norm.weight"} <= set(rest)


def test_each_part_of_a_fused_matrix_is_a_matrix_of_its_own(monkeypatch):
    """q, k and v, gate and up, given to torch's Muon one by one, and AdamW for the rest: the same weights."""
    # As torch's does everywhere, and ours on a GPU.
    monkeypatch.setattr(muon, "orthogonalise", lambda part, steps, _: orthogonalise(part, steps, torch.bfloat16))
    training = options(muon_momentum=0.9, weight_decay=0.3)

    def reference(parameters):
        matrices, rest = split(parameters)
        parts = []
        for p in matrices.values():
            for part, gradient in zip(*(t.detach().split(p.tp_segments, p.tp_dim) for t in (p, p.grad)), strict=True):
                part.grad = gradient
                parts.append(part)
        adamw = torch.optim.AdamW(decay_groups(rest, 0.3), lr=0.01, betas=(0.9, 0.95), eps=1e-8)
        return torch.optim.Muon(parts, 0.01, 0.3, 0.9, ns_steps=5, adjust_lr_fn="match_rms_adamw"), adamw

    def ours(parameters):
        optimizer = make_optimizer(parameters, training)
        for group in optimizer.param_groups:
            group["lr"] = 0.01  # as Engine.step does
        return (optimizer,)

    got, want = ({}, {})
    for optimizer_of, weights in ((ours, got), (reference, want)):
        stage = make_stage(num_kv_heads=2)
        parameters = {p.global_name: p for p in stage.parameters()}
        before = {name: p.detach().clone() for name, p in parameters.items()}
        loss_and_gradients(stage, *make_batch())
        for optimizer in optimizer_of(parameters):
            optimizer.step()
        weights |= {name: parameters[name].detach() - before[name] for name in parameters}
    for name in want:
        assert (got[name] - want[name]).norm() < 1e-5 * want[name].norm(), name


def test_the_second_step_has_the_momentum_of_both():
    """Against the formula: m = 0.95 m + 0.05 g, along 0.05 g + 0.95 m."""
    weight = torch.nn.Parameter(torch.zeros(4, 6))
    weight.global_name, weight.global_shape = "blocks.0.mlp.down.weight", (4, 6)
    weight.tp_dim, weight.tp_segments = 1, (6,)
    other = torch.nn.Parameter(torch.zeros(3))
    other.global_name, other.global_shape = "final_norm.weight", (3,)
    optimizer = make_optimizer({p.global_name: p for p in (weight, other)}, options(learning_rate=1.0))
    first, second = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(1))
    for gradient in (first, second):
        weight.grad, before = gradient.clone(), weight.detach().clone()
        optimizer.step()
    momentum = 0.95 * 0.05 * first + 0.05 * second
    torch.testing.assert_close(optimizer.state[weight]["momentum"], momentum)
    update = 0.2 * 6**0.5 * orthogonalise(0.05 * second + 0.95 * momentum, 5, torch.float32)
    torch.testing.assert_close(weight.detach(), before * (1 - 0.1) - update)  # 0.1: the default decay
    assert not optimizer.state[other]  # it had no gradient


@pytest.mark.parametrize(
    ("zero", "changes", "message"),
    [
        (
            1,
            {"optimizer": "muon"},
            "muon works on whole matrices, of which ZeRO-1 gives each rank a part; add --zero 0",
        ),
        (3, {"optimizer": "muon"}, "of which ZeRO-3"),
        (0, {"optimizer": "muon", "precision": "fp16"}, "fp16 needs a GPU"),
    ],
)
def test_refused(zero, changes, message):
    with pytest.raises(ConfigError, match=message):
        check_training(Config.model_validate({"training": changes}), zero, "cpu")


def test_compile_with_documents_wants_masks_of_one_shape():
    settings = {"training": {"compile": "blocks"}, "data": {"mask_documents": True}, "model": {"attention": "varlen"}}
    with pytest.raises(ConfigError, match=r"attention varlen each batch .* set model\.attention to sdpa"):
        check_training(Config.model_validate(settings), 0, "cpu")
