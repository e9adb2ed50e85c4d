"""Tensor and sequence parallelism beside one process: the same loss and the same gradient of every parameter."""

import time

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megalite import kernels
from megalite.comms.collectives import TensorParallel, sum_gradient
from megalite.layers.attention import Attention
from megalite.layers.embedding import VocabParallelEmbedding
from megalite.layers.sharded_init import InitSpec
from megalite.topology import Grid
from tests.dist.harness import RankFailure, run_ranks
from tests.dist.layouts import (
    BASE,
    LENGTH,
    Layout,
    assert_equal_to_one_process,
    assert_replicas_are_equal,
    loss_and_gradients,
)

pytestmark = pytest.mark.dist

TP = 2
SEQUENCE = {"sequence": True}
FUSED = {"fused_loss": True}
CASES = {
    2: {
        "tied": {},
        "untied": {"tie_embeddings": False},
        "qk-norm": {"qk_norm": True, "head_dim": 12},
        "padding on rank 1": {"vocab_size": 50, "tie_embeddings": False},
        "padding is all of rank 1": {"vocab_size": 20},
        "selective": {"checkpointing": "selective"},
        "full": {"checkpointing": "full"},
        "prefix": {"prefix": 3},
        "fused loss": FUSED,
        "fused loss, padding on rank 1": FUSED | {"vocab_size": 50, "tie_embeddings": False},
        "fused loss, padding is all of rank 1": FUSED | {"vocab_size": 20},
        "one key/value head": {"num_kv_heads": 1, "qk_norm": True},
        "bf16": {"bf16": True, "qk_norm": True},
        "sequence": SEQUENCE,
        "sequence, untied, qk-norm": SEQUENCE | {"tie_embeddings": False, "qk_norm": True, "head_dim": 12},
        "sequence, softmax": SEQUENCE | {"attention": "softmax", "documents": True},
        "sequence, selective": SEQUENCE | {"checkpointing": "selective"},
        "sequence, full": SEQUENCE | {"checkpointing": "full", "documents": True},
        "sequence, offload": SEQUENCE | {"checkpointing": "offload"},
        "sequence, fused loss": SEQUENCE | FUSED | {"vocab_size": 50},
        "sequence, bf16": SEQUENCE | {"bf16": True, "qk_norm": True, "checkpointing": "selective"},
    },
    4: {
        "tied": {"num_kv_heads": 4},
        "two key/value heads": {"qk_norm": True},
        "one key/value head": {"num_kv_heads": 1, "tie_embeddings": False},
        "sequence": SEQUENCE | {"num_kv_heads": 4, "qk_norm": True},
        "sequence, two key/value heads": SEQUENCE | {"qk_norm": True, "checkpointing": "full"},
        "sequence, one key/value head": SEQUENCE | FUSED | {"num_kv_heads": 1, "checkpointing": "selective"},
    },
}
EACH = pytest.mark.parametrize(("tensor", "case"), [(tensor, case) for tensor in CASES for case in CASES[tensor]])


def every_case(tensor: int) -> dict[str, dict]:
    layout = Layout(Grid.of(tensor, tensor=tensor))
    results = {name: loss_and_gradients(case, layout) for name, case in CASES[tensor].items()}
    weight = torch.zeros(4, 4, dtype=torch.bfloat16, requires_grad=True)
    gradient = torch.ones_like(weight)
    gradient[:, dist.get_rank()] = 256.0
    sum_gradient(weight, layout.tensor).backward(gradient)
    return results | {"half precision": {"gradient": weight.grad}}


@pytest.fixture(scope="module")
def ranks() -> dict[int, list[dict[str, dict]]]:
    return {tensor: run_ranks(every_case, tensor, tensor, timeout=180) for tensor in CASES}


@EACH
def test_ranks_compute_what_one_process_does(ranks, tensor, case):
    assert_equal_to_one_process([results[case] for results in ranks[tensor]], tensor, CASES[tensor][case])


@EACH
def test_what_is_replicated_has_the_same_gradient_to_the_bit(ranks, tensor, case):
    assert_replicas_are_equal([results[case] for results in ranks[tensor]], tensor)


def test_gradients_of_half_precision_are_added_in_fp32(ranks):
    """Added one by one in bf16, 256 + 1 is 256, and the next 1 is lost too."""
    for results in ranks[4]:
        assert torch.equal(
            results["half precision"]["gradient"].float(), torch.full((4, 4), 260.0)
        )  # 259, rounded once


