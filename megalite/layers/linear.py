"""Tensor-parallel linear layers without bias (Megatron-LM, arXiv:1909.08053, section 3; arXiv:2205.05198, section 4.2).

Shapes: s sequence, b batch, tp ranks. Between the layers x is [s, b, features], replicated; with sequence parallelism
each rank has [s/tp, b, features] of it.
"""

import torch
from torch import Tensor, nn

from megalite import kernels
from megalite.comms.collectives import (
    TensorParallel,
    start_all_gather,
    start_all_reduce,
    start_reduce_scatter,
    wait,
)
from megalite.layers.sharded_init import InitSpec, sharded_parameter


class ColumnParallelLinear(nn.Module):
    """y = x W^T with W's output features split: x [s, b, in], or [s/tp, b, in] -> y [s, b, out/tp].

    outputs: sizes of the parts that share the matrix (q, k, v; gate, up); each part is split over the group by itself.
    """

    def __init__(self, name: str, in_features: int, outputs: tuple[int, ...], init: InitSpec, tp: TensorParallel):
        super().__init__()
        self.tp = tp
        self.weight = sharded_parameter(
            f"{name}.weight", (sum(outputs), in_features), init, group=tp.group, dim=0, segments=outputs
        )

    def forward(self, x: Tensor) -> Tensor:
        return column_parallel(x, self.weight, self.tp)


class RowParallelLinear(nn.Module):
    """y = x W^T with W's input features split: x [s, b, in/tp] -> y [s, b, out], or [s/tp, b, out]."""

    def __init__(self, name: str, in_features: int, out_features: int, init: InitSpec, tp: TensorParallel, std: float):
        super().__init__()
        self.tp = tp
        self.weight = sharded_parameter(
            f"{name}.weight", (out_features, in_features), init, std=std, group=tp.group, dim=1
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.tp.size == 1:
            return kernels.linear(x, self.weight)
        x, weight = _autocast(x, self.weight)
        return _RowParallel.apply(x, weight, self.tp.size, self.tp.group.group_name, self.tp.sequence)


def column_parallel(x: Tensor, weight: Tensor, tp: TensorParallel) -> Tensor:
    """x [s, b, in], or [s/tp, b, in], times the rows [out/tp, in] that this rank has of a matrix: [s, b, out/tp]."""
    if tp.size == 1:
        return kernels.linear(x, weight)
    x, weight = _autocast(x, weight)
    return _ColumnParallel.apply(x, weight, tp.size, tp.group.group_name, tp.sequence)


def _autocast(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """In autocast's dtype, under it. Outside it both stay what they are: ZeRO-3 empties and refills the Parameter."""
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return x, weight
    dtype = torch.get_autocast_dtype(device)
    return x.to(dtype), weight.to(dtype)


# Operators of their own, because recomputation keeps the results of whole ones: no collective runs again for them.
# (torch.library.custom_op would be shorter, and takes torch._dynamo along: a second of every start.)
_library = torch.library.Library("megalite", "DEF")
_library.define("gather_linear(Tensor x, Tensor weight, int size, str name) -> Tensor")
_library.define("linear_reduce(Tensor x, Tensor weight, int size, str name, bool sequence) -> Tensor")


@torch.library.impl(_library, "gather_linear", "CompositeExplicitAutograd")
def _gather_linear(x: Tensor, weight: Tensor, size: int, name: str) -> Tensor:
    return wait(start_all_gather(x, size, name)) @ weight.t()


@torch.library.register_fake("megalite::gather_linear")
def _(x: Tensor, weight: Tensor, size: int, name: str) -> Tensor:
    return x.new_empty(x.shape[0] * size, x.shape[1], weight.shape[0])


@torch.library.impl(_library, "linear_reduce", "CompositeExplicitAutograd")
def _linear_reduce(x: Tensor, weight: Tensor, size: int, name: str, sequence: bool) -> Tensor:
    y = x @ weight.t()
    return wait(start_reduce_scatter(y, size, name) if sequence else start_all_reduce(y, name))


@torch.library.register_fake("megalite::linear_reduce")
def _(x: Tensor, weight: Tensor, size: int, name: str, sequence: bool) -> Tensor:
    return x.new_empty(x.shape[0] // size if sequence else x.shape[0], x.shape[1], weight.shape[0])


class _ColumnParallel(torch.autograd.Function):
    """f and the product, or the all-gather and the product. What is kept of x is this rank's part."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, size: int, name: str, sequence: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.tp = size, name, sequence
        return torch.ops.megalite.gather_linear(x, weight, size, name) if sequence else x @ weight.t()

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        size, name, sequence = ctx.tp
        grad, dx, dweight = grad.contiguous(), None, None
        if sequence:
            x = start_all_gather(x, size, name)  # beside the product of dx
        if ctx.needs_input_grad[0]:
            dx = grad @ weight  # whose sum is made beside the product of dweight
            dx = start_reduce_scatter(dx, size, name) if sequence else start_all_reduce(dx, name)
        if sequence:
            x = wait(x)
        if ctx.needs_input_grad[1]:
            dweight = _weight_gradient(grad, x)
        return None if dx is None else wait(dx), dweight, None, None, None


class _RowParallel(torch.autograd.Function):
    """The product and g, or the product and the reduce-scatter."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, size: int, name: str, sequence: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.tp = size, name, sequence
        return torch.ops.megalite.linear_reduce(x, weight, size, name, sequence)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        size, name, sequence = ctx.tp
        grad = wait(start_all_gather(grad, size, name)) if sequence else grad.contiguous()
        dx = grad @ weight if ctx.needs_input_grad[0] else None
        dweight = _weight_gradient(grad, x) if ctx.needs_input_grad[1] else None
        return dx, dweight, None, None, None


def _weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """grad [s, b, out], x [s, b, in] -> [out, in]."""
    return grad.flatten(0, 1).t() @ x.flatten(0, 1)
