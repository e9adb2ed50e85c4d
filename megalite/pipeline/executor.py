"""Runs a schedule's actions: the only training path, whatever the number of stages."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from megalite.data.batch import Batch
from megalite.pipeline.schedules import Action

Forward = Callable[[Batch], Tensor]


def run_schedule(
    actions: list[Action], forward: Forward, batches: list[Batch], backward: Callable[[Tensor, bool], None]
) -> Tensor:
    """Run `actions` over the micro-batches; returns the sum of the loss over all their valid tokens, an fp64 scalar.

    forward(batch) gives a micro-batch's summed loss. backward(loss_sum, is_last) scales and differentiates it; is_last
    marks this rank's last backward of the step, after which gradients may be reduced.
    """
    last_backward = max(i for i, action in enumerate(actions) if action.kind == "backward")
    losses: dict[int, Tensor] = {}
    total = torch.zeros((), dtype=torch.float64, device=batches[0].tokens.device)
    for i, (kind, m) in enumerate(actions):
        if kind == "forward":
            losses[m] = forward(batches[m])
        else:
            loss = losses.pop(m)
            backward(loss, i == last_backward)
            total += loss.detach()
    return total


@torch.no_grad()
def run_evaluation(forward: Forward, batches: Iterable[Batch]) -> tuple[float, float]:
    """The sum of the loss over the valid tokens of `batches`, and the number of those tokens."""
    total, valid = 0.0, 0.0
    for batch in batches:
        total += forward(batch).item()
        valid += batch.loss_mask.sum().item()
    return total, valid
