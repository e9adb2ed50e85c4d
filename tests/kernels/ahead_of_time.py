"""Compiles the kernels for a GPU that need not be here, and says what the compiler made of them.

    python tests/kernels/ahead_of_time.py 90    # sm_90; a line of JSON for each kernel

Each of `CASES` calls the public function on meta tensors, which have shapes and strides but no memory: everything up to
the launch is what happens on a GPU (block sizes, warps, which arguments are known to be divisible by 16), and in place
of the launch the kernel is compiled. In a process of its own, as the interpreter would stand in the compiler's place.
(linear_cross_entropy launches what cross_entropy does.)
"""

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megalite.kernels import cross_entropy, dispatch, rms_norm, rope, softmax, swiglu, swiglu_packed

TOKENS = 8192


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=dtype.is_floating_point)


def norm(dtype: torch.dtype, h: int, residual: bool = False):
    x, weight = empty(TOKENS, h, dtype=dtype), empty(h, dtype=dtype)
    return rms_norm(x, weight, residual=empty(TOKENS, h, dtype=dtype) if residual else None)


def attention(dtype: torch.dtype, keys: int, masked: bool = False, **options):
    mask = empty(2, 1, 1024, keys, dtype=torch.bool) if masked else None
    return softmax(empty(2, 16, 1024, keys, dtype=dtype), scale=0.125, mask=mask, **options)


def loss(dtype: torch.dtype, v: int, **options):
    return cross_entropy(empty(TOKENS, v, dtype=dtype) * 1, empty(TOKENS, dtype=torch.int64), **options)


def rotation(dtype: torch.dtype, d: int, n: int):
    q, k, _ = empty(2048, 4, n + n // 2, d, dtype=dtype).split((n, n // 4, n // 4), dim=2)  # of the fused product
    return rope(q, k, *(empty(2048, 1, 1, d // 2, dtype=torch.float32).detach() for _ in range(2)))


def activation(dtype: torch.dtype, columns: int):
    return swiglu(empty(TOKENS, columns, dtype=dtype), empty(TOKENS, columns, dtype=dtype))


def packed_activation(dtype: torch.dtype, columns: int):
    return swiglu_packed(empty(TOKENS, 2 * columns, dtype=dtype))


# The shapes that models have; and of what goes down long rows in blocks, one such row.
CASES: dict[str, Callable] = {
    **{f"rms_norm h={h}": partial(norm, h=h) for h in (2048, 4096, 8192)},
    **{f"rms_norm h={h} residual": partial(norm, h=h, residual=True) for h in (2048, 4096, 8192, 32768)},
    **{f"softmax s={s} causal": partial(attention, keys=s, causal=True) for s in (4096, 65536)},
    **{f"softmax s={s} all": partial(attention, keys=s, causal=True, masked=True, softcap=50.0) for s in (4096, 65536)},
    **{f"cross_entropy v={v}": partial(loss, v=v) for v in (32000, 128256, 131072)},
    **{
        f"cross_entropy v={v} all": partial(loss, v=v, label_smoothing=0.1, z_loss=1e-4, softcap=30.0)
        for v in (32000, 128256, 131072)
    },
    **{f"rope d={d} n={n}": partial(rotation, d=d, n=n) for d, n in ((64, 32), (128, 64))},
    "swiglu f=11008": partial(activation, columns=11008),
    "swiglu_packed f=11008": partial(packed_activation, columns=11008),
}
# To disassemble takes as long as to compile twice: of each kernel the instructions at one shape, in bf16.
DISASSEMBLED = (
    "rms_norm h=4096",
    "rms_norm h=4096 residual",
    "softmax s=4096 causal",
    "softmax s=4096 all",
    "cross_entropy v=131072 all",
    "rope d=128 n=64",
    "swiglu f=11008",
)


def describe(kernel, binary: Path, disassemble: bool) -> dict:
    """Its bytes of stack (where registers are spilled to), and how many accesses to memory of each width it has."""
    from triton.backends import nvidia

    def cuobjdump(option: str) -> str:
        command = [Path(nvidia.__file__).parent / "bin" / "cuobjdump", option, binary]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    binary.write_bytes(kernel.asm["cubin"])
    usage = {name: int(size) for name, size in re.findall(r"(REG|STACK|LOCAL):(\d+)", cuobjdump("-res-usage"))}
    return {
        "warps": kernel.metadata.num_warps,
        "registers": usage["REG"],
        "stack": usage["STACK"] + usage["LOCAL"],
        "fp64": ".f64" in kernel.asm["ptx"],
        "ptx": Counter(re.findall(r"\b(?:ld|st)\.global[.:\w]*", kernel.asm["ptx"])),
        "sass": Counter(re.findall(r"\b(?:LDG|STG)\.[.\w]*", cuobjdump("-sass"))) if disassemble else {},
    }


def main(architecture: int) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Driver:
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)
        get_current_target = staticmethod(lambda: GPUTarget("cuda", architecture, 32))

    compiled, launch = [], JITFunction.run

    def compile_only(function, *args, grid, warmup, **options):
        compiled.append((function, launch(function, *args, grid=grid, warmup=True, **options)))

    driver.set_active(Driver())
    JITFunction.run = compile_only
    dispatch._no_triton = lambda device: None  # meta tensors too
    descriptions: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as folder:
        for dtype in (torch.bfloat16, torch.float32):
            for case, call in CASES.items():
                compiled.clear()
                results = call(dtype)
                results = results if isinstance(results, tuple) else (results,)
                torch.autograd.backward(results, [torch.empty_like(result) for result in results])
                for function, kernel in compiled:
                    disassemble = case in DISASSEMBLED and dtype == torch.bfloat16
                    if kernel.hash not in descriptions or disassemble:
                        descriptions[kernel.hash] = describe(kernel, Path(folder, "cubin"), disassemble)
                    name = f"{function.__module__.removeprefix('megalite.kernels.')}.{function.__name__}"
                    print(json.dumps({"case": case, "kernel": name, "dtype": str(dtype)} | descriptions[kernel.hash]))


if __name__ == "__main__":
    main(int(sys.argv[1]))
