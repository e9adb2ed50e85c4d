"""Head and loss in chunks: against fp64, how many matrix products they take, and what they never hold."""

import inspect

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from megalite.kernels import cross_entropy, dispatch, linear_cross_entropy
from megalite.kernels.linear_cross_entropy import _chunk_tokens, linear_cross_entropy_reference
from tests.kernels.test_cross_entropy import CHOICES, OPTIONS, draw, draw_targets, exact

TOKENS, HIDDEN, IDS = 10, 16, 100
# Relative to the largest value of each tensor. fp32: sums of at most a hundred terms, rounded at 6e-8 each. Half
# precision: logits, their gradient, hidden's gradient (twice) and the weight's are rounded, at 2^-9 or 2^-12 each, and
# the logits' rounding, up to 2^-7 or 2^-10 at a logit of 4, is a relative error of the probability.
RELATIVE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def inputs(device: str, dtype: torch.dtype = torch.float32, tokens: int = TOKENS) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = draw(tokens, HIDDEN, device=device), draw(IDS, HIDDEN, device=device, seed=1) / 4
    targets = draw_targets(tokens, ids=IDS - 10, device=device)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def upstream_of(kind: str, device: str) -> Tensor:
    return torch.tensor(0.7, device=device).expand(TOKENS) if kind == "uniform" else draw(TOKENS, device=device, seed=2)


def assert_near(got: list[Tensor], want: list[Tensor], relative: float) -> None:
    for actual, expected in zip(got, want, strict=True):
        scale = expected.abs().max().item()
        assert scale > 0
        torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=relative * scale)


@pytest.mark.parametrize("dtype", RELATIVE, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", ["uniform", "each token its own"])
@pytest.mark.parametrize("chunk_tokens", [1, 4, None])
@CHOICES
def test_against_fp64(device, choice, dtype, options, kind, chunk_tokens):
    """With a tenth of the ids padding, though their rows in the weight are not 0."""
    hidden, weight, targets = inputs(device, dtype)
    x, w = (each.detach().double().requires_grad_() for each in (hidden, weight))
    logits = torch.where(torch.arange(IDS, device=device) < IDS - 10, x @ w.t(), -torch.inf)
    want = exact(logits, targets, **options)
    upstream = upstream_of(kind, device)
    with dispatch.using(choice):
        loss = linear_cross_entropy(hidden, weight, targets, chunk_tokens=chunk_tokens, vocab_size=IDS - 10, **options)
        gradients = torch.autograd.grad(loss, (hidden, weight), upstream)
    assert [loss.dtype, *(g.dtype for g in gradients)] == [torch.float32, dtype, dtype]
    want_gradients = torch.autograd.grad(want, (x, w), upstream.double())
    assert_near([loss, *gradients], [want, *want_gradients], RELATIVE[dtype])
    assert not gradients[1][IDS - 10 :].any()  # of padding


@CHOICES
def test_it_is_the_product_and_its_loss(device, choice):
    """Forward and backward give what the two operators in a row give, in any layout of hidden and targets."""
    hidden, weight, targets = inputs(device, tokens=12)
    hidden = hidden.detach().view(3, 4, HIDDEN).transpose(0, 1).requires_grad_()
    targets = targets.view(3, 4).t()
    with dispatch.using(choice):
        whole = cross_entropy(hidden @ weight.t(), targets, z_loss=0.1)
        parts = linear_cross_entropy(hidden, weight, targets, z_loss=0.1, chunk_tokens=5)
        assert parts.shape == (4, 3)
        got, want = (torch.autograd.grad(loss.sum(), (hidden, weight)) for loss in (parts, whole))
    assert_near([parts, *got], [whole, *want], RELATIVE[torch.float32])


def test_gradients_in_fp64(device):
    """By hand, since gradcheck runs backward several times on one graph. The kernels have theirs in cross-entropy's."""
    hidden, weight = torch.randn(12, 5, dtype=torch.float64, device=device).requires_grad_().split((5, 7))
    targets = torch.tensor([0, 6, -100, 3, 3], device=device)
    upstream = torch.linspace(-1, 2, 5, dtype=torch.float64, device=device)

    def total(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, targets, chunk_tokens=2, **OPTIONS["all"]) @ upstream

    with dispatch.using("torch"):
        gradients = torch.autograd.grad(total(hidden, weight), (hidden, weight))
        with torch.no_grad():
            for i, gradient in enumerate(gradients):
                slopes = []
                for step in 1e-6 * torch.eye(gradient.numel(), dtype=torch.float64, device=device):
                    step = (step.view(gradient.shape), 0.0) if i == 0 else (0.0, step.view(gradient.shape))
                    up, down = total(hidden + step[0], weight + step[1]), total(hidden - step[0], weight - step[1])
                    slopes.append((up - down) / 2e-6)
                torch.testing.assert_close(gradient.flatten(), torch.stack(slopes), rtol=1e-7, atol=1e-8)


def test_the_gradient_of_the_weight_is_summed_in_fp32(device):
    """In bf16 a sum of ones stops at 256 (Liger's issue 512): here 600 tokens, each a chunk, add a half each."""
    tokens = 600
    hidden = torch.ones(tokens, 1, dtype=torch.bfloat16, device=device)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, device=device).requires_grad_()
    targets = torch.zeros(tokens, dtype=torch.int64, device=device)
    with dispatch.using("torch"):
        loss = linear_cross_entropy(hidden, weight, targets, chunk_tokens=1)
    loss.sum().backward()
    assert weight.grad.flatten().tolist() == [-tokens / 2, tokens / 2]