def test_the_fused_loss_is_the_loss_of_the_logits():
    """In one process; above it is compared with itself."""
    for case in ("tied", "padding on rank 1", "padding is all of rank 1"):
        want, got = (loss_and_gradients(CASES[TP][case] | fused) for fused in ({}, {"fused_loss": True}))
        torch.testing.assert_close(got["loss"], want["loss"], rtol=1e-6, atol=0)
        for name, gradient in want["gradients"].items():
            torch.testing.assert_close(
                got["gradients"][name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item()
            )


# What crosses between ranks, what is kept, what is refused

# Of one block: all-gathers, reduce-scatters and all-reduces. Sequence parallelism gathers before the two
# column-parallel layers and, in backward, behind the two row-parallel ones; each has its opposite, and the columns'
# input is gathered again for the weight. "full" repeats the forward's. Norm weights' gradients: two.
COUNTS = {
    ("none", True): [6, 4, 2],
    ("selective", True): [6, 4, 2],
    ("full", True): [8, 6, 2],
    ("none", False): [0, 0, 4],
    ("selective", False): [0, 0, 4],
    ("full", False): [0, 0, 6],
}
OPERATORS = ("all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce")
WRONG = {
    "4 heads and 3 key/value heads of 8 do not divide over 2 tensor-parallel ranks": {"kv_heads": 3},
    "3 heads and 1 key/value heads of 8 do not divide over 2 tensor-parallel ranks": {"heads": 3, "kv_heads": 1},
    "4 heads and 1 key/value heads of 7 do not divide over 2 tensor-parallel ranks": {"kv_heads": 1, "head_size": 7},
    "a key/value head is of 2 ranks; tp.kv_group has 1": {"kv_heads": 1},
    "2 heads and 3 key/value heads of a tensor-parallel rank do not divide over 2 context-parallel ranks": {
        "kv_heads": 6,
        "context": True,
    },
    "a context group needs attend": {"context": True},
}


def count_collectives(layout: Layout, mode: str, sequence: bool) -> list[int]:
    """How often each of OPERATORS runs more with one block more."""
    counts = []
    for layers in (1, 2):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            loss_and_gradients({"sequence": sequence, "checkpointing": mode, "num_layers": layers}, layout)
        seen = {event.key: event.count for event in profile.key_averages()}
        counts.append([seen.get(f"_c10d_functional::{name}", 0) for name in OPERATORS])
    return [after - before for before, after in zip(*counts, strict=True)]


def kept_shapes(layout: Layout) -> list[list[int]]:
    shapes = []

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            shapes.append(list(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_and_gradients(SEQUENCE, layout)
    return shapes


def refusals() -> list[str]:
    messages, init, group = [], InitSpec(1, 0.2), dist.group.WORLD
    for case in WRONG.values():
        context = group if case.get("context") else None
        sizes = 32, case.get("heads", 4), case.get("kv_heads", 2), case.get("head_size", 8)
        try:
            Attention("a", *sizes, False, 1e-5, init, 0.2, TensorParallel(group), "auto", context)
        except ValueError as error:
            messages.append(str(error))
    embedding = VocabParallelEmbedding("e", 64, 64, 8, init, TensorParallel(group, sequence=True))
    try:
        embedding(torch.zeros(1, 5, dtype=torch.int64))
    except ValueError as error:
        messages.append(str(error))
    return messages


def look_closer() -> dict:
    layout = Layout(Grid.of(TP, tensor=TP))
    counts = {f"{mode} {sequence}": count_collectives(layout, mode, sequence) for mode, sequence in COUNTS}
    return {"counts": counts, "kept": kept_shapes(layout), "refusals": refusals()}


@pytest.fixture(scope="module")
def closer() -> list[dict]:
    return run_ranks(look_closer, TP, timeout=180)


@pytest.mark.parametrize(("mode", "sequence"), COUNTS)
def test_collectives_of_a_block(closer, mode, sequence):
    """Keeping matmul outputs must not cost a collective."""
    assert [rank["counts"][f"{mode} {sequence}"] for rank in closer] == [COUNTS[mode, sequence]] * TP


def test_what_sequence_parallelism_keeps_of_hidden_is_each_ranks_part(closer):
    for rank in closer:
        assert [LENGTH // TP, 2, BASE["hidden_size"]] in rank["kept"]
        assert [LENGTH, 2, BASE["hidden_size"]] not in rank["kept"]


def test_what_does_not_divide_is_refused(closer):
    *attention, embedding = closer[0]["refusals"]
    assert attention == [f"a: {message}" for message in WRONG]
    assert embedding == "5 positions do not divide over 2 ranks of sequence parallelism"


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
