"""Activation checkpointing: it changes no number, and what it repeats and keeps."""

from collections import Counter

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from megalite.layers.recompute import recompute
from megalite.model.flops import predict_memory
from tests.unit.tiny_model import CHECKPOINTING, loss_and_gradients, make_batch, make_model, make_stage


class CountOperators(TorchDispatchMode):
    """Counts the matrix products and attentions that run, and how often documents are laid out for attention."""

    def __init__(self):
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("mm", "bmm", "addmm", "_linear_pointwise"):
            self.seen["product"] += 1
        elif name in ("nonzero", "tril"):
            self.seen["segments"] += 1
        elif "attention" in name:
            self.seen["attention_backward" if name.endswith("backward") else "attention"] += 1
        return function(*args, **(kwargs or {}))


RECOMPUTED = {"num_layers": 3, "qk_norm": True, "tie_embeddings": False}
# In each sequence three documents; with a prefix they take another road.
DOCUMENTS = {"documents": torch.tensor([0] * 4 + [1] + [2] * 7).expand(2, 12)}
EVERY_ATTENTION = pytest.mark.parametrize(
    ("options", "attentions"),
    [({}, 3), (DOCUMENTS, 18), (DOCUMENTS | {"prefix_embeddings": torch.ones(2, 3, 32)}, 3)],
    ids=["plain", "documents", "documents and prefix"],
)


@EVERY_ATTENTION
def test_recomputation_changes_no_bit(options, attentions):
    batch = make_batch()
    loss, gradients = loss_and_gradients(make_stage(**RECOMPUTED), *batch, **options)
    for mode in (*CHECKPOINTING[1:], "offload"):
        stage = make_stage(activation_checkpointing=mode, **RECOMPUTED)
        other_loss, other = loss_and_gradients(stage, *batch, **options)
        assert torch.equal(other_loss, loss)
        for name, gradient in gradients.items():
            assert torch.equal(other[name], gradient), (mode, name)


@EVERY_ATTENTION
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_selective_repeats_no_product_and_full_repeats_all(kv_heads, options, attentions):
    counts = {}
    for mode in CHECKPOINTING:
        stage = make_stage(activation_checkpointing=mode, num_kv_heads=kv_heads, **RECOMPUTED)
        with CountOperators() as counter:
            loss_and_gradients(stage, *make_batch(), **options)
        counts[mode] = counter.seen
        assert counter.seen["segments"] == (1 if options else 0)
    assert counts["none"]["attention"] == attentions  # over 3 layers
    assert counts["none"]["product"] == 3 * (4 * 3 + 1)  # four in each of 3 layers and the head; two more in backward
    assert counts["selective"] == counts["none"]
    assert counts["full"] - counts["none"] == {"product": 3 * 4, "attention": attentions}


def test_evaluation_does_not_checkpoint():
    stage = make_stage(activation_checkpointing="full", **RECOMPUTED)
    tokens, labels, mask = make_batch()
    with torch.no_grad():
        assert torch.equal(stage(tokens, labels=labels, loss_mask=mask), stage(tokens, None, labels, mask))


def bytes_kept(mode: str) -> int:
    """What a forward pass allocates and does not free."""
    stage = make_stage(activation_checkpointing=mode, **RECOMPUTED)
    tokens, labels, mask = make_batch(b=4, s=32)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss = stage(tokens, labels=labels, loss_mask=mask)
    del loss
    return sum(e.nbytes() for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]")


def test_recomputation_keeps_less():
    kept = {mode: bytes_kept(mode) for mode in CHECKPOINTING}
    hidden = 4 * 32 * 32 * 4  # [s, b, h] in fp32
    assert kept["full"] < kept["selective"] < kept["none"]
    # A block keeps far more than twenty such tensors' worth without, and one, its input, with full recomputation.
    assert kept["none"] - kept["full"] > 3 * 10 * hidden


class CountCopies(TorchDispatchMode):
    """Where the memory begins that is copied from, and how many bytes are."""

    def __init__(self):
        super().__init__()
        self.sources: set[int] = set()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket is torch.ops.aten.copy_:
            self.sources.add(args[1].untyped_storage().data_ptr())
            self.bytes += args[1].nbytes
        return function(*args, **(kwargs or {}))


