"""The product with a weight: oneDNN's, where it runs, against fp64, and where it leaves the work to torch."""

import importlib

import pytest
import torch
from torch.nn import functional as F

from megalite import kernels
from tests.unit.test_kernels import UPSTREAMS, compare, draw

module = importlib.import_module("megalite.kernels.linear")
BY_ONEDNN = pytest.mark.skipif(module._PRODUCT is None, reason="this torch has no such operator")


@BY_ONEDNN
@pytest.mark.parametrize("layout", ["dense", "transposed", "strided"])
@pytest.mark.parametrize("shape", [(5, 3, 7), (1, 1, 100), (0, 4, 7), (40, 2, 33)])
@UPSTREAMS
def test_against_fp64(layout, shape, kind):
    x, weight = draw(*shape), draw(11, shape[-1], seed=1)
    if layout != "dense":
        x = x.detach()
        x = x.transpose(0, 1) if layout == "transposed" else torch.stack((x, x), -1)[..., 0]
        x.requires_grad_()
    assert by_onednn(kernels.linear(x, weight))
    compare(kernels.linear, F.linear, [x, weight], kind)


def by_onednn(y) -> bool:
    return y.grad_fn.next_functions[0][0].name() == "_LinearBackward"


@pytest.mark.parametrize("frozen", [0, 1])
def test_one_gradient_alone(frozen):
    inputs = [draw(4, 3), draw(5, 3, seed=1)]
    inputs[frozen].requires_grad_(False)
    kernels.linear(*inputs).sum().backward()
    rows = len(inputs[1 - frozen])
    torch.testing.assert_close(inputs[1 - frozen].grad, inputs[frozen].sum(0).expand(rows, 3))
    assert inputs[frozen].grad is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_dtypes_are_left_to_torch(dtype):
    x, weight = draw(4, 3, dtype=dtype), draw(5, 3, dtype=dtype, seed=1)
    assert torch.equal(kernels.linear(x, weight), F.linear(x, weight))


def test_autocast_is_heeded():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert kernels.linear(draw(4, 3), draw(5, 3, seed=1)).dtype == torch.bfloat16


@BY_ONEDNN
def test_backward_takes_the_parameter_as_it_is_then():
    """ZeRO-3 takes its elements away after forward, and puts them elsewhere before backward."""
    x, weight = draw(4, 3), torch.nn.Parameter(draw(5, 3, seed=1).detach())
    whole, y = weight.detach().clone(), kernels.linear(x, weight)
    weight.data.zero_()
    weight.data = torch.empty(0)
    weight.data = whole
    y.sum().backward()
    torch.testing.assert_close(x.grad, whole.sum(0).expand(4, 3))


def test_the_result_may_be_written_into_unrecorded():
    """As the head does with logits of padding."""
    x = draw(2, 4, 3)
    y = kernels.linear(x, draw(5, 3, seed=1))
    with torch.no_grad():
        y[..., 3:] = 0.0
    y.sum().backward()
    assert x.grad.isfinite().all()


@BY_ONEDNN
def test_the_same_bits_each_time():
    x, weight = draw(640, 320), draw(480, 320, seed=1)
    runs = []
    for _ in range(3):
        y = kernels.linear(x, weight)
        runs.append((y, *torch.autograd.grad(y.square().sum(), (x, weight))))
    assert all(map(torch.equal, runs[0] + runs[0], runs[1] + runs[2]))


def test_compiled_in_one_graph():
    x, weight = draw(4, 3), draw(5, 3, seed=1)
    compiled = torch.compile(kernels.linear, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, weight), F.linear(x, weight))
