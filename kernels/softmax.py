"""Softmax over attention's scores: scale, soft-cap (Gemma 2, arXiv:2408.00118, section 2), causal and boolean masks.

Shapes: ... any leading dimensions (batch, heads), sq queries, sk keys. A row is what one query gives to all keys; the
queries are the last sq of the positions that the keys have, so with a cache of earlier keys sk > sq.

For attention whose probabilities are wanted, or soft-capped: what never stores [..., sq, sk] is faster without them.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megalite.kernels.dispatch import choose, operator, tl, triton

# Rows of up to so many columns are held in registers, and read once; longer ones are read twice.
_WIDEST = 16384


def softmax(
    scores: Tensor,
    *,
    scale: float = 1.0,
    causal: bool = False,
    mask: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The probabilities of softcap * tanh(scores * scale / softcap), or without softcap of scores * scale.

    scores: [..., sq, sk] -> the same shape and dtype; computed in fp32, in fp64 from fp64. causal: query i sees keys
    0 .. sk - sq + i. mask: bool, broadcastable to scores, True where a query sees a key; nothing of its size is made.
    A query that sees no key, or none with a score above -inf, gives zeros and gets gradients of 0.
    Only scores get a gradient, and no second one. For it the result is kept, with softcap also the scores.
    Raises ValueError where mask is not bool or does not broadcast, or scores have fewer than two dimensions.
    """
    if scores.dim() < 2:
        raise ValueError(f"scores: shape {list(scores.shape)}, wants [..., queries, keys]")
    if mask is not None:
        if mask.dtype != torch.bool:
            raise ValueError(f"mask: {mask.dtype}, wants torch.bool: True where a query sees a key")
        if mask.dim() > scores.dim() or any(
            m not in (1, n) for m, n in zip(mask.shape[::-1], scores.shape[::-1], strict=False)
        ):
            raise ValueError(f"mask: shape {list(mask.shape)} does not broadcast to scores, {list(scores.shape)}")
    if choose("softmax", scores):
        return _Softmax.apply(scores, mask, float(scale), causal, None if softcap is None else float(softcap))
    return softmax_reference(scores, scale=scale, causal=causal, mask=mask, softcap=softcap)


