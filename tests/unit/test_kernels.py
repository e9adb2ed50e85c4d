"""The operators against fp64 references, forward and backward."""

import importlib

import pytest
import torch
from torch import Tensor

from megalite import kernels
from megalite.layers.rope import rope_angles

# fp32: sums of about a hundred terms, each rounded at 6e-8. bf16: inputs are exact for both sides, so what differs is
# the rounding (2^-9) of the result and of one or two intermediate results.
TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-6}, torch.bfloat16: {"rtol": 2e-2, "atol": 1e-2}}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
SIZES = pytest.mark.parametrize("size", [1, 7, 100])
UPSTREAMS = pytest.mark.parametrize("kind", ["dense", "strided", "expanded"])


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def upstream_of(y: Tensor, kind: str) -> Tensor:
    """A gradient like y, laid out as autograd may hand it on: a slice of something larger, or one value repeated."""
    if kind == "expanded":
        return torch.full((), 0.75, dtype=y.dtype).expand(y.shape)
    dense = draw(*y.shape, dtype=y.dtype, seed=99).detach()
    return dense if kind == "dense" else torch.stack((dense, dense), -1)[..., 0]


def file_of(operator: str):
    """The module, of which the package shows the function."""
    return importlib.import_module(f"megalite.kernels.{operator}")


def compare(function, reference, inputs: list[Tensor], kind: str = "dense") -> None:
    """Outputs and every input's gradient of `function` beside those of `reference` on the same numbers in fp64."""
    exact = [x.detach().double().requires_grad_() for x in inputs]
    got, want = function(*inputs), reference(*exact)
    got, want = (y if isinstance(y, tuple) else (y,) for y in (got, want))
    tolerance = TOLERANCE[inputs[0].dtype]
    upstream = [upstream_of(y, kind) for y in got]
    gradients = torch.autograd.grad(got, inputs, upstream)
    exact_gradients = torch.autograd.grad(want, exact, [g.double() for g in upstream])
    for actual, expected in zip((*got, *gradients), (*want, *exact_gradients), strict=True):
        torch.testing.assert_close(actual.double(), expected, **tolerance)


# RMSNorm


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


@DTYPES
@SIZES
@UPSTREAMS
def test_rms_norm(dtype, size, kind):
    x, weight = draw(3, 2, size, dtype=dtype), draw(size, dtype=dtype, seed=1)
    compare(kernels.rms_norm, rms_norm_reference, [x, weight], kind)
    assert kernels.rms_norm(x, weight).dtype == dtype


@DTYPES
@SIZES
@UPSTREAMS
def test_rms_norm_with_residual(dtype, size, kind):
    def fused(x, residual, weight):
        return kernels.rms_norm(x, weight, residual=residual)

    def reference(x, residual, weight):
        total = x + residual
        # The new residual stream has the model's precision, and the norm sees what the stream holds.
        total = total + (total.detach().to(dtype).double() - total.detach())
        return rms_norm_reference(total, weight), total

    inputs = [draw(3, 2, size, dtype=dtype), draw(3, 2, size, dtype=dtype, seed=1), draw(size, dtype=dtype, seed=2)]
    compare(fused, reference, inputs, kind)


@pytest.mark.parametrize("used", [0, 1, None])
@pytest.mark.parametrize("rows", [0, 4])
def test_rms_norm_of_other_layouts_with_results_that_nobody_uses(rows, used):
    def views(x, residual):
        return x.transpose(0, 2), residual[:1].expand(5, -1, -1)

    def fused(x, residual, weight):
        x, residual = views(x, residual)
        both = kernels.rms_norm(x, weight, residual=residual)
        return both if used is None else both[used] + 0 * weight

    def reference(x, residual, weight):
        total = sum(views(x, residual))
        both = rms_norm_reference(total, weight), total
        return both if used is None else both[used] + 0 * weight

    compare(fused, reference, [draw(7, rows, 5), draw(2, rows, 7, seed=1), draw(7, seed=2)])