# What it costs


class Watch(TorchDispatchMode):
    """Counts matrix products, and elements of the largest tensor that an operator returns."""

    products = 0
    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.products += "mm" in function.name() or "linear" in function.name()
        leaves = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        self.largest = max(self.largest, *(leaf.numel() for leaf in leaves), 0)
        return result


@pytest.mark.parametrize(
    ("kind", "frozen", "count"),
    [
        ("uniform", None, 3),
        ("each token its own", None, 5),
        ("uniform", "weight", 2),
        ("each token its own", "weight", 2),
        ("each token its own", "hidden", 4),
        ("no gradient", None, 1),
        ("uniform", "both", 1),
    ],
)
def test_matrix_products_of_each_of_four_chunks(device, kind, frozen, count):
    hidden, weight, targets = inputs(device)
    hidden.requires_grad_(frozen not in ("hidden", "both"))
    weight.requires_grad_(frozen not in ("weight", "both"))

    with Watch() as watch:
        with torch.set_grad_enabled(kind != "no gradient"):
            loss = linear_cross_entropy(hidden, weight, targets, chunk_tokens=3)
        if loss.requires_grad:
            loss.backward(upstream_of(kind, device))
    assert watch.products == 4 * count
    assert [hidden.grad is None, weight.grad is None] == [not hidden.requires_grad or count == 1, count <= 2]


@pytest.mark.parametrize("kind", ["uniform", "each token its own"])
@CHOICES
def test_it_never_holds_all_logits(device, choice, kind):
    tokens, chunk = 60, 20  # of more elements than hidden and weight
    hidden, weight, targets = inputs(device, tokens=tokens)
    upstream = torch.ones(tokens, device=device)
    with dispatch.using(choice), Watch() as watch:
        loss = linear_cross_entropy(hidden, weight, targets, chunk_tokens=chunk)
        loss.backward(upstream if kind != "uniform" else upstream[0].expand(tokens))
    assert watch.largest == chunk * IDS


@pytest.mark.parametrize(
    ("tokens", "row_bytes", "on", "chunk"),
    [
        (8192, 2 * 32768, "cuda", 4096),
        (8192, 2 * 131072, "cuda", 2048),
        (8192, 4 * 131072, "cuda", 1024),
        (4097, 2 * 32768, "cuda", 2112),  # two alike, not one of one token
        (100, 2 * 32768, "cuda", 128),
        (8192, 2**30, "cuda", 256),
        (0, 64, "cuda", 64),
        (2048, 4 * 4096, "cpu", 1024),
        (8192, 4 * 131072, "cpu", 256),
        (100, 4 * 4096, "cpu", 128),
    ],
)
def test_default_chunks(tokens, row_bytes, on, chunk):
    assert _chunk_tokens(tokens, row_bytes, on) == chunk


