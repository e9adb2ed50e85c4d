"""Triton's interpreter with the bf16 of a GPU.

The interpreter holds bf16 as uint16. Its cast from fp32 cuts off the low bits where a GPU rounds to nearest even, and
its arithmetic on bf16 works on the bit patterns. `patch` mends the cast, and makes such arithmetic an error: kernels
convert to fp32 when they load. (A matrix product takes bf16 on a GPU too; here its operands are converted.)
"""

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, ScanOps, TensorHandle


def round_to_bf16(x: np.ndarray) -> np.ndarray:
    """fp32 or fp64 -> the bits of the nearest bf16 as uint16, ties to even. fp64 goes by way of fp32."""
    with np.errstate(over="ignore"):  # beyond fp32 is infinite
        bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded.astype(np.uint16)).reshape(np.shape(x))


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """The bits of bf16 -> fp32, exactly."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def is_bf16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16  # a pointer's scalar is the pointer


def patch() -> None:
    """Idempotent, and for the whole process."""
    if getattr(InterpreterBuilder, "rounds_bf16", False):
        return
    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def cast_impl(self, source, dtype):
        if is_bf16(source) and dtype.scalar != tl.bfloat16:
            source = TensorHandle(from_bf16(source.data), tl.float32)
            return source if dtype.scalar == tl.float32 else cast(self, source, dtype)
        if dtype.scalar == tl.bfloat16 and source.dtype.scalar in (tl.float32, tl.float64, tl.float16):
            return TensorHandle(round_to_bf16(source.data), tl.bfloat16)
        return cast(self, source, dtype)

    def create_dot(self, a, b, *rest):
        a, b = (TensorHandle(from_bf16(x.data), tl.float32) if is_bf16(x) else x for x in (a, b))
        return dot(self, a, b, *rest)

    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = cast_impl, create_dot
    InterpreterBuilder.binary_op = _refusing_bf16(InterpreterBuilder.binary_op, 2)
    InterpreterBuilder.unary_op = _refusing_bf16(InterpreterBuilder.unary_op, 1)
    InterpreterBuilder.create_fma = _refusing_bf16(InterpreterBuilder.create_fma, 3)
    for operation in (ReduceOps, ScanOps):
        operation.apply_impl = _refusing_bf16_input(operation.apply_impl)
    InterpreterBuilder.rounds_bf16 = True


def _refusing_bf16(original, operands: int):
    def method(self, *args):
        if any(is_bf16(handle) for handle in args[:operands]):
            raise TypeError("arithmetic on bf16: convert to fp32 first")
        return original(self, *args)

    return method


def _refusing_bf16_input(original):
    def apply_impl(self, tensors):
        if any(is_bf16(tensor.handle) for tensor in tensors):
            raise TypeError("a reduction of bf16: convert to fp32 first")
        return original(self, tensors)

    return apply_impl
