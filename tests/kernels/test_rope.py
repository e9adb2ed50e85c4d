"""RoPE's kernel against fp64, forward and backward."""

import pytest
import torch

from megalite.kernels.rope import _apply, rope
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


def angles(s, b, d, device="cpu", dtype=torch.float32):
    theta = draw(s, b, 1, d // 2, seed=7).detach().double() * 3
    return theta.cos().to(device, dtype), theta.sin().to(device, dtype)


def rotated(x, cos, sin):
    """(x[i] + 1j x[i + d/2]) e^(1j angle): a rotation is a complex product."""
    half = x.shape[-1] // 2
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.complex(cos.double(), sin.double())
    return torch.cat((turned.real, turned.imag), -1)


def compare_rope(q, k, cos, sin, upstream="dense"):
    compare(
        lambda q, k: rope(q, k, cos, sin),
        lambda q, k: (rotated(q, cos, sin), rotated(k, cos, sin)),
        [q, k],
        upstream,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("s", "b", "n", "n_kv", "d", "angle_batch"),
    [
        (1, 1, 1, 1, 2, 1),
        (4, 2, 6, 2, 14, 1),
        (4, 2, 6, 2, 14, 2),
        (2, 1, 4, 1, 100, 1),
        (1, 2, 5, 5, 2048, 2),  # more heads than a program holds at a time
        (1, 1, 2, 1, 50258, 1),
    ],
)
def test_sizes(device, dtype, s, b, n, n_kv, d, angle_batch):
    q, k = draw(s, b, n, d, dtype=dtype, device=device), draw(s, b, n_kv, d, dtype=dtype, device=device, seed=1)
    cos, sin = angles(s, angle_batch, d, device)
    compare_rope(q, k, cos, sin)
    assert [x.dtype for x in rope(q, k, cos, sin)] == [dtype, dtype]


@pytest.mark.parametrize("upstream", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(device, layout, upstream):
    q = laid_out(draw(3, 2, 4, 6, device=device), layout).transpose(0, 1).detach().requires_grad_()
    k = laid_out(draw(2, 3, 2, 6, device=device, seed=1), layout)
    compare_rope(q, k, *angles(2, 3, 6, device), upstream)


def test_angles_of_any_layout(device):
    """Each [b, s] of positions gives its own angles, transposed."""
    q, k = draw(4, 3, 2, 6, device=device), draw(4, 3, 1, 6, device=device, seed=1)
    cos, sin = (x.transpose(0, 1) for x in angles(3, 4, 6, device))
    compare_rope(q, k, cos, torch.stack((sin, sin), -1)[..., 0])


def test_slices_of_the_fused_product_are_not_copied(device, monkeypatch):
    heads = draw(4, 2, 8, 6, device=device).detach()
    q, k, _ = heads.split((4, 2, 2), dim=2)
    cos, sin = angles(4, 2, 6, device)
    want = rope(q.contiguous(), k.contiguous(), cos, sin)
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda self: pytest.fail("a copy"))
    assert all(map(torch.equal, rope(q, k, cos, sin), want))


def test_angle_zero_is_the_identity(device):
    q = draw(5, 1, 2, 8, device=device)
    once, _ = rope(q, q, torch.ones(5, 1, 1, 4, device=device), torch.zeros(5, 1, 1, 4, device=device))
    assert torch.equal(once, q)


def test_only_one_result_used(device):
    q, k = draw(4, 1, 2, 6, device=device), draw(4, 1, 2, 6, device=device, seed=1)
    rope(q, k, *angles(4, 1, 6, device))[0].sum().backward()
    assert q.grad.abs().sum() > 0
    assert torch.equal(k.grad, torch.zeros_like(k))


@pytest.mark.skipif(not INTERPRETED, reason="fp64 is for the interpreter")
def test_gradcheck():
    cos, sin = angles(2, 1, 4, dtype=torch.float64)
    q, k = draw(2, 1, 2, 4, dtype=torch.float64), draw(2, 1, 1, 4, dtype=torch.float64, seed=1)
    assert torch.autograd.gradcheck(lambda q, k: rope(q, k, cos, sin), (q, k))


@pytest.mark.parametrize("inverse", [True, False])
def test_operator(device, inverse):
    q, k, _ = draw(3, 2, 6, 4, dtype=torch.bfloat16, device=device).split((2, 2, 2), dim=2)
    check_operator(_apply, q, k, *angles(3, 1, 4, device), inverse)


def test_compiled(device):
    cos, sin = angles(3, 1, 4, device)
    q, k = draw(3, 2, 2, 4, device=device), draw(3, 2, 1, 4, device=device, seed=1)
    compare_compiled(lambda q, k: rope(q, k, cos, sin), [q, k])


def test_more_than_2_to_the_31_elements(device):
    """Positions, batches and heads so far apart that the third begins beyond int32; untouched memory is not there."""
    out = in_subprocess(
        """
from megalite.kernels.rope import _apply
apart, d = 2**30 + 8, 8
base = torch.empty(2 * apart + d, dtype=torch.bfloat16, device=device)
theta = torch.randn(3, 3, 1, d // 2, device=device)
for dim in range(3):
    shape, strides = [1, 1, 1, d], [d, d, d, 1]
    shape[dim], strides[dim] = 3, apart
    x = base.as_strided(shape, strides).copy_(torch.randn(shape))
    cos, sin = theta.cos()[: shape[0], : shape[1]], theta.sin()[: shape[0], : shape[1]]
    far, near = (_apply(each, each, cos, sin, False) for each in (x, x.contiguous()))
    assert all(map(torch.equal, far, near)), dim
print("equal")
"""
    )
    assert out == "equal\n"
