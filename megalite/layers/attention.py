"""Causal self-attention with grouped key/value heads (GQA, arXiv:2305.13245), tensor-parallel over heads.

Shapes: s queries, t keys, b batch, h hidden, n query heads, k key/value heads, d head size; p prefix vectors, which
stand before the tokens of every document.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megalite import kernels
from megalite.comms.collectives import Group, group_size
from megalite.layers.linear import ColumnParallelLinear, RowParallelLinear
from megalite.layers.norm import RMSNorm
from megalite.layers.sharded_init import InitSpec

Segments = list[list[int]] | Tensor
"""How attention keeps documents apart, made once a forward pass by `document_segments`."""


class KVCache:
    """Keys and values of the positions seen so far, for generation; `length` of them are filled."""

    def __init__(self, batch: int, kv_heads: int, max_length: int, head_size: int, dtype: torch.dtype, device):
        self.keys = torch.empty(batch, kv_heads, max_length, head_size, dtype=dtype, device=device)  # [b, k, t, d]
        self.values = torch.empty_like(self.keys)
        self.length = 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values [b, k, s, d]; returns all so far, [b, k, t, d]."""
        end = self.length + keys.shape[2]
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


class Attention(nn.Module):
    """x [s, b, h] -> [s, b, h]."""

    def __init__(
        self,
        name: str,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        qk_norm: bool,
        norm_eps: float,
        init: InitSpec,
        output_std: float,
        group: Group,
    ):
        super().__init__()
        tp = group_size(group)
        self.heads, self.kv_heads, self.head_size = num_heads // tp, num_kv_heads // tp, head_size
        outputs = (num_heads * head_size, num_kv_heads * head_size, num_kv_heads * head_size)
        self.qkv = ColumnParallelLinear(f"{name}.qkv", hidden_size, outputs, init, group)
        self.output = RowParallelLinear(f"{name}.output", num_heads * head_size, hidden_size, init, group, output_std)
        self.q_norm = RMSNorm(f"{name}.q_norm", head_size, norm_eps, init) if qk_norm else None
        self.k_norm = RMSNorm(f"{name}.k_norm", head_size, norm_eps, init) if qk_norm else None

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None = None, segments: Segments | None = None
    ) -> Tensor:
        s, b, _ = x.shape
        heads = self.qkv(x).view(s, b, self.heads + 2 * self.kv_heads, self.head_size)
        q, k, v = heads.split((self.heads, self.kv_heads, self.kv_heads), dim=2)  # [s, b, n or k, d]
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = kernels.rope(q, k, cos, sin)
        q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))  # [b, n or k, s, d]
        past = 0
        if cache is not None:
            past = cache.length
            k, v = cache.append(k, v)
        y = causal_attention(q, k, v, past) if segments is None else document_attention(q, k, v, segments)
        # y: [b, n, s, d]
        return self.output(y.permute(2, 0, 1, 3).reshape(s, b, self.heads * self.head_size))


def causal_attention(q: Tensor, k: Tensor, v: Tensor, past: int = 0) -> Tensor:
    """softmax(q k^T / sqrt(d)) v where query i sees keys 0 .. past + i.

    q: [b, n, s, d], k and v: [b, k, t, d] with t = past + s -> [b, n, s, d].
    """
    mask = None
    if past and q.shape[2] > 1:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(past)
    return _attend(q, k, v, mask, is_causal=past == 0)


def document_segments(documents: Tensor, prefix: int, dtype: torch.dtype, head_size: int) -> Segments | None:
    """The documents in the form in which attention is fastest here; None where each row is a single one.

    documents: [b, s], the number of each token's document, from 0, rising along a row. prefix: p. dtype: of q, k and v.
    - lists of document lengths, a list for each row, on the CPU: s^2 shrinks to the sum of the lengths' squares;
    - `document_bounds` as int32, on a GPU that has FlashAttention for it;
    - bool [b, 1, p+s, p+s], what each query sees, with a prefix or in fp32 on a GPU.
    """
    b, s = documents.shape
    if not (documents[:, 1:] != documents[:, :-1]).any():
        return None
    if not prefix and documents.device.type == "cpu":
        bounds = document_bounds(documents)
        rows = torch.bincount(bounds[:-1] // s).tolist()
        return [lengths.tolist() for lengths in bounds.diff().split(rows)]
    if not prefix and _has_varlen(documents.device, dtype, head_size):
        return document_bounds(documents).int()
    # The prefix is a document that all may see.
    documents = torch.cat((documents.new_full((b, prefix), -1), documents), dim=1)
    seen = (documents[:, :, None] == documents[:, None, :]) | (documents == -1)[:, None, :]
    return seen.tril()[:, None]


def document_bounds(documents: Tensor) -> Tensor:
    """Where documents begin among the b * s tokens, and at last b * s: [b, s] -> int64 [documents + 1]."""
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return F.pad(begins.flatten().nonzero().flatten(), (0, 1), value=documents.numel())


def document_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """Causal attention where each document sees only itself, and the prefix if there is one.

    q: [b, n, s, d], k and v: [b, k, s, d] -> [b, n, s, d].
    """
    if isinstance(segments, list):
        parts = [
            _attend(*(part[None] for part in document), is_causal=True)
            for *row, lengths in zip(q, k, v, segments, strict=True)
            for document in zip(*(x.split(lengths, dim=1) for x in row), strict=True)
        ]
        return torch.cat(parts, dim=2).unflatten(2, (q.shape[0], q.shape[2]))[0].transpose(0, 1)
    if segments.dtype == torch.bool:
        return _attend(q, k, v, segments)
    return _varlen_attention(q, k, v, segments)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=is_causal,
        scale=1.0 / math.sqrt(q.shape[-1]),
        enable_gqa=q.shape[1] != k.shape[1],
    )


def _varlen_attention(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # not above: it takes torch._dynamo, and so a second, along

    b, n, s, _ = q.shape
    # torch 2.11 has no enable_gqa here.
    k, v = (x.repeat_interleave(n // x.shape[1], dim=1) for x in (k, v))
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # [b * s, n, d]
    # s as the longest document, of which the true length would have to come from the GPU.
    y = varlen_attn(q, k, v, bounds, bounds, s, s, scale=1.0 / math.sqrt(q.shape[-1]), window_size=(-1, 0))
    return y.unflatten(0, (b, s)).transpose(1, 2)


def _has_varlen(device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
    """FlashAttention 2: half precision, Ampere or later, heads of up to 256 in steps of 8."""
    return (
        device.type == "cuda"
        and dtype in (torch.float16, torch.bfloat16)
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and head_size <= 256
        and head_size % 8 == 0
    )
