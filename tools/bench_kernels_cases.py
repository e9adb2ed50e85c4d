"""What tools/bench_kernels.py measures: each kernel's inputs, what else does the same, and the least work there is.

Shapes: t tokens, h hidden, v vocabulary, f the MLP's width, s sequence, n heads, n_kv key heads, d head size.
Every function takes the inputs by name and returns a tensor or a tuple; a loss returns the sum over its tokens.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from megalite import kernels

EPS = 1e-6
HEAD_SIZE = 128


@dataclass(frozen=True)
class Sizes:
    tokens: int
    hidden: tuple[int, ...]
    vocab: tuple[int, ...]
    mlp: int
    rope_hidden: int
    """In heads of 128, with a quarter as many key heads."""
    softmax_heads: int
    """Over sequences of half the tokens."""


SIZES = {
    "full": Sizes(8192, (2048, 4096, 8192), (32000, 131072), 11008, 4096, 16),
    "reduced": Sizes(256, (512,), (4096,), 1408, 512, 4),  # for a CPU
}


@dataclass(frozen=True)
class Case:
    """One kernel at one shape."""

    kernel: str
    shape: str
    make: Callable[[], dict[str, Tensor]]
    differentiable: tuple[str, ...]
    """The inputs that get gradients."""
    ours: Callable
    eager: Callable
    liger: Callable | None
    """Given Liger's functional module, then the inputs; None where it has nothing of the kind."""
    work: dict[str, int]
    """What each pass needs at the least: bytes read and written, or floating-point operations.

    Passes are forward and backward, or for a loss forward (without gradients) and both: it may be that gradients are
    made in forward, or written over what forward has read, so that backward alone says nothing, or can't be repeated.
    """
    unit: str = "bytes"  # or flops


