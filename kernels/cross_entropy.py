"""Cross-entropy over a vocabulary that may be split over a process group (Megatron-LM, arXiv:1909.08053, section 3),
with label smoothing (arXiv:1512.00567, section 7), the z-loss of PaLM (arXiv:2204.02311, section 5) and the soft-cap of
Gemma 2 (arXiv:2408.00118, section 2).

Shapes: t tokens, v vocabulary, v/tp this rank's part of it. One pass over the logits gives each row five numbers
(`STATISTICS`), which the ranks exchange; the losses are computed from those, and backward takes one more pass.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megalite.kernels.dispatch import check_shape, choose, on_its_device, operator, tl, triton

# Of a row, or a rank's part of it: the largest logit, the sum of exp(logit - largest), the target's logit (0 where it
# is not in this part); for label smoothing alone, else 0: the sum of the logits above -inf, and how many those are.
STATISTICS = 5
# Logits that torch copies at a time. On a CPU 4 MiB, as new memory costs more there than all the arithmetic does.
_BLOCK, _CPU_BLOCK = 2**27, 2**20


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """The loss of each token: log Z - (1 - e) x[target] - e mean(x) + z_loss * (log Z)^2, and 0 where ignored.

    logits: [..., v/tp]: rank r of `group` holds the ids from r * v/tp on; x: the logits, or with a soft-cap
    softcap * tanh(logits / softcap). targets: [...], global ids, or ignore_index -> [...] in fp32, or in fp64 from
    fp64 logits. e: label_smoothing; its mean is over the ids of the whole vocabulary whose logit is not -inf, since
    that is how ids that don't exist are marked: such a logit has probability and gradient 0.

    Backward writes the gradient over the logits, unless they are a leaf: nothing may read them afterwards, and autograd
    raises where it would, in a second backward too. Hand in a clone where they are wanted.
    A target outside the vocabulary raises IndexError on a CPU; on a GPU, where asking would stall it, its loss and
    gradient are NaN. Raises ValueError for a smoothing outside 0 .. 1 or a soft-cap that is not positive.
    """
    return _run(choose("cross_entropy", logits), logits, targets, group, ignore_index, label_smoothing, z_loss, softcap)


def cross_entropy_reference(
    logits: Tensor,
    targets: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """`cross_entropy` in torch."""
    return _run(False, logits, targets, group, ignore_index, label_smoothing, z_loss, softcap)


def _run(
    triton_runs: bool, logits: Tensor, targets: Tensor, group, ignore_index: int, label_smoothing, z_loss, softcap
) -> Tensor:
    check_options(label_smoothing, softcap)
    check_shape("cross_entropy", "targets", targets, logits.shape[:-1])
    # What a compiled graph holds for backward, and the data that a leaf stands for, are not ours to overwrite.
    overwrite = False
    if not torch.compiler.is_compiling():
        overwrite = not (logits._base if logits._is_view() else logits).is_leaf
    x = logits.reshape(-1, logits.shape[-1])
    # A row has to be contiguous, and rows apart: those of an expanded tensor are one.
    if x.stride(1) != 1 or x.stride(0) < x.shape[1]:
        x = x.contiguous()
    loss = _CrossEntropy.apply(
        x,
        targets.reshape(-1),
        group,
        ignore_index,
        label_smoothing,
        z_loss,
        softcap or 0.0,
        overwrite,
        triton_runs,
    )
    return loss.view(targets.shape)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, targets: Tensor, group, ignore_index, label_smoothing, z_loss, softcap, overwrite, triton_runs
    ) -> Tensor:
        index, ignored, outside = find_targets(targets, x.shape[1], group, ignore_index)
        rows = statistics(x, index, softcap, label_smoothing > 0, triton_runs)
        rows = merge(rows, group)
        ctx.save_for_backward(x, index, ignored, outside, rows)
        ctx.options = label_smoothing, z_loss, softcap, overwrite, triton_runs
        return losses(rows, ignored, outside, label_smoothing, z_loss)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        x, index, ignored, outside, rows = ctx.saved_tensors
        label_smoothing, z_loss, softcap, overwrite, triton_runs = ctx.options
        rows = factors(upstream, rows, ignored, outside, label_smoothing, z_loss)
        # Written into a saved tensor: autograd notices that, and a second backward raises instead of being wrong.
        grad = gradient(x.detach(), index, rows, softcap, label_smoothing > 0, overwrite, triton_runs)
        return grad, *[None] * 8


# The parts, which linear_cross_entropy takes too.


def check_options(label_smoothing: float, softcap: float | None) -> None:
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing = {label_smoothing} is not within 0 .. 1")
    if softcap is not None and not softcap > 0.0:
        raise ValueError(f"softcap = {softcap} is not positive; None is for no cap")


def find_targets(targets: Tensor, local: int, group, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of targets [t]: the index among this rank's `local` ids, -1 elsewhere; which are ignored; which don't exist.

    Raises IndexError for those that don't exist, on a CPU.
    """
    first, size = _part(local, group)
    ignored = targets == ignore_index
    outside = ((targets < 0) | (targets >= size)) & ~ignored
    if targets.device.type == "cpu" and not torch.compiler.is_compiling() and outside.any():
        position = int(outside.nonzero()[0])
        raise IndexError(
            f"target {int(targets[position])} (token {position}) is outside the vocabulary of {size} ids, "
            f"and not ignore_index = {ignore_index}"
        )
    here = (targets >= first) & (targets < first + local) & ~ignored
    return torch.where(here, targets - first, -1), ignored, outside


