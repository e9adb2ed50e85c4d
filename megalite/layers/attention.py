"""Causal self-attention with grouped key/value heads (GQA, arXiv:2305.13245), tensor-parallel over heads.

Shapes: s queries, t keys, b batch, h hidden, n query heads, k key/value heads, d head size; p prefix vectors, which
stand before the tokens of every document.
"""

import inspect
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from megalite import kernels
from megalite.comms.collectives import Group, TensorParallel, all_gather, group_size
from megalite.errors import ConfigError
from megalite.layers.linear import ColumnParallelLinear, RowParallelLinear
from megalite.layers.norm import RMSNorm
from megalite.layers.sharded_init import InitSpec

Segments = list[list[int]] | Tensor
"""How attention keeps documents apart, made once a forward pass by `document_segments` or `row_segments`."""

Attend = Callable[[Callable[[Tensor, Tensor, Tensor], Tensor], Tensor, Tensor, Tensor], Tensor]
"""attend(core, q, k, v): core's attention of whole sequences, exchanged over the ranks that have parts of them."""

_HALF = (torch.float16, torch.bfloat16)


class KVCache:
    """Keys and values of the positions seen so far, for generation; `length` of them are filled."""

    def __init__(self, batch: int, kv_heads: int, max_length: int, head_size: int, dtype: torch.dtype, device):
        self.keys = torch.empty(batch, kv_heads, max_length, head_size, dtype=dtype, device=device)  # [b, k, t, d]
        self.values = torch.empty_like(self.keys)
        self.length = 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values [b, k, s, d]; returns all so far, [b, k, t, d]."""
        end = self.length + keys.shape[2]
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


class Attention(nn.Module):
    """x [s, b, h] -> [s, b, h]; with sequence parallelism [s/tp, b, h] -> [s/tp, b, h].

    path: auto, sdpa, varlen or softmax; what each is, `document_segments` says. Where there are fewer key/value heads
    than tensor-parallel ranks, tp.kv_group's ranks have one of them together, each some rows of its matrices.

    context: the ranks that have the parts of one sequence, in their order, s positions each. `attend` gives each of
    them, for the time of the attention, all positions of a part of its heads (DeepSpeed-Ulysses, arXiv:2309.14509);
    cos and sin are of its own positions then, and segments of the whole sequence.

    Raises ValueError where heads do not divide over ranks.
    """

    def __init__(
        self,
        name: str,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        qk_norm: bool,
        norm_eps: float,
        init: InitSpec,
        output_std: float,
        tp: TensorParallel,
        path: str = "auto",
        context: Group = None,
        attend: Attend | None = None,
    ):
        super().__init__()
        self.path, self.kv_group = path, tp.kv_group
        self.sharers = max(1, tp.size // num_kv_heads)  # ranks that have a key/value head together
        self.heads, self.kv_heads, self.head_size = num_heads // tp.size, max(1, num_kv_heads // tp.size), head_size
        if num_heads % tp.size or self.kv_heads * tp.size != num_kv_heads * self.sharers or head_size % self.sharers:
            raise ValueError(
                f"{name}: {num_heads} heads and {num_kv_heads} key/value heads of {head_size} do not divide over"
                f" {tp.size} tensor-parallel ranks"
            )
        if group_size(tp.kv_group) != self.sharers:
            raise ValueError(
                f"{name}: a key/value head is of {self.sharers} ranks; tp.kv_group has {group_size(tp.kv_group)}"
            )
        cp = group_size(context)
        self.attend = attend if cp > 1 else None
        self.copies = max(1, cp // self.kv_heads)  # of each key/value head, one for each context rank that needs it
        if self.heads % cp or (self.kv_heads * self.copies) % cp:
            raise ValueError(
                f"{name}: {self.heads} heads and {self.kv_heads} key/value heads of a tensor-parallel rank do not"
                f" divide over {cp} context-parallel ranks"
            )
        if cp > 1 and attend is None:
            raise ValueError(f"{name}: a context group needs attend")
        outputs = (num_heads * head_size, num_kv_heads * head_size, num_kv_heads * head_size)
        self.qkv = ColumnParallelLinear(f"{name}.qkv", hidden_size, outputs, init, tp)
        self.output = RowParallelLinear(f"{name}.output", num_heads * head_size, hidden_size, init, tp, output_std)
        # Each rank has its heads alone, of which the weight's gradient is a part.
        self.q_norm = RMSNorm(f"{name}.q_norm", head_size, norm_eps, init, tp.group) if qk_norm else None
        self.k_norm = RMSNorm(f"{name}.k_norm", head_size, norm_eps, init, tp.group) if qk_norm else None

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None = None, segments: Segments | None = None
    ) -> Tensor:
        q, k, v = self._heads(self.qkv(x))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = kernels.rope(q, k, cos, sin)
        if self.attend is None:
            y = self._core(q, k, v, cache, segments)
        else:
            if self.copies > 1:
                k, v = (t.repeat_interleave(self.copies, dim=2) for t in (k, v))
            y = self.attend(partial(self._core, segments=segments), q, k, v)
        return self.output(y.flatten(2))

    def _heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The heads [s, b, n or k, d] in what this rank's matrix gives."""
        if self.sharers == 1:
            heads = qkv.unflatten(2, (-1, self.head_size))
            return heads.split((self.heads, self.kv_heads, self.kv_heads), dim=2)
        part = self.head_size // self.sharers
        q, kv = qkv.split((self.heads * self.head_size, 2 * part), dim=2)
        parts = all_gather(kv, self.kv_group).unflatten(0, (self.sharers, -1))  # [sharers, s, b, 2 part]
        k, v = (x.movedim(0, 2).flatten(2).unsqueeze(2) for x in parts.split(part, dim=3))
        return q.unflatten(2, (-1, self.head_size)), k, v

    def _core(
        self, q: Tensor, k: Tensor, v: Tensor, cache: KVCache | None = None, segments: Segments | None = None
    ) -> Tensor:
        """Attention of whole sequences: q [s, b, n, d], k and v [s, b, k, d] -> [s, b, n, d]."""
        q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))  # [b, n or k, s, d]
        past = 0
        if cache is not None:
            past = cache.length
            k, v = cache.append(k, v)
        if self.path == "softmax":
            y = softmax_attention(q, k, v, segments)
        elif segments is None:
            y = causal_attention(q, k, v, past)
        else:
            y = document_attention(q, k, v, segments)
        return y.permute(2, 0, 1, 3)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, past: int = 0) -> Tensor:
    """softmax(q k^T / sqrt(d)) v where query i sees keys 0 .. past + i.

    q: [b, n, s, d], k and v: [b, k, t, d] with t = past + s -> [b, n, s, d].
    """
    mask = None
    if past and q.shape[2] > 1:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(past)
    return _attend(q, k, v, mask, is_causal=past == 0)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """As `causal_attention`, from the definition: the probabilities of all pairs, [b, n, s, t], are made and kept.

    mask: bool [b, 1, s, t], what each query sees of what is not later; None: all of it.
    """
    groups, s = q.shape[1] // k.shape[1], q.shape[2]
    # Query heads that share a key head stand under each other as more queries of it, so that nothing is repeated.
    rows = q.unflatten(1, (-1, groups)).flatten(2, 3)  # [b, k, n/k * s, d]
    scores = (rows @ k.transpose(2, 3)).unflatten(2, (groups, s))  # [b, k, n/k, s, t]
    mask = None if mask is None else mask[:, None]
    probabilities = kernels.softmax(scores, scale=1.0 / math.sqrt(q.shape[-1]), causal=True, mask=mask)
    return (probabilities.flatten(2, 3) @ v).unflatten(2, (groups, s)).flatten(1, 2)


