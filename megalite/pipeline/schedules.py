"""Schedules as pure lists of actions: what one rank runs, in which order. Transport and arithmetic are elsewhere."""

from typing import Literal, NamedTuple


class Action(NamedTuple):
    """Forward or backward of one micro-batch."""

    kind: Literal["forward", "backward"]
    micro_batch: int


def one_stage(micro_batches: int) -> list[Action]:
    """F0 B0 F1 B1 ...: with one stage, at most one micro-batch's activations are alive."""
    return [Action(kind, m) for m in range(micro_batches) for kind in ("forward", "backward")]
