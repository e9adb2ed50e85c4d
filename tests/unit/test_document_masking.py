"""Documents packed into one window, beside each of them alone."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megalite.data.batch import Batch, document_fields
from megalite.data.dataset import WindowDataset
from megalite.layers.attention import KVCache, document_attention, document_bounds, document_segments
from megalite.layers.recompute import recompute
from megalite.model.gpt import Stage
from tests.unit.test_dataset import make_source
from tests.unit.test_indexed import handwritten_idx
from tests.unit.tiny_model import CHECKPOINTING, loss_and_gradients, make_batch, make_stage

LENGTHS = [[5, 1, 6], [1, 1, 10], [12]]
FAR = torch.finfo(torch.float64).eps * 1e5  # fp64 through two layers, sums of a few hundred terms in another order


def packed(lengths: list[list[int]] = LENGTHS) -> tuple[Tensor, Tensor]:
    """positions and documents, [b, s]."""
    breaks = [torch.tensor(row).cumsum(0)[:-1].tolist() for row in lengths]
    positions, documents = document_fields(breaks, sum(lengths[0]))
    return torch.from_numpy(positions), torch.from_numpy(documents)


def spans(lengths: list[list[int]] = LENGTHS) -> list[tuple[int, slice]]:
    """Where each document is: row, tokens."""
    ends = [torch.tensor(row).cumsum(0).tolist() for row in lengths]
    return [(i, slice(end - n, end)) for i, row in enumerate(lengths) for n, end in zip(row, ends[i], strict=True)]


def naive_attention(q: Tensor, k: Tensor, v: Tensor, documents: Tensor, p: int = 0) -> Tensor:
    """From the definition, one query at a time."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    y = torch.empty_like(q)
    for b in range(q.shape[0]):
        for i in range(q.shape[2]):
            seen = [j for j in range(i + 1) if j < p or (i >= p and documents[b, j - p] == documents[b, i - p])]
            scores = torch.einsum("nd,njd->nj", q[b, :, i], k[b][:, seen]) / q.shape[-1] ** 0.5
            y[b, :, i] = torch.einsum("nj,njd->nd", scores.softmax(-1), v[b][:, seen])
    return y