def _part(local: int, group) -> tuple[int, int]:
    """This rank's first id, and the size of the whole vocabulary."""
    return (0, local) if group is None else (dist.get_rank(group) * local, dist.get_world_size(group) * local)


def statistics(x: Tensor, index: Tensor, softcap: float, smoothing: bool, triton_runs: bool) -> Tensor:
    """x: [t, v/tp] with contiguous rows, index: [t] -> [t, 5], see STATISTICS, in at least fp32."""
    return (_statistics_triton if triton_runs else statistics_torch)(x, index, softcap, smoothing)


def merge(rows: Tensor, group) -> Tensor:
    """The parts' statistics [t, 5] -> those of whole rows, the same bits on every rank."""
    if group is None or dist.get_world_size(group) == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, rows, group=group)
    parts = torch.stack(parts)  # [tp, t, 5]
    largest, total, *others = parts.unbind(-1)
    maximum = largest.amax(0)
    total = total * (largest - maximum).exp()  # a part without any id has exp(-inf) of 0 here
    return torch.stack((maximum, total.sum(0), *(each.sum(0) for each in others)), -1)


def losses(rows: Tensor, ignored: Tensor, outside: Tensor, label_smoothing: float, z_loss: float) -> Tensor:
    """Statistics of whole rows -> [t]. Differences to the largest logit, which stay exact where logits are huge."""
    maximum, total, target, summed, count = rows.unbind(-1)
    log_total = total.log()
    loss = log_total - (target - maximum)
    if label_smoothing:
        mean = summed / count
        loss = torch.lerp(loss, log_total - (mean - maximum), label_smoothing)
    if z_loss:
        loss = loss + z_loss * (maximum + log_total).square()
    return loss.masked_fill(outside, torch.nan).masked_fill(ignored, 0.0)


def factors(
    upstream: Tensor, rows: Tensor, ignored: Tensor, outside: Tensor, label_smoothing: float, z_loss: float
) -> Tensor:
    """What the gradient of each row is made of: [t, 4], (m, a, b, c) in a * exp(x - m) - b at the target - c."""
    maximum, total, _, _, count = rows.unbind(-1)
    upstream = upstream.to(rows.dtype).masked_fill(ignored, 0.0)
    scale = upstream * (1.0 + 2.0 * z_loss * (maximum + total.log())) if z_loss else upstream
    scale = (scale / total).masked_fill(outside, torch.nan)
    smooth = upstream * label_smoothing / count if label_smoothing else torch.zeros_like(upstream)
    return torch.stack((maximum, scale, upstream * (1.0 - label_smoothing), smooth), -1)


def gradient(
    x: Tensor, index: Tensor, rows: Tensor, softcap: float, smoothing: bool, overwrite: bool, triton_runs: bool
) -> Tensor:
    """The gradient [t, v/tp] of logits x, from factors [t, 4]; with `overwrite` written over x, which is returned."""
    if not triton_runs:
        return _gradient_torch(x, index, rows, softcap, smoothing, x if overwrite else torch.empty_like(x))
    if not overwrite:
        return _gradient_triton(x, index, rows, softcap, smoothing)
    _launch_gradient(x, index, rows, softcap, smoothing, x)
    torch.autograd.graph.increment_version(x)  # what torch's own operators do
    return x


# In torch