# Where it is used


@CHOICES
def test_autocast(device, choice):
    """fp32 hidden and weight under bf16 autocast: bf16 products, and gradients that were never rounded to bf16."""
    hidden, weight, targets = inputs(device)
    rounded = [x.detach().bfloat16().requires_grad_() for x in (hidden, weight)]
    with dispatch.using(choice):
        with torch.autocast(device, torch.bfloat16):
            loss = linear_cross_entropy(hidden, weight, targets, chunk_tokens=4)
        want = linear_cross_entropy(*rounded, targets, chunk_tokens=4)
    assert torch.equal(loss, want)
    gradients = torch.autograd.grad(loss.sum(), (hidden, weight))
    want_gradients = torch.autograd.grad(want.sum(), rounded)
    assert [g.dtype for g in gradients] == [torch.float32] * 2
    assert torch.equal(gradients[0].bfloat16(), want_gradients[0])
    assert torch.equal(gradients[1].bfloat16(), want_gradients[1])
    assert not torch.equal(gradients[1], want_gradients[1].float())


@pytest.mark.parametrize("wrapper", ["checkpoint", "compile"])
@CHOICES
def test_inside(device, choice, wrapper):
    def loss_of(hidden, weight, targets):
        return linear_cross_entropy(hidden * 2, weight, targets, chunk_tokens=4, **OPTIONS["all"]).sum()

    results = []
    for wrapped in (False, True):
        hidden, weight, targets = inputs(device)
        with dispatch.using(choice):
            if not wrapped:
                loss = loss_of(hidden, weight, targets)
            elif wrapper == "checkpoint":
                loss = checkpoint(loss_of, hidden, weight, targets, use_reentrant=False)
            else:  # a graph before and one after it
                loss = torch.compile(loss_of, backend="aot_eager")(hidden, weight, targets)
            results.append([loss.detach(), *torch.autograd.grad(loss, (hidden, weight))])
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-7)


@CHOICES
def test_a_second_backward_raises(device, choice):
    hidden, weight, targets = inputs(device)
    with dispatch.using(choice):
        loss = linear_cross_entropy(hidden, weight, targets).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="the first backward has used its gradients"):
        loss.backward()


@pytest.mark.parametrize("kind", ["uniform", "each token its own"])
@CHOICES
def test_all_targets_ignored(device, choice, kind):
    hidden, weight, targets = inputs(device)
    with dispatch.using(choice):
        loss = linear_cross_entropy(hidden, weight, targets.fill_(-100), chunk_tokens=4, **OPTIONS["all"])
        loss.backward(upstream_of(kind, device))
    assert loss.tolist() == [0.0] * TOKENS
    assert not hidden.grad.any()
    assert not weight.grad.any()


@CHOICES
def test_no_tokens(device, choice):
    hidden, weight, targets = inputs(device)
    with dispatch.using(choice):
        linear_cross_entropy(hidden[:0], weight, targets[:0]).sum().backward()
    assert not weight.grad.any()


def test_mistakes(device):
    hidden, weight, targets = inputs(device)
    with pytest.raises(ValueError, match="chunk_tokens = 0"):
        linear_cross_entropy(hidden, weight, targets, chunk_tokens=0)
    with pytest.raises(ValueError, match=r"label_smoothing = -0\.1"):
        linear_cross_entropy(hidden, weight, targets, label_smoothing=-0.1)
    targets[3] = IDS
    if device == "cpu":
        with pytest.raises(IndexError, match=rf"target {IDS} \(token 3\)"):
            linear_cross_entropy(hidden, weight, targets, chunk_tokens=2)
    else:
        loss = linear_cross_entropy(hidden, weight, targets, chunk_tokens=2)
        assert loss.isnan().nonzero().flatten().tolist() == [3]


def test_the_reference_has_the_same_signature():
    assert inspect.signature(linear_cross_entropy) == inspect.signature(linear_cross_entropy_reference)
