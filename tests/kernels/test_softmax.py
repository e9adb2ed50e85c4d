"""The softmax of attention's scores: the kernel against fp64, forward and backward, and the torch reference too."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megalite import kernels
from megalite.kernels import dispatch
from megalite.kernels.softmax import _backward, _forward, softmax_reference
from megalite.layers.attention import softmax_attention
from megalite.layers.recompute import recompute
from tests.kernels import INTERPRETED
from tests.kernels.checks import check_operator, compare_compiled, in_subprocess

# fp32: some ten operations rounded at 6e-8, and a sum. bf16, fp16: exact inputs, results rounded at 2^-9 and 2^-12;
# backward begins from a probability rounded so.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
SOFTCAPS = pytest.mark.parametrize("softcap", [None, 2.0])
CAUSAL = pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])


def draw(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(3).to(device, dtype).requires_grad_()


def draw_mask(*shape: int, device: str = "cpu") -> Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(5)) > 0.4).to(device)


def definition(
    scores: Tensor,
    *,
    scale: float = 1.0,
    causal: bool = False,
    mask: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """exp over its sum over what is seen; 0 where nothing is."""
    sq, sk = scores.shape[-2:]
    seen = torch.ones(scores.shape, dtype=torch.bool, device=scores.device)
    if causal:
        i, j = torch.arange(sq)[:, None], torch.arange(sk)
        seen = seen & (j <= sk - sq + i).to(scores.device)
    if mask is not None:
        seen = seen & mask
    x = scores * scale
    if softcap is not None:
        x = softcap * (x / softcap).tanh()
    e = torch.where(seen, (x - x.detach().amax(-1, keepdim=True)).exp(), 0.0)
    return e / e.sum(-1, keepdim=True).masked_fill(~seen.any(-1, keepdim=True), 1.0)


def upstream_of(y: Tensor, kind: str = "dense") -> Tensor:
    """A gradient like y, laid out as autograd may hand it on: a slice of something larger, or one row repeated."""
    if kind == "expanded":
        return draw(y.shape[-1], dtype=y.dtype, device=y.device, seed=9).detach().expand(y.shape)
    dense = draw(*y.shape, dtype=y.dtype, device=y.device, seed=9).detach()
    return dense if kind == "dense" else torch.stack((dense, dense), -1)[..., 0]


def compare(scores: Tensor, kind: str = "dense", function=kernels.softmax, tolerance: float | None = None, **options):
    exact = scores.detach().double().requires_grad_()
    got, want = function(scores, **options), definition(exact, **options)
    upstream = upstream_of(got, kind)
    (gradient,) = torch.autograd.grad(got, scores, upstream)
    (expected,) = torch.autograd.grad(want, exact, upstream.double())
    tolerance = tolerance or TOLERANCE[scores.dtype]
    assert got.dtype == gradient.dtype == scores.dtype
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance / 8)
    # A gradient is g minus its mean, so its rounding is relative to g (about 3 here), not to itself.
    torch.testing.assert_close(gradient.double(), expected, rtol=tolerance, atol=tolerance)


@DTYPES
@CAUSAL
@pytest.mark.parametrize("keys", [1, 7, 100, 2048])
def test_lengths(device, dtype, causal, keys):
    compare(draw(2, 2, 3, keys, dtype=dtype, device=device), scale=0.7, causal=causal)


@CAUSAL
@SOFTCAPS
@pytest.mark.parametrize("keys", [16384, 16385, 50257])
def test_rows_longer_than_a_block(device, causal, softcap, keys):
    """16385 and more are read in blocks; whole blocks are masked, at the beginning and at the end."""
    mask = torch.ones(3, keys, dtype=torch.bool, device=device)
    mask[1, : keys // 2] = False
    mask[2] = False
    compare(draw(3, keys, device=device), causal=causal, softcap=softcap, mask=mask)
    assert not kernels.softmax(draw(3, keys, device=device), mask=mask)[2].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@SOFTCAPS
@CAUSAL
# The batch's padding, documents, queries' padding, all at once; one for each head, head group or query alone.
@pytest.mark.parametrize("shape", [(2, 1, 1, 9), (2, 1, 3, 9), (2, 1, 3, 1), (2, 2, 3, 9), (2, 1, 9), (3, 9), (9,)])
def test_masks(device, dtype, softcap, causal, shape):
    options = {"scale": 0.5, "causal": causal, "mask": draw_mask(*shape, device=device), "softcap": softcap}
    compare(draw(2, 2, 3, 9, dtype=dtype, device=device), **options)


@pytest.mark.parametrize("shape", [(2, 1, 1, 3, 5), (1, 3, 1, 3, 5), (2, 1, 2, 3, 5), (2, 3, 1, 1, 5)])
def test_masks_of_grouped_heads(device, shape):
    """Five dimensions; the third mask leaves out the middle one, so that its strides merge to no two."""
    compare(draw(2, 3, 2, 3, 5, device=device), mask=draw_mask(*shape, device=device))


def test_a_mask_is_read_where_it_lies(device):
    """Transposed, sliced, of every second column."""
    scores = draw(2, 3, 5, 5, device=device)
    mask = draw_mask(2, 2, 5, 10, device=device)
    for view in (mask[:, :1, :, :5].transpose(2, 3), mask[:, 1:, :, ::2], mask[:1, :1, :, 5:].expand(2, 3, 5, 5)):
        compare(scores, mask=view)


@CAUSAL
@pytest.mark.parametrize(("sq", "sk"), [(1, 1), (1, 17), (4, 17), (17, 17), (17, 4)])
def test_queries_are_the_last_of_the_keys(device, causal, sq, sk):
    """With more queries than keys, the first see nothing."""
    compare(draw(2, sq, sk, device=device), causal=causal)


@pytest.mark.parametrize("kind", ["strided", "expanded"])
@SOFTCAPS
def test_upstream_gradients(device, kind, softcap):
    compare(draw(2, 3, 4, 7, device=device), kind, causal=True, softcap=softcap)


@SOFTCAPS
@pytest.mark.parametrize("view", ["transposed", "sliced", "expanded"])
def test_strided_scores(device, softcap, view):
    base = draw(2, 8, 8, device=device).detach()
    base = {"transposed": base.transpose(1, 2), "sliced": base[:, ::2, ::2], "expanded": base[:1].expand(3, 8, 8)}[view]
    compare(base.requires_grad_(), softcap=softcap)


@pytest.mark.parametrize("function", [kernels.softmax, softmax_reference], ids=["kernel", "reference"])
@SOFTCAPS
def test_rows_that_see_nothing_are_zero(device, function, softcap):
    """Also those whose scores are all -inf; never NaN, whatever the upstream gradient."""
    scores = draw(4, 6, device=device)
    mask = torch.ones(4, 6, dtype=torch.bool, device=device)
    mask[1] = False
    if softcap is None:
        with torch.no_grad():
            scores[2], scores[3, :3] = -math.inf, -math.inf
    got = function(scores, mask=mask, softcap=softcap)
    blind = [1] if softcap else [1, 2]
    (gradient,) = torch.autograd.grad(got, scores, torch.full_like(got, 1e30))
    assert not got[blind].any()
    assert not gradient[blind].any()
    assert gradient.isfinite().all()
    torch.testing.assert_close(got[[0, 3]].sum(-1), torch.ones(2, device=device))
    if softcap is None:
        assert not got[3, :3].any()


@pytest.mark.parametrize("function", [kernels.softmax, softmax_reference], ids=["kernel", "reference"])
def test_large_scores_do_not_overflow(device, function):
    scores = torch.tensor([[3e38, -3e38, 3e38]], device=device)
    with np.errstate(over="ignore"):  # the interpreter's; -6e38 is -inf, as it should be
        assert function(scores).tolist() == [[0.5, 0.0, 0.5]]
        capped = function(scores, softcap=1.0)[0]
    torch.testing.assert_close(capped[0] / capped[1], torch.tensor(math.e**2, device=device))
    assert function(torch.tensor([[1.0, math.nan, 2.0]], device=device)).isnan().all()


def test_a_soft_cap_as_models_have_it(device):
    """Gemma 2 caps at 50. tanh is a ratio with an absolute error of some 2^-24, so scores err by 50 of these."""
    scores = (draw(2, 3, 100, device=device).detach() * 20).requires_grad_()
    compare(scores, softcap=50.0, tolerance=2e-5)


@CAUSAL
@SOFTCAPS
@pytest.mark.parametrize("masked", [False, True])
def test_the_reference_is_the_definition(causal, softcap, masked):
    mask = draw_mask(2, 1, 5, 9) if masked else None
    scores = draw(2, 3, 5, 9).detach().double().requires_grad_()
    options = {"scale": 0.5, "causal": causal, "softcap": softcap, "mask": mask}
    compare(scores, function=softmax_reference, tolerance=1e-13, **options)
    for dtype in TOLERANCE:
        compare(draw(2, 3, 5, 9, dtype=dtype), function=softmax_reference, **options)


def test_on_a_cpu_without_the_interpreter_it_is_the_reference():
    with dispatch.using("torch"):
        scores = draw(2, 5, 5)
        assert torch.equal(kernels.softmax(scores, causal=True), softmax_reference(scores, causal=True))


@pytest.mark.skipif(not INTERPRETED, reason="fp64 is for the interpreter")
@CAUSAL
@SOFTCAPS
def test_gradcheck(device, causal, softcap):
    """Fast: along random directions, as each element by itself would be two runs of the interpreter."""
    mask = draw_mask(2, 3, 4, device=device)
    mask[1, 2] = False
    scores = draw(2, 3, 4, device=device).detach().double().requires_grad_()
    options = {"scale": 0.3, "causal": causal, "softcap": softcap, "mask": mask}
    assert torch.autograd.gradcheck(lambda x: kernels.softmax(x, **options), scores, fast_mode=True)


def test_there_is_no_second_derivative(device):
    scores = draw(3, 4, device=device)
    (gradient,) = torch.autograd.grad(kernels.softmax(scores).square().sum(), scores, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_scores_are_left_alone(device):
    """And the upstream gradient, and the result by backward."""
    scores = draw(3, 4, device=device)
    before = scores.detach().clone()
    got = kernels.softmax(scores, softcap=2.0)
    kept, upstream = got.detach().clone(), upstream_of(got)
    same = upstream.clone()
    first, second = (torch.autograd.grad(got, scores, upstream, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(scores, before)
    assert torch.equal(got, kept)
    assert torch.equal(upstream, same)
    assert torch.equal(first, second)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_nothing_in_nothing_out(device, shape):
    scores = draw(*shape, device=device)
    got = kernels.softmax(scores, causal=True)
    got.sum().backward()
    assert got.shape == scores.grad.shape == shape
    assert softmax_reference(scores, causal=True).shape == shape


@pytest.mark.parametrize(
    ("scores", "mask", "message"),
    [
        ((4,), None, r"scores: shape \[4\], wants \[..., queries, keys\]"),
        ((3, 4), torch.ones(3, 4), "mask: torch.float32, wants torch.bool"),
        ((3, 4), torch.ones(4, 3, dtype=torch.bool), r"mask: shape \[4, 3\] does not broadcast to scores, \[3, 4\]"),
        ((3, 4), torch.ones(2, 3, 4, dtype=torch.bool), r"mask: shape \[2, 3, 4\] does not broadcast"),
    ],
)
def test_what_does_not_fit_is_refused(scores, mask, message):
    with pytest.raises(ValueError, match=message):
        kernels.softmax(torch.zeros(scores), mask=mask)


@SOFTCAPS
@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(device, softcap, masked):
    scores = draw(2, 3, 4, device=device).detach()
    mask = draw_mask(2, 1, 4, device=device) if masked else None
    columns_first = scores.transpose(1, 2).contiguous().transpose(1, 2)
    check_operator(_forward, columns_first, mask, 0.5, True, softcap)
    probabilities, upstream = (kernels.softmax(scores, causal=True), scores.flip(0))
    kept = scores if softcap else None
    check_operator(_backward, probabilities, upstream, kept, 0.5, True, softcap)


@SOFTCAPS
def test_compiled(device, softcap):
    mask = draw_mask(2, 1, 4, 5, device=device)

    def function(x: Tensor) -> Tensor:
        return kernels.softmax(x * 2, scale=0.5, causal=True, mask=mask, softcap=softcap).square()

    compare_compiled(function, [draw(2, 2, 4, 5, device=device)])


@SOFTCAPS
def test_checkpointed(device, softcap):
    scores = draw(2, 4, 5, device=device)
    results = []
    for run in (lambda f: f(scores), lambda f: checkpoint(f, scores, use_reentrant=False)):
        y = run(lambda x: kernels.softmax(x + 1, causal=True, softcap=softcap))
        results.append(torch.autograd.grad(y, scores, upstream_of(y))[0])
    assert torch.equal(*results)


@pytest.mark.parametrize("mode", ["selective", "full", "offload"])
def test_in_attention_under_recomputation(device, mode):
    """With more positions than twice the head size, so that selective recomputation makes the scores again."""
    heads = [draw(1, n, 9, 4, device=device, seed=n) for n in (2, 1, 3)]
    heads[2] = heads[2][:, :1].detach().requires_grad_()
    mask = draw_mask(1, 1, 9, 9, device=device)
    results = []
    for choice, run in (("torch", "none"), ("triton", "none"), ("triton", mode)):
        with dispatch.using({"softmax": choice}):
            y = recompute(run, softmax_attention, *heads, mask)
            results.append((y, *torch.autograd.grad(y, heads, upstream_of(y))))
    for reference, plain, again in zip(*results, strict=True):
        torch.testing.assert_close(plain, reference, rtol=1e-5, atol=1e-5)
        assert torch.equal(again, plain)


FAR_ROWS = """
from triton.runtime.interpreter import InterpreterBuilder
from megalite.kernels.softmax import softmax, softmax_reference
module = __import__("sys").modules["megalite.kernels.softmax"]

