"""What ranks say of themselves, and the verdict on who holds up the rest. No clocks, no processes."""

import linecache
from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch.distributed as dist

MAX_TOLD = 4  # ranks, or places where some wait, that a line names
MAX_ROWS = 64  # of a table: a screen or two, whatever the number of ranks


@dataclass(frozen=True)
class State:
    """What one rank does, as it travels to the others (JSON).

    beat: counts how often the rank has said so. what: where its main thread is. seconds: for how long it got no
    further. call: the communication it is in, or None. group: torch's name of that one's group, if known. counts: by
    such a name, the collectives that this rank has called in the group; all its members call the same ones.
    """

    beat: int = 0
    what: str = "start"
    seconds: float = 0.0
    call: str | None = None
    group: str | None = None
    counts: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """culprits: the ranks to blame; none where ranks wait for each other. line: what the user is told."""

    culprits: list[int]
    line: str


def communication(frame: FrameType) -> tuple[str, Any] | None:
    """(name, group) of the communication that a thread with this innermost frame is in; None if in none.

    The name is that of the outermost function of torch.distributed, the group the one that this was given. A wait for
    a message, or for what was begun earlier, has the name of its caller and no group.
    """
    if not _communicates(frame):
        return None
    name, group = frame.f_code.co_qualname.split(".<locals>")[0], None
    found: FrameType | None = frame
    while found is not None and _file(found, "/torch/distributed/"):
        if found.f_code.co_name != "wrapper":  # torch's logger of calls
            name, given = found.f_code.co_name, found.f_locals
            group = (given["group"] or dist.group.WORLD) if "group" in given else None
        found = found.f_back
    return name, group


def _communicates(frame: FrameType) -> bool:
    if _file(frame, "/torch/distributed/") or _file(frame, "/megalite/comms/"):
        return True
    # A handle's wait is C++ and has no frame.
    return ".wait(" in linecache.getline(frame.f_code.co_filename, frame.f_lineno or 0)


def _file(frame: FrameType, part: str) -> bool:
    return part in frame.f_code.co_filename


def judge(states: dict[int, State], silent: dict[int, str], places: dict[int, str], limit: float) -> Verdict | None:
    """Who holds up the others; None where no rank has waited for `limit` seconds.

    silent: of ranks that no longer say what they do, why ("is gone"). places: all ranks' names. A rank that is silent
    is to blame; else one that is not in a communication; else they wait for each other.
    """
    behind, ahead = _compare(states)
    waiting = {r: s for r, s in states.items() if r not in silent and (s.call or r in ahead) and s.seconds >= limit}
    if not waiting:
        return None
    waits = _waits(waiting, states)
    if silent:
        told = some(f"{places[rank]} {why}{_last_seen(states.get(rank))}" for rank, why in sorted(silent.items()))
        return Verdict(sorted(silent), f"{told}; {waits}")
    # Others may compute, too: what holds up the rest has done so for as long as they wait, or nearly.
    busy = [r for r, s in states.items() if not s.call and s.seconds >= limit / 2 and r not in ahead]
    culprits = [r for r in busy if r in behind] or busy
    if culprits:
        told = some(
            f"{places[rank]} hangs: {states[rank].what}, in no communication, for {states[rank].seconds:.0f} s"
            for rank in culprits
        )
        return Verdict(culprits, f"{told}; {waits}")
    if any(not s.call and s.seconds < limit / 2 for s in states.values()):
        return None  # it is on its way
    return Verdict([], f"the ranks wait for each other: {waits}")


def _compare(states: dict[int, State]) -> tuple[set[int], set[int]]:
    """The ranks that have called fewer collectives in a group than another member, and those that have called more."""
    lowest: dict[str, int] = {}
    highest: dict[str, int] = {}
    for state in states.values():
        for group, count in state.counts.items():
            lowest[group] = min(count, lowest.get(group, count))
            highest[group] = max(count, highest.get(group, count))
    behind = {r for r, s in states.items() if any(count < highest[group] for group, count in s.counts.items())}
    ahead = {r for r, s in states.items() if any(count > lowest[group] for group, count in s.counts.items())}
    return behind, ahead


def _last_seen(state: State | None) -> str:
    if state is None:
        return ""
    return f", last seen at {state.what}" + (f", in {state.call}" if state.call else "")


def _waits(waiting: dict[int, State], states: dict[int, State]) -> str:
    """Who waits where, and for whom: "ranks 0, 1 wait in all_reduce (zero group) for rank 2; rank 3 waits in ..."."""
    calls: dict[tuple, list[int]] = {}
    for rank, state in sorted(waiting.items()):
        call = state.call or "a collective begun before"
        calls.setdefault((call, state.group, state.counts.get(state.group)), []).append(rank)
    told = []
    for (call, group, count), ranks in calls.items():
        late = [] if count is None else [r for r, s in states.items() if s.counts.get(group, count) < count]
        whom = f" for {_ranks(sorted(late))}" if late else ""
        told.append(f"{_ranks(ranks)} {'wait' if len(ranks) > 1 else 'waits'} in {call}{whom}")
    return some(told)


def some(told: Iterable[str]) -> str:
    """The first of what is to be told, and how much more there is: a line, however many ranks."""
    told = list(told)
    more = [f"and {len(told) - MAX_TOLD} more"] if len(told) > MAX_TOLD else []
    return "; ".join(told[:MAX_TOLD] + more)


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"


def table(states: dict[int, State], silent: Container[int], places: dict[int, str], first: list[int]) -> str:
    """A line for each rank, those of `first` above the others: its place, for how long it got no further, where."""
    order = [*first, *(r for r in sorted(places) if r not in first)]
    rows = [("rank", "for", "doing", "in communication")]
    for rank in order[:MAX_ROWS]:
        state = states.get(rank)
        if state is None:
            rows.append((places[rank], "?", "?", "?"))
        else:
            seconds = "silent" if rank in silent else f"{state.seconds:.0f} s"
            rows.append((places[rank], seconds, state.what, state.call or "none"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    hidden = len(order) - MAX_ROWS
    return "\n".join([*lines, f"and {hidden} more"] if hidden > 0 else lines)