def statistics_torch(x: Tensor, index: Tensor, softcap: float, smoothing: bool, overwrite: bool = False) -> Tensor:
    """overwrite, on a CPU: x, in fp32 or fp64 and without soft-cap, becomes its softmax, for `softmax_gradient`."""
    found = []
    for block, at in _blocks(x, index):
        y = _capped(block.to(torch.promote_types(x.dtype, torch.float32)), softcap)
        maximum = y.amax(-1)
        target = y.gather(1, at.clamp(min=0).unsqueeze(1)).squeeze(1).masked_fill(at < 0, 0.0)
        summed = count = torch.zeros_like(maximum)
        if smoothing:
            exists = y != -torch.inf
            summed, count = y.where(exists, 0.0).sum(-1), exists.sum(-1).to(y.dtype)
        # The largest probability is 1 / total, and torch's softmax takes less time than exp and a sum do.
        in_place = y.device.type == "cpu" and (overwrite or y is not block)
        softmax = torch.softmax(y, -1, out=y if in_place else None)
        total = softmax.amax(-1).reciprocal().masked_fill(maximum == -torch.inf, 0.0)
        found.append(torch.stack((maximum, total, target, summed, count), -1))
    return torch.cat(found)


def _gradient_torch(x: Tensor, index: Tensor, rows: Tensor, softcap: float, smoothing: bool, out: Tensor) -> Tensor:
    for block, at, factors, to in _blocks(x, index, rows, out):
        maximum, scale, pull, smooth = (each.unsqueeze(1) for each in factors.unbind(-1))
        y = _capped(block.to(rows.dtype), softcap)
        slope = 1.0 - (y.clamp(min=-softcap) / softcap).square() if softcap else None
        exists = y != -torch.inf if smoothing else None
        grad = torch.sub(y, maximum, out=to) if to.dtype == y.dtype else y.sub_(maximum)
        _pull(grad.exp_().mul_(scale), at, pull)
        if exists is not None:
            grad.sub_(smooth * exists)
        if slope is not None:
            grad.mul_(slope)
        if grad is not to:
            to.copy_(grad)
    return out


def softmax_gradient(softmax: Tensor, index: Tensor, part: Tensor, rows: Tensor) -> Tensor:
    """`gradient`, without soft-cap and smoothing, from the softmax over this part of the vocabulary and over it.

    part: this part's statistics [t, 5]; rows: the factors [t, 4] of whole rows.
    """
    maximum, scale, pull, _ = rows.unbind(-1)
    scale = scale * part[:, 1] * (part[:, 0] - maximum).exp()
    return _pull(softmax.mul_(scale.unsqueeze(1)), index, pull.unsqueeze(1))