def cases(kernel: str, sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """All shapes of one kernel. Bytes: large inputs read and results written, each once."""
    makers = {
        "rms_norm": rms_norm_cases,
        "softmax": softmax_cases,
        "cross_entropy": cross_entropy_cases,
        "linear_cross_entropy": linear_cross_entropy_cases,
        "rope": rope_cases,
        "swiglu": swiglu_cases,
    }

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    yield from makers[kernel](sizes, draw)


def rms_norm_cases(sizes: Sizes, draw: Callable[..., Tensor]) -> Iterator[Case]:
    t = sizes.tokens
    for h in sizes.hidden:
        n = t * h * draw(1).itemsize
        yield Case(
            "rms_norm",
            f"{t} x {h}",
            lambda h=h: {"x": draw(t, h), "weight": draw(h)},
            ("x", "weight"),
            lambda x, weight: kernels.rms_norm(x, weight, EPS),
            lambda x, weight: F.rms_norm(x, weight.shape, weight, EPS),
            lambda liger, x, weight: liger.liger_rms_norm(x, weight, EPS, in_place=False),
            {"forward": 2 * n, "backward": 3 * n},
        )
        yield Case(
            "rms_norm",
            f"{t} x {h}, residual",
            lambda h=h: {"x": draw(t, h), "weight": draw(h), "residual": draw(t, h)},
            ("x", "weight", "residual"),
            lambda x, weight, residual: kernels.rms_norm(x, weight, EPS, residual),
            eager_rms_norm_residual,
            lambda liger, x, weight, residual: liger.liger_fused_add_rms_norm(x, residual, weight, EPS, in_place=False),
            {"forward": 4 * n, "backward": 4 * n},
        )


def eager_rms_norm_residual(x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    x = x + residual
    return F.rms_norm(x, weight.shape, weight, EPS), x


def softmax_cases(sizes: Sizes, draw: Callable[..., Tensor]) -> Iterator[Case]:
    """Causal: half of what is read need not be, while all of the result is written."""
    heads, s = sizes.softmax_heads, sizes.tokens // 2
    scale = HEAD_SIZE**-0.5

    def make() -> dict[str, Tensor]:
        scores = draw(1, heads, s, s)
        return {"scores": scores, "mask": scores.new_full((s, s), -torch.inf).triu(1)}

    def eager(scores: Tensor, mask: Tensor) -> Tensor:
        """As transformers' eager attention has it."""
        return torch.softmax(scores * scale + mask, dim=-1, dtype=torch.float32).to(scores.dtype)

    n = heads * s * s * draw(1).itemsize
    yield Case(
        "softmax",
        f"{heads} x {s} x {s}, causal",
        make,
        ("scores",),
        lambda scores, mask: kernels.softmax(scores, scale=scale, causal=True),
        eager,
        None,
        {"forward": n * 3 // 2, "backward": 2 * n},
    )


def cross_entropy_cases(sizes: Sizes, draw: Callable[..., Tensor]) -> Iterator[Case]:
    t = sizes.tokens
    for v in sizes.vocab:
        n = t * v * draw(1).itemsize
        yield Case(
            "cross_entropy",
            f"{t} x {v}",
            lambda v=v: with_targets(v, logits=draw(t, v)),
            ("logits",),
            lambda logits, targets: kernels.cross_entropy(logits, targets).sum(),
            lambda logits, targets: F.cross_entropy(logits.float(), targets, reduction="sum"),
            lambda liger, logits, targets: liger.liger_cross_entropy(logits, targets, reduction="sum"),
            {"forward": n, "both": 3 * n},
        )


def linear_cross_entropy_cases(sizes: Sizes, draw: Callable[..., Tensor]) -> Iterator[Case]:
    """The work is that of the matrix products: one forward, three with gradients."""
    t = sizes.tokens
    for h in sizes.hidden:
        for v in sizes.vocab:
            product = 2 * t * h * v
            yield Case(
                "linear_cross_entropy",
                f"{t} x {h} x {v}",
                lambda h=h, v=v: with_targets(v, hidden=draw(t, h), weight=draw(v, h) * h**-0.5),
                ("hidden", "weight"),
                lambda hidden, weight, targets: kernels.linear_cross_entropy(hidden, weight, targets).sum(),
                lambda hidden, weight, targets: F.cross_entropy(
                    (hidden @ weight.t()).float(), targets, reduction="sum"
                ),
                lambda liger, hidden, weight, targets: liger.liger_fused_linear_cross_entropy(
                    hidden, weight, targets, reduction="sum", accum_dtype=torch.float32
                ),
                {"forward": product, "both": 3 * product},
                unit="flops",
            )


def with_targets(v: int, **inputs: Tensor) -> dict[str, Tensor]:
    first = next(iter(inputs.values()))
    return inputs | {"targets": torch.randint(v, (first.shape[0],), device=first.device)}


def rope_cases(sizes: Sizes, draw: Callable[..., Tensor]) -> Iterator[Case]:
    """One sequence: only then do the layouts [s, b, n, d], ours, and [b, s, n, d], Liger's, need no copy."""
    s, n, d = sizes.tokens, sizes.rope_hidden // HEAD_SIZE, HEAD_SIZE
    n_kv = max(1, n // 4)

    def make() -> dict[str, Tensor]:
        q, k = draw(s, 1, n, d), draw(s, 1, n_kv, d)
        exponent = torch.arange(0, d, 2, device=q.device) / d
        angles = (torch.arange(s, device=q.device)[:, None] / 10000.0**exponent).view(s, 1, 1, d // 2)
        wide = {f"wide_{name}": torch.cat((x, x), -1).to(q.dtype) for name, x in trigonometric(angles).items()}
        return {"q": q, "k": k} | trigonometric(angles) | wide

    def liger_rope(liger, q: Tensor, k: Tensor, wide_cos: Tensor, wide_sin: Tensor, **_) -> tuple[Tensor, Tensor]:
        heads_first = (x.permute(1, 2, 0, 3) for x in (q, k))  # [1, n, s, d]
        q, k = liger.liger_rope(*heads_first, *(x.view(1, s, d) for x in (wide_cos, wide_sin)))
        return q.permute(2, 0, 1, 3), k.permute(2, 0, 1, 3)

    n_bytes = s * (n + n_kv) * d * draw(1).itemsize
    yield Case(
        "rope",
        f"{s} x ({n} + {n_kv}) x {d}",
        make,
        ("q", "k"),
        lambda q, k, cos, sin, **_: kernels.rope(q, k, cos, sin),
        eager_rope,
        liger_rope,
        {"forward": 2 * n_bytes, "backward": 2 * n_bytes},
    )


def trigonometric(angles: Tensor) -> dict[str, Tensor]:
    return {"cos": angles.cos(), "sin": angles.sin()}


def eager_rope(q: Tensor, k: Tensor, wide_cos: Tensor, wide_sin: Tensor, **_) -> tuple[Tensor, Tensor]:
    """As transformers' Llama has it: in the model's dtype."""
    return tuple(
        x * wide_cos + torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), -1) * wide_sin
        for x in (q, k)
    )


def swiglu_cases(sizes: Sizes, draw: Callable[..., Tensor]) -> Iterator[Case]:
    t, f = sizes.tokens, sizes.mlp
    n = t * f * draw(1).itemsize
    yield Case(
        "swiglu",
        f"{t} x {f}",
        lambda: {"gate": draw(t, f), "up": draw(t, f)},
        ("gate", "up"),
        lambda gate, up: kernels.swiglu(gate, up),
        lambda gate, up: F.silu(gate) * up,
        lambda liger, gate, up: liger.liger_swiglu(gate, up),
        {"forward": 3 * n, "backward": 5 * n},
    )
