"""Causal self-attention with grouped key/value heads (GQA, arXiv:2305.13245), tensor-parallel over heads.

Shapes: s queries, t keys, b batch, h hidden, n query heads, k key/value heads, d head size.
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

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None = None) -> Tensor:
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
        y = causal_attention(q, k, v, past)  # [b, n, s, d]
        return self.output(y.permute(2, 0, 1, 3).reshape(s, b, self.heads * self.head_size))


def causal_attention(q: Tensor, k: Tensor, v: Tensor, past: int = 0) -> Tensor:
    """softmax(q k^T / sqrt(d)) v where query i sees keys 0 .. past + i.

    q: [b, n, s, d], k and v: [b, k, t, d] with t = past + s -> [b, n, s, d].
    """
    mask = None
    if past and q.shape[2] > 1:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(past)
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=past == 0,
        scale=1.0 / math.sqrt(q.shape[-1]),
        enable_gqa=q.shape[1] != k.shape[1],
    )
