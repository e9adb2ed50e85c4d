"""Schedules as pure lists of actions: what one stage runs, in which order. Transport and arithmetic are elsewhere.

A stage has `virtual` chunks of the model; chunk v of stage s is chunk v * stages + s of the whole model. In a step each
stage runs forward and backward of every micro-batch through every chunk of its own.
"""

from typing import Literal, NamedTuple

from megalite.config_check import schedule_problem
from megalite.errors import ConfigError, nearest_multiples

Kind = Literal["forward", "backward"]


class Action(NamedTuple):
    """Forward or backward of one micro-batch through one of the stage's chunks."""

    kind: Kind
    micro_batch: int
    chunk: int = 0


def build(schedule: str, stage: int, stages: int, virtual: int, micro_batches: int) -> list[Action]:
    """The actions of one stage for one step; schedule: gpipe, 1f1b or interleaved.

    gpipe (arXiv:1811.06965): all forwards, then all backwards. 1f1b (PipeDream-Flush, arXiv:2006.09503): the same
    bubble, and a stage holds the activations of at most stages - stage micro-batches; one alone goes F0 B0 F1 B1 ...
    interleaved (arXiv:2104.04473, section 2.2): virtual chunks on a stage in turns, for a bubble that is `virtual`
    times smaller; it raises ConfigError unless the micro-batches are a multiple of the stages. The first two take any
    number.
    """
    if problem := schedule_problem(schedule, stages, virtual):
        raise ConfigError(problem)
    if schedule == "interleaved":
        return _interleaved(stage, stages, virtual, micro_batches)
    forwards = [Action("forward", m) for m in range(micro_batches)]
    backwards = [Action("backward", m) for m in range(micro_batches)]
    ahead = {"gpipe": micro_batches, "1f1b": min(stages - stage - 1, micro_batches)}[schedule]
    return _warm_up_then_alternate(forwards, backwards, ahead)


def sends_to(action: Action, stage: int, stages: int, virtual: int) -> tuple[int, int] | None:
    """(stage, its chunk) that gets what an action of `stage` computes; None where the model, or its backward, ends.

    A forward sends hidden states to the next chunk of the model, a backward their gradient to the one before.
    Transport may match messages by their order alone, as NCCL does: between two stages those of one kind arrive in the
    order in which they are sent. Every schedule of `build` sends and receives in one order.
    """
    return _neighbour(action, 1 if action.kind == "forward" else -1, stage, stages, virtual)


def receives_from(action: Action, stage: int, stages: int, virtual: int) -> tuple[int, int] | None:
    """(stage, its chunk) whose message an action of `stage` needs; None where the model, or its backward, begins."""
    return _neighbour(action, -1 if action.kind == "forward" else 1, stage, stages, virtual)


def _neighbour(action: Action, step: int, stage: int, stages: int, virtual: int) -> tuple[int, int] | None:
    number = action.chunk * stages + stage + step
    return (number % stages, number // stages) if 0 <= number < stages * virtual else None


def _interleaved(stage: int, stages: int, virtual: int, micro_batches: int) -> list[Action]:
    """Rounds of `stages` micro-batches go through chunk 0, then through chunk 1, ...; then comes the next round."""
    if micro_batches % stages:
        raise ConfigError(
            f"parallel.virtual = {virtual} takes micro-batches in rounds of parallel.pipeline = {stages}, but a step "
            f"has {micro_batches} (training.gradient_accumulation_steps, or what training.global_batch_size makes of "
            f"it); give it {nearest_multiples(micro_batches, stages)}, or set parallel.virtual to 1"
        )
    order = [
        (first + m, chunk)
        for first in range(0, micro_batches, stages)
        for chunk in range(virtual)
        for m in range(stages)
    ]
    forwards = [Action("forward", m, chunk) for m, chunk in order]
    backwards = [Action("backward", m, virtual - 1 - chunk) for m, chunk in order]
    # A round's first backward needs its forwards through all chunks but the last; two more actions for each stage
    # behind, one down to the last and one back, keep this one from waiting.
    ahead = (virtual - 1) * stages + 2 * (stages - stage - 1)
    return _warm_up_then_alternate(forwards, backwards, min(ahead, len(forwards)))


def _warm_up_then_alternate(forwards: list[Action], backwards: list[Action], ahead: int) -> list[Action]:
    """`ahead` forwards, then a forward and a backward in turns, then the backwards that are left."""
    steady = [action for pair in zip(forwards[ahead:], backwards, strict=False) for action in pair]
    return forwards[:ahead] + steady + backwards[len(forwards) - ahead :]