def random_heads(b: int, s: int, kv_heads: int, dtype=torch.float64, device="cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [
        torch.randn(b, n, s, 16, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()
        for n in (4, kv_heads, kv_heads)
    ]


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("p", [0, 3])
def test_attention_is_its_definition(kv_heads, p):
    documents = packed()[1]
    q, k, v = random_heads(3, p + 12, kv_heads)
    segments = document_segments(documents, p, torch.float64, 16)
    assert segments.dtype == torch.bool if p else segments == LENGTHS
    got = document_attention(q, k, v, segments)
    torch.testing.assert_close(got, naive_attention(q, k, v, documents, p), rtol=0, atol=1e-13)


def test_numbers_of_documents_may_start_and_jump_as_they_like():
    documents = packed()[1]
    assert document_segments(7 + 5 * documents, 0, torch.float32, 16) == LENGTHS
    want, got = (document_segments(each, 2, torch.float32, 16) for each in (documents, 7 + 5 * documents))
    assert torch.equal(got, want)


@pytest.mark.parametrize("mode", CHECKPOINTING)
@pytest.mark.parametrize("p", [0, 3])
@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_embeddings": False, "num_kv_heads": 2}, {"qk_norm": True, "num_kv_heads": 1, "vocab_multiple": 64}],
    ids=str,
)
def test_packed_documents_are_as_alone(changes, p, mode):
    """Logits, loss, and the gradient of every parameter and of the prefix."""
    stage = make_stage(activation_checkpointing=mode, z_loss=0.1, **changes).double()
    tokens, labels, mask = make_batch(b=3)
    positions, documents = packed()
    prefix = torch.randn(3, p, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(4)).requires_grad_()

    def logits_and_gradients(rows, span, **options) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        prefix.grad = None
        options |= {"positions": positions[rows, span], "prefix_embeddings": prefix[rows] if p else None}
        got = stage(tokens[rows, span], **options).detach()
        loss, gradients = loss_and_gradients(stage, tokens[rows, span], labels[rows, span], mask[rows, span], **options)
        return got, loss, gradients | ({"prefix": prefix.grad} if p else {})

    logits, loss, gradients = logits_and_gradients(slice(None), slice(None), documents=documents)
    total, totals = torch.zeros((), dtype=torch.float64), {name: torch.zeros_like(g) for name, g in gradients.items()}
    for row, span in spans():
        alone, its_loss, its_gradients = logits_and_gradients(slice(row, row + 1), span)
        torch.testing.assert_close(logits[span, row], alone[:, 0], rtol=FAR, atol=FAR)
        total += its_loss
        for name, gradient in its_gradients.items():
            totals[name] += gradient
    torch.testing.assert_close(loss, total, rtol=FAR, atol=0)
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 1e-3, name
        torch.testing.assert_close(gradient, totals[name], rtol=FAR, atol=FAR * 100, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("p", [0, 3])
def test_a_document_changes_no_bit_of_another(p):
    stage = make_stage(num_kv_heads=2)
    tokens, _, _ = make_batch(b=3)
    options = {"documents": packed()[1], "prefix_embeddings": torch.ones(3, p, 32)}
    before = stage(tokens, **options)
    for row, span in spans():
        changed = tokens.clone()
        changed[row, span.start] = (changed[row, span.start] + 1) % 61
        different = (stage(changed, **options) != before).any(-1).t()
        want = torch.zeros_like(different)
        want[row, span] = True
        assert torch.equal(different, want)
        if not p:  # and every document sees the prefix
            continue
        prefix = torch.ones(3, p, 32)
        prefix[row] += 0.1
        different = (stage(tokens, documents=packed()[1], prefix_embeddings=prefix) != before).any(-1).t()
        assert different[row].all()
        assert not different[[i for i in range(3) if i != row]].any()


@pytest.mark.parametrize("p", [0, 3])
def test_one_document_a_row_is_the_plain_path(p):
    stage = make_stage()
    tokens, _, _ = make_batch(b=3)
    prefix = torch.ones(3, p, 32)
    row = torch.tensor([[0], [2], [5]], dtype=torch.int32).expand(3, 12)
    assert document_segments(row, p, torch.float32, 8) is None
    assert torch.equal(stage(tokens, documents=row, prefix_embeddings=prefix), stage(tokens, prefix_embeddings=prefix))


def test_tokens_that_see_themselves_alone():
    stage = make_stage()
    tokens, _, _ = make_batch()
    positions, documents = packed([[1] * 12] * 2)
    alone = stage(tokens.reshape(24, 1)).view(2, 12, -1).transpose(0, 1)
    torch.testing.assert_close(stage(tokens, positions, documents=documents), alone, rtol=1e-4, atol=1e-5)


def test_positions_that_restart_hide_nothing():
    stage = make_stage()
    tokens, _, _ = make_batch(b=3)
    positions, documents = packed()
    plain, reset, masked = stage(tokens), stage(tokens, positions), stage(tokens, positions, documents=documents)
    assert torch.equal(plain[:5, 0], reset[:5, 0])
    assert torch.equal(plain[:, 2], reset[:, 2])
    for other in (plain, masked):
        assert not torch.isclose(reset[5:, 0], other[5:, 0], atol=1e-3).all(-1).any()
    # Angles depend on distance alone: within a document it does not matter from where its positions count.
    torch.testing.assert_close(stage(tokens, documents=documents), masked, rtol=1e-4, atol=1e-4)


def test_a_window_of_a_dataset(tmp_path):
    """From the .idx to the loss: documents of 5, 1 and 9 tokens, windows of 6."""
    tokens = torch.randint(61, (15,), generator=torch.Generator().manual_seed(6))
    make_source(tmp_path, "a", tokens.tolist())
    (tmp_path / "a.idx").write_bytes(handwritten_idx([5, 1, 9]))
    data = WindowDataset([tmp_path / "a"], 6, reset_positions=True, mask_documents=True)
    stage = make_stage()
    for window, pieces in ((0, [(0, 5), (5, 6)]), (1, [(6, 12)])):
        batch = data.batch([window])
        got = stage(batch.tokens, batch.positions, batch.labels, batch.loss_mask, documents=batch.documents)
        want = sum(stage(tokens[None, a:z], labels=tokens[None, a + 1 : z + 1]) for a, z in pieces)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=0)


