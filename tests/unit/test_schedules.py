"""Schedules, played against each other: complete, without deadlock, and as long and as hungry as the formulas say."""

import re
from collections.abc import Iterator
from itertools import pairwise

import pytest

from megalite.errors import ConfigError
from megalite.pipeline.schedules import Action, build, receives_from, sends_to
from megalite.pipeline.simulator import simulate

# (schedule, stages p, virtual v, micro-batches m)
CASES = [
    (schedule, p, v, m)
    for p in range(1, 9)
    for v in range(1, 5)
    for m in range(1, 3 * p + 1)
    for schedule in (("gpipe", "1f1b") if v == 1 else ("interleaved",))
    if v == 1 or (p > 1 and m % p == 0)
]
# Least `ahead` with which no two stages that send wait for each other, whatever the numbers.
AHEAD = {"gpipe": 0, "1f1b": 1, "interleaved": 2}


def all_stages(schedule: str, p: int, v: int, m: int) -> list[list[Action]]:
    return [build(schedule, stage, p, v, m) for stage in range(p)]


def held(schedule: str, p: int, v: int, m: int, stage: int) -> int:
    """Chunks' activations on a stage at most: one more than the forwards before its first backward."""
    if schedule == "gpipe":
        return m
    if schedule == "1f1b":
        return min(p - stage, m)
    # Megatron-LM's number of warm-up forwards; on stage 0 in all p v + p - 1 chunks (arXiv:2205.05198, section 4.2.3).
    return min((v - 1) * p + 2 * (p - stage - 1) + 1, m * v)


@pytest.mark.parametrize(("forward", "backward"), [(1, 2), (5, 1)])
def test_every_schedule_is_valid_and_as_the_formulas_say(forward, backward):
    assert len(CASES) == 2 * 108 + 3 * 7 * 3
    for case in CASES:
        _, p, v, m = case
        timeline = simulate(all_stages(*case), forward_time=forward, backward_time=backward)
        ideal = m * v * (forward + backward)
        # GPipe's and 1F1B's bubble is (p - 1) / m of the ideal step, interleaved / v (arXiv:2104.04473, section 2.2).
        assert timeline.makespan == ideal + (p - 1) * (forward + backward), case
        assert timeline.bubble == pytest.approx([(p - 1) / (m * v)] * p), case
        assert timeline.in_flight == [held(*case, stage) for stage in range(p)], case


def test_schedules_finish_even_where_sending_waits_for_the_receiver():
    for case in CASES:
        timeline = simulate(all_stages(*case), ahead=AHEAD[case[0]])
        assert timeline.bubble[0] == pytest.approx((case[1] - 1) / (case[2] * case[3])), case


@pytest.mark.parametrize(("case", "ahead"), [(("1f1b", 2, 1, 2), 0), (("interleaved", 2, 2, 4), 1)])
def test_with_less_ahead_neighbours_send_to_each_other_for_ever(case, ahead):
    with pytest.raises(ValueError, match=r"deadlock: all wait: stage 0 at \S+ to send .*, stage 1 at \S+ to send"):
        simulate(all_stages(*case), ahead=ahead)


def test_orders_by_hand():
    def shown(actions: list[Action]) -> str:
        return " ".join(f"{kind[0].upper()}{m}{'abc'[chunk]}" for kind, m, chunk in actions)

    alone = build("1f1b", 0, 1, 1, 2)
    assert alone == [Action("forward", 0), Action("backward", 0), Action("forward", 1), Action("backward", 1)]
    assert shown(build("gpipe", 1, 2, 1, 3)) == "F0a F1a F2a B0a B1a B2a"
    assert shown(build("1f1b", 0, 3, 1, 4)) == "F0a F1a F2a B0a F3a B1a B2a B3a"
    assert shown(build("1f1b", 0, 4, 1, 2)) == "F0a F1a B0a B1a"
    # arXiv:2104.04473, figure 4: the first and last of two stages, two chunks on each.
    first, last = all_stages("interleaved", 2, 2, 4)
    assert shown(first) == "F0a F1a F0b F1b F2a B0b F3a B1b F2b B0a F3b B1a B2b B3b B2a B3a"
    assert shown(last) == "F0a F1a F0b B0b F1b B1b F2a B0a F3a B1a F2b B2b F3b B3b B2a B3a"


def test_messages_follow_the_model():
    """Two stages, two chunks: the model runs stage 0, 1, 0, 1."""
    path = [(0, 0), (1, 0), (0, 1), (1, 1)]
    for kind, way in (("forward", path), ("backward", path[::-1])):
        for i, (stage, chunk) in enumerate(way):
            action = Action(kind, 3, chunk)
            assert receives_from(action, stage, 2, 2) == (way[i - 1] if i else None)
            assert sends_to(action, stage, 2, 2) == (way[i + 1] if i < 3 else None)


