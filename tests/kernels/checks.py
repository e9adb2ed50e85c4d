"""What the tests of every operator need: inputs of any layout, and comparisons with fp64."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

from megalite.kernels import dispatch

REPOSITORY = Path(__file__).resolve().parents[2]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Half the distance between neighbouring numbers: what rounding the exact result once may change.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# What arithmetic in fp32 adds: a few roundings of 6e-8 of intermediate results of size 1 to 100.
RELATIVE, ABSOLUTE = 2e-6, 1e-5


def draw(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Tensor:
    """Normal numbers, the same on every device."""
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return numbers.to(device, dtype).requires_grad_()


def laid_out(x: Tensor, kind: str) -> Tensor:
    """x as autograd may hand it on: dense, a slice of something larger, with gaps, or one number for all (stride 0)."""
    x = x.detach()
    if kind == "slice":
        x = torch.cat((x, x), -1)[..., : x.shape[-1]]
    elif kind == "strided":
        x = torch.stack((x, x), -1)[..., 0]
    elif kind == "expanded":
        x = torch.full((), 0.75, dtype=x.dtype, device=x.device).expand(x.shape)
    return x.requires_grad_()


LAYOUTS = ("dense", "slice", "strided", "expanded")


def compare(function, reference, inputs: list[Tensor], layout: str = "dense", absolute: float = ABSOLUTE) -> None:
    """Outputs of `function`, and the gradients of its inputs, against those of `reference` on the same numbers in fp64.

    Tolerance: the result's own rounding, once, and the arithmetic's of fp32. layout: of the gradients from above.
    """
    exact = [x.detach().double().requires_grad_() for x in inputs]
    got, want = function(*inputs), reference(*exact)
    got, want = (y if isinstance(y, tuple) else (y,) for y in (got, want))
    upstream = [laid_out(draw(*y.shape, dtype=y.dtype, device=y.device, seed=99), layout).detach() for y in got]
    before = [g.clone() for g in upstream]
    gradients = torch.autograd.grad(got, inputs, upstream)
    exact_gradients = torch.autograd.grad(want, exact, [g.double() for g in upstream])
    assert [g.dtype for g in gradients] == [x.dtype for x in inputs]
    for actual, expected in zip((*got, *gradients), (*want, *exact_gradients), strict=True):
        tolerance = ROUNDING[actual.dtype] * 1.01 + RELATIVE
        torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=absolute)
    assert all(map(torch.equal, upstream, before)), "it wrote into the gradient it was given"


def compare_compiled(function, inputs: list[Tensor]) -> None:
    """Under torch.compile, in one graph: the same numbers as eagerly, forward and backward."""
    upstream = None
    results = []
    for each in (function, torch.compile(function, backend="aot_eager", fullgraph=True)):
        outputs = each(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        upstream = upstream or [draw(*y.shape, dtype=y.dtype, device=y.device, seed=99).detach() for y in outputs]
        results.append((*outputs, *torch.autograd.grad(outputs, inputs, upstream)))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def check_operator(op, *arguments) -> None:
    """A registered operator: schema, and that its fake has the shapes, dtypes and strides of the real one."""
    detached = [x.detach() if isinstance(x, Tensor) else x for x in arguments]
    torch.library.opcheck(op.registered, detached, test_utils=("test_schema", "test_faketensor"))


FAR = """
def far(seed):
    apart = 2**30 + 8
    x = torch.empty(2 * apart + 16, dtype=torch.bfloat16, device=device).as_strided((3, 16), (apart, 1))
    return x.copy_(torch.randn(3, 16, generator=torch.Generator().manual_seed(seed)))
"""


def in_subprocess(code: str, timeout: float = 120) -> str:
    """What `code` prints in a process of its own, where an access out of bounds ends nothing else.

    It starts as these tests do, with Triton's interpreter where there is no GPU, and `device` set. far(seed) is a
    random bf16 [3, 16] whose rows stand so far apart that the third begins beyond int32.
    """
    device = "cuda" if not dispatch.INTERPRETED else "cpu"
    header = (
        f"import tests.kernels, torch\nfrom megalite.kernels import dispatch\n"
        f"dispatch.use('triton')\ndevice = {device!r}\n{FAR}"
    )
    done = subprocess.run(
        [sys.executable, "-c", header + code],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, f"ended with {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout
