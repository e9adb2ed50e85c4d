"""Who is blamed when ranks wait, from what they say of themselves."""

import pytest

from megalite.training.verdict import MAX_ROWS, State, judge, table

LIMIT = 60.0
PLACES = {rank: f"rank {rank} (here)" for rank in range(4)}


def waits(seconds: float, call: str = "all_reduce (zero group)", **counts: int) -> State:
    """In a collective of the group that is named first."""
    return State(1, "step 5, forward", seconds, call, next(iter(counts), None), counts)


def works(seconds: float, **counts: int) -> State:
    return State(1, "step 5, backward", seconds, counts=counts)


@pytest.mark.parametrize(
    ("states", "culprits", "parts"),
    [
        # Nobody has waited for long enough, or at all.
        ([waits(59), works(100)], None, []),
        ([works(100), works(100)], None, []),
        # The one that is waited for gets on.
        ([waits(90), works(20)], None, []),
        ([waits(90), works(95)], [1], ["rank 1 (here) hangs: step 5, backward, in no communication, for 95 s"]),
        ([waits(90), waits(70, "barrier"), works(95)], [2], ["rank 0 waits in all_reduce (zero group); rank 1 waits"]),
        # Two compute for long, but only one of them is missed in a group.
        ([waits(90, a=7), works(95, a=6), works(95, b=3), waits(90, b=3)], [1], ["rank 0 waits", "for rank 1"]),
        ([waits(90), works(95), works(95)], [1, 2], ["rank 1 (here) hangs", "rank 2 (here) hangs"]),
        # On a GPU the main thread waits somewhere else than where the collective was called.
        ([works(90, a=7), works(95, a=6)], [1], ["rank 0 waits in a collective begun before"]),
        ([works(90, a=7), works(90, a=6, b=4), works(95, b=3)], [2], ["ranks 0, 1 wait in a collective begun before"]),
        (
            [waits(90, a=7, b=1), waits(90, "barrier", b=2, a=6)],
            [],
            ["the ranks wait for each other: rank 0 waits in all_reduce (zero group) for rank 1; rank 1 waits in b"],
        ),
    ],
)
def test_who_holds_up_the_others(states, culprits, parts):
    verdict = judge(dict(enumerate(states)), {}, PLACES, LIMIT)
    assert (verdict and verdict.culprits) == culprits
    for part in parts:
        assert part in verdict.line
    assert verdict is None or "\n" not in verdict.line


def test_who_is_silent_is_blamed_first():
    states = {0: waits(90), 1: works(95), 2: works(2), 3: waits(80)}
    verdict = judge(states, {2: "is gone"}, PLACES, LIMIT)
    assert verdict.culprits == [2]
    assert verdict.line.startswith(
        "rank 2 (here) is gone, last seen at step 5, backward; ranks 0, 3 wait in all_reduce"
    )
    # One that is silent while nobody misses it is not.
    assert judge(states | {0: waits(9), 3: waits(9)}, {2: "is gone"}, PLACES, LIMIT) is None
    # What a silent one was waiting in says nothing of the others.
    assert judge({0: waits(90), 1: works(3)}, {0: "is gone"}, PLACES, LIMIT) is None


def test_many_ranks_make_a_short_line():
    states = {rank: waits(90, zero=2) for rank in range(500)} | {rank: works(95, zero=1) for rank in range(500, 900)}
    verdict = judge(states, {}, {rank: f"rank {rank}" for rank in states}, LIMIT)
    assert verdict.culprits == list(range(500, 900))
    assert len(verdict.line) < 600
    assert "and 396 more" in verdict.line
    assert "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 492 more wait in all_reduce" in verdict.line
    assert "for ranks 500, 501, 502, 503, 504, 505, 506, 507 and 392 more" in verdict.line


def test_the_table_shows_who_is_to_blame_first():
    states = {0: waits(90), 1: works(95), 2: works(2)}
    lines = table(states, {2}, PLACES, [1]).splitlines()
    assert [line.split("  ")[0] for line in lines] == ["rank", *(PLACES[rank] for rank in (1, 0, 2, 3))]
    assert [line.split()[3] for line in lines[1:]] == ["95", "90", "silent", "?"]
    many = {rank: f"rank {rank}" for rank in range(100)}
    lines = table({}, {}, many, [99]).splitlines()
    assert len(lines) == MAX_ROWS + 2
    assert lines[1].startswith("rank 99 ")
    assert lines[-1] == "and 36 more"
