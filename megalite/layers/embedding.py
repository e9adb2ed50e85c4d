"""Vocabulary-parallel token embedding and output head. s sequence, b batch, h hidden, v padded vocabulary, tp ranks."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megalite import kernels
from megalite.comms.collectives import (
    Group,
    TensorParallel,
    all_gather,
    copy_to_tensor_parallel,
    reduce_from_tensor_parallel,
    reduce_scatter,
)
from megalite.layers.linear import column_parallel
from megalite.layers.sharded_init import InitSpec, sharded_parameter


def _vocabulary_parameter(
    name: str, vocab: int, padded: int, hidden: int, init: InitSpec, tp: TensorParallel
) -> nn.Parameter:
    return sharded_parameter(name, (padded, hidden), init, group=tp.group, dim=0, valid_rows=vocab)


class VocabParallelEmbedding(nn.Module):
    """Rows split over the group: tokens [b, s] -> hidden [s, b, h] replicated, or this rank's [s/tp, b, h].

    Raises ValueError where s does not divide for sequence parallelism.
    """

    def __init__(
        self, name: str, vocab_size: int, padded_size: int, hidden_size: int, init: InitSpec, tp: TensorParallel
    ):
        super().__init__()
        self.tp = tp
        self.weight = _vocabulary_parameter(f"{name}.weight", vocab_size, padded_size, hidden_size, init, tp)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens.t()  # [s, b]
        if self.tp.size == 1:
            return F.embedding(tokens, self.weight)
        local = self.weight.shape[0]
        first = self.tp.rank * local
        elsewhere = (tokens < first) | (tokens >= first + local)
        hidden = F.embedding((tokens - first).masked_fill(elsewhere, 0), self.weight)
        hidden = hidden.masked_fill(elsewhere.unsqueeze(-1), 0.0)
        return (reduce_scatter if self.tp.sequence else reduce_from_tensor_parallel)(hidden, self.tp.group)


class VocabParallelHead(nn.Module):
    """hidden [s, b, h], or [s/tp, b, h] -> logits [s, b, v/tp]; from vocab_size on they are -inf: padding.

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
        tp: TensorParallel,
        weight: nn.Parameter | None = None,
    ):
        super().__init__()
        self.tp = tp
        if weight is None:
            weight = _vocabulary_parameter(f"{name}.weight", vocab_size, padded_size, hidden_size, init, tp)
        self.weight = weight
        local = padded_size // tp.size
        self.local_valid = min(max(vocab_size - tp.rank * local, 0), local)
        self.vocab_size = vocab_size

    @property
    def group(self) -> Group:
        return self.tp.group

    def forward(self, hidden: Tensor, targets: Tensor | None = None, z_loss: float = 0.0) -> Tensor:
        if targets is not None:
            hidden = (all_gather if self.tp.sequence else copy_to_tensor_parallel)(hidden, self.tp.group)
            # In this module's forward, around which ZeRO-3 gathers the weight.
            return kernels.linear_cross_entropy(
                hidden, self.weight, targets, group=self.tp.group, z_loss=z_loss, vocab_size=self.vocab_size
            )
        logits = column_parallel(hidden, self.weight, self.tp)
        if self.local_valid < logits.shape[-1]:
            # In place and unrecorded: the matmul's backward needs no output, the loss's gradient is 0 here already,
            # and either record would copy all logits.
            with torch.no_grad():
                logits[..., self.local_valid :] = -torch.inf
        return logits
