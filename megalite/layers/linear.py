"""Tensor-parallel linear layers without bias (Megatron-LM, arXiv:1909.08053, section 3). Shapes: [s, b, features]."""

from torch import Tensor, nn
from torch.nn import functional as F

from megalite.comms.collectives import Group, copy_to_tensor_parallel, reduce_from_tensor_parallel
from megalite.layers.sharded_init import InitSpec, sharded_parameter


class ColumnParallelLinear(nn.Module):
    """y = x W^T with W's output features split: x [s, b, in] replicated -> y [s, b, out/tp].

    outputs: sizes of the parts that share the matrix (q, k, v; gate, up); each part is split over the group by itself.
    """

    def __init__(self, name: str, in_features: int, outputs: tuple[int, ...], init: InitSpec, group: Group):
        super().__init__()
        self.group = group
        self.weight = sharded_parameter(
            f"{name}.weight", (sum(outputs), in_features), init, group=group, dim=0, segments=outputs
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(copy_to_tensor_parallel(x, self.group), self.weight)


class RowParallelLinear(nn.Module):
    """y = x W^T with W's input features split: x [s, b, in/tp] -> y [s, b, out] replicated, summed over the group."""

    def __init__(self, name: str, in_features: int, out_features: int, init: InitSpec, group: Group, std: float):
        super().__init__()
        self.group = group
        self.weight = sharded_parameter(
            f"{name}.weight", (out_features, in_features), init, std=std, group=group, dim=1
        )

    def forward(self, x: Tensor) -> Tensor:
        return reduce_from_tensor_parallel(F.linear(x, self.weight), self.group)