def document_segments(
    documents: Tensor, prefix: int, dtype: torch.dtype, head_size: int, path: str = "auto"
) -> Segments | None:
    """The documents in the form that `path` takes here; None where each row is a single one and needs none.

    documents: [b, s], the number of each token's document, from 0, rising along a row. prefix: p. dtype: of q, k and v.
    - varlen: attention of each document by itself. On the CPU lists of document lengths, a list for each row: s^2
      shrinks to the sum of the lengths' squares, in a call a document. On a GPU `document_bounds` as int32, for
      FlashAttention's one call. There is no prefix with it.
    - sdpa, softmax: bool [b, 1, p+s, p+s], what each query sees, for torch's fused attention or for our softmax.
    - auto: varlen where it can be, else sdpa.
    Raises ConfigError where varlen was asked for by name and cannot be.
    """
    b, s = documents.shape
    gpu_varlen = path in ("auto", "varlen") and _has_varlen(documents.device, dtype, head_size)
    if path == "varlen":
        _check_varlen(documents.device, dtype, head_size)
        if prefix:
            raise ConfigError(
                "model.attention = varlen keeps no prefix in sight of every document; choose auto, sdpa or softmax"
            )
        if gpu_varlen:
            return document_bounds(documents).int()
    if not (documents[:, 1:] != documents[:, :-1]).any():
        return None
    if not prefix and documents.device.type == "cpu" and path in ("auto", "varlen"):
        bounds = document_bounds(documents)
        rows = torch.bincount(bounds[:-1] // s).tolist()
        return [lengths.tolist() for lengths in bounds.diff().split(rows)]
    if not prefix and gpu_varlen:
        return document_bounds(documents).int()
    # The prefix is a document that all may see.
    documents = torch.cat((documents.new_full((b, prefix), -1), documents), dim=1)
    seen = (documents[:, :, None] == documents[:, None, :]) | (documents == -1)[:, None, :]
    return seen.tril()[:, None]


def row_segments(b: int, s: int, device: torch.device, dtype: torch.dtype, head_size: int) -> Tensor | None:
    """For the path varlen without documents: each row is one, of s positions. None on the CPU, where that is sdpa.

    Raises ConfigError as `document_segments`.
    """
    _check_varlen(device, dtype, head_size)
    if device.type == "cpu":
        return None
    return torch.arange(0, (b + 1) * s, s, dtype=torch.int32, device=device)


def document_bounds(documents: Tensor) -> Tensor:
    """Where documents begin among the b * s tokens, and at last b * s: [b, s] -> int64 [documents + 1]."""
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return F.pad(begins.flatten().nonzero().flatten(), (0, 1), value=documents.numel())


def document_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """Causal attention where each document sees only itself, and the prefix if there is one.

    q: [b, n, s, d], k and v: [b, k, s, d] -> [b, n, s, d].
    """
    if isinstance(segments, list):
        parts = [
            _attend(*(part[None] for part in document), is_causal=True)
            for *row, lengths in zip(q, k, v, segments, strict=True)
            for document in zip(*(x.split(lengths, dim=1) for x in row), strict=True)
        ]
        return torch.cat(parts, dim=2).unflatten(2, (q.shape[0], q.shape[2]))[0].transpose(0, 1)
    if segments.dtype == torch.bool:
        return _attend(q, k, v, segments)
    return _varlen_attention(q, k, v, segments)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    groups_fused = mask is None and _has_flash(q.device, q.dtype, q.shape[-1])
    if q.shape[1] != k.shape[1] and q.is_cuda and not groups_fused:
        # Of the fused kernels only those without a mask, in half precision, take groups; unfused would keep s^2.
        k, v = _repeat_heads(q, k, v)
    with _backends(q.device, q.dtype, is_causal):
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=is_causal,
            scale=1.0 / math.sqrt(q.shape[-1]),
            enable_gqa=q.shape[1] != k.shape[1],
        )


