"""The decoder: `Block`, and `Stage`, the consecutive part of it that is one pipeline stage (all of it, without).

Shapes: s sequence, b batch, h hidden, p prefix vectors, v padded vocabulary, tp and cp ranks of tensor and context
parallelism. Between layers hidden is [s, b, h]; with sequence parallelism each tensor rank has [s/tp, b, h] of it. With
context parallelism s is this rank's part of the sequence throughout.
"""

import math
from functools import partial

import torch
from torch import Tensor, nn

from megalite.comms.collectives import Group, TensorParallel, group_rank, group_size
from megalite.config import ModelConfig
from megalite.layers.attention import (
    Attend,
    Attention,
    KVCache,
    Segments,
    document_segments,
    row_segments,
)
from megalite.layers.dropout import Dropout
from megalite.layers.embedding import VocabParallelEmbedding, VocabParallelHead
from megalite.layers.loss import language_model_loss
from megalite.layers.mlp import MLP
from megalite.layers.norm import RMSNorm
from megalite.layers.recompute import recompute
from megalite.layers.rope import rope_angles
from megalite.layers.sharded_init import InitSpec


class Block(nn.Module):
    """Pre-norm decoder block: x + attention(norm(x)), then x + mlp(norm(x)); [s, b, h] -> [s, b, h]."""

    def __init__(
        self,
        number: int,
        model: ModelConfig,
        init: InitSpec,
        tp: TensorParallel,
        context: Group = None,
        attend: Attend | None = None,
    ):
        super().__init__()
        name, self.number = f"blocks.{number}", number
        self.activation_checkpointing = "none"  # its own: see Stage.compile_blocks
        # The residual stream adds 2 * num_layers outputs; scaling each keeps its variance (GPT-2, section 2.3).
        output_std = init.std / math.sqrt(2 * model.num_layers)
        partial = tp.sequence_group
        self.attention_norm = RMSNorm(f"{name}.attention_norm", model.hidden_size, model.norm_eps, init, partial)
        self.attention = Attention(
            f"{name}.attention",
            model.hidden_size,
            model.num_heads,
            model.kv_heads,
            model.head_size,
            model.qk_norm,
            model.norm_eps,
            init,
            output_std,
            tp,
            model.attention,
            context,
            attend,
        )
        self.mlp_norm = RMSNorm(f"{name}.mlp_norm", model.hidden_size, model.norm_eps, init, partial)
        self.mlp = MLP(f"{name}.mlp", model.hidden_size, model.ffn_size, init, output_std, tp)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: KVCache | None = None,
        segments: Segments | None = None,
        dropout: Dropout | None = None,
    ) -> Tensor:
        attended = self.attention(self.attention_norm(x), cos, sin, cache, segments)
        if dropout is not None:
            attended = dropout(attended, 2 * self.number + 1)
        normed, x = self.mlp_norm(attended, residual=x)
        y = self.mlp(normed)
        return x + (y if dropout is None else dropout(y, 2 * self.number + 2))

    def recomputed(self, *args) -> Tensor:
        """`forward` under the block's own mode of `recompute`."""
        return recompute(self.activation_checkpointing, partial(Block.forward, self), *args)


