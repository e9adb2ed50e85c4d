"""SwiGLU's kernels against fp64, forward and backward."""

import pytest
import torch

from megalite.kernels.swiglu import _backward, _forward, swiglu, swiglu_packed
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


def reference(gate, up):
    return gate / (1 + (-gate).exp()) * up


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 7, 100, 2048, 50257])
def test_sizes(device, dtype, size):
    rows = 3 if size < 5000 else 1
    gate, up = (draw(rows, size, dtype=dtype, device=device, seed=seed) for seed in (0, 1))
    compare(swiglu, reference, [gate, up])
    assert swiglu(gate, up).dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("upstream", LAYOUTS)
@pytest.mark.parametrize("apart", [True, False])
def test_halves_of_one_tensor(device, dtype, upstream, apart):
    """As the MLP gives them: two views of one matrix product."""
    function = (lambda x: swiglu(*x.chunk(2, -1))) if apart else swiglu_packed
    compare(function, lambda x: reference(*x.chunk(2, -1)), [draw(5, 2, 2 * 33, dtype=dtype, device=device)], upstream)


@pytest.mark.parametrize("gate_layout", LAYOUTS)
@pytest.mark.parametrize("up_layout", LAYOUTS)
def test_layouts(device, gate_layout, up_layout):
    gate = laid_out(draw(3, 4, 10, device=device), gate_layout)[:, 1:].detach().requires_grad_()
    compare(swiglu, reference, [gate, laid_out(draw(3, 3, 10, device=device, seed=1), up_layout)])


def test_halves_are_not_copied(device, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda self: pytest.fail("a copy"))
    both = draw(4, 2, 2 * 32, device=device)
    swiglu_packed(both).backward(draw(4, 2, 32, device=device).detach())
    gate, up = both.chunk(2, -1)
    swiglu(gate, up).backward(draw(4, 2, 32, device=device).detach())


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # numpy's: it is infinite, as it should be
def test_large_inputs(device):
    gate = torch.tensor([-1e4, 1e4, 0.0], device=device, requires_grad=True)
    y = swiglu(gate, torch.ones(3, device=device))
    y.sum().backward()
    assert y.tolist() == [0.0, 1e4, 0.0]
    assert gate.grad.tolist() == [0.0, 1.0, 0.5]


def test_no_rows(device):
    x = draw(0, 8, device=device)
    swiglu_packed(x).sum().backward()
    assert x.grad.shape == (0, 8)


def test_backward_twice_gives_the_same(device):
    x = draw(5, 8, device=device)
    y = swiglu_packed(x).square().sum()
    first = torch.autograd.grad(y, x, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(y, x)[0])


@pytest.mark.skipif(not INTERPRETED, reason="fp64 is for the interpreter")
def test_gradcheck():
    gate, up = (draw(3, 5, dtype=torch.float64, seed=seed) for seed in (0, 1))
    assert torch.autograd.gradcheck(swiglu, (gate, up))
    assert torch.autograd.gradcheck(swiglu_packed, (draw(3, 6, dtype=torch.float64),))


def test_operators(device):
    gate, up, dy = (draw(3, 2, 8, dtype=torch.bfloat16, device=device, seed=seed) for seed in range(3))
    check_operator(_forward, gate, up)
    check_operator(_backward, dy, *draw(3, 2, 16, dtype=torch.bfloat16, device=device).chunk(2, -1))


def test_compiled(device):
    compare_compiled(swiglu_packed, [draw(5, 8, device=device)])
    compare_compiled(swiglu, [draw(5, 8, device=device), draw(5, 8, device=device, seed=1)])


def test_more_than_2_to_the_31_elements(device):
    """Rows so far apart that the third begins beyond int32; memory that nobody touches is not there."""
    out = in_subprocess(
        """
from megalite.kernels.swiglu import _backward, _forward
gate, up, dy = far(0), far(1), far(2)
near = [x.contiguous() for x in (dy, gate, up)]
assert torch.equal(_forward(gate, up), _forward(*near[1:]))
assert torch.equal(_backward(dy, gate, up), _backward(*near))
print("equal")
"""
    )
    assert out == "equal\n"
