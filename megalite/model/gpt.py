"""The decoder: `Block`, and `Stage`, the part of the model that one pipeline stage holds (all of it, with one stage).

Shapes: s sequence, b batch, h hidden, p prefix vectors, v padded vocabulary. Between layers hidden is [s, b, h].
"""

import math
from functools import partial

import torch
from torch import Tensor, nn

from megalite.comms.collectives import Group
from megalite.config import ModelConfig
from megalite.layers.attention import Attention, KVCache, Segments, document_segments, row_segments
from megalite.layers.embedding import VocabParallelEmbedding, VocabParallelHead
from megalite.layers.loss import language_model_loss
from megalite.layers.mlp import MLP
from megalite.layers.norm import RMSNorm
from megalite.layers.recompute import recompute
from megalite.layers.rope import rope_angles
from megalite.layers.sharded_init import InitSpec


class Block(nn.Module):
    """Pre-norm decoder block: x + attention(norm(x)), then x + mlp(norm(x)); [s, b, h] -> [s, b, h]."""

    def __init__(self, name: str, model: ModelConfig, init: InitSpec, group: Group):
        super().__init__()
        self.activation_checkpointing = "none"  # its own: see Stage.compile_blocks
        # The residual stream adds 2 * num_layers outputs; scaling each keeps its variance (GPT-2, section 2.3).
        output_std = init.std / math.sqrt(2 * model.num_layers)
        self.attention_norm = RMSNorm(f"{name}.attention_norm", model.hidden_size, model.norm_eps, init)
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
            group,
            model.attention,
        )
        self.mlp_norm = RMSNorm(f"{name}.mlp_norm", model.hidden_size, model.norm_eps, init)
        self.mlp = MLP(f"{name}.mlp", model.hidden_size, model.ffn_size, init, output_std, group)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None = None, segments: Segments | None = None
    ) -> Tensor:
        attended = self.attention(self.attention_norm(x), cos, sin, cache, segments)
        normed, x = self.mlp_norm(attended, residual=x)
        return x + self.mlp(normed)

    def recomputed(self, *args) -> Tensor:
        """`forward` under the block's own mode of `recompute`."""
        return recompute(self.activation_checkpointing, partial(Block.forward, self), *args)


class Stage(nn.Module):
    """The whole decoder: tokens [b, s] -> the summed loss where labels are given, else logits [s, b, v].

    group: the tensor-parallel group; None or of size one for whole layers.
    """

    def __init__(
        self,
        model: ModelConfig,
        *,
        seed: int,
        group: Group = None,
        activation_checkpointing: str = "none",
        z_loss: float = 0.0,
        init_rounding: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.model, self.group = model, group
        self.activation_checkpointing, self.z_loss = activation_checkpointing, z_loss
        init = InitSpec(seed, model.init_std, init_rounding)
        vocabulary = (model.vocab_size, model.padded_vocab_size, model.hidden_size, init, group)
        self.embedding = VocabParallelEmbedding("embedding", *vocabulary)
        self.blocks = nn.ModuleList(Block(f"blocks.{i}", model, init, group) for i in range(model.num_layers))
        self.final_norm = RMSNorm("final_norm", model.hidden_size, model.norm_eps, init)
        tied = self.embedding.weight if model.tie_embeddings else None
        self.head = VocabParallelHead("head", *vocabulary, weight=tied)

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
        prefix_embeddings: Tensor | None = None,
        caches: list[KVCache] | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        """tokens, labels, positions: [b, s] int64; loss_mask: [b, s] bool, default: all.

        positions: default 0 .. s-1, after what the caches hold. prefix_embeddings [b, p, h]: vectors that stand before
        the tokens (a user's or persona's, say), attended by all of them; they take positions 0 .. p-1, shift the
        tokens' by p, and have no loss and no logits. caches: one `KVCache` a block, which this call extends.
        documents [b, s] int, rising along a row: tokens attend only to those of their own document (and to the prefix).
        Returns an fp32 scalar: the sum of the loss of the tokens with loss_mask, or logits [s, b, v].
        Raises ValueError where prefix, cache and tokens together pass n_positions, where the prefix or the documents
        have another shape, or where documents come with caches.
        """
        b, s = tokens.shape
        if documents is not None and caches:
            raise ValueError("documents are for training: with caches, give one document a row")
        if documents is not None and documents.shape != tokens.shape:
            raise ValueError(f"documents: shape {list(documents.shape)}, wants {[b, s]}")
        past = caches[0].length if caches else 0
        hidden = self.embedding(tokens)  # [s, b, h]
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
        if past + p + s > self.model.n_positions:
            raise ValueError(f"{past + p + s} positions, but model.n_positions is {self.model.n_positions}")
        if positions is None:
            positions = torch.arange(past, past + s, device=tokens.device).expand(b, s)
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
                segments = row_segments(b, p + s, device, dtype, head_size)
        for i, block in enumerate(self.blocks):
            cache = caches[i] if caches else None
            hidden = recompute(self.activation_checkpointing, block, hidden, cos, sin, cache, segments)
        hidden = self.final_norm(hidden[p:])
        if labels is None:
            return self.head(hidden)  # [s, b, v/tp]
        z_loss = self.z_loss if self.training else 0.0  # evaluation reports plain cross-entropy
        return language_model_loss(self.head, hidden, labels, loss_mask, z_loss, self.model.fused_loss)
