"""The output head's matrix product and its cross-entropy, a chunk of tokens at a time: nobody holds all logits.

Shapes: t tokens, h hidden, v vocabulary, v/tp this rank's part of it. Library matrix products around the parts of
`cross_entropy`. Forward computes the gradients too, for an upstream gradient of 1, while it has a chunk's logits: three
products a chunk, as without chunks, where computing the logits again in backward would make it four.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megalite.kernels.cross_entropy import (
    STATISTICS,
    check_options,
    factors,
    find_targets,
    gradient,
    losses,
    merge,
    softmax_gradient,
    statistics,
    statistics_torch,
)
from megalite.kernels.dispatch import check_shape, choose
from megalite.kernels.linear import product

# 4096 tokens: with few of them, reading and writing the fp32 gradient of the weight costs more than the product that is
# added to it (a quarter of it at 4096). And half a GiB of logits, from which 128k ids in bf16 get 2048 tokens.
_MOST_TOKENS, _LEAST_TOKENS, _CHUNK_BYTES = 4096, 256, 2**29
# On a CPU 16 MiB: glibc maps what has 32 MiB and more anew each time, and the page faults cost as much as a product.
_CPU_CHUNK_BYTES = 2**24


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    chunk_tokens: int | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """`cross_entropy` of the logits hidden @ weight^T, with their loss of each token, options and errors.

    hidden: [..., h], weight: [v/tp, h], targets: [...] -> [...] in fp32, or fp64 from fp64. vocab_size: global ids from
    there on are padding, which is never predicted; default: none is. chunk_tokens: default: up to 4096 tokens, as many
    as 512 MiB of logits hold, on a CPU 16 MiB. Under autocast the products are in its dtype. The weight's gradient is
    summed in fp32.

    Over a group, hidden is replicated and its gradient is of this rank's part of the vocabulary alone, as that of the
    product is: the caller sums it over the group.

    Where all tokens have one upstream gradient, as under sum(), backward only scales; otherwise (under mean() too,
    whose gradient is written out for each token) it computes the weight's gradient again, by two more products. It
    runs once: a second backward raises RuntimeError.
    """
    return _run(
        choose("linear_cross_entropy", hidden, weight),
        hidden, weight, targets, group, ignore_index, label_smoothing, z_loss, softcap, chunk_tokens, vocab_size,
    )  # fmt: skip


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    chunk_tokens: int | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """`linear_cross_entropy` in torch."""
    return _run(
        False,
        hidden, weight, targets, group, ignore_index, label_smoothing, z_loss, softcap, chunk_tokens, vocab_size,
    )  # fmt: skip


def _run(
    triton_runs: bool, hidden: Tensor, weight: Tensor, targets: Tensor,
    group, ignore_index, label_smoothing, z_loss, softcap, chunk_tokens, vocab_size,
) -> Tensor:  # fmt: skip
    check_options(label_smoothing, softcap)
    check_shape("linear_cross_entropy", "targets", targets, hidden.shape[:-1])
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens = {chunk_tokens} is less than 1")
    device, local = hidden.device.type, weight.shape[0]
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    rank = 0 if group is None else dist.get_rank(group)
    valid = local if vocab_size is None else min(max(vocab_size - rank * local, 0), local)
    chunk = chunk_tokens or _chunk_tokens(targets.numel(), local * dtype.itemsize, device)
    apply = _LinearCrossEntropy.apply
    if torch.compiler.is_compiling():
        apply = torch.compiler.disable(apply)  # it writes over its own results, which a graph cannot hold
    loss = apply(
        hidden.reshape(-1, hidden.shape[-1]), weight, targets.reshape(-1), group, ignore_index, label_smoothing, z_loss,
        softcap or 0.0, dtype, valid, chunk, triton_runs, torch.is_grad_enabled(),
    )  # fmt: skip
    return loss.view(targets.shape)


def _chunk_tokens(tokens: int, row_bytes: int, device: str) -> int:
    """As large as may be, and chunks alike: one token over must not make a chunk of one token."""
    most = (_CPU_CHUNK_BYTES if device == "cpu" else _CHUNK_BYTES) // row_bytes
    most = min(max(most, _LEAST_TOKENS), _MOST_TOKENS)
    chunks = max(1, -(-tokens // most))
    return max(64, -(-tokens // chunks // 64) * 64)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, targets: Tensor, group, ignore_index, label_smoothing, z_loss,
        softcap, dtype, valid, chunk, triton_runs, differentiate,
    ) -> Tensor:  # fmt: skip
        index, ignored, outside = find_targets(targets, weight.shape[0], group, ignore_index)
        wide = torch.promote_types(dtype, torch.float32)
        rows = x.new_empty((x.shape[0], STATISTICS), dtype=wide)
        needs_x, needs_weight = (differentiate and needed for needed in ctx.needs_input_grad[:2])
        dx = x.new_empty(x.shape, dtype=dtype) if needs_x else None
        dweight = weight.new_zeros(weight.shape, dtype=wide) if needs_weight else None
        matrix, smoothing, one = weight.to(dtype), label_smoothing > 0, rows.new_ones(())
        # One exp a logit instead of two. Where the dtype is narrower, or a row has no logit, its softmax is no use.
        at_once = x.device.type == "cpu" and not (triton_runs or softcap or smoothing) and dtype == wide and valid > 0
        for part, hidden, logits in _chunks(x, matrix, valid, chunk):
            own = (
                statistics_torch(logits, index[part], 0.0, False, overwrite=True)
                if at_once
                else statistics(logits, index[part], softcap, smoothing, triton_runs)
            )
            merged = merge(own, group)
            rows[part] = merged
            if not (needs_x or needs_weight):
                continue
            unit = factors(one.expand(len(merged)), merged, ignored[part], outside[part], label_smoothing, z_loss)
            if at_once:
                softmax_gradient(logits, index[part], own, unit)
            else:
                gradient(logits, index[part], unit, softcap, smoothing, True, triton_runs)
            if needs_x:
                found = product(logits, matrix.t(), to := dx[part])
                if found is not to:
                    to.copy_(found)
            if needs_weight:
                _add_product(dweight, logits, hidden)
        ctx.save_for_backward(x, weight, index, ignored, outside, rows)
        ctx.options = label_smoothing, z_loss, softcap, dtype, valid, chunk, triton_runs
        # Not saved as tensors are: backward scales them in place and lets go of them, so that nothing is copied.
        ctx.gradients = dx, dweight
        return losses(rows, ignored, outside, label_smoothing, z_loss)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        x, weight, index, ignored, outside, rows = ctx.saved_tensors
        label_smoothing, z_loss, softcap, dtype, valid, chunk, triton_runs = ctx.options
        if ctx.gradients is None:
            raise RuntimeError("linear_cross_entropy: the first backward has used its gradients; run forward again")
        (dx, dweight), ctx.gradients = ctx.gradients, None
        # One value expanded, which its layout tells without asking the GPU for values.
        uniform = not any(upstream.stride())
        if dx is not None:
            dx = dx.mul_(upstream.masked_fill(ignored, 0.0).unsqueeze(1)).to(x.dtype)
        if dweight is not None and uniform:
            dweight.mul_(upstream[:1].sum())
        elif dweight is not None:
            dweight.zero_()
            per_row = factors(upstream, rows, ignored, outside, label_smoothing, z_loss)
            for part, hidden, logits in _chunks(x, weight.to(dtype), valid, chunk):
                gradient(logits, index[part], per_row[part], softcap, label_smoothing > 0, True, triton_runs)
                _add_product(dweight, logits, hidden)
        return dx, None if dweight is None else dweight.to(weight.dtype), *[None] * 11


def _chunks(x: Tensor, weight: Tensor, valid: int, chunk: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Which tokens, their hidden in the weight's dtype, their logits: in memory that the next chunk's take over."""
    memory = x.new_empty((min(chunk, x.shape[0]), weight.shape[0]), dtype=weight.dtype)
    for first in range(0, x.shape[0], chunk):
        hidden = x[first : first + chunk].to(weight.dtype)
        logits = product(hidden, weight, memory[: len(hidden)])
        logits[:, valid:] = -torch.inf
        yield slice(first, first + len(hidden)), hidden, logits


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a^T @ b, where total may be wider than a and b."""
    if total.dtype == a.dtype:
        total.addmm_(a.t(), b)
    elif a.is_cuda:
        torch.addmm(total, a.t(), b, out_dtype=total.dtype, out=total)
    else:
        total += a.t() @ b
