"""RMSNorm (Zhang and Sennrich, 2019, arXiv:1910.07467), optionally fused with the residual addition before it.

Shapes: `...` any leading dimensions, together `rows`; h hidden. In formulas, z: what is normalised (x, or x + residual
rounded to its dtype), r = 1 / sqrt(mean(z^2) + eps) of each row, in fp32.
Memory-bound: forward reads x and writes y (with a residual, 2 and 2), backward reads 2 and writes 1 (3 and 1).
"""

import functools

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from megalite.kernels.dispatch import check_shape, choose, operator, rows, tl, triton

# A row up to this is held in registers, a longer one is read twice, in blocks. Backward holds more for each column.
_LONGEST_FORWARD, _LONGEST_BACKWARD, _BLOCK = 16384, 8192, 4096


def rms_norm_reference(
    x: Tensor, weight: Tensor, eps: float = 1e-6, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    if residual is not None:
        x = x + residual
    if x.dtype in (torch.float32, torch.float64):
        y = F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)
    else:
        y = F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)
    return y if residual is None else (y, x)


@triton.jit
def _load_sum(x, residual, z, at, inside, ACC: tl.constexpr, HAS_RESIDUAL: tl.constexpr):
    """z: x, or x + residual as its dtype rounds it, which is stored."""
    value = tl.load(x + at, inside, 0.0).to(ACC)
    if HAS_RESIDUAL:
        rounded = (value + tl.load(residual + at, inside, 0.0).to(ACC)).to(z.dtype.element_ty)
        tl.store(z + at, rounded, inside)
        value = rounded.to(ACC)
    return value


@triton.jit
def _forward_kernel(
    x,
    residual,
    weight,
    y,
    z,  # where x + residual goes; without a residual it is x
    r,
    x_stride,  # from row to row
    residual_stride,
    z_stride,
    h,
    EPS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,  # a row fits in BLOCK
    HAS_RESIDUAL: tl.constexpr,
):
    """One row a program."""
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    y += row * h
    z += row * z_stride
    if HAS_RESIDUAL:
        residual += row * residual_stride
    column = tl.arange(0, BLOCK)
    if WHOLE:
        inside = column < h
        value = _load_sum(x, residual, z, column, inside, ACC, HAS_RESIDUAL)
        scale = tl.rsqrt(tl.sum(value * value, 0) / h + EPS)
        w = tl.load(weight + column, inside, 0.0).to(ACC)
        tl.store(y + column, value * scale * w, inside)
    else:
        squares = tl.zeros((BLOCK,), ACC)
        for first in range(0, h, BLOCK):
            value = _load_sum(x, residual, z, first + column, first + column < h, ACC, HAS_RESIDUAL)
            squares += value * value
        scale = tl.rsqrt(tl.sum(squares, 0) / h + EPS)
        tl.debug_barrier()  # threads now read z as others wrote it
        for first in range(0, h, BLOCK):
            inside = first + column < h
            value = tl.load(z + first + column, inside, 0.0).to(ACC)
            w = tl.load(weight + first + column, inside, 0.0).to(ACC)
            tl.store(y + first + column, value * scale * w, inside)
    tl.store(r + row, scale)