def softmax_reference(
    scores: Tensor,
    *,
    scale: float = 1.0,
    causal: bool = False,
    mask: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    sq, sk = scores.shape[-2:]
    x = scores.to(torch.promote_types(scores.dtype, torch.float32)) * scale
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    if causal:
        later = torch.ones(sq, sk, dtype=torch.bool, device=scores.device).triu(sk - sq + 1)
        x = x.masked_fill(later, -torch.inf)
    if mask is not None:
        x = x.masked_fill(~mask, -torch.inf)
    if sk == 0:
        return x.to(scores.dtype)
    # torch makes NaN of a row of -inf, in backward too: so it sees zeros there, and its result is thrown away.
    blind = x.detach().amax(-1, keepdim=True) == -torch.inf
    return torch.softmax(x.masked_fill(blind, 0.0), dim=-1).masked_fill(blind, 0.0).to(scores.dtype)


@triton.jit
def _needed(columns, keys, bound, CAUSAL: tl.constexpr):
    """Which columns to load, of those that are: beyond `bound` keys are later than the query.

    Rounded up, as with a bound that is no multiple of a vector's length each element would be a load of its own.
    """
    inside = columns < keys
    if CAUSAL:
        inside = inside & (columns < (bound + 15) // 16 * 16)
    return inside


@triton.jit
def _decayed(scores, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    """exp(-2 |z|) of z = scores * SCALE / SOFTCAP: both tanh (there is none in tl) and its slope are ratios of it."""
    return tl.exp(-2.0 * tl.abs(scores * (SCALE / SOFTCAP)))


@triton.jit
def _load_scores(
    scores,
    mask,
    columns,
    keys,
    bound,
    mask_column,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    ACC: tl.constexpr,
):
    """Scaled and capped scores of a row, -inf where its query sees nothing; scores and mask point to its beginning."""
    inside = _needed(columns, keys, bound, CAUSAL)
    x = tl.load(scores + columns, mask=inside, other=0.0).to(ACC) * SCALE
    if SOFTCAP is not None:
        decayed = _decayed(x, 1.0, SOFTCAP)
        size = SOFTCAP * (1.0 - decayed) / (1.0 + decayed)
        x = tl.where(x < 0.0, -size, size)
    seen = columns < bound
    if MASKED:
        seen = seen & (tl.load(mask + columns.to(tl.int64) * mask_column, mask=inside, other=0) != 0)
    return tl.where(seen, x, float("-inf"))


@triton.jit
def _forward_kernel(
    scores,  # [rows, keys]
    mask,  # of uint8, read with the strides below; or None
    probabilities,  # [rows, keys]
    queries,
    keys,
    inner,
    mask_outer,
    mask_inner,
    mask_query,
    mask_column,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,  # a row is one block
):
    row = tl.program_id(0).to(tl.int64)
    query = row % queries
    scores += row * keys
    probabilities += row * keys
    if MASKED:
        group = row // queries
        mask += group // inner * mask_outer + group % inner * mask_inner + query * mask_query
    bound = keys
    if CAUSAL:
        bound = keys - queries + query.to(tl.int32) + 1
    columns = tl.arange(0, BLOCK)
    if WHOLE:
        x = _load_scores(scores, mask, columns, keys, bound, mask_column, SCALE, SOFTCAP, MASKED, CAUSAL, ACC)
        highest = tl.max(x, 0)
        x = tl.exp(x - tl.where(highest == float("-inf"), 0.0, highest))
        total = tl.sum(x, 0)
        x = x / tl.where(total == 0.0, 1.0, total)
        tl.store(probabilities + columns, x.to(probabilities.dtype.element_ty), mask=columns < keys)
    else:
        highest = tl.full((), float("-inf"), ACC)
        total = tl.full((), 0.0, ACC)
        for start in range(0, bound, BLOCK):
            at = start + columns
            x = _load_scores(scores, mask, at, keys, bound, mask_column, SCALE, SOFTCAP, MASKED, CAUSAL, ACC)
            before = highest
            highest = tl.maximum(highest, tl.max(x, 0))
            shift = tl.where(highest == float("-inf"), 0.0, highest)
            total = total * tl.exp(before - shift) + tl.sum(tl.exp(x - shift), 0)
        shift = tl.where(highest == float("-inf"), 0.0, highest)
        total = tl.where(total == 0.0, 1.0, total)
        for start in range(0, keys, BLOCK):
            at = start + columns
            x = _load_scores(scores, mask, at, keys, bound, mask_column, SCALE, SOFTCAP, MASKED, CAUSAL, ACC)
            x = tl.exp(x - shift) / total
            tl.store(probabilities + at, x.to(probabilities.dtype.element_ty), mask=at < keys)


@triton.jit
def _load_pair(probabilities, upstream, columns, keys, bound, CAUSAL: tl.constexpr, ACC: tl.constexpr):
    inside = _needed(columns, keys, bound, CAUSAL)  # elsewhere probabilities are 0
    p = tl.load(probabilities + columns, mask=inside, other=0.0).to(ACC)
    return p, tl.load(upstream + columns, mask=inside, other=0.0).to(ACC)


@triton.jit
def _scores_gradient(
    x, scores, columns, keys, bound, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, CAUSAL: tl.constexpr, ACC: tl.constexpr
):
    """From x, the gradient of the scaled and capped scores, that of the scores."""
    x = x * SCALE
    if SOFTCAP is not None:
        inside = _needed(columns, keys, bound, CAUSAL)
        decayed = _decayed(tl.load(scores + columns, mask=inside, other=0.0).to(ACC), SCALE, SOFTCAP)
        x = x * (4.0 * decayed / ((1.0 + decayed) * (1.0 + decayed)))
    return x


@triton.jit
def _backward_kernel(
    probabilities,  # [rows, keys], as are the following
    upstream,
    scores,  # None without SOFTCAP
    gradient,
    queries,
    keys,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    CAUSAL: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    probabilities += row * keys
    upstream += row * keys
    gradient += row * keys
    if SOFTCAP is not None:
        scores += row * keys
    bound = keys
    if CAUSAL:
        bound = keys - queries + (row % queries).to(tl.int32) + 1
    columns = tl.arange(0, BLOCK)
    if WHOLE:
        p, g = _load_pair(probabilities, upstream, columns, keys, bound, CAUSAL, ACC)
        x = p * (g - tl.sum(p * g, 0))
        x = _scores_gradient(x, scores, columns, keys, bound, SCALE, SOFTCAP, CAUSAL, ACC)
        tl.store(gradient + columns, x.to(gradient.dtype.element_ty), mask=columns < keys)
    else:
        total = tl.full((), 0.0, ACC)
        for start in range(0, bound, BLOCK):
            p, g = _load_pair(probabilities, upstream, start + columns, keys, bound, CAUSAL, ACC)
            total += tl.sum(p * g, 0)
        for start in range(0, keys, BLOCK):
            at = start + columns
            p, g = _load_pair(probabilities, upstream, at, keys, bound, CAUSAL, ACC)
            x = _scores_gradient(p * (g - total), scores, at, keys, bound, SCALE, SOFTCAP, CAUSAL, ACC)
            tl.store(gradient + at, x.to(gradient.dtype.element_ty), mask=at < keys)


def _blocks(keys: int, dtype: torch.dtype) -> dict:
    block = triton.next_power_of_2(keys) if keys <= _WIDEST else 4096
    acc = tl.float64 if dtype == torch.float64 else tl.float32
    return {"ACC": acc, "BLOCK": block, "WHOLE": keys <= block, "num_warps": min(max(block // 1024, 1), 16)}


def _mask_strides(mask: Tensor, shape: torch.Size) -> tuple[Tensor, int, list[int]]:
    """The mask as uint8; how many leading indices its inner stride serves; its strides: outer, inner, query, key.

    Scores have any number of leading dimensions, and the kernel knows two: those whose strides allow are merged.
    """
    mask = mask.expand(shape)
    merged: list[list[int]] = []  # size, stride
    for size, stride in zip(shape[:-2], mask.stride()[:-2], strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1] == size * stride:
            merged[-1] = [merged[-1][0] * size, stride]
        else:
            merged.append([size, stride])
    if len(merged) > 2:
        return _mask_strides(mask.contiguous(), shape)
    (_, outer), (inner, stride) = [[1, 0]] * (2 - len(merged)) + merged
    return mask.view(torch.uint8), inner, [outer, stride, *mask.stride()[-2:]]


@operator("softmax", lambda scores, *_: torch.empty_like(scores, memory_format=torch.contiguous_format))
def _forward(scores: Tensor, mask: Tensor | None, scale: float, causal: bool, softcap: float | None) -> Tensor:
    scores = scores.contiguous()
    queries, keys = scores.shape[-2:]
    probabilities = torch.empty_like(scores)
    if scores.numel() == 0:
        return probabilities
    inner, strides = 1, [0, 0, 0, 0]
    if mask is not None:
        mask, inner, strides = _mask_strides(mask, scores.shape)
    _forward_kernel[(scores.numel() // keys,)](
        scores,
        mask,
        probabilities,
        queries,
        keys,
        inner,
        *strides,
        SCALE=scale,
        SOFTCAP=softcap,
        MASKED=mask is not None,
        CAUSAL=causal,
        **_blocks(keys, scores.dtype),
    )
    return probabilities


@operator("softmax_backward", lambda probabilities, *_: torch.empty_like(probabilities))
def _backward(
    probabilities: Tensor, upstream: Tensor, scores: Tensor | None, scale: float, causal: bool, softcap: float | None
) -> Tensor:
    upstream = upstream.contiguous()
    scores = None if scores is None else scores.contiguous()
    queries, keys = probabilities.shape[-2:]
    gradient = torch.empty_like(probabilities)
    if probabilities.numel() == 0:
        return gradient
    _backward_kernel[(probabilities.numel() // keys,)](
        probabilities,
        upstream,
        scores,
        gradient,
        queries,
        keys,
        SCALE=scale,
        SOFTCAP=softcap,
        CAUSAL=causal,
        **_blocks(keys, probabilities.dtype),
    )
    return gradient


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores: Tensor, mask: Tensor | None, scale: float, causal: bool, softcap: float | None) -> Tensor:
        probabilities = _forward(scores, mask, scale, causal, softcap)
        ctx.save_for_backward(probabilities, None if softcap is None else scores)
        ctx.settings = scale, causal, softcap
        return probabilities

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        probabilities, scores = ctx.saved_tensors
        return _backward(probabilities, upstream, scores, *ctx.settings), None, None, None, None