def test_sending_takes_time():
    """One micro-batch down two stages and back: two messages."""
    timeline = simulate(all_stages("1f1b", 2, 1, 1), send_time=10)
    assert [[(span.start, span.end) for span in spans] for spans in timeline.spans] == [
        [(0, 1), (24, 26)],
        [(11, 12), (12, 14)],
    ]
    assert timeline.makespan == 26
    assert timeline.bubble == [26 / 3 - 1, 26 / 3 - 1]


def actions_of(text: str) -> list[Action]:
    """Of "F0 B1" and so on, one chunk."""
    return [Action({"F": "forward", "B": "backward"}[word[0]], int(word[1:])) for word in text.split()]


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (["F0 F1 B1", "F0 F1 B0 B1"], "stage 0: B0 is missing"),
        (["F0 F1 B0 B1", "F0 B0 B1"], "stage 1: F1 is missing"),
        (["F0 F1 B0 B1 B1", "F0 F1 B0 B1"], "stage 0: B1 is twice"),
        (["F0 B0 F0 F1 B1"], "stage 0: F0 is twice"),
        (["B0 F0"], "stage 0: B0 comes before its forward"),
        (["F0 F-1 B0"], "stage 0: F-1 is no action of a step of 1 micro-batches"),
        (["F0 F1 B0 B1", "F1 F0 B0 B1"], "forward, stage 0 to 1: sent for F0, where the receiver comes to F1"),
        (["F0 F1 B1 B0", "F0 B0 F1 B1"], "backward, stage 1 to 0: sent for B0, where the receiver comes to B1"),
        (
            ["F0 B0 F1 B1", "F0 F1 B0 B1"],
            "deadlock: all wait: stage 0 at B0 for a message, stage 1 at F1 for a message",
        ),
        (["", ""], "no stage has an action"),
    ],
)
def test_the_simulator_refuses(stages, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        simulate([actions_of(text) for text in stages])


@pytest.mark.parametrize("case", [("1f1b", 4, 1, 6), ("interleaved", 2, 2, 4), ("gpipe", 3, 1, 3)])
def test_no_action_can_be_dropped(case):
    for stage, actions in enumerate(all_stages(*case)):
        for i in range(len(actions)):
            broken = all_stages(*case)
            del broken[stage][i]
            with pytest.raises(ValueError, match=f"stage {stage}: .* is missing"):
                simulate(broken)


def swaps(case: tuple) -> Iterator[tuple[bool, list[list[Action]]]]:
    """Each way to swap neighbours on one stage: whether they are of one kind, and the schedules with it."""
    for stage, actions in enumerate(all_stages(*case)):
        for i, (one, other) in enumerate(pairwise(actions)):
            broken = all_stages(*case)
            broken[stage][i : i + 2] = other, one
            yield one.kind == other.kind, broken


@pytest.mark.parametrize(
    "case", [("1f1b", 4, 1, 6), ("interleaved", 2, 2, 4), ("interleaved", 3, 3, 6), ("gpipe", 3, 1, 3)]
)
def test_no_two_of_a_kind_can_be_swapped(case):
    for same_kind, broken in swaps(case):
        if same_kind:
            with pytest.raises(ValueError, match=r"stage \d to \d: sent for"):
                simulate(broken)


@pytest.mark.parametrize("case", [("1f1b", 4, 1, 6), ("1f1b", 3, 1, 2)])
def test_no_forward_and_backward_can_be_swapped_for_free(case):
    """What still runs takes longer or holds more."""
    sound = simulate(all_stages(*case))
    for same_kind, broken in swaps(case):
        if not same_kind:
            try:
                timeline = simulate(broken)
            except ValueError:
                continue
            assert (timeline.makespan, timeline.in_flight) > (sound.makespan, sound.in_flight)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (("interleaved", 4, 2, 6), "has 6 (.*give it 4 or 8, or set parallel.virtual to 1"),
        (("interleaved", 4, 2, 3), "has 3 (.*give it 4, or set"),
        (("interleaved", 1, 2, 4), "parallel.virtual = 2 needs parallel.pipeline above 1"),
        (("interleaved", 4, 1, 4), "parallel.schedule = interleaved and parallel.virtual = 1: "),
        (("1f1b", 4, 2, 4), "parallel.schedule = 1f1b and parallel.virtual = 2: "),
    ],
)
def test_refused(case, message):
    with pytest.raises(ConfigError, match=message.replace("(.", r"\(.")) as caught:
        build(case[0], 0, *case[1:])
    assert "\n" not in str(caught.value)
