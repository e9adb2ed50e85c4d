"""Two tensor-parallel ranks beside one process: the same loss and the same gradient of every parameter."""

import time

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megalite import kernels
from megalite.config import ModelConfig
from megalite.layers.sharded_init import shard
from megalite.model.gpt import Stage
from tests.dist.harness import RankFailure, run_ranks

pytestmark = pytest.mark.dist

TP = 2
BASE = {
    "vocab_size": 64,
    "vocab_multiple": 64,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "intermediate_size": 48,
    "n_positions": 32,
    "init_std": 0.2,
}
CASES = {
    "tied": {},
    "untied": {"tie_embeddings": False},
    "qk-norm": {"qk_norm": True, "head_dim": 12},
    "padding on rank 1": {"vocab_size": 50, "tie_embeddings": False},
    "padding is all of rank 1": {"vocab_size": 20},
    "selective": {"checkpointing": "selective"},
    "full": {"checkpointing": "full"},
    "prefix": {"prefix": 3},
    "fused loss": {"fused_loss": True},
    "fused loss, padding on rank 1": {"fused_loss": True, "vocab_size": 50, "tie_embeddings": False},
    "fused loss, padding is all of rank 1": {"fused_loss": True, "vocab_size": 20},
}


def loss_and_gradients(case: dict, group: dist.ProcessGroup | None) -> dict:
    """A training pass of the case's model; every rank of `group` has the same batch."""
    changes = dict(case)
    checkpointing, p = changes.pop("checkpointing", "none"), changes.pop("prefix", 0)
    model = ModelConfig(**(BASE | changes))
    stage = Stage(model, seed=1, group=group, activation_checkpointing=checkpointing, z_loss=0.01)
    generator = torch.Generator().manual_seed(0)
    for parameter in stage.parameters():
        if parameter.dim() == 1:  # at 1, a norm in the wrong place would not show
            parameter.data.uniform_(0.5, 1.5, generator=generator)
    ids = torch.randint(model.vocab_size, (2, 13), generator=generator)
    mask = torch.rand(2, 12, generator=generator) > 0.3
    prefix = torch.randn(2, p, 32, generator=generator).requires_grad_() if p else None
    loss = stage(ids[:, :-1], labels=ids[:, 1:], loss_mask=mask, prefix_embeddings=prefix)
    loss.backward()
    return {
        "loss": loss.detach(),
        "weights": {parameter.global_name: parameter.detach() for parameter in stage.parameters()},
        "gradients": {parameter.global_name: parameter.grad for parameter in stage.parameters()},
        "prefix": None if prefix is None else prefix.grad,
        "split": {
            parameter.global_name: [parameter.tp_dim, list(parameter.tp_segments)] for parameter in stage.parameters()
        },
    }


