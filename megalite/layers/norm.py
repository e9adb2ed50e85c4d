"""RMSNorm as a module; its weight is replicated over tensor-parallel ranks."""

from torch import Tensor, nn

from megalite import kernels
from megalite.comms.collectives import Group, sum_gradient
from megalite.layers.sharded_init import InitSpec, sharded_parameter


class RMSNorm(nn.Module):
    """x [..., h] -> [..., h]; with a residual [..., h], the norm of x + residual, and x + residual.

    partial: the group of the ranks of which each sees a part of what the weight is applied to (of the positions, or of
    the heads), over which the weight's gradient is summed. None: each sees all.
    """

    def __init__(self, name: str, size: int, eps: float, init: InitSpec, partial: Group = None):
        super().__init__()
        self.eps, self.partial = eps, partial
        self.weight = sharded_parameter(f"{name}.weight", (size,), init, fill=1.0)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        return kernels.rms_norm(x, sum_gradient(self.weight, self.partial), self.eps, residual)
