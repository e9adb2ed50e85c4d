"""Cross-entropy in Triton and in torch: against fp64, written over its logits, and where others were wrong."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from megalite.kernels import cross_entropy, dispatch
from megalite.kernels.cross_entropy import _gradient_triton, _statistics_triton, cross_entropy_reference

CHOICES = pytest.mark.parametrize("choice", ["triton", "torch"])
OPTIONS = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "all": {"label_smoothing": 0.2, "z_loss": 0.05, "softcap": 5.0},
}
# All arithmetic is fp32, on inputs that both sides have exactly. A loss is a difference of numbers up to 20 in which
# fp32 rounds at 1e-6, and a z-loss adds their square's. A gradient is rounded once, at 2^-24, 2^-11 and 2^-8, after
# fp32's exp, which is right to some 1e-6. (fp16 below 6e-5 has fewer digits; its steps there are 6e-8.)
LOSS = {"rtol": 1e-5, "atol": 4e-6}
GRADIENT = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-6},
    torch.float16: {"rtol": 2**-10, "atol": 1e-6},
    torch.bfloat16: {"rtol": 2**-8, "atol": 1e-6},
}


def exact(
    x: Tensor, targets: Tensor, label_smoothing: float = 0.0, z_loss: float = 0.0, softcap: float | None = None
) -> Tensor:
    """The formula, by logits that exist; the others' are masked out and so get gradient 0."""
    exists = x.detach() != -torch.inf
    x = x.masked_fill(~exists, 0.0)
    if softcap:
        x = softcap * (x / softcap).tanh()
    log_z = x.masked_fill(~exists, -torch.inf).logsumexp(-1)
    ignored = targets == -100
    target = x.gather(-1, targets.masked_fill(ignored, 0).unsqueeze(-1)).squeeze(-1)
    mean = x.masked_fill(~exists, 0.0).sum(-1) / exists.sum(-1)
    loss = log_z - (1 - label_smoothing) * target - label_smoothing * mean + z_loss * log_z.square()
    return loss.masked_fill(ignored, 0.0)


def draw(*shape: int, device: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def draw_targets(*shape: int, ids: int, device: str) -> Tensor:
    """Both ends of the vocabulary are among them, and every fourth is ignored."""
    targets = torch.randint(ids, shape, generator=torch.Generator().manual_seed(3))
    flat = targets.view(-1)
    flat[0], flat[-1] = ids - 1, 0
    flat[2::4] = -100
    return targets.to(device)


def computed(x: Tensor) -> Tensor:
    """What a model's logits are: the result of something, and no leaf."""
    return x.detach().clone().requires_grad_().clone()


def check(x: Tensor, targets: Tensor, upstream: Tensor, logits: Tensor | None = None, **options) -> None:
    """Loss and gradient beside those in fp64; logits: x's numbers in another layout."""
    logits = computed(x) if logits is None else logits
    x = x.detach().double().requires_grad_()
    want = exact(x, targets, **options)
    loss = cross_entropy(logits, targets, **options)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), want, **LOSS)
    (gradient,) = torch.autograd.grad(loss, logits, upstream)
    (want_gradient,) = torch.autograd.grad(want, x, upstream.double())
    assert gradient.dtype == logits.dtype
    torch.testing.assert_close(gradient.double(), want_gradient, **GRADIENT[logits.dtype])


