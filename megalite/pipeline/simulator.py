"""Plays the schedules of all stages against each other: shows that they fit, and what they cost.

Times are in any unit; an action is that of one chunk. Pure Python, nothing is computed or sent.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from megalite.pipeline.schedules import Action, receives_from, sends_to


class Span(NamedTuple):
    """An action and when it ran."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """How a step went, by stage."""

    spans: list[list[Span]]  # in the order in which they ran
    bubble: list[float]  # time without work in the step, as a fraction of the stage's work (arXiv:2104.04473)
    in_flight: list[int]  # most forwards, each of one chunk, whose backward had not ended

    @property
    def makespan(self) -> float:
        return max(spans[-1].end for spans in self.spans)


def simulate(
    schedules: list[list[Action]],
    *,
    forward_time: float = 1,
    backward_time: float = 2,
    send_time: float = 0,
    ahead: int | None = None,
) -> Timeline:
    """Run one step; schedules[stage] are the actions of a stage.

    ahead: None if sending never keeps a stage from going on, as with `Link`. A number: a stage goes on only once the
    receiver has come to within so many actions of the one that needs the message (0: to that itself). Of the schedules
    of `build`, gpipe then finishes with any number, 1f1b needs 1 and interleaved 2: with less, two stages send to each
    other and neither comes to receive.

    Raises ValueError, naming stage and action, where an action is missing, is there twice or is unknown; where a
    backward comes before its forward; where two stages do not send and receive in one order; and where stages wait for
    each other for ever.
    """
    if not any(schedules):
        raise ValueError("no stage has an action")
    virtual = 1 + max(action.chunk for actions in schedules for action in actions)
    micro_batches = 1 + max(action.micro_batch for actions in schedules for action in actions)
    for stage, actions in enumerate(schedules):
        _check_actions(stage, actions, virtual, micro_batches)
    _check_order(schedules, virtual)

    times = {"forward": forward_time, "backward": backward_time}
    stages = range(len(schedules))
    spans: list[list[Span]] = [[] for _ in stages]
    place = {(stage, action): i for stage in stages for i, action in enumerate(schedules[stage])}
    # came[stage][i]: when the stage came to its action i. arrived[stage, action]: when what it needs was there.
    came: list[list[float]] = [[0] for _ in stages]
    arrived: dict[tuple[int, Action], float] = {}
    moved = True
    while moved:
        moved = False
        for stage, actions in enumerate(schedules):
            while len(came[stage]) <= len(actions):
                i = len(came[stage]) - 1
                action = actions[i]
                if len(spans[stage]) == i:
                    if receives_from(action, stage, len(stages), virtual) and (stage, action) not in arrived:
                        break
                    start = max(came[stage][i], arrived.get((stage, action), 0))
                    spans[stage].append(Span(action, start, start + times[action.kind]))
                    moved = True
                end = spans[stage][i].end
                if receiver := sends_to(action, stage, len(stages), virtual):
                    other, needs = receiver[0], action._replace(chunk=receiver[1])
                    if ahead is not None:
                        asked = max(place[other, needs] - ahead, 0)
                        if asked >= len(came[other]):
                            break
                        end = max(end, came[other][asked])
                    arrived[other, needs] = end + send_time
                came[stage].append(end)
                moved = True
    _check_finished(schedules, spans, came, virtual)
    makespan = max(stage_spans[-1].end for stage_spans in spans)
    work = [sum(span.end - span.start for span in stage_spans) for stage_spans in spans]
    return Timeline(spans, [makespan / busy - 1 for busy in work], [_most_in_flight(actions) for actions in schedules])


def label(action: Action, virtual: int) -> str:
    """F2 or B2, with several chunks F2.0: chunk 0 of the stage."""
    return f"{action.kind[0].upper()}{action.micro_batch}" + (f".{action.chunk}" if virtual > 1 else "")


def _check_actions(stage: int, actions: list[Action], virtual: int, micro_batches: int) -> None:
    counts = Counter(actions)
    for action in _expected(virtual, micro_batches):
        if counts.pop(action, 0) != 1:
            what = "twice" if action in actions else "missing"
            raise ValueError(f"stage {stage}: {label(action, virtual)} is {what}")
    if counts:
        unknown = label(next(iter(counts)), virtual)
        raise ValueError(f"stage {stage}: {unknown} is no action of a step of {micro_batches} micro-batches")
    place = {action: i for i, action in enumerate(actions)}
    for action, i in place.items():
        if action.kind == "backward" and i < place[action._replace(kind="forward")]:
            raise ValueError(f"stage {stage}: {label(action, virtual)} comes before its forward")


def _expected(virtual: int, micro_batches: int) -> Iterator[Action]:
    for kind in ("forward", "backward"):
        for m in range(micro_batches):
            yield from (Action(kind, m, chunk) for chunk in range(virtual))


def _check_order(schedules: list[list[Action]], virtual: int) -> None:
    """Each way from one stage to another, and each kind of message on it, has one order at both ends."""
    stages = len(schedules)
    sent: dict[tuple, list[Action]] = {}
    received: dict[tuple, list[Action]] = {}
    for stage, actions in enumerate(schedules):
        for action in actions:
            if receiver := sends_to(action, stage, stages, virtual):
                sent.setdefault((action.kind, stage, receiver[0]), []).append(action._replace(chunk=receiver[1]))
            if sender := receives_from(action, stage, stages, virtual):
                received.setdefault((action.kind, sender[0], stage), []).append(action)
    for way, messages in sent.items():
        for message, wanted in zip(messages, received[way], strict=True):
            if message != wanted:
                kind, sender, receiver = way
                raise ValueError(
                    f"{kind}, stage {sender} to {receiver}: sent for {label(message, virtual)}, where the receiver "
                    f"comes to {label(wanted, virtual)}"
                )


def _check_finished(
    schedules: list[list[Action]], spans: list[list[Span]], came: list[list[float]], virtual: int
) -> None:
    waits = []
    for stage, actions in enumerate(schedules):
        i = len(came[stage]) - 1
        if i < len(actions):
            doing = "to send what it computed" if len(spans[stage]) > i else "for a message"
            waits.append(f"stage {stage} at {label(actions[i], virtual)} {doing}")
    if waits:
        raise ValueError(f"deadlock: all wait: {', '.join(waits)}")


def _most_in_flight(actions: list[Action]) -> int:
    alive = most = 0
    for action in actions:
        alive += 1 if action.kind == "forward" else -1
        most = max(most, alive)
    return most
