"""Rotary position embedding (Su et al., 2021, arXiv:2104.09864), in the half-split layout of Llama.

Shapes: s sequence, b batch, n query heads, n_kv key heads, d head size.
Memory-bound: q and k are read and written once each, forward and backward.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megalite.kernels.dispatch import check_shape, choose, operator, tl, triton

_TILE = 4096  # elements of half a head's width times heads that a program holds at a time


def rope_reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def _apply_torch(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    return tuple(_rotate_in_place(x, cos, sin, -1.0 if inverse else 1.0) for x in (q, k))


def _rotate_in_place(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    """`_rotate` by sign * angle, into a result that lies in memory as [b, n, s, d], the order that attention reads.

    In that order the inner loop runs over positions, whose angles lie next to each other: three times as fast on a CPU.
    """
    s, b, n, d = x.shape
    dtype = torch.promote_types(x.dtype, cos.dtype)
    y = torch.empty(b, n, s, d, dtype=dtype, device=x.device).permute(2, 0, 1, 3)
    (a, b), (to_a, to_b) = x.chunk(2, -1), y.chunk(2, -1)
    torch.mul(a, cos, out=to_a).addcmul_(b, sin, value=-sign)
    torch.mul(b, cos, out=to_b).addcmul_(a, sin, value=sign)
    return y.to(x.dtype)


@triton.jit
def _rotate_heads(x, y, cos, sin, stride, n, half, ACC: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr):
    """All heads of one token; x: its first element, `stride` elements from head to head; y the same, contiguous."""
    column = tl.arange(0, HALF)[None, :]
    for first in range(0, n, HEADS):
        head = (first + tl.arange(0, HEADS)[:, None]).to(tl.int64)
        inside = (head < n) & (column < half)
        a = tl.load(x + head * stride + column, inside, 0.0).to(ACC)
        b = tl.load(x + head * stride + half + column, inside, 0.0).to(ACC)
        to = y + head * (2 * half) + column
        tl.store(to, a * cos - b * sin, inside)
        tl.store(to + half, b * cos + a * sin, inside)


@triton.jit
def _rope_kernel(
    q,
    k,
    cos,
    sin,
    q_out,
    k_out,
    q_s,  # strides of q: from position to position, batch to batch, head to head
    q_b,
    q_n,
    k_s,
    k_b,
    k_n,
    cos_s,
    cos_b,
    sin_s,
    sin_b,
    batch,
    n,
    n_kv,
    half,
    INVERSE: tl.constexpr,
    ACC: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    """One token a program."""
    token = tl.program_id(0).to(tl.int64)
    s, b = token // batch, token % batch
    column = tl.arange(0, HALF)[None, :]
    c = tl.load(cos + s * cos_s + b * cos_b + column, column < half, 0.0).to(ACC)
    t = tl.load(sin + s * sin_s + b * sin_b + column, column < half, 0.0).to(ACC)
    if INVERSE:
        t = -t
    _rotate_heads(q + s * q_s + b * q_b, q_out + token * n * 2 * half, c, t, q_n, n, half, ACC, HEADS, HALF)
    _rotate_heads(k + s * k_s + b * k_b, k_out + token * n_kv * 2 * half, c, t, k_n, n_kv, half, ACC, HEADS, HALF)


def _fake(q, k, cos, sin, inverse):
    return q.new_empty(q.shape), k.new_empty(k.shape)


@operator("rope", fake=_fake)
def _apply(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """One launch for q and k; both may be slices of a larger tensor."""
    results = q.new_empty(q.shape), k.new_empty(k.shape)
    # `inverse` comes with gradients, which may be of any layout.
    q, k, cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, cos, sin))
    s, b, n, d = q.shape
    cos, sin = (x.expand(s, b, 1, d // 2) for x in (cos, sin))
    half = triton.next_power_of_2(max(d // 2, 1))
    _rope_kernel[(s * b,)](
        q,
        k,
        cos,
        sin,
        *results,
        *q.stride()[:3],
        *k.stride()[:3],
        *cos.stride()[:2],
        *sin.stride()[:2],
        b,
        n,
        k.shape[2],
        d // 2,
        INVERSE=inverse,
        ACC=tl.float64 if q.dtype == torch.float64 else tl.float32,
        HEADS=min(triton.next_power_of_2(n), max(1, _TILE // half)),
        HALF=half,
    )
    return results


class _Rope(torch.autograd.Function):
    """Its backward is the rotation the other way, of the gradients: nothing of q and k is kept."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, triton_runs: bool) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.triton_runs = triton_runs
        return (_apply if triton_runs else _apply_torch)(q, k, cos, sin, False)

    @staticmethod
    @once_differentiable
    def backward(ctx, dq: Tensor, dk: Tensor):
        run = _apply if ctx.triton_runs else _apply_torch
        return *run(dq, dk, *ctx.saved_tensors, True), None, None, None


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate each (x[i], x[i + d/2]) by its position's angle, in fp32.

    q: [s, b, n, d], k: [s, b, n_kv, d]; cos, sin: [s, b or 1, 1, d/2] in fp32 -> the same shapes and dtypes as q and k.
    No gradient to cos and sin, and no second derivative.
    """
    check_shape("rope", "k", k, (*q.shape[:2], k.shape[-2], q.shape[-1]))
    triton_runs = choose("rope", q, k, cos, sin)
    if not triton_runs and torch.compiler.is_compiling():
        return rope_reference(q, k, cos, sin)
    return _Rope.apply(q, k, cos, sin, triton_runs)