@pytest.mark.parametrize("size", [1, 7, 100, 2048, 50257])
@pytest.mark.parametrize("dtype", GRADIENT, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@CHOICES
def test_against_fp64(device, choice, size, dtype, options):
    """Another upstream gradient for each token, and a tenth of the vocabulary is padding."""
    ids = size - size // 10
    x = 3 * draw(2, 3, size, device=device, dtype=dtype)
    x[..., ids:] = -torch.inf
    with dispatch.using(choice):
        check(x, draw_targets(2, 3, ids=ids, device=device), draw(2, 3, device=device, seed=1), **options)


@pytest.mark.parametrize("layout", ["dense", "strided", "expanded"])
@CHOICES
def test_upstream_gradients_in_any_layout(device, choice, layout):
    upstream = draw(9, 2, device=device, seed=1)[:, 0]
    upstream = {"dense": upstream.contiguous(), "strided": upstream, "expanded": upstream[0].expand(9)}[layout]
    with dispatch.using(choice):
        check(draw(9, 33, device=device), draw_targets(9, ids=33, device=device), upstream, **OPTIONS["all"])


@pytest.mark.parametrize(
    "layout", ["rows of a wider tensor", "every second column", "columns", "transposed", "one row expanded"]
)
@CHOICES
def test_logits_in_any_layout(device, choice, layout):
    x = draw(2, 4, 33, device=device)
    wide = draw(2, 4, 40, device=device, seed=2).requires_grad_().clone()
    before = wide.detach().clone()
    if layout == "rows of a wider tensor":
        logits = wide[..., 3:36]
        with torch.no_grad():
            logits.copy_(x)
    elif layout == "every second column":
        logits = computed(x.repeat_interleave(2, -1))[..., ::2]
    elif layout == "columns":
        logits = computed(x.movedim(-1, 0)).movedim(0, -1)
    elif layout == "transposed":
        logits = computed(x.transpose(0, 1)).transpose(0, 1)
    else:
        x = x[:1, :1].expand(2, 4, 33)
        logits = computed(x[:1, :1]).expand(2, 4, 33)
    upstream = draw(2, 4, device=device, seed=1)
    with dispatch.using(choice):
        check(x, draw_targets(2, 4, ids=33, device=device), upstream, logits, **OPTIONS["smoothed"])
    assert torch.equal(wide[..., :3], before[..., :3])  # what stands beside the logits stays
    assert torch.equal(wide[..., 36:], before[..., 36:])


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("dtype", GRADIENT, ids=str)
@CHOICES
def test_huge_logits(device, choice, sign, dtype):
    x = torch.zeros(2, 5, dtype=dtype, device=device)
    x[:, 1] = sign * 1e4
    with dispatch.using(choice):
        check(x, torch.tensor([1, 2], device=device), torch.ones(2, device=device), label_smoothing=0.1)


@CHOICES
def test_another_reference(device, choice):
    """torch's, with ids that are no padding and another ignored id."""
    x, targets = draw(20, 33, device=device), draw_targets(20, ids=33, device=device)
    targets[targets == -100] = 5
    want = F.cross_entropy(x, targets, reduction="none", ignore_index=5, label_smoothing=0.1)
    with dispatch.using(choice):
        loss = cross_entropy(x, targets, ignore_index=5, label_smoothing=0.1)
    torch.testing.assert_close(loss, want)
    assert (loss == 0).sum() >= 5


# Written over the logits


@CHOICES
def test_the_gradient_takes_the_place_of_the_logits(device, choice):
    logits = computed(draw(3, 5, 9, device=device))
    with dispatch.using(choice):
        loss = cross_entropy(logits, draw_targets(3, 5, ids=9, device=device))
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert gradient.data_ptr() == logits.data_ptr()


@pytest.mark.parametrize("form", ["leaf", "view of a leaf"])
@CHOICES
def test_a_leaf_is_left_alone(device, choice, form):
    leaf = draw(4, 9, device=device).requires_grad_()
    before, targets = leaf.detach().clone(), draw_targets(4, ids=9, device=device)
    logits = leaf if form == "leaf" else leaf[:, :]
    with dispatch.using(choice):
        loss = cross_entropy(logits, targets)
    loss.sum().backward(retain_graph=True)
    first = leaf.grad.clone()
    loss.sum().backward()  # so this may be done twice
    assert torch.equal(leaf, before)
    assert torch.equal(leaf.grad, 2 * first)


@pytest.mark.parametrize("reader", ["a second backward", "another use of the logits", "another loss of the logits"])
@CHOICES
def test_overwritten_logits_cannot_be_read(device, choice, reader):
    """Stale logits gave wrong gradients in Liger (issues 272 and 1251)."""
    logits, targets = computed(draw(4, 7, device=device)), draw_targets(4, ids=7, device=device)
    with dispatch.using(choice):
        other = {
            "a second backward": lambda: 0,
            "another use of the logits": lambda: logits.square().sum(),
            "another loss of the logits": lambda: cross_entropy(logits, targets).sum(),
        }[reader]()
        loss = cross_entropy(logits, targets).sum() + other
    if reader == "a second backward":
        loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@CHOICES
def test_clones_of_the_logits_may_be_read(device, choice):
    x, targets = draw(4, 7, device=device).requires_grad_(), draw_targets(4, ids=7, device=device)
    with dispatch.using(choice):
        logits = x.clone()
        (cross_entropy(logits.clone(), targets).sum() + logits.square().sum()).backward()
    y = x.detach().double().requires_grad_()
    (exact(y, targets).sum() + y.square().sum()).backward()
    torch.testing.assert_close(x.grad.double(), y.grad, rtol=1e-5, atol=1e-6)


# Targets


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@CHOICES
def test_all_targets_ignored(device, choice, options):
    """Loss and gradient are 0, not the nan of a mean over nothing; also where nan comes from above."""
    logits = computed(draw(6, 11, device=device))
    with dispatch.using(choice):
        loss = cross_entropy(logits, torch.full((6,), -100, device=device), **options)
    assert loss.tolist() == [0.0] * 6
    (gradient,) = torch.autograd.grad(loss, logits, torch.full((6,), torch.nan, device=device))
    assert not gradient.any()


@pytest.mark.parametrize("target", [11, -1, -101])
def test_a_target_outside_the_vocabulary_raises_on_a_cpu(target):
    targets = torch.tensor([3, -100, target, 12])
    with (
        dispatch.using("torch"),
        pytest.raises(IndexError, match=rf"target {target} \(token 2\) is outside the vocabulary of 11 ids"),
    ):
        cross_entropy(draw(4, 11, device="cpu"), targets)


@CHOICES
def test_a_target_outside_the_vocabulary_is_nan_where_it_cannot_raise(device, choice):
    """On a GPU, and in a compiled graph."""
    targets = torch.tensor([3, -100, 11, -1], device=device)
    logits = draw(4, 11, device=device).requires_grad_()
    function = torch.compile(cross_entropy, backend="aot_eager") if device == "cpu" else cross_entropy
    with dispatch.using(choice):
        loss = function(logits, targets)
        loss.sum().backward()
    assert loss.isnan().tolist() == [False, False, True, True]
    assert logits.grad.isnan().all(-1).tolist() == [False, False, True, True]
    assert logits.grad[:2].isfinite().all()


@CHOICES
def test_no_tokens(device, choice):
    logits = computed(draw(0, 11, device=device))
    with dispatch.using(choice):
        loss = cross_entropy(logits, torch.zeros(0, dtype=torch.int64, device=device))
    assert loss.shape == (0,)
    assert torch.autograd.grad(loss.sum(), logits)[0].shape == (0, 11)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": 1.5}, "label_smoothing = 1.5"),
        ({"softcap": 0.0}, "softcap = 0.0"),
        ({"softcap": -1.0}, "-1"),
    ],
)
def test_options_out_of_range(device, options, message):
    with pytest.raises(ValueError, match=message):
        cross_entropy(draw(2, 3, device=device), torch.tensor([0, 1], device=device), **options)


