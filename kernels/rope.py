"""Rotary position embedding (Su et al., 2021, arXiv:2104.09864), in the half-split layout of Llama."""

import torch
from torch import Tensor


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate each (x[i], x[i + d/2]) by its position's angle.

    q: [s, b, n, d], k: [s, b, n_kv, d]; cos, sin: [s, b or 1, 1, d/2] in fp32 -> the same shapes and dtypes as q and k.
    """
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
