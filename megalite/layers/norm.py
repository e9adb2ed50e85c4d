"""RMSNorm as a module; its weight is replicated over tensor-parallel ranks."""

from torch import Tensor, nn

from megalite import kernels
from megalite.layers.sharded_init import InitSpec, sharded_parameter


class RMSNorm(nn.Module):
    """x [..., h] -> [..., h]."""

    def __init__(self, name: str, size: int, eps: float, init: InitSpec):
        super().__init__()
        self.eps = eps
        self.weight = sharded_parameter(f"{name}.weight", (size,), init, fill=1.0)

    def forward(self, x: Tensor) -> Tensor:
        return kernels.rms_norm(x, self.weight, self.eps)