class LastTwo:
    def __init__(self, kernel):
        self.kernel = kernel
    def __getitem__(self, grid):
        assert grid == (rows,)
        return self.kernel[(2,)]

InterpreterBuilder.set_grid_idx = lambda self, x, y, z: setattr(self, "grid_idx", (x + rows - 2, y, z))
module._forward_kernel, module._backward_kernel = LastTwo(module._forward_kernel), LastTwo(module._backward_kernel)
rows, keys = 16400, 131072

def large(values, *shape):
    x = torch.empty(shape, dtype=values.dtype)
    x.view(-1, keys)[-2:] = values
    return x

generator = torch.Generator().manual_seed(0)
last, upstream = torch.randn(2, 2, keys, generator=generator).half()
last.requires_grad_()
want = softmax_reference(last, mask=last > -1, softcap=2.0)
want.backward(upstream)
scores = large(last.detach(), rows // 2, 2, keys).requires_grad_()
got = softmax(scores, mask=large(last > -1, rows // 2, 2, keys), softcap=2.0)
got.backward(large(upstream, rows // 2, 2, keys))
torch.testing.assert_close(got[-1], want, rtol=1e-3, atol=1e-7)
torch.testing.assert_close(scores.grad[-1], last.grad, rtol=1e-2, atol=1e-7)
assert scores.numel() > 2**31 and want.count_nonzero() > keys
print("right")
"""


@pytest.mark.skipif(not INTERPRETED, reason="for the interpreter")
def test_more_than_2_to_31_elements():
    """Offsets in int32 would be negative. Two rows are computed, the last; memory that nobody touches costs none."""
    assert in_subprocess(FAR_ROWS) == "right\n"
