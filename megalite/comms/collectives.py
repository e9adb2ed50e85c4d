"""Conjugate collectives of tensor and sequence parallelism, as autograd Functions.

Megatron-LM's: arXiv:1909.08053, figure 3, and arXiv:2205.05198, figure 5.

A group of size one, or None, makes each of them the identity. The operators underneath start and leave, and `wait`
waits: what is computed in between overlaps on a GPU. They name the group by its name, and torch.compile can trace them.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | None


def group_size(group: Group) -> int:
    return 1 if group is None else dist.get_world_size(group)


def group_rank(group: Group) -> int:
    return 0 if group is None else dist.get_rank(group)


@dataclass(frozen=True)
class TensorParallel:
    """How layers are split.

    group: the ranks that split each layer. sequence: with sequence parallelism (arXiv:2205.05198), where each rank
    holds its part of the sequence between the split layers. kv_group: the ranks of the group that share one key/value
    head, where there are fewer heads than ranks.
    """

    group: Group = None
    sequence: bool = False
    kv_group: Group = None

    @property
    def size(self) -> int:
        return group_size(self.group)

    @property
    def rank(self) -> int:
        return group_rank(self.group)

    @property
    def sequence_group(self) -> Group:
        """The ranks that have the parts of the sequence between the split layers; None where each has all of it."""
        return self.group if self.sequence else None


def start_all_gather(x: Tensor, size: int, name: str) -> Tensor:
    """x [s, ...] of each of the `size` ranks of group `name`, in their order: [size * s, ...], once waited for."""
    return torch.ops._c10d_functional.all_gather_into_tensor(x.contiguous(), size, name)


def start_reduce_scatter(x: Tensor, size: int, name: str) -> Tensor:
    """This rank's part of the ranks' sum: x [s, ...] -> [s / size, ...], once waited for."""
    return torch.ops._c10d_functional.reduce_scatter_tensor(x.contiguous(), "sum", size, name)


def start_all_reduce(x: Tensor, name: str) -> Tensor:
    """The ranks' sum, in another tensor, once waited for."""
    return torch.ops._c10d_functional.all_reduce(x, "sum", name)


def wait(x: Tensor) -> Tensor:
    """A result that was started, when it is there; on a GPU its stream waits, not the caller."""
    return torch.ops._c10d_functional.wait_tensor(x)


class _CopyToTensorParallel(torch.autograd.Function):
    """Megatron's f: identity forward, all-reduce backward."""

    @staticmethod
    def forward(ctx, x: Tensor, name: str) -> Tensor:
        ctx.name = name
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return wait(start_all_reduce(grad, ctx.name)), None


class _ReduceFromTensorParallel(torch.autograd.Function):
    """Megatron's g: all-reduce forward, identity backward."""

    @staticmethod
    def forward(ctx, x: Tensor, name: str) -> Tensor:
        return wait(start_all_reduce(x, name))

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None


class _AllGather(torch.autograd.Function):
    """Sequence parallelism's g: all-gather forward, reduce-scatter backward."""

    @staticmethod
    def forward(ctx, x: Tensor, size: int, name: str) -> Tensor:
        ctx.group = size, name
        return wait(start_all_gather(x, size, name))

    @staticmethod
    def backward(ctx, grad: Tensor):
        return wait(start_reduce_scatter(grad, *ctx.group)), None, None


class _ReduceScatter(torch.autograd.Function):
    """Sequence parallelism's g-bar: reduce-scatter forward, all-gather backward."""

    @staticmethod
    def forward(ctx, x: Tensor, size: int, name: str) -> Tensor:
        ctx.group = size, name
        return wait(start_reduce_scatter(x, size, name))

    @staticmethod
    def backward(ctx, grad: Tensor):
        return wait(start_all_gather(grad, *ctx.group)), None, None


class _SumGradient(torch.autograd.Function):
    """f for a weight, whose gradients of half precision are added in fp32."""

    @staticmethod
    def forward(ctx, weight: Tensor, name: str) -> Tensor:
        ctx.name = name
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, grad: Tensor):
        wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
        return wait(start_all_reduce(wide, ctx.name)).to(grad.dtype), None


def copy_to_tensor_parallel(x: Tensor, group: Group) -> Tensor:
    """f, before a column-parallel layer: x is replicated, its gradients are summed over the group."""
    return x if group_size(group) == 1 else _CopyToTensorParallel.apply(x, group.group_name)


def reduce_from_tensor_parallel(x: Tensor, group: Group) -> Tensor:
    """g, after a row-parallel layer: the partial sums x of the group's ranks are added."""
    return x if group_size(group) == 1 else _ReduceFromTensorParallel.apply(x, group.group_name)


def all_gather(x: Tensor, group: Group) -> Tensor:
    """x [s, ...] of each rank -> [s * size, ...]; each rank's gradients of it are parts of a sum."""
    size = group_size(group)
    return x if size == 1 else _AllGather.apply(x, size, group.group_name)


def reduce_scatter(x: Tensor, group: Group) -> Tensor:
    """The partial sums x [s, ...] of the group's ranks are added, and each gets its part, [s / size, ...].

    Raises ValueError where s does not divide over the ranks.
    """
    size = group_size(group)
    if x.shape[0] % size:
        raise ValueError(f"{x.shape[0]} positions do not divide over {size} ranks of sequence parallelism")
    return x if size == 1 else _ReduceScatter.apply(x, size, group.group_name)


def sum_gradient(weight: Tensor, group: Group) -> Tensor:
    """A replicated weight that each rank applies to a part of the positions or heads: its gradients are summed.

    At once in each backward pass, not once a step: ZeRO-2 and ZeRO-3 divide gradients among ranks as they appear.
    """
    return weight if group_size(group) == 1 else _SumGradient.apply(weight, group.group_name)
