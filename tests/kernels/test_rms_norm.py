"""RMSNorm's kernels against fp64, forward and backward."""

import pytest
import torch

from megalite.kernels.dispatch import using
from megalite.kernels.rms_norm import _backward, _forward, rms_norm
from tests.kernels import INTERPRETED
from tests.kernels.checks import (
    DTYPES,
    LAYOUTS,
    check_operator,
    compare,
    compare_compiled,
    draw,
    in_subprocess,
    laid_out,
)


def reference(x, weight, eps=1e-6):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def rows_for(device: str, size: int) -> int:
    """More rows than backward has programs; a GPU has two programs for each of up to 200 multiprocessors."""
    return (9 if size < 5000 else 5) if device == "cpu" else 500  # 4 on a CPU


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 7, 100, 2048, 50257])
def test_sizes(device, dtype, size):
    rows = rows_for(device, size)
    x, weight = draw(rows, size, dtype=dtype, device=device), draw(size, dtype=dtype, device=device, seed=1)
    # The weight's gradient sums `rows` products of size 1 to 10.
    compare(rms_norm, reference, [x, weight], absolute=1e-5 * max(1, rows / 50))
    assert rms_norm(x, weight).dtype == dtype


def summed(x, residual, weight):
    y, total = rms_norm(x, weight, residual=residual)
    return y, total


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 100, 20000])
def test_residual(device, dtype, size):
    def expected(x, residual, weight):
        total = x + residual
        # The new residual stream has the model's precision, and the norm sees what the stream holds.
        total = total + (total.detach().to(dtype).double() - total.detach())
        return reference(total, weight), total

    rows = rows_for(device, size)
    x, residual = (draw(rows, size, dtype=dtype, device=device, seed=seed) for seed in (0, 1))
    weight = draw(size, dtype=dtype, device=device, seed=2)
    compare(summed, expected, [x, residual, weight], absolute=1e-5 * max(1, rows / 50))


@pytest.mark.parametrize("upstream", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(device, layout, upstream):
    """Of inputs and of gradients; leading dimensions that cannot be one by strides alone."""
    x = laid_out(draw(3, 4, 2, 10, device=device), layout)[:, 1:].detach().requires_grad_()
    residual = laid_out(draw(3, 3, 2, 10, device=device, seed=1), layout)
    weight = laid_out(draw(10, device=device, seed=2), layout)
    compare(
        summed,
        lambda x, residual, weight: (reference(x + residual, weight), x + residual),
        [x, residual, weight],
        upstream,
    )


def test_residual_in_fp32_beside_bf16(device):
    """As under autocast: a matrix product's bf16 joins a stream of fp32."""
    x = draw(5, 40, dtype=torch.bfloat16, device=device)
    residual, weight = draw(5, 40, device=device, seed=1), draw(40, device=device, seed=2)
    compare(summed, lambda x, residual, weight: (reference(x + residual, weight), x + residual), [x, residual, weight])
    assert [y.dtype for y in summed(x, residual, weight)] == [torch.float32, torch.float32]


@pytest.mark.parametrize("used", [0, 1])
def test_a_result_that_nobody_uses(device, used):
    x, residual, weight = (draw(*shape, device=device, seed=9) for shape in ((3, 8), (3, 8), (8,)))
    with using("torch"):
        want = torch.autograd.grad(summed(x, residual, weight)[used].sum(), (x, residual, weight), allow_unused=True)
    got = torch.autograd.grad(summed(x, residual, weight)[used].sum(), (x, residual, weight), allow_unused=True)
    torch.testing.assert_close(got[:2], want[:2])
    assert used or torch.allclose(got[2], want[2])


def test_weight_gradient_is_summed_in_fp32(device):
    """Liger-Kernel #512: in bf16, 1 + 2^-9 is 1."""
    x, weight = torch.ones(64, 1, dtype=torch.bfloat16, device=device), torch.ones(1, device=device, requires_grad=True)
    upstream = torch.full((64, 1), 2.0**-9, dtype=torch.bfloat16, device=device)
    upstream[:4] = 1.0
    rms_norm(x, weight, 0.0).backward(upstream)
    assert weight.grad.item() == 4 + 60 * 2.0**-9


def test_statistics_are_fp32(device):
    """In fp16, 300^2 is infinite; in bf16, a sum of 4096 ones stops at 256."""
    large = torch.full((1, 64), 300.0, dtype=torch.float16, device=device)
    assert torch.equal(rms_norm(large, torch.ones(64, device=device)), torch.ones_like(large))
    ones = torch.ones(1, 4096, dtype=torch.bfloat16, device=device)
    assert torch.equal(rms_norm(ones, torch.ones(4096, device=device)), ones)


def test_eps(device):
    x, weight = torch.full((1, 4), 1e-3, device=device), torch.ones(4, device=device)
    torch.testing.assert_close(rms_norm(x, weight, eps=1e-2), x / (1e-6 + 1e-2) ** 0.5)
    assert torch.equal(rms_norm(torch.zeros_like(x), weight), torch.zeros_like(x))


def test_no_rows(device):
    x, weight = draw(0, 8, device=device), draw(8, device=device)
    rms_norm(x, weight).sum().backward()
    assert x.grad.shape == (0, 8)
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_backward_twice_gives_the_same(device):
    """Liger-Kernel #272 and #1251: what backward reads must not be what it wrote."""
    inputs = [draw(*shape, device=device, seed=3) for shape in ((5, 8), (5, 8), (8,))]
    y = sum(part.square().sum() for part in summed(*inputs))
    first = torch.autograd.grad(y, inputs, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(y, inputs)))


@pytest.mark.skipif(not INTERPRETED, reason="fp64 is for the interpreter")
def test_gradcheck():
    x, residual, weight = (draw(*shape, dtype=torch.float64, seed=4) for shape in ((3, 5), (3, 5), (5,)))
    assert torch.autograd.gradcheck(rms_norm, (x, weight))
    assert torch.autograd.gradcheck(summed, (x, residual, weight))


def test_second_derivative_is_refused(device):
    x = draw(2, 4, device=device)
    y = rms_norm(x, draw(4, device=device)).square().sum()
    (gradient,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operators(device, dtype):
    x, dy = (draw(3, 2, 8, dtype=dtype, device=device, seed=seed) for seed in (0, 1))
    weight, r = draw(8, device=device, seed=2), draw(3, 2, device=device)
    for residual in (None, draw(3, 2, 8, device=device, seed=3)):
        check_operator(_forward, x, weight, 1e-6, residual)
        check_operator(_backward, dy, residual, x, weight, r)


def test_compiled(device):
    inputs = [draw(*shape, device=device, seed=5) for shape in ((5, 8), (5, 8), (8,))]
    compare_compiled(summed, inputs)
    compare_compiled(rms_norm, inputs[1:])


def test_more_than_2_to_the_31_elements(device):
    """Rows so far apart that the third begins beyond int32; memory that nobody touches is not there."""
    out = in_subprocess(
        """
from megalite.kernels.rms_norm import _backward, _forward
x, residual, dy = far(0), far(1), far(2)
weight = torch.ones(16, device=device)
y, z, r = _forward(x, weight, 1e-6, residual)
near = _forward(x.clone(memory_format=torch.contiguous_format), weight, 1e-6, residual.contiguous())
assert all(map(torch.equal, (y, z, r), near))
got = _backward(dy, residual, x, weight, r)
want = _backward(dy.contiguous(), residual.contiguous(), x.contiguous(), weight, r)
assert all(map(torch.equal, got, want))
print("equal")
"""
    )
    assert out == "equal\n"
