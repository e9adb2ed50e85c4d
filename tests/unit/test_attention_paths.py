"""Every way to compute attention, beside its definition in fp64: forward, gradients, and what recomputation keeps."""

from collections import Counter
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from megalite.errors import ConfigError
from megalite.layers import attention
from megalite.layers.attention import (
    KVCache,
    causal_attention,
    document_attention,
    document_segments,
    row_segments,
    softmax_attention,
)
from megalite.layers.recompute import recompute
from megalite.model.flops import predict_memory
from tests.unit.test_document_masking import FAR, naive_attention, packed, random_heads
from tests.unit.tiny_model import loss_and_gradients, make_batch, make_model, make_stage

PATHS = ["auto", "sdpa", "varlen", "softmax"]
EVERY_PATH = pytest.mark.parametrize("path", PATHS)
MODES = ["none", "selective", "full", "offload"]


def attend(path: str, q: Tensor, k: Tensor, v: Tensor, segments, past: int = 0) -> Tensor:
    """As `Attention` chooses."""
    if path == "softmax":
        return softmax_attention(q, k, v, segments)
    return causal_attention(q, k, v, past) if segments is None else document_attention(q, k, v, segments)


def outcome(function, heads: list[Tensor]) -> list[Tensor]:
    """What it gives, and the gradients of q, k and v under an upstream gradient that differs everywhere."""
    y = function(*heads)
    upstream = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).cos().to(y)
    return [y.detach(), *torch.autograd.grad(y, heads, upstream)]


@EVERY_PATH
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("layout", ["plain", "documents", "prefix"])
def test_each_path_is_the_definition(path, mode, kv_heads, layout):
    p = 3 if layout == "prefix" else 0
    documents = packed()[1] if layout != "plain" else torch.zeros(3, 12, dtype=torch.int32)
    if path == "varlen" and p:
        pytest.skip("refused, as another test shows")
    heads = random_heads(3, p + 12, kv_heads)
    segments = document_segments(documents, p, torch.float64, 16, path)
    got = outcome(partial(recompute, mode, partial(attend, path, segments=segments)), heads)
    want = outcome(lambda q, k, v: naive_attention(q, k, v, documents, p), heads)
    for actual, expected in zip(got, want, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-13)


@EVERY_PATH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_path_in_less_precision(path, dtype):
    documents = packed()[1]
    heads = random_heads(3, 12, 2, dtype)
    segments = document_segments(documents, 0, dtype, 16, path)
    got = outcome(partial(attend, path, segments=segments), heads)
    exact = [x.detach().double().requires_grad_() for x in heads]
    want = outcome(lambda q, k, v: naive_attention(q, k, v, documents), exact)
    # fp32: sums of at most 24 terms. bf16: scores, probabilities and results each round at 2^-9, values are up to 3.
    limit = 1e-5 if dtype == torch.float32 else 5e-2
    for actual, expected in zip(got, want, strict=True):
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=limit)


@EVERY_PATH
def test_with_a_cache(path):
    """The first five at once, then two together, then one by one."""
    q, k, v = (x.detach() for x in random_heads(2, 12, 2))
    want = naive_attention(q, k, v, torch.zeros(2, 12))
    cache = KVCache(2, 2, 12, 16, torch.float64, "cpu")
    for a, z in ((0, 5), (5, 7), (7, 8), (8, 9), (9, 12)):
        keys, values = cache.append(k[:, :, a:z], v[:, :, a:z])
        got = attend(path, q[:, :, a:z], keys, values, None, past=a)
        torch.testing.assert_close(got, want[:, :, a:z], rtol=0, atol=1e-13)


@EVERY_PATH
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", [{}, {"documents": packed()[1]}], ids=["plain", "documents"])
def test_the_model_on_each_path(path, mode, options):
    """Loss, and the gradient of every parameter, against auto, which other tests hold to Hugging Face and to alone."""
    changes = {"num_kv_heads": 2, "qk_norm": True}
    batch = make_batch(b=3)
    want, gradients = loss_and_gradients(make_stage(**changes).double(), *batch, **options)
    stage = make_stage(activation_checkpointing=mode, attention=path, **changes).double()
    got, others = loss_and_gradients(stage, *batch, **options)
    torch.testing.assert_close(got, want, rtol=FAR, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=FAR, atol=FAR * 100, msg=lambda m, n=name: f"{n}: {m}")


