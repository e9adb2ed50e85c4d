"""RMSNorm (Zhang and Sennrich, 2019, arXiv:1910.07467), optionally fused with the residual addition before it."""

import torch
from torch import Tensor
from torch.nn import functional as F


def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-6, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """x / sqrt(mean(x^2) + eps) * weight, with the statistics in at least fp32.

    x: [..., h], weight: [h] -> [..., h] in x's dtype. With `residual` [..., h] it normalises x + residual and
    returns (the result, x + residual): the second is the new residual stream.
    """
    if residual is not None:
        x = x + residual
    if x.dtype in (torch.float32, torch.float64):
        y = F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)
    else:
        y = F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)
    return y if residual is None else (y, x)