def every_case() -> dict[str, dict]:
    return {name: loss_and_gradients(case, dist.group.WORLD) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, dict]]:
    return run_ranks(every_case, TP)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_compute_what_one_process_does(ranks, case):
    want = loss_and_gradients(CASES[case], None)
    assert sum(dim is not None for dim, _ in want["split"].values()) >= 9  # most parameters are split
    for rank, got in enumerate(results[case] for results in ranks):
        # Row-parallel layers add two partial sums where one process has one sum: fp32 rounding, 6e-8 a step.
        torch.testing.assert_close(got["loss"], want["loss"], rtol=1e-5, atol=0)
        assert got["split"] == want["split"]
        for name, (dim, segments) in want["split"].items():
            full = want["gradients"][name]
            assert torch.equal(got["weights"][name], shard(want["weights"][name], dim, segments, TP, rank)), name
            gradient = got["gradients"][name]
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                # Replicated, but each rank's heads alone use it: the gradient of the whole is the ranks' sum.
                gradient = sum(results[case]["gradients"][name] for results in ranks)
            scale = full.abs().max().item()
            assert scale > 1e-3, name
            torch.testing.assert_close(
                gradient,
                shard(full, dim, segments, TP, rank),
                rtol=1e-4,
                atol=1e-5 * scale,
                msg=lambda m, n=name: f"{n}: {m}",
            )
        if want["prefix"] is not None:
            torch.testing.assert_close(got["prefix"], want["prefix"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_what_is_replicated_has_the_same_gradient_to_the_bit(ranks, case):
    """Otherwise the ranks' copies drift apart."""
    first, second = (results[case] for results in ranks)
    for name, (dim, _) in first["split"].items():
        if dim is None and not name.endswith(("q_norm.weight", "k_norm.weight")):
            assert torch.equal(first["gradients"][name], second["gradients"][name]), name
    assert torch.equal(first["loss"], second["loss"])


def test_the_fused_loss_is_the_loss_of_the_logits():
    """In one process; above it is compared with itself."""
    for case in ("tied", "padding on rank 1", "padding is all of rank 1"):
        want, got = (loss_and_gradients(CASES[case] | fused, None) for fused in ({}, {"fused_loss": True}))
        torch.testing.assert_close(got["loss"], want["loss"], rtol=1e-6, atol=0)
        for name, gradient in want["gradients"].items():
            torch.testing.assert_close(
                got["gradients"][name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item()
            )


# Cross-entropy over a split vocabulary, from logits and from hidden

VOCABULARY, VALID = 24, 17  # rank 1 holds ids 12 .. 23, and 17 .. 23 are padding
LOSSES = {
    "plain": {},
    "z-loss": {"z_loss": 0.01},
    "smoothed": {"label_smoothing": 0.1},
    "all": {"label_smoothing": 0.2, "z_loss": 0.01, "softcap": 5.0},
}


def logits_and_targets() -> tuple[Tensor, Tensor, Tensor]:
    """With targets at both ends of both halves, ignored ones, and one row of huge logits."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(10, VOCABULARY, generator=generator)
    logits[4] *= 1e4
    logits[:, VALID:] = -torch.inf
    targets = torch.tensor([0, 11, 12, 16, 5, -100, 13, -100, 3, 15])
    return logits, targets, torch.rand(10, generator=generator)


def hidden_and_weight() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(10, 8, generator=generator), torch.randn(VOCABULARY, 8, generator=generator)


def split_losses(dtype: torch.dtype) -> dict[str, list[list[Tensor]]]:
    """By options: [loss, gradient, loss of the whole logits]; then the linear form by both kinds of backward."""
    logits, targets, upstream = logits_and_targets()
    group, rank = dist.group.WORLD, dist.get_rank()
    results = {}
    for name, options in LOSSES.items():
        local = logits.to(dtype).chunk(TP, -1)[rank].clone().requires_grad_()
        loss = kernels.cross_entropy(local, targets, group=group, **options)
        (gradient,) = torch.autograd.grad(loss, local, upstream)
        parts = [torch.empty_like(local) for _ in range(TP)]
        dist.all_gather(parts, local.detach())
        whole = kernels.cross_entropy(torch.cat(parts, -1), targets, **options)
        results[name] = [[loss.detach(), gradient, whole]]

        hidden, weight = (x.to(dtype) for x in hidden_and_weight())
        hidden, local = hidden.requires_grad_(), weight.chunk(TP)[rank].clone().requires_grad_()
        for each in (upstream, upstream[0].expand(10)):
            loss = kernels.linear_cross_entropy(
                hidden, local, targets, group=group, vocab_size=VALID, chunk_tokens=4, **options
            )
            results[name].append([loss.detach(), *torch.autograd.grad(loss, (hidden, local), each)])
    return results


@pytest.fixture(scope="module")
def split() -> dict[torch.dtype, list[dict]]:
    return {dtype: run_ranks(split_losses, TP, dtype) for dtype in (torch.float32, torch.bfloat16)}


# fp32: the softmax's sum is made of two. In bf16 the gradient may then round to a neighbour (2^-8).
NEAR = {torch.float32: 1e-5, torch.bfloat16: 8e-3}


@pytest.mark.parametrize("dtype", NEAR, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_cross_entropy_of_a_split_vocabulary(split, dtype, name):
    logits, targets, upstream = logits_and_targets()
    full = logits.to(dtype).requires_grad_()
    want = kernels.cross_entropy(full, targets, **LOSSES[name])
    (gradient,) = torch.autograd.grad(want, full, upstream)
    for rank in range(TP):
        loss, part, whole = split[dtype][rank][name][0]
        assert part.dtype == dtype
        torch.testing.assert_close(loss, want.detach(), rtol=1e-5, atol=1e-6)
        # Of gathered logits, Megatron-LM's was off by log(TP) (issue 7452).
        assert torch.equal(whole, want.detach())
        torch.testing.assert_close(part, gradient.chunk(TP, -1)[rank], rtol=NEAR[dtype], atol=1e-6)
    padding = split[dtype][1][name][0][1][:, VALID - 12 :]
    assert torch.equal(padding, torch.zeros(10, VOCABULARY - VALID, dtype=dtype))


@pytest.mark.parametrize("dtype", NEAR, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_linear_cross_entropy_of_a_split_vocabulary(split, dtype, name):
    """Hidden's gradient is each rank's part of the sum."""
    _, targets, upstream = logits_and_targets()
    hidden, weight = (x.to(dtype).requires_grad_() for x in hidden_and_weight())
    for i, each in enumerate((upstream, upstream[0].expand(10)), 1):
        want = kernels.linear_cross_entropy(hidden, weight, targets, vocab_size=VALID, **LOSSES[name])
        want_hidden, want_weight = torch.autograd.grad(want, (hidden, weight), each)
        losses, of_hidden, of_weight = zip(*(split[dtype][rank][name][i] for rank in range(TP)), strict=True)
        assert torch.equal(losses[0], losses[1])
        torch.testing.assert_close(losses[0], want.detach(), rtol=1e-5, atol=1e-5)
        for got, expected in ((sum(of_hidden), want_hidden), (torch.cat(of_weight), want_weight)):
            # Each part is rounded by itself, to its own size.
            torch.testing.assert_close(got, expected, rtol=NEAR[dtype], atol=NEAR[dtype] * expected.abs().max().item())
        assert not of_weight[1][VALID - 12 :].any()


# The harness: a broken rank must not cost more than its message


def return_much(extra: int) -> list:
    """Far more than a pipe holds: whoever waits for the process before reading must not wait for ever."""
    return [dist.get_rank() + extra, torch.full((4_000_000,), float(dist.get_rank()))]


def fail_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise ValueError("this rank is broken")
    dist.barrier()


def hang_on_rank_1() -> None:
    if dist.get_rank() == 1:
        time.sleep(600)
    dist.barrier()


def test_results_come_back_in_rank_order():
    assert [(number, tensor[-1].item()) for number, tensor in run_ranks(return_much, TP, 10)] == [(10, 0.0), (11, 1.0)]


def test_a_failing_rank_fails_the_test_with_its_traceback():
    run_ranks(return_much, TP, 0)  # starts the server, if this test runs alone
    started = time.monotonic()
    with pytest.raises(RankFailure, match=r"(?s)exit codes by rank: \{.*1: 1.*this rank is broken"):
        run_ranks(fail_on_rank_1, TP)
    assert time.monotonic() - started < 30  # not the 60 s of the time-out, which rank 0 would wait


def test_a_hanging_rank_is_killed_and_says_where_it_hung():
    run_ranks(return_much, TP, 0)  # as above
    with pytest.raises(RankFailure, match=r"(?s)ranks \[0, 1\] still ran at the time-out.*rank 1.*in hang_on_rank_1"):
        run_ranks(hang_on_rank_1, TP, timeout=6)