@EVERY_PATH
def test_the_model_with_prefix_and_cache(path):
    tokens, _, _ = make_batch()
    prefix = torch.ones(2, 3, 32)
    want = make_stage(num_kv_heads=2).eval()(tokens, prefix_embeddings=prefix)
    stage = make_stage(num_kv_heads=2, attention=path).eval()
    caches = [KVCache(2, 2, 15, 8, torch.float32, "cpu") for _ in stage.blocks]
    parts = [stage(tokens[:, :5], prefix_embeddings=prefix, caches=caches)]
    parts += [stage(tokens[:, a:z], caches=caches) for a, z in ((5, 9), (9, 10), (10, 12))]
    torch.testing.assert_close(torch.cat(parts), want, rtol=1e-4, atol=1e-5)


# What each path is made of


class Watch(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self):
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen[function.name().removeprefix("aten::")] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("path", "fused", "products"), [("auto", 7, 0), ("sdpa", 1, 0), ("varlen", 7, 0), ("softmax", 0, 2)]
)
def test_a_path_runs_what_its_name_says(path, fused, products):
    segments = document_segments(packed()[1], 0, torch.float32, 16, path)
    with Watch() as watch:
        attend(path, *random_heads(3, 12, 4, torch.float32), segments)
    assert sum(n for name, n in watch.seen.items() if "scaled_dot_product" in name) == fused
    assert watch.seen["bmm"] == products


def test_one_document_a_row_needs_no_segments():
    documents = torch.zeros(2, 12, dtype=torch.int32)
    assert [document_segments(documents, 0, torch.float32, 16, path) for path in PATHS] == [None] * 4
    assert row_segments(2, 12, torch.device("cpu"), torch.float32, 16) is None


def bytes_kept(mode: str, path: str, s: int) -> int:
    """What a forward pass of attention allocates and does not free."""
    heads = random_heads(2, s, 2, torch.float32)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        y = recompute(mode, partial(attend, path, segments=None), *heads)
    del y
    return sum(e.nbytes() for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]")


@EVERY_PATH
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_scores_are_kept_by_softmax_without_recomputation_alone(path, mode):
    s = 160  # five times 2 d: scores are far larger than all else
    scores = 2 * 4 * s * s * 4
    if path == "softmax" and mode == "none":
        assert bytes_kept(mode, path, s) > scores
    else:
        assert bytes_kept(mode, path, s) < scores / 2


def test_selective_repeats_the_scores_and_keeps_the_other_product():
    counts = {}
    for mode in ("none", "selective", "full"):
        with Watch() as watch:
            y = recompute(mode, lambda *heads: softmax_attention(*heads).square(), *random_heads(2, 160, 2))
            y.sum().backward()
        counts[mode] = watch.seen["bmm"]
    assert counts == {"none": 2 + 4, "selective": 2 + 4 + 1, "full": 2 + 4 + 2}


@pytest.mark.parametrize(
    ("device", "dtype", "causal", "capability", "cudnn_first"),
    [
        ("cuda", torch.bfloat16, True, (9, 0), True),
        ("cuda", torch.float16, True, (10, 0), True),
        ("cuda", torch.bfloat16, True, (8, 0), False),
        ("cuda", torch.float32, True, (9, 0), False),
        ("cuda", torch.bfloat16, False, (9, 0), False),
        ("cpu", torch.bfloat16, True, (9, 0), False),
    ],
)
def test_cudnn_stands_first_from_hopper_on(monkeypatch, device, dtype, causal, capability, cudnn_first):
    monkeypatch.setattr(attention, "_capability", lambda device: capability)
    before = torch._C._get_sdp_priority_order()
    assert before[0] != SDPBackend.CUDNN_ATTENTION.value
    with attention._backends(torch.device(device), dtype, causal):
        order = torch._C._get_sdp_priority_order()
    if cudnn_first:
        names = ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
        assert order[:4] == [getattr(SDPBackend, name).value for name in names]
    else:
        assert order == before
    assert torch._C._get_sdp_priority_order() == before


