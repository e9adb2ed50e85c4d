"""SwiGLU's elementwise part (Shazeer, 2020, arXiv:2002.05202). Shapes: `...` any leading dimensions, f the MLP's width.

Memory-bound: forward reads 2 and writes 1 element of each [..., f], backward reads 3 and writes 2.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from megalite.kernels.dispatch import check_shape, choose, operator, rows, tl, triton

_BLOCK = 1024  # columns of a program: with 4 warps one 16-byte load of bf16 a thread
_CPU_BLOCK = 2**18  # elements for each thread at a time on a CPU: what several passes go over stays in its cache


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


@triton.jit
def _forward_kernel(gate, up, y, gate_stride, up_stride, columns, ACC: tl.constexpr, BLOCK: tl.constexpr):
    blocks = (columns + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    g = tl.load(gate + row * gate_stride + column, inside, 0.0).to(ACC)
    u = tl.load(up + row * up_stride + column, inside, 0.0).to(ACC)
    tl.store(y + row * columns + column, g / (1.0 + tl.exp(-g)) * u, inside)


@triton.jit
def _backward_kernel(
    dy, gate, up, d_gate_up, dy_stride, gate_stride, up_stride, columns, ACC: tl.constexpr, BLOCK: tl.constexpr
):
    blocks = (columns + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    d = tl.load(dy + row * dy_stride + column, inside, 0.0).to(ACC)
    g = tl.load(gate + row * gate_stride + column, inside, 0.0).to(ACC)
    u = tl.load(up + row * up_stride + column, inside, 0.0).to(ACC)
    sigmoid = 1.0 / (1.0 + tl.exp(-g))
    d_gate = d_gate_up + row * 2 * columns + column
    tl.store(d_gate, d * u * sigmoid * (1.0 + g * (1.0 - sigmoid)), inside)
    tl.store(d_gate + columns, d * g * sigmoid, inside)


@operator("swiglu", fake=lambda gate, up: gate.new_empty(gate.shape))
def _forward(gate: Tensor, up: Tensor) -> Tensor:
    y = gate.new_empty(gate.shape)
    gate, up = rows(gate), rows(up)
    count, columns = gate.shape
    _forward_kernel[(count * triton.cdiv(columns, _BLOCK),)](
        gate, up, y, gate.stride(0), up.stride(0), columns, ACC=_accumulator(gate), BLOCK=_BLOCK
    )
    return y


@operator("swiglu_backward", fake=lambda dy, gate, up: gate.new_empty((*gate.shape[:-1], 2 * gate.shape[-1])))
def _backward(dy: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """Both gradients side by side, [..., 2 f]."""
    d_gate_up = gate.new_empty((*gate.shape[:-1], 2 * gate.shape[-1]))
    dy, gate, up = rows(dy), rows(gate), rows(up)
    count, columns = gate.shape
    strides = (dy.stride(0), gate.stride(0), up.stride(0))
    _backward_kernel[(count * triton.cdiv(columns, _BLOCK),)](
        dy, gate, up, d_gate_up, *strides, columns, ACC=_accumulator(gate), BLOCK=_BLOCK
    )
    return d_gate_up


def _accumulator(x: Tensor):
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def _forward_torch(gate: Tensor, up: Tensor) -> Tensor:
    y = torch.empty_like(gate, memory_format=torch.contiguous_format)
    for g, u, to in _blocks(gate, up, y):
        torch.ops.aten.silu.out(g, out=to).mul_(u)
    return y


def _backward_torch(dy: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """As `_backward`, without a pass that only moves data."""
    d_gate_up = gate.new_empty((*gate.shape[:-1], 2 * gate.shape[-1]))
    for d, g, u, to in _blocks(dy, gate, up, d_gate_up):
        d_gate, d_up = to.chunk(2, -1)
        torch.mul(d, u, out=d_gate)
        torch.ops.aten.silu_backward.grad_input(d_gate, g, grad_input=d_gate)
        torch.ops.aten.silu.out(g, out=d_up).mul_(d)
    return d_gate_up


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of each of them; on a CPU as many at a time as `_CPU_BLOCK` says of the first."""
    tensors = tuple(rows(tensor) for tensor in tensors)
    count, columns = tensors[0].shape
    if tensors[0].device.type == "cpu":
        count = _CPU_BLOCK * torch.get_num_threads() // columns
    return zip(*(tensor.split(max(count, 1)) for tensor in tensors), strict=True)


class _SwiGLU(torch.autograd.Function):
    """Of (gate, up), or of ([gate, up] in one tensor, None). Keeps its inputs: the result is cheap to get again."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor | None, triton_runs: bool) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.triton_runs = triton_runs
        run = _forward if triton_runs else _forward_torch
        return run(*(gate.chunk(2, -1) if up is None else (gate, up)))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        gate, up = ctx.saved_tensors
        run = _backward if ctx.triton_runs else _backward_torch
        if up is None:
            return run(dy, *gate.chunk(2, -1)), None, None
        return *run(dy, gate, up).chunk(2, -1), None


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, computed in at least fp32 by Triton; gate, up: [..., f] -> [..., f]. No second derivative."""
    check_shape("swiglu", "up", up, gate.shape)
    if gate.dtype != up.dtype:
        raise ValueError(f"swiglu: gate is {gate.dtype}, and up {up.dtype}")
    triton_runs = choose("swiglu", gate, up)
    if not triton_runs and torch.compiler.is_compiling():
        return swiglu_reference(gate, up)
    return _SwiGLU.apply(gate, up, triton_runs)


def swiglu_packed(gate_up: Tensor) -> Tensor:
    """swiglu(*gate_up.chunk(2, -1)): [..., 2 f] -> [..., f], whose gradient needs no concatenation."""
    triton_runs = choose("swiglu", gate_up)
    if not triton_runs and torch.compiler.is_compiling():
        return swiglu_reference(*gate_up.chunk(2, -1))
    return _SwiGLU.apply(gate_up, None, triton_runs)
