"""SwiGLU's elementwise part (Shazeer, 2020, arXiv:2002.05202)."""

from torch import Tensor
from torch.nn import functional as F


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up; gate, up: [..., f] -> [..., f]."""
    return F.silu(gate) * up