def test_rms_norm_keeps_its_statistics_in_fp32():
    """In fp16, 300^2 is infinite; in bf16, a sum of 4096 ones stops at 256."""
    large = torch.full((1, 64), 300.0, dtype=torch.float16)
    assert torch.equal(kernels.rms_norm(large, torch.ones(64)), torch.ones(1, 64, dtype=torch.float16))
    ones = torch.ones(1, 4096, dtype=torch.bfloat16)
    assert torch.equal(kernels.rms_norm(ones, torch.ones(4096)), ones)


def test_rms_norm_eps_counts():
    x = torch.full((1, 4), 1e-3)
    torch.testing.assert_close(kernels.rms_norm(x, torch.ones(4), eps=1e-2), x / (1e-6 + 1e-2) ** 0.5)
    assert torch.equal(kernels.rms_norm(torch.zeros(1, 4), torch.ones(4)), torch.zeros(1, 4))


# RoPE


def angles(s: int, b: int, d: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    theta = draw(s, b, 1, d // 2, seed=7).detach().double() * 3
    return theta.cos().to(dtype), theta.sin().to(dtype)


def rope_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(x[i] + 1j x[i + d/2]) e^(1j angle): a rotation is a complex product."""
    half = x.shape[-1] // 2
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.complex(cos.double(), sin.double())
    return torch.cat((turned.real, turned.imag), -1)


@DTYPES
@pytest.mark.parametrize(("s", "d"), [(1, 2), (7, 14), (100, 6)])
@pytest.mark.parametrize("angle_batch", [1, 3])
@UPSTREAMS
def test_rope(dtype, s, d, angle_batch, kind):
    cos, sin = angles(s, angle_batch, d)
    q, k = draw(s, 3, 4, d, dtype=dtype), draw(s, 3, 2, d, dtype=dtype, seed=1)
    compare(
        lambda q, k: kernels.rope(q, k, cos, sin),
        lambda q, k: (rope_reference(q, cos, sin), rope_reference(k, cos, sin)),
        [q, k],
        kind,
    )
    assert [x.dtype for x in kernels.rope(q, k, cos, sin)] == [dtype, dtype]


def test_rope_at_angle_zero_is_the_identity():
    q = draw(5, 1, 2, 8)
    rotated, _ = kernels.rope(q, q, torch.ones(5, 1, 1, 4), torch.zeros(5, 1, 1, 4))
    assert torch.equal(rotated, q)


def test_rope_rounds_bf16_once():
    q, (cos, sin) = draw(50, 1, 4, 16, dtype=torch.bfloat16), angles(50, 1, 16)
    got, want = kernels.rope(q, q, cos, sin)[0].double(), rope_reference(q.double(), cos, sin)
    assert ((got - want).abs() <= 2**-8 * want.abs() + 1e-6).all()


def test_rope_lays_its_results_out_for_attention():
    results = kernels.rope(draw(5, 3, 4, 8), draw(5, 3, 2, 8, seed=1), *angles(5, 1, 8))
    assert all(x.permute(1, 2, 0, 3).is_contiguous() for x in results)


@pytest.mark.parametrize(("positions", "rows"), [([[0, 1, 2]], 1), ([[0, 1, 2]] * 2, 1), ([[0, 1, 2], [0, 1, 0]], 2)])
def test_rows_with_the_same_positions_share_their_angles(positions, rows):
    positions = torch.tensor(positions)
    cos, sin = rope_angles(positions, 4, 100.0)
    assert cos.shape == sin.shape == (3, rows, 1, 2)
    angle = positions.t()[..., None, None] * torch.tensor([1.0, 0.1])
    torch.testing.assert_close([cos.expand_as(angle), sin.expand_as(angle)], [angle.cos(), angle.sin()])


# SwiGLU


@DTYPES
@SIZES
@UPSTREAMS
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("block", [None, 200])  # rows, of which there are ten, all at once; or 200, 28 and 2
def test_swiglu(monkeypatch, dtype, size, kind, packed, block):
    if block:
        monkeypatch.setattr(file_of("swiglu"), "_CPU_BLOCK", block // torch.get_num_threads())
    both = draw(5, 2, 2 * size, dtype=dtype)  # as the MLP gives them: two views of one matrix product
    compare(
        kernels.swiglu_packed if packed else lambda x: kernels.swiglu(*x.chunk(2, -1)),
        lambda x: x[..., :size] / (1 + (-x[..., :size]).exp()) * x[..., size:],
        [both],
        kind,
    )


def test_swiglu_of_large_inputs_is_finite():
    gate = torch.tensor([-1e4, 1e4, 0.0], requires_grad=True)
    y = kernels.swiglu(gate, torch.ones(3))
    y.sum().backward()
    assert y.tolist() == [0.0, 1e4, 0.0]
    assert gate.grad.tolist() == [0.0, 1.0, 0.5]


# Cross-entropy


def cross_entropy_reference(logits: Tensor, targets: Tensor, z_loss: float = 0.0) -> Tensor:
    log_z = logits.logsumexp(-1)
    ignored = targets == -100
    target_logit = logits.gather(-1, targets.masked_fill(ignored, 0).unsqueeze(-1)).squeeze(-1)
    return (log_z - target_logit + z_loss * log_z.square()).masked_fill(ignored, 0.0)


def draw_targets(*shape: int, vocabulary: int) -> Tensor:
    """Ids from the whole vocabulary, its ends among them, and every fourth ignored."""
    targets = torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(3))
    flat = targets.view(-1)
    flat[0], flat[-1] = vocabulary - 1, 0
    flat[2::4] = -100
    return targets


@DTYPES
@pytest.mark.parametrize("vocabulary", [1, 7, 100, 1000])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@UPSTREAMS
@pytest.mark.parametrize("block", [None, 500])  # rows, of which there are 27, all at once; or 500, 71, 5 and 1
def test_cross_entropy(monkeypatch, dtype, vocabulary, z_loss, kind, block):
    if block:
        monkeypatch.setattr(file_of("cross_entropy"), "_CPU_BLOCK", block)
    targets = draw_targets(9, 3, vocabulary=vocabulary)
    logits = draw(9, 3, vocabulary, dtype=dtype)
    compare(
        lambda x: kernels.cross_entropy(x, targets, z_loss=z_loss),
        lambda x: cross_entropy_reference(x, targets, z_loss),
        [logits],
        kind,
    )


def test_cross_entropy_computes_in_fp32_from_bf16():
    targets = draw_targets(50, vocabulary=1000)
    logits = draw(50, 1000, dtype=torch.bfloat16)
    loss = kernels.cross_entropy(logits, targets)
    assert loss.dtype == torch.float32
    # No bf16 rounding anywhere: the tolerance is that of fp32.
    torch.testing.assert_close(
        loss.double(), cross_entropy_reference(logits.double(), targets), **TOLERANCE[torch.float32]
    )
    assert torch.autograd.grad(loss.sum(), logits)[0].dtype == torch.bfloat16


def test_a_part_of_a_row_without_logits_adds_nothing():
    nothing, elsewhere = torch.full((2, 5), -torch.inf), torch.tensor([-1, -1])
    rows = file_of("cross_entropy").statistics(nothing, elsewhere, 0.0, False, False)
    assert rows.tolist() == [[-torch.inf, 0.0, 0.0, 0.0, 0.0]] * 2


def test_cross_entropy_is_that_of_torch():
    """Another reference, that nobody here wrote."""
    targets, logits = draw_targets(20, vocabulary=33), draw(20, 33)
    want = torch.nn.functional.cross_entropy(logits, targets, reduction="none", ignore_index=-100)
    torch.testing.assert_close(kernels.cross_entropy(logits, targets), want)


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_cross_entropy_with_all_targets_ignored(z_loss):
    logits = draw(6, 11)
    loss = kernels.cross_entropy(logits, torch.full((6,), -100), z_loss=z_loss)
    assert loss.tolist() == [0.0] * 6
    loss.sum().backward()
    assert torch.equal(logits.grad, torch.zeros(6, 11))


def test_cross_entropy_gives_ignored_tokens_no_gradient_whatever_comes_from_above():
    logits = draw(2, 11)
    loss = kernels.cross_entropy(logits, torch.tensor([3, -100]))
    loss.backward(torch.tensor([1.0, torch.nan]))
    assert logits.grad[0].isfinite().all()
    assert torch.equal(logits.grad[1], torch.zeros(11))


def test_cross_entropy_takes_another_ignore_index():
    logits, targets = draw(4, 11), torch.tensor([0, 5, 0, 7])
    loss = kernels.cross_entropy(logits, targets, ignore_index=0)
    want = cross_entropy_reference(logits, torch.where(targets == 0, -100, targets))
    torch.testing.assert_close(loss, want)


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_cross_entropy_of_padded_columns(z_loss):
    """-inf columns change neither loss nor gradient, and get gradient exactly zero."""
    targets, valid = draw_targets(8, vocabulary=10), draw(8, 10)
    logits = torch.cat((valid.detach(), torch.full((8, 6), -torch.inf)), 1).requires_grad_()
    loss = kernels.cross_entropy(logits, targets, z_loss=z_loss)
    want = kernels.cross_entropy(valid, targets, z_loss=z_loss)
    torch.testing.assert_close(loss, want)
    loss.sum().backward()
    want.sum().backward()
    torch.testing.assert_close(logits.grad[:, :10], valid.grad)
    assert torch.equal(logits.grad[:, 10:], torch.zeros(8, 6))


@pytest.mark.parametrize("sign", [1.0, -1.0])
@DTYPES
def test_cross_entropy_of_huge_logits(sign, dtype):
    logits = torch.zeros(2, 5, dtype=dtype)
    logits[:, 1] = sign * 1e4
    logits.requires_grad_()
    loss = kernels.cross_entropy(logits, torch.tensor([1, 2]))
    compare(
        lambda x: kernels.cross_entropy(x, torch.tensor([1, 2])),
        lambda x: cross_entropy_reference(x, torch.tensor([1, 2])),
        [logits],
    )
    assert loss.isfinite().all()


def test_cross_entropy_leaves_its_inputs_alone():
    logits, targets = draw(4, 9), torch.tensor([0, -100, 8, 3])
    before = logits.detach().clone(), targets.clone()
    kernels.cross_entropy(logits, targets).sum().backward()
    assert torch.equal(logits, before[0])
    assert torch.equal(targets, before[1])


def test_cross_entropy_refuses_a_second_derivative():
    """Its backward works on saved results and would differentiate to something wrong."""
    logits = draw(3, 5)
    loss = kernels.cross_entropy(logits, torch.tensor([0, 1, 2])).square().sum()
    (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()


# Numerical derivatives


def double(*shape: int, seed: int = 0) -> Tensor:
    return draw(*shape, dtype=torch.float64, seed=seed)


def test_gradcheck_rms_norm():
    x, weight, residual = double(2, 3, 5), double(5, seed=1), double(2, 3, 5, seed=2)
    assert torch.autograd.gradcheck(kernels.rms_norm, (x, weight))
    assert torch.autograd.gradcheck(lambda *a: kernels.rms_norm(a[0], a[1], 1e-6, a[2]), (x, weight, residual))


def test_gradcheck_rope_and_swiglu():
    cos, sin = angles(3, 1, 4, torch.float64)
    assert torch.autograd.gradcheck(lambda q, k: kernels.rope(q, k, cos, sin), (double(3, 2, 2, 4), double(3, 2, 1, 4)))
    assert torch.autograd.gradcheck(kernels.swiglu, (double(3, 5), double(3, 5, seed=1)))


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_gradcheck_cross_entropy(z_loss):
    """By hand: gradcheck runs backward twice on one graph, and ours writes the gradient over what it saved."""
    targets = torch.tensor([0, 6, -100, 3])
    x, upstream = double(4, 7), double(4, seed=1).detach()

    def loss(logits: Tensor) -> Tensor:
        return (kernels.cross_entropy(logits, targets, z_loss=z_loss) * upstream).sum()

    loss(x).backward()
    step = 1e-6 * torch.eye(28, dtype=torch.float64).view(28, 4, 7)
    with torch.no_grad():
        slopes = torch.stack([(loss(x + each) - loss(x - each)) / 2e-6 for each in step])
    torch.testing.assert_close(x.grad.flatten(), slopes, rtol=1e-7, atol=1e-8)


def test_a_second_backward_raises_instead_of_being_wrong():
    loss = kernels.cross_entropy(2 * double(4, 7), torch.tensor([0, 6, -100, 3])).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