@triton.jit
def _backward_kernel(
    dy,
    dz,  # the gradient that comes by way of the new residual
    z,
    weight,
    r,
    dx,
    dw,  # [programs, h]: each program's share of the weight's gradient
    dy_stride,
    dz_stride,
    z_stride,
    count,
    h,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
    HAS_DZ: tl.constexpr,
):
    """Every programs-th row. dx = r (w dy - z r mean(w dy z r)) + dz; dw = sum over rows of dy z r."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    row = program.to(tl.int64)
    dw += row * h
    column = tl.arange(0, BLOCK)
    if WHOLE:
        inside = column < h
        w = tl.load(weight + column, inside, 0.0).to(ACC)
        total = tl.zeros((BLOCK,), ACC)
        for _ in range((count - program + programs - 1) // programs):
            scale = tl.load(r + row)
            normed = tl.load(z + row * z_stride + column, inside, 0.0).to(ACC) * scale
            d = tl.load(dy + row * dy_stride + column, inside, 0.0).to(ACC)
            total += d * normed
            d = d * w
            d = scale * (d - normed * (tl.sum(d * normed, 0) / h))
            if HAS_DZ:
                d += tl.load(dz + row * dz_stride + column, inside, 0.0).to(ACC)
            tl.store(dx + row * h + column, d, inside)
            row += programs
        tl.store(dw + column, total, inside)
    else:  # dw is zero at first, and each block of it is added to in memory
        for _ in range((count - program + programs - 1) // programs):
            scale = tl.load(r + row)
            products = tl.zeros((BLOCK,), ACC)
            for first in range(0, h, BLOCK):
                at, inside = first + column, first + column < h
                normed = tl.load(z + row * z_stride + at, inside, 0.0).to(ACC) * scale
                d = tl.load(dy + row * dy_stride + at, inside, 0.0).to(ACC)
                products += d * tl.load(weight + at, inside, 0.0).to(ACC) * normed
            mean = tl.sum(products, 0) / h
            for first in range(0, h, BLOCK):
                at, inside = first + column, first + column < h
                normed = tl.load(z + row * z_stride + at, inside, 0.0).to(ACC) * scale
                d = tl.load(dy + row * dy_stride + at, inside, 0.0).to(ACC)
                tl.store(dw + at, tl.load(dw + at, inside, 0.0) + d * normed, inside)
                d = scale * (d * tl.load(weight + at, inside, 0.0).to(ACC) - normed * mean)
                if HAS_DZ:
                    d += tl.load(dz + row * dz_stride + at, inside, 0.0).to(ACC)
                tl.store(dx + row * h + at, d, inside)
            tl.debug_barrier()  # the next row's threads read dw as these wrote it
            row += programs


def _fake_forward(x, weight, eps, residual):
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    y = x.new_empty(x.shape, dtype=dtype)
    r = x.new_empty(x.shape[:-1], dtype=torch.promote_types(dtype, torch.float32))
    return y, x.new_empty(0 if residual is None else x.shape, dtype=dtype), r


@operator("rms_norm", fake=_fake_forward)
def _forward(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(y, x + residual, or nothing where there is no residual, r)."""
    y, z, r = _fake_forward(x, weight, eps, residual)
    x = rows(x)
    summed = rows(z) if residual is not None else x
    residual = rows(residual) if residual is not None else x
    count, h = x.shape
    settings = _settings(h, _LONGEST_FORWARD, r.dtype)
    strides = x.stride(0), residual.stride(0), summed.stride(0)
    _forward_kernel[(count,)](
        x, residual, weight.contiguous(), y, summed, r, *strides, h, EPS=eps, HAS_RESIDUAL=z.numel() > 0, **settings
    )
    return y, z, r


def _fake_backward(dy, dz, z, weight, r):
    return z.new_empty(z.shape), weight.new_empty(weight.shape)


