"""RMSNorm as a module; its weight is replicated over tensor-parallel ranks."""

from torch import Tensor, nn

from megalite import kernels
from megalite.layers.sharded_init import InitSpec, sharded_parameter


class RMSNorm(nn.Module):
    """x [..., h] -> [..., h]; with a residual [..., h], the norm of x + residual, and x + residual."""

    def __init__(self, name: str, size: int, eps: float, init: InitSpec):
        super().__init__()
        self.eps = eps
        self.weight = sharded_parameter(f"{name}.weight", (size,), init, fill=1.0)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        return kernels.rms_norm(x, self.weight, self.eps, residual)