def test_varlen_by_name_that_cannot_be_is_refused():
    with pytest.raises(
        ConfigError, match=r"^model.attention = varlen keeps no prefix .*; choose auto, sdpa or softmax$"
    ):
        make_stage(attention="varlen")(
            make_batch()[0], prefix_embeddings=torch.ones(2, 3, 32), documents=packed()[1][:2]
        )
    documents, meta = packed()[1].to("meta"), torch.device("meta")
    match = r"needs bf16 or fp16, .*; here are torch.float32 on meta and heads of 16; choose auto$"
    with pytest.raises(ConfigError, match=match):
        document_segments(documents, 0, torch.float32, 16, "varlen")
    with pytest.raises(ConfigError, match=match):
        row_segments(2, 12, meta, torch.float32, 16)


@EVERY_PATH
@pytest.mark.parametrize("layout", ["plain", "documents"])
def test_compiled_in_one_graph(path, layout):
    torch._dynamo.reset()
    heads, documents = random_heads(3, 12, 2), packed()[1]
    segments = None if layout == "plain" else document_segments(documents, 0, torch.float64, 16, path)
    function = partial(attend, path, segments=segments)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for got, want in zip(outcome(compiled, heads), outcome(function, heads), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-13)


@pytest.mark.parametrize("mode", MODES)
def test_compiled_and_recomputed(mode):
    """The explicit path, as the only one with products of its own."""
    torch._dynamo.reset()
    heads = random_heads(2, 12, 2)
    compiled = torch.compile(softmax_attention, backend="aot_eager", fullgraph=True)
    got = outcome(partial(recompute, mode, compiled), heads)
    for actual, expected in zip(got, outcome(softmax_attention, heads), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-13)


def test_predicted_memory_has_the_probabilities():
    def activations(mode: str, **changes) -> float:
        options = {"zero_stage": 1, "offload": False, "data_parallel": 1, "low_precision": True, "micro_batch": 2}
        return predict_memory(make_model(**changes), **options, sequence=1024, recompute=mode)["activations"]

    probabilities = 2 * 4 * 1024 * 1024 * 2  # b * n * s * s in bf16
    for mode, blocks in (("none", 2), ("selective", 1), ("full", 1), ("offload", 1)):
        assert activations(mode, attention="softmax") - activations(mode) == blocks * probabilities


# On a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@EVERY_PATH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["plain", "documents"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_each_path_on_a_gpu(path, dtype, layout, kv_heads):
    """Against the definition, and no torch path that would keep s^2 behind our back."""
    if path == "varlen" and dtype == torch.float32:
        pytest.skip("refused")
    documents = packed()[1].cuda() if layout == "documents" else torch.zeros(3, 12, dtype=torch.int32, device="cuda")
    heads = random_heads(3, 12, kv_heads, dtype, "cuda")
    if layout == "plain" and path == "varlen":
        segments = row_segments(3, 12, documents.device, dtype, 16)
    else:
        segments = document_segments(documents, 0, dtype, 16, path)
    with Watch() as watch:
        got = outcome(partial(attend, path, segments=segments), heads)
    exact = [x.detach().double().requires_grad_() for x in heads]
    want = outcome(lambda q, k, v: naive_attention(q, k, v, documents), exact)
    # fp32 as on the CPU, but for TF32, which torch's default keeps off. Half precision rounds three times at 2^-9.
    limit = 1e-4 if dtype == torch.float32 else 5e-2
    for actual, expected in zip(got, want, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=limit)
    assert "_scaled_dot_product_attention_math" not in watch.seen
    assert (watch.seen["bmm"] > 0) == (path == "softmax")