class Stage(nn.Module):
    """Decoder layers that follow each other: tokens [b, s] -> the summed loss where labels are given, else logits.

    layers: their numbers, default: all. first: with the embedding in front. last: with the final norm and the head
    behind, else hidden is what comes out. tp: how layers are split, default: not. context: the group of the ranks that
    have the parts of one sequence; attend: what exchanges heads over it, see `Attention`.
    """

    def __init__(
        self,
        model: ModelConfig,
        *,
        seed: int,
        tp: TensorParallel | None = None,
        context: Group = None,
        attend: Attend | None = None,
        layers: range | None = None,
        first: bool = True,
        last: bool = True,
        activation_checkpointing: str = "none",
        z_loss: float = 0.0,
        init_rounding: torch.dtype = torch.float32,
    ):
        super().__init__()
        tp = tp or TensorParallel()
        self.model, self.tp, self.context = model, tp, context
        self.first, self.last, self.seed = first, last, seed
        self.activation_checkpointing, self.z_loss = activation_checkpointing, z_loss
        init = InitSpec(seed, model.init_std, init_rounding)
        vocabulary = (model.vocab_size, model.padded_vocab_size, model.hidden_size, init, tp)
        if first:
            self.embedding = VocabParallelEmbedding("embedding", *vocabulary)
        layers = range(model.num_layers) if layers is None else layers
        self.blocks = nn.ModuleList(Block(i, model, init, tp, context, attend) for i in layers)
        if last:
            self.final_norm = RMSNorm("final_norm", model.hidden_size, model.norm_eps, init, tp.sequence_group)
            # A tied head far from the embedding has a copy of its weight; the engine sums the gradients of both.
            tied = self.embedding.weight if model.tie_embeddings and first else None
            self.head = VocabParallelHead("embedding" if model.tie_embeddings else "head", *vocabulary, weight=tied)

    def compile_blocks(self, backend: str) -> None:
        """Have torch.compile compile the blocks, each by itself: they are alike, so one graph serves all of them.

        What is computed again goes into the graph, where the compiler plans it together with the backward.
        """
        inside = "none"
        if self.activation_checkpointing != "offload":  # which handles what the graphs hand over
            inside, self.activation_checkpointing = self.activation_checkpointing, "none"
        for block in self.blocks:
            block.activation_checkpointing = inside
            block.forward = torch.compile(block.recomputed, backend=backend, dynamic=False)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        *,
        hidden: Tensor | None = None,
        prefix_embeddings: Tensor | None = None,
        caches: list[KVCache] | None = None,
        documents: Tensor | None = None,
        samples: Tensor | None = None,
    ) -> Tensor:
        """tokens, labels, positions: [b, s] int64; loss_mask: [b, s] bool, default: all.

        hidden: what the stage before gave, unless this is the first.

        positions: default 0 .. s-1, after what the caches hold. prefix_embeddings [b, p, h]: vectors that stand before
        the tokens (a user's or persona's, say), attended by all of them; they take positions 0 .. p-1, shift the
        tokens' by p, and have no loss and no logits. caches: one `KVCache` a block, which this call extends.
        documents [b, s * cp] int, rising along a row: tokens attend only to those of their own document (and to the
        prefix). samples [b] int64: each sequence's number in the run, from which dropout is drawn in training.
        Returns an fp32 scalar: the sum of the loss of the tokens with loss_mask; or logits [s, b, v/tp]; or, unless
        this is the last stage, hidden. Raises ValueError where prefix, cache and tokens together pass n_positions,
        where the prefix or the documents have another shape, where documents come with caches, where samples are
        missing, and where the sequence does not divide over the ranks that share it.
        """
        b, s = tokens.shape
        cp = group_size(self.context)
        if self.tp.sequence and s % self.tp.size:
            raise ValueError(f"{s} positions do not divide over {self.tp.size} ranks of sequence parallelism")
        if (cp > 1 or self.tp.sequence) and (caches or prefix_embeddings is not None):
            raise ValueError("caches and prefix_embeddings need whole sequences: no context or sequence parallelism")
        if documents is not None and caches:
            raise ValueError("documents are for training: with caches, give one document a row")
        if documents is not None and documents.shape != (b, s * cp):
            raise ValueError(f"documents: shape {list(documents.shape)}, wants {[b, s * cp]}")
        past = caches[0].length if caches else 0
        first = group_rank(self.context) * s  # the position of tokens[:, 0] in its sequence
        dropout = self._dropout(samples, first, s)
        if self.first:
            hidden = self.embedding(tokens)  # [s, b, h], or [s/tp, b, h]
            hidden = hidden if dropout is None else dropout(hidden, 0)
        p = 0
        if prefix_embeddings is not None:
            if prefix_embeddings.dim() != 3 or prefix_embeddings.shape[::2] != (b, self.model.hidden_size):
                want = f"[{b}, p, {self.model.hidden_size}]"
                raise ValueError(f"prefix_embeddings: shape {list(prefix_embeddings.shape)}, wants {want}")
            if past:
                raise ValueError(
                    "prefix_embeddings stand before all tokens: give them with the first call on empty caches"
                )
            p = prefix_embeddings.shape[1]
            hidden = torch.cat((prefix_embeddings.transpose(0, 1).to(hidden.dtype), hidden))  # [p+s, b, h]
        if past + p + s * cp > self.model.n_positions:
            raise ValueError(f"{past + p + s * cp} positions, but model.n_positions is {self.model.n_positions}")
        if positions is None:
            positions = torch.arange(past + first, past + first + s, device=tokens.device).expand(b, s)
        if p:
            before = torch.arange(p, device=tokens.device).expand(b, p)
            positions = torch.cat((before, positions + p), dim=1)

        cos, sin = rope_angles(positions, self.model.head_size, self.model.rope_theta)
        segments = None
        path, head_size, device = self.model.attention, self.model.head_size, hidden.device
        if documents is not None or (path == "varlen" and not caches):
            autocast = torch.is_autocast_enabled(device.type)
            dtype = torch.get_autocast_dtype(device.type) if autocast else hidden.dtype
            if documents is not None:
                segments = document_segments(documents, p, dtype, head_size, path)
            else:
                segments = row_segments(b, p + s * cp, device, dtype, head_size)
        for i, block in enumerate(self.blocks):
            cache = caches[i] if caches else None
            hidden = recompute(self.activation_checkpointing, block, hidden, cos, sin, cache, segments, dropout)
        if not self.last:
            return hidden
        hidden = self.final_norm(hidden[p:])
        if labels is None:
            return self.head(hidden)  # [s, b, v/tp]
        z_loss = self.z_loss if self.training else 0.0  # evaluation reports plain cross-entropy
        return language_model_loss(self.head, hidden, labels, loss_mask, z_loss, self.model.fused_loss)

    def _dropout(self, samples: Tensor | None, first: int, s: int) -> Dropout | None:
        if not self.training or self.model.dropout == 0.0:
            return None
        if samples is None:
            raise ValueError("model.dropout needs the number of each sequence (samples)")
        if self.tp.sequence:
            first += self.tp.rank * (s // self.tp.size)
        return Dropout(self.model.dropout, self.seed, samples, first)