@operator("rms_norm_backward", fake=_fake_backward)
def _backward(dy: Tensor, dz: Tensor | None, z: Tensor, weight: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of z and of the weight."""
    dx = z.new_empty(z.shape)
    dy, z = rows(dy), rows(z)
    count, h = z.shape
    settings = _settings(h, _LONGEST_BACKWARD, r.dtype)
    programs = min(count, _most_programs(z.device))
    dw = r.new_empty(programs, h) if settings["WHOLE"] else r.new_zeros(programs, h)
    other = dy if dz is None else rows(dz)
    strides = dy.stride(0), other.stride(0), z.stride(0)
    if settings["WHOLE"]:
        # Two programs of up to 8 warps fill a multiprocessor's 64 K registers so, and no more of them are launched. The
        # compiler, which does not know that, would spill registers to make room for a third.
        settings["maxnreg"] = 128
    _backward_kernel[(programs,)](
        dy, other, z, weight.contiguous(), r, dx, dw, *strides, count, h, HAS_DZ=dz is not None, **settings
    )
    return dx, dw.sum(0).to(weight.dtype)


def _settings(h: int, longest: int, accumulator: torch.dtype) -> dict:
    whole = h <= longest
    block = triton.next_power_of_2(h) if whole else _BLOCK
    accumulator = tl.float64 if accumulator == torch.float64 else tl.float32
    warps = min(max(block // 512, 4), 16) if whole else 16
    return {"ACC": accumulator, "BLOCK": block, "WHOLE": whole, "num_warps": warps}


@functools.cache
def _most_programs(device: torch.device) -> int:
    """Of backward: two for each multiprocessor, as every program writes a row of partial sums. Few on a CPU."""
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _forward_torch(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """As `_forward`, in fp32 or fp64: fewer passes than torch's own, and results in place of what they come from."""
    z = x if residual is None else x + residual
    y = torch.mul(z, z, out=z.new_empty(z.shape))
    r = y.mean(-1).add_(eps).rsqrt_()
    torch.mul(z, r.unsqueeze(-1), out=y).mul_(weight)
    return y, z, r


def _backward_torch(dy: Tensor, dz: Tensor | None, z: Tensor, weight: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """As `_backward`."""
    products = torch.mul(dy, z, out=z.new_empty(z.shape)).view(-1, z.shape[-1])
    dw = products.t() @ r.view(-1)
    along_z = (products @ weight).view(r.shape).mul_(r).mul_(r).div_(-z.shape[-1]).unsqueeze(-1)
    dx = torch.mul(dy, weight, out=products.view(z.shape)).addcmul_(z, along_z).mul_(r.unsqueeze(-1))
    return dx if dz is None else dx.add_(dz), dw


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, triton_runs: bool):
        y, z, r = (_forward if triton_runs else _forward_torch)(x, weight, eps, residual)
        ctx.save_for_backward(x if residual is None else z, weight, r)
        ctx.dtypes = x.dtype, None if residual is None else residual.dtype
        ctx.triton_runs = triton_runs
        ctx.set_materialize_grads(False)
        return y if residual is None else (y, z)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor | None, dz: Tensor | None = None):
        z, weight, r = ctx.saved_tensors
        run = _backward if ctx.triton_runs else _backward_torch
        dx, dw = (dz, None) if dy is None else run(dy, dz, z, weight, r)
        to_x, to_residual = (None if dtype is None or dx is None else dx.to(dtype) for dtype in ctx.dtypes)
        return to_x, dw, None, to_residual, None


def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-6, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """x / sqrt(mean(x^2) + eps) * weight, with the statistics in at least fp32.

    x: [..., h], weight: [h] -> [..., h] in x's dtype. With `residual` [..., h] it normalises x + residual and
    returns (the result, x + residual): the second is the new residual stream. No second derivative from Triton, nor on
    a CPU.
    """
    check_shape("rms_norm", "weight", weight, x.shape[-1:])
    if residual is not None:
        check_shape("rms_norm", "residual", residual, x.shape)
    triton_runs = choose("rms_norm", x, weight, residual)
    if triton_runs or _by_hand(x, weight, residual):
        return _RMSNorm.apply(x, weight, eps, residual, triton_runs)
    return rms_norm_reference(x, weight, eps, residual)


def _by_hand(x: Tensor, weight: Tensor, residual: Tensor | None) -> bool:
    """Whether `_forward_torch` runs where Triton does not: on a CPU, in one wide dtype, and not in a compiled graph."""
    dtypes = {tensor.dtype for tensor in (x, weight, residual) if tensor is not None}
    wide = dtypes in ({torch.float32}, {torch.float64})
    return x.device.type == "cpu" and wide and not torch.compiler.is_compiling()
