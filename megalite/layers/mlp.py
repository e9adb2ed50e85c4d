"""The SwiGLU MLP: down(silu(gate(x)) * up(x)), gate and up in one matrix."""

from torch import Tensor, nn

from megalite import kernels
from megalite.comms.collectives import TensorParallel
from megalite.layers.linear import ColumnParallelLinear, RowParallelLinear
from megalite.layers.sharded_init import InitSpec


class MLP(nn.Module):
    """x [s, b, h] -> [s, b, h]; with sequence parallelism [s/tp, b, h] -> [s/tp, b, h]."""

    def __init__(
        self, name: str, hidden_size: int, ffn_size: int, init: InitSpec, output_std: float, tp: TensorParallel
    ):
        super().__init__()
        self.gate_up = ColumnParallelLinear(f"{name}.gate_up", hidden_size, (ffn_size, ffn_size), init, tp)
        self.down = RowParallelLinear(f"{name}.down", ffn_size, hidden_size, init, tp, output_std)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(kernels.swiglu_packed(self.gate_up(x)))  # of [s, b, 2 f/tp]