# Autograd, torch.compile and size


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@CHOICES
def test_gradcheck(device, choice, options):
    if device == "cuda" and choice == "triton":
        pytest.skip("no fp64 kernels on a GPU")
    x = 3 * torch.randn(3, 5, dtype=torch.float64, device=device, generator=torch.Generator(device).manual_seed(0))
    targets = torch.tensor([0, 4, -100], device=device)
    with dispatch.using(choice):
        assert torch.autograd.gradcheck(lambda x: cross_entropy(x, targets, **options), (x.requires_grad_(),))


@CHOICES
def test_a_second_derivative_is_refused(device, choice):
    x = draw(3, 5, device=device).requires_grad_()
    with dispatch.using(choice):
        loss = cross_entropy(x, torch.tensor([0, 1, 2], device=device)).square().sum()
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


def head_and_loss(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(x @ weight.t(), targets, **OPTIONS["all"])


@pytest.mark.parametrize("wrapper", ["checkpoint", "compile"])
@CHOICES
def test_inside(device, choice, wrapper):
    """Under activation checkpointing, and in one compiled graph, the numbers stay the same."""
    targets = draw_targets(6, ids=33, device=device)
    upstream = draw(6, device=device, seed=4)
    gradients = []
    for wrapped in (False, True):
        inputs = [draw(6, 8, device=device).requires_grad_(), draw(33, 8, device=device, seed=1).requires_grad_()]
        with dispatch.using(choice):
            if not wrapped:
                loss = head_and_loss(*inputs, targets)
            elif wrapper == "checkpoint":
                loss = checkpoint(head_and_loss, *inputs, targets, use_reentrant=False)
            else:
                loss = torch.compile(head_and_loss, backend="aot_eager", fullgraph=True)(*inputs, targets)
            gradients.append([loss.detach(), *torch.autograd.grad(loss, inputs, upstream)])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-6, atol=1e-7)


def test_the_operators_are_what_they_say(device):
    x, index = draw(4, 33, device=device), torch.tensor([0, 32, -1, 5], device=device)
    torch.library.opcheck(_statistics_triton.registered, (x, index, 5.0, True))
    factors = draw(4, 4, device=device, seed=1)
    torch.library.opcheck(_gradient_triton.registered, (x[:, :20], index, factors, 5.0, True))


def test_the_reference_has_the_same_signature():
    assert inspect.signature(cross_entropy) == inspect.signature(cross_entropy_reference)


# A row that starts beyond 2^31 elements, where rows are less apart than that. Memory that nobody touches is never
# there, and a bad offset is a crash.
FAR = """
import tests.kernels
import torch
from megalite.kernels.cross_entropy import gradient, statistics

device, far, v = {device!r}, 2**30 + 4096, 300
memory = torch.empty(2 * far + v, dtype=torch.bfloat16, device=device)
x = memory.as_strided((3, v), (far, 1))
x.copy_(torch.randn(3, v, generator=torch.Generator().manual_seed(0)))
near, index = x.new_empty(3, 304)[:, :v].copy_(x), torch.tensor([7, 299, -1], device=device)  # aligned as x's rows
rows = statistics(x, index, 0.0, True, True)
assert torch.equal(rows, statistics(near, index, 0.0, True, True))
factors = torch.rand((3, 4), device=device)
want = gradient(near, index, factors, 0.0, True, False, True)
assert torch.equal(gradient(x, index, factors, 0.0, True, True, True), want)
assert torch.equal(x, want)
"""


def test_more_than_2_31_elements(device):
    done = subprocess.run(
        [sys.executable, "-c", FAR.format(device=device)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
