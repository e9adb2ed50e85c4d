"""The language-model loss of one micro-batch."""

from torch import Tensor

from megalite import kernels
from megalite.comms.collectives import Group


def language_model_loss(
    logits: Tensor, labels: Tensor, loss_mask: Tensor | None, z_loss: float, group: Group
) -> Tensor:
    """Sum of the cross-entropy of the tokens that count, an fp32 scalar.

    logits: [s, b, v/tp]; labels: [b, s]; loss_mask: [b, s], None: all count. A sum and not a mean: the caller divides
    by the number of valid tokens of the whole global batch, which makes the loss the same in every layout.
    """
    if loss_mask is not None:
        labels = labels.masked_fill(~loss_mask, -100)
    targets = labels.t()  # [s, b]
    return kernels.cross_entropy(logits, targets, group=group, ignore_index=-100, z_loss=z_loss).sum()