def test_what_does_not_go_together_is_refused():
    stage = make_stage()
    tokens, _, _ = make_batch()
    documents = torch.zeros(2, 12, dtype=torch.int32)
    caches = [KVCache(2, 4, 20, 8, torch.float32, "cpu") for _ in stage.blocks]
    with pytest.raises(ValueError, match="with caches, give one document a row"):
        stage(tokens, caches=caches, documents=documents)
    with pytest.raises(ValueError, match=r"documents: shape \[2, 11\], wants \[2, 12\]"):
        stage(tokens, documents=documents[:, 1:])


@pytest.mark.parametrize("mode", CHECKPOINTING)
def test_bf16_autocast(mode):
    stage = make_stage(num_kv_heads=2, qk_norm=True, activation_checkpointing=mode)
    batch, documents = make_batch(b=3), packed()[1]
    exact, gradients = loss_and_gradients(stage, *batch, documents=documents)
    with torch.autocast("cpu", torch.bfloat16):
        loss, rough = loss_and_gradients(stage, *batch, documents=documents)
    # bf16 has 8 bits: 0.4 % a rounding, some of which a sum over tokens averages away.
    torch.testing.assert_close(loss, exact, rtol=2e-2, atol=0)
    for name, gradient in rough.items():
        assert (gradient - gradients[name]).norm() / gradients[name].norm() < 0.1, name


# FlashAttention of many lengths, which only GPUs have


def test_varlen_attention_takes_and_gives_the_right_shapes():
    q, k, v = random_heads(3, 12, 2, torch.bfloat16, "meta")
    y = document_attention(q, k, v, torch.empty(8, dtype=torch.int32, device="meta"))
    assert y.shape == (3, 4, 12, 16)
    y.sum().backward()
    assert k.grad.shape == v.grad.shape == (3, 2, 12, 16)


def test_selective_recomputation_keeps_what_varlen_attention_gave():
    class Count(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.seen += function.name() == "torch_attn::_varlen_attn"
            return function(*args, **(kwargs or {}))

    times = {}
    for mode in CHECKPOINTING:
        heads = random_heads(3, 12, 2, torch.bfloat16, "meta")
        with Count() as counter:
            y = recompute(mode, document_attention, *heads, torch.empty(8, dtype=torch.int32, device="meta"))
            y.square().sum().backward()
        times[mode] = counter.seen
    assert times == {"none": 1, "selective": 1, "full": 2}


def test_bounds_are_those_of_all_rows():
    assert document_bounds(packed()[1]).tolist() == [0, 5, 6, 12, 13, 14, 24, 36]


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gpu_varlen_is_the_masked_path(kv_heads, dtype):
    documents = packed()[1].cuda()
    outcomes = []
    for p in (0, 3):
        heads = random_heads(3, 12, kv_heads, dtype, "cuda")
        segments = document_segments(documents, p, dtype, 16)
        if p:
            segments = segments[:, :, p:, p:]  # the masked form without its prefix
        else:
            assert segments.dtype == torch.int32
        y = document_attention(*heads, segments)
        (y * y.detach().cos()).sum().backward()
        outcomes.append((y.detach(), *(x.grad for x in heads)))
    for got, want in zip(*outcomes, strict=True):
        # bf16 keeps 8 bits; both round the same sums of up to 12 terms, in another order.
        torch.testing.assert_close(got, want, rtol=3e-2, atol=3e-2)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_gpu_is_the_cpu(precision):
    batch = Batch(*make_batch(b=3), *packed())

    def outcome(stage: Stage, batch: Batch) -> tuple[float, dict[str, Tensor]]:
        with torch.autocast(batch.tokens.device.type, torch.bfloat16, enabled=precision == "bf16"):
            return loss_and_gradients(
                stage, batch.tokens, batch.labels, batch.loss_mask, positions=batch.positions, documents=batch.documents
            )

    loss, gradients = outcome(make_stage(num_kv_heads=2), batch)
    limit = 0.1 if precision == "bf16" else 1e-3
    for mode in CHECKPOINTING:
        stage = make_stage(num_kv_heads=2, activation_checkpointing=mode).cuda()
        its_loss, its_gradients = outcome(stage, batch.pin_memory().to("cuda", non_blocking=True))
        torch.testing.assert_close(its_loss.cpu(), loss, rtol=limit, atol=0)
        for name, gradient in its_gradients.items():
            assert (gradient.cpu() - gradients[name]).norm() / gradients[name].norm() < limit, (mode, name)
