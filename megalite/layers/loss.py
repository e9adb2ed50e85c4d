"""The language-model loss of one micro-batch."""

from torch import Tensor

from megalite import kernels
from megalite.layers.embedding import VocabParallelHead


def language_model_loss(
    head: VocabParallelHead, hidden: Tensor, labels: Tensor, loss_mask: Tensor | None, z_loss: float, fused: bool
) -> Tensor:
    """Sum of the cross-entropy of the tokens that count, an fp32 scalar.

    hidden: [s, b, h]; labels: [b, s]; loss_mask: [b, s], None: all count. A sum and not a mean: the caller divides by
    the number of valid tokens of the whole global batch, which makes the loss the same in every layout. fused: head and
    loss chunk by chunk, for which a sum is the cheapest too.
    """
    if loss_mask is not None:
        labels = labels.masked_fill(~loss_mask, -100)
    targets = labels.t()  # [s, b]
    if fused:
        return head(hidden, targets, z_loss).sum()
    return kernels.cross_entropy(head(hidden), targets, group=head.group, ignore_index=-100, z_loss=z_loss).sum()
