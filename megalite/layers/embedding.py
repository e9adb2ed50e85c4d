"""Vocabulary-parallel token embedding and output head."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megalite import kernels
from megalite.comms.collectives import (
    Group,
    copy_to_tensor_parallel,
    group_rank,
    group_size,
    reduce_from_tensor_parallel,
)
from megalite.layers.sharded_init import InitSpec, sharded_parameter


def _vocabulary_parameter(
    name: str, vocab: int, padded: int, hidden: int, init: InitSpec, group: Group
) -> nn.Parameter:
    return sharded_parameter(name, (padded, hidden), init, group=group, dim=0, valid_rows=vocab)


class VocabParallelEmbedding(nn.Module):
    """Rows split over the group: tokens [b, s] -> hidden [s, b, h] replicated."""

    def __init__(self, name: str, vocab_size: int, padded_size: int, hidden_size: int, init: InitSpec, group: Group):
        super().__init__()
        self.group = group
        self.weight = _vocabulary_parameter(f"{name}.weight", vocab_size, padded_size, hidden_size, init, group)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens.t()  # [s, b]
        if group_size(self.group) == 1:
            return F.embedding(tokens, self.weight)
        local = self.weight.shape[0]
        first = group_rank(self.group) * local
        elsewhere = (tokens < first) | (tokens >= first + local)
        hidden = F.embedding((tokens - first).masked_fill(elsewhere, 0), self.weight)
        return reduce_from_tensor_parallel(hidden.masked_fill(elsewhere.unsqueeze(-1), 0.0), self.group)


class VocabParallelHead(nn.Module):
    """hidden [s, b, h] -> logits [s, b, v/tp]; ids from vocab_size on are padding and get -inf: never predicted.

    With targets [s, b], global ids or -100 -> the loss of each token [s, b], without ever holding all logits.
    weight: the embedding's parameter when tied, else None for one of its own.
    """

    def __init__(
        self,
        name: str,
        vocab_size: int,
        padded_size: int,
        hidden_size: int,
        init: InitSpec,
        group: Group,
        weight: nn.Parameter | None = None,
    ):
        super().__init__()
        self.group = group
        if weight is None:
            weight = _vocabulary_parameter(f"{name}.weight", vocab_size, padded_size, hidden_size, init, group)
        self.weight = weight
        local = padded_size // group_size(group)
        self.local_valid = min(max(vocab_size - group_rank(group) * local, 0), local)
        self.vocab_size = vocab_size

    def forward(self, hidden: Tensor, targets: Tensor | None = None, z_loss: float = 0.0) -> Tensor:
        hidden = copy_to_tensor_parallel(hidden, self.group)
        if targets is not None:
            # In this module's forward, around which ZeRO-3 gathers the weight.
            return kernels.linear_cross_entropy(
                hidden, self.weight, targets, group=self.group, z_loss=z_loss, vocab_size=self.vocab_size
            )
        logits = F.linear(hidden, self.weight)
        if self.local_valid < logits.shape[-1]:
            # In place and unrecorded: the matmul's backward needs no output, the loss's gradient is 0 here already,
            # and either record would copy all logits.
            with torch.no_grad():
                logits[..., self.local_valid :] = -torch.inf
        return logits