def _pull(grad: Tensor, index: Tensor, pull: Tensor) -> Tensor:
    """Take `pull` [t, 1] off each row's target, in place."""
    index = index.unsqueeze(1)
    return grad.scatter_add_(1, index.clamp(min=0), -pull.masked_fill(index < 0, 0.0))


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of each, `_BLOCK` elements of the first at a time; under torch.compile, which fuses, all."""
    rows, columns = tensors[0].shape
    if not torch.compiler.is_compiling():
        rows = (_CPU_BLOCK if tensors[0].device.type == "cpu" else _BLOCK) // columns
    return zip(*(tensor.split(max(rows, 1)) for tensor in tensors), strict=True)


def _capped(x: Tensor, softcap: float) -> Tensor:
    """-inf, which tanh would make finite, stays: the id does not exist."""
    return torch.where(x == -torch.inf, x, softcap * (x / softcap).tanh()) if softcap else x


# In Triton


@triton.jit
def _load_capped(pointer, column, columns, dtype: tl.constexpr, SOFTCAP: tl.constexpr):
    x = tl.load(pointer + column, mask=column < columns, other=-float("inf")).to(dtype)
    if SOFTCAP > 0.0:
        # tanh by exp of what is never positive, so that nothing overflows. Absolute error 1e-7 * SOFTCAP in fp32.
        e = tl.exp(tl.abs(x) * (-2.0 / SOFTCAP))
        y = SOFTCAP * (1.0 - e) / (1.0 + e)
        x = tl.where(x == -float("inf"), x, tl.where(x < 0.0, -y, y))
    return x


@triton.jit
def _statistics_kernel(
    logits, index, out, stride, columns, SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr, BLOCK: tl.constexpr
):
    """One program a row. Every lane goes its own way down the row, and they meet at its end."""
    dtype: tl.constexpr = out.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    lane = tl.arange(0, BLOCK)
    maximum = tl.full([BLOCK], -3.0e38, dtype)  # finite: -inf - -inf is nan
    total = tl.zeros([BLOCK], dtype)
    summed = tl.zeros([BLOCK], dtype)
    count = tl.zeros([BLOCK], dtype)
    for start in range(0, columns, BLOCK):
        x = _load_capped(logits, start + lane, columns, dtype, SOFTCAP)
        # One exp a logit: of the sum so far and the new term, the one with the smaller maximum is scaled.
        difference = x - maximum
        e = tl.exp(-tl.abs(difference))
        total = tl.where(difference > 0.0, total * e + 1.0, total + e)
        maximum = tl.maximum(maximum, x)
        if SMOOTHING:
            exists = x != -float("inf")
            summed += tl.where(exists, x, 0.0)
            count += tl.where(exists, 1.0, 0.0)
    largest = tl.max(maximum, 0)
    out += row * 5
    tl.store(out, largest)
    tl.store(out + 1, tl.sum(total * tl.exp(maximum - largest), 0))
    target = tl.load(index + row)
    # columns - 1 stands in where the target is elsewhere
    chosen = _load_capped(logits, tl.where(target < 0, columns - 1, target), columns, dtype, SOFTCAP)
    tl.store(out + 2, tl.where(target < 0, 0.0, chosen))
    tl.store(out + 3, tl.sum(summed, 0))
    tl.store(out + 4, tl.sum(count, 0))


@triton.jit
def _gradient_kernel(
    logits, index, factors, out, stride, out_stride, columns,
    SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a block of a row; `out` may be `logits`."""
    dtype: tl.constexpr = factors.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    factors += row * 4
    maximum, scale, pull, smooth = tl.load(factors), tl.load(factors + 1), tl.load(factors + 2), tl.load(factors + 3)
    x = _load_capped(logits + row * stride, column, columns, dtype, SOFTCAP)
    grad = tl.exp(x - maximum) * scale
    grad = tl.where(column == tl.load(index + row), grad - pull, grad)
    if SMOOTHING:
        grad = tl.where(x == -float("inf"), grad, grad - smooth)
    if SOFTCAP > 0.0:
        slope = tl.maximum(x, -SOFTCAP) / SOFTCAP
        grad *= 1.0 - slope * slope
    tl.store(out + row * out_stride + column, grad.to(out.dtype.element_ty), mask=column < columns)


def _shape(columns: int) -> dict[str, int]:
    """4096: 16 values a thread, two loads of 128 bits each in bf16; larger blocks were seen to spill registers."""
    block = min(4096, triton.next_power_of_2(columns))
    return {"BLOCK": block, "num_warps": max(1, min(8, block // 512))}


def _empty_statistics(x: Tensor, index: Tensor, softcap: float, smoothing: bool) -> Tensor:
    return x.new_empty((x.shape[0], STATISTICS), dtype=torch.promote_types(x.dtype, torch.float32))


@operator("cross_entropy_statistics", _empty_statistics)
def _statistics_triton(x: Tensor, index: Tensor, softcap: float, smoothing: bool) -> Tensor:
    out = _empty_statistics(x, index, softcap, smoothing)
    if x.shape[0]:
        t, v = x.shape
        _statistics_kernel[(t,)](x, index, out, x.stride(0), v, SOFTCAP=softcap, SMOOTHING=smoothing, **_shape(v))
    return out


def _empty_gradient(x: Tensor, index: Tensor, factors: Tensor, softcap: float, smoothing: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@operator("cross_entropy_gradient", _empty_gradient)
def _gradient_triton(x: Tensor, index: Tensor, factors: Tensor, softcap: float, smoothing: bool) -> Tensor:
    out = _empty_gradient(x, index, factors, softcap, smoothing)
    _launch_gradient(x, index, factors, softcap, smoothing, out)
    return out


@on_its_device
def _launch_gradient(x: Tensor, index: Tensor, factors: Tensor, softcap: float, smoothing: bool, out: Tensor) -> None:
    if x.shape[0]:
        t, v = x.shape
        shape = _shape(v)
        grid = (t, triton.cdiv(v, shape["BLOCK"]))
        _gradient_kernel[grid](
            x, index, factors, out, x.stride(0), out.stride(0), v, SOFTCAP=softcap, SMOOTHING=smoothing, **shape
        )