def _repeat_heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values for each query head."""
    return tuple(x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))


def _backends(device: torch.device, dtype: torch.dtype, is_causal: bool) -> AbstractContextManager:
    """cuDNN's attention before the others from Hopper on, where it has 1.7 to 2.3 times FlashAttention 2's speed.

    Only as a sequence begins: cuDNN makes a plan for each new shape, and with a cache every token has a new one.
    """
    if not is_causal or device.type != "cuda" or dtype not in _HALF or _capability(device) < (9, 0):
        return nullcontext()  # torch's own order
    order = [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ]
    return sdpa_kernel(order, set_priority=True)


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _varlen_attention(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # not above: it takes torch._dynamo, and so a second, along

    b, _, s, _ = q.shape
    options = {"scale": 1.0 / math.sqrt(q.shape[-1]), "window_size": (-1, 0)}
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        options["enable_gqa"] = q.shape[1] != k.shape[1]
    else:  # torch 2.11
        k, v = _repeat_heads(q, k, v)
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # [b * s, n, d]
    # s as the longest document, of which the true length would have to come from the GPU.
    y = varlen_attn(q, k, v, bounds, bounds, s, s, **options)
    return y.unflatten(0, (b, s)).transpose(1, 2)


def _has_flash(device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
    """FlashAttention 2 (which torch pads other heads for): half precision, Ampere or later, heads of up to 256."""
    return device.type == "cuda" and dtype in _HALF and _capability(device) >= (8, 0) and head_size <= 256


def _has_varlen(device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
    """Its form for documents, in which heads are in steps of 8."""
    return _has_flash(device, dtype, head_size) and head_size % 8 == 0


def _check_varlen(device: torch.device, dtype: torch.dtype, head_size: int) -> None:
    if device.type != "cpu" and not _has_varlen(device, dtype, head_size):
        raise ConfigError(
            "model.attention = varlen needs bf16 or fp16, a GPU from Ampere on, and heads of up to 256 in steps of 8;"
            f" here are {dtype} on {device.type} and heads of {head_size}; choose auto"
        )