def test_offload_moves_what_backward_needs_and_no_more():
    """Not the parameters, nor the angles and masks that all blocks share; nothing where there is no backward."""
    tokens, labels, mask = make_batch(b=4, s=32)
    options = {"documents": torch.arange(2).repeat_interleave(16).expand(4, 32)}
    hidden = 4 * 32 * 32 * 4  # [s, b, h] in fp32
    for path in ("sdpa", "softmax"):  # with a mask
        stage = make_stage(activation_checkpointing="offload", attention=path, **RECOMPUTED)
        shared = []
        stage.blocks[0].register_forward_pre_hook(
            lambda block, args, shared=shared: shared.extend(x for x in args[1:] if isinstance(x, torch.Tensor))
        )
        with CountCopies() as copies:
            stage(tokens, None, labels, mask, **options)
        assert len(shared) == 3
        stay = {x.untyped_storage().data_ptr() for x in (*shared, *stage.parameters())}
        assert not copies.sources & stay
        assert copies.bytes > 3 * 10 * hidden
        with CountCopies() as copies, torch.no_grad():
            stage(tokens, None, labels, mask, **options)
        assert not copies.bytes


def test_offload_leaves_what_autocast_makes_of_a_weight():
    """Of which each micro-batch would move all to the host and back."""
    layer, x = torch.nn.Linear(8, 16, bias=False), torch.randn(4, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16), CountCopies() as copies:
        y = recompute("offload", layer, x)
    assert copies.bytes == x.nbytes // 2
    y.sum().backward()
    torch.testing.assert_close(layer.weight.grad, x.sum(0).expand(16, 8), rtol=1e-2, atol=1e-2)


def test_offload_moves_what_is_expanded_once():
    x = torch.randn(4, 1, 8).expand(4, 32, 8).requires_grad_()
    with CountCopies() as copies:
        recompute("offload", torch.sin, x)
    assert copies.bytes == 4 * 8 * 4


@pytest.mark.parametrize("layout", ["transposed", "slice", "every second", "expanded"])
def test_offload_keeps_values_and_layout(layout):
    """In another layout sums would have another order."""
    x = torch.randn(6, 8)
    x = {"transposed": x.t(), "slice": x[:, 2:5], "every second": x[:, ::2], "expanded": x[:1].expand(6, 8)}[layout]
    x = x.detach()
    seen = []

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * 2

        @staticmethod
        def backward(ctx, upstream):
            seen.append(ctx.saved_tensors[0])
            return upstream * 2

    recompute("offload", Double.apply, x.requires_grad_()).sum().backward()
    assert torch.equal(seen[0], x)
    assert seen[0].stride() == x.stride()
    assert seen[0].data_ptr() != x.data_ptr()


def test_offload_is_predicted():
    """On the device one block's, on the host all blocks' activations."""
    options = {"zero_stage": 1, "offload": False, "data_parallel": 1, "low_precision": True, "micro_batch": 2}
    none, full, offload = (
        predict_memory(make_model(**RECOMPUTED), **options, sequence=16, recompute=mode)
        for mode in ("none", "full", "offload")
    )
    assert none["host"] == full["host"] == 0
    assert offload["activations"] < full["activations"]
    logits = 2 * 16 * 61 * 2
    assert offload["host"] == none["activations"] - logits == 3 * (offload["activations"] - logits)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_offload_frees_the_gpu():
    batch = [x.cuda() for x in make_batch(b=8, s=32)]
    held, results = {}, {}
    for mode in ("none", "offload"):
        stage = make_stage(activation_checkpointing=mode, **RECOMPUTED).cuda()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        loss = stage(batch[0], None, *batch[1:])
        held[mode] = torch.cuda.memory_allocated() - before
        loss.backward()
        results[mode] = [loss, *(p.grad for p in stage.parameters())]
    assert held["offload"] < held["none"] / 3
    for got, want in zip(*results.values(), strict=True):
        torch.testing.assert_close(got, want)


def test_bf16_autocast_trains():
    stage = make_stage(num_kv_heads=2, qk_norm=True, vocab_multiple=16)
    batch = make_batch()
    exact, gradients = loss_and_gradients(stage, *batch)
    for mode in CHECKPOINTING:
        stage.activation_checkpointing = mode
        with torch.autocast("cpu", torch.bfloat16):
            loss, rough = loss_and_gradients(stage, *batch)
        assert loss.dtype == torch.float32
        # bf16 has 8 bits: 0.4 % a rounding, some of which a sum over 16 tokens averages away.
        torch.testing.assert_close(loss, exact, rtol=2e-2, atol=0)
        for name, gradient in rough.items():
            assert gradient.dtype == torch.float32
            error = (gradient - gradients[name]).norm() / gradients[name].norm()
            assert error < 0.1, (mode, name)
