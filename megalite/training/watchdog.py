"""Names the rank that died or hangs, and ends the run: two threads of each rank that watch it and the others.

The ranks of one machine see each other's processes end at once. For the rest, each rank says every second what it does,
in the store at which the ranks met. Those on its machine read it, and so does everyone when one has waited for too
long. The main thread only leaves marks.
"""

import contextlib
import faulthandler
import json
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from datetime import timedelta
from types import TracebackType
from typing import Any, NoReturn, Self

import torch.distributed as dist

from megalite.errors import UserError
from megalite.topology import Topology
from megalite.training.verdict import MAX_TOLD, State, communication, judge, some, table

BEAT = 1.0  # seconds between two states of a rank
SILENCE = 4.0  # seconds without a new state after which a rank counts as dead or frozen; a busy machine is slow, too
LINGER = (
    4.0  # seconds by which the others outlive the culprit: launchers blame who ends first, and deepspeed looks each 1 s
)
EXIT_CODE = 70  # EX_SOFTWARE of sysexits.h
MARGIN = timedelta(minutes=1)  # by which a group's own time-out has to be longer, so that the watchdog speaks first


class Watchdog:
    """As a context, watches over the ranks until its end; collective to make.

    timeout: how long a rank may wait for another. Then the one that is waited for is named, with what all ranks do and
    its Python stack, and every process ends with EXIT_CODE; so they do when one has died, or raised an error through
    the context. A rank that computes for long holds nobody up until another has waited for it. With one rank it does
    nothing.

    A process then also prints the Python stacks of its threads on SIGQUIT, before it ends of that, and if it crashes.
    """

    def __init__(self, topology: Topology, timeout: timedelta):
        self.rank, self._limit = topology.rank, timeout.total_seconds()
        self._all = range(topology.world_size)
        self._mark = (0, "start")
        self._state = State()
        self._over = threading.Event()  # that this rank ends, well or not
        self._known = threading.Event()  # that the run ends, and that somebody has said why
        if topology.world_size == 1:
            return
        faulthandler.enable()
        faulthandler.register(signal.SIGQUIT, chain=True)
        self._places = {rank: _place(rank, topology.grid.coordinates(rank)) for rank in self._all}
        groups = {"world": dist.group.WORLD, **vars(topology)}
        groups = {name: group for name, group in groups.items() if isinstance(group, dist.ProcessGroup)}
        self._groups = [group for group in groups.values() if group.size() > 1]
        self._names = {id(group): name.replace("_", " ") for name, group in groups.items()}
        self._main = threading.main_thread().ident
        self._store = dist.PrefixStore("watchdog", dist.distributed_c10d._get_default_store())
        self._store.set("verdict", "")
        self._store.set(f"state {self.rank}", json.dumps(asdict(self._state)))
        # When all have told, all have set their keys, too.
        homes = topology.gather_objects((socket.gethostname(), _machine(), os.getpid()))
        self._homes = {rank: f"pid {pid} on {host}" for rank, (host, _, pid) in enumerate(homes)}
        self._pids = {rank: pid for rank, (_, machine, pid) in enumerate(homes) if machine == homes[self.rank][1]}
        self._near = [rank for rank in self._pids if rank != self.rank]
        self._alive: dict[int, int] = {}  # of those near: rank by descriptor of its process
        with contextlib.suppress(OSError):  # this system has none: deaths show by silence
            self._alive = {os.pidfd_open(self._pids[rank]): rank for rank in self._near}
        self._seen: dict[int, State] = {}  # what those near, and rank 0, said last
        self._verdict: dict[str, Any] = {}
        self._store_lost = False
        self._talker = threading.Thread(target=self._talk, name="watchdog talks", daemon=True)
        self._talker.start()
        threading.Thread(target=self._watch, name="watchdog watches", daemon=True).start()

    def at(self, what: str) -> None:
        """The main thread begins with `what` ("step 12, forward of micro-batch 3"). Each call counts as progress."""
        self._mark = (self._mark[0] + 1, what)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if len(self._all) == 1:
            return
        if error is not None and _of_communication(error, trace) and self._await_cause():
            self._end(LINGER)
        self._over.set()
        self._talker.join(LINGER)
        if error is None:
            return
        if isinstance(error, Exception) and not isinstance(error, UserError):
            self._say(f"{self._places[self.rank]} failed at {self._mark[1]}: {type(error).__name__}: {error}")
        # Whoever sees this process end must know by then that it gave a reason.
        if isinstance(error, UserError) and error.on_every_rank:
            self._ask(self._leave_together, 3 * LINGER)
        else:
            self._ask(self._leave, LINGER)

    def _leave(self, store: dist.Store) -> None:
        """Tell the others to end; until they had the time to hear it."""
        store.set("verdict", json.dumps({"culprits": [self.rank], "silent": []}))
        time.sleep(LINGER / 2)

    def _leave_together(self, store: dist.Store) -> None:
        """Until all ranks are about to end; rank 0, which may serve the store, goes last."""
        store.add("over", 1)
        while store.add("over", 0) < len(self._all):
            time.sleep(0.05)
        if self.rank:
            store.add("left", 1)
            time.sleep(BEAT)  # rank 0 speaks for all, and a launcher ends it once one has ended
            return
        while store.add("left", 0) < len(self._all) - 1:
            time.sleep(0.05)

    # The thread that talks to the store. It may wait there for ever, if what serves the store is frozen.

    def _talk(self) -> None:
        store, beat, deaths = self._store.clone(), 0, self._deaths()
        readers = sorted({0, *self._near} - {self.rank})
        keys = ["verdict", *(f"state {rank}" for rank in readers)]
        try:
            while not self._over.wait(BEAT) and not deaths.poll(0):
                beat += 1
                state = replace(self._state, beat=beat, what=self._mark[1])
                store.set(f"state {self.rank}", json.dumps(asdict(state)))
                verdict, *states = store.multi_get(keys)
                self._seen = {rank: State(**json.loads(state)) for rank, state in zip(readers, states, strict=True)}
                self._verdict = json.loads(verdict) if verdict else {}
            if self._over.is_set():
                state = replace(self._state, beat=-1, what="the end", call="the barrier at the end")
                store.set(f"state {self.rank}", json.dumps(asdict(state)))
        except RuntimeError:  # the store is gone, with who served it
            self._store_lost = True

    # The thread that watches. It never waits for the store.

    def _watch(self) -> None:
        deaths = self._deaths()
        progress, seconds, last, again = None, 0.0, time.monotonic(), 0.0
        while not self._over.is_set():
            ended = [descriptor for descriptor, _ in deaths.poll(BEAT * 1000)]
            counts = {group.group_name: _collectives(group) for group in self._groups}
            before, progress = progress, (self._mark[0], sum(counts.values()))
            now = time.monotonic()
            # A job that was suspended for hours has not hung for hours.
            seconds = 0.0 if progress != before else seconds + min(now - last, 2 * BEAT)
            last = now
            # Looking at the stack costs little, but nothing is better.
            call, group = self._call() if seconds >= 2 * BEAT else (None, None)
            self._state = State(0, self._mark[1], seconds, call, group, counts)
            if self._verdict:
                self._obey(**self._verdict)
            dead = [self._alive.pop(descriptor) for descriptor in ended if deaths.unregister(descriptor) is None]
            if dead:
                self._mourn(dead)
            if self._store_lost and 0 not in self._pids and self._await_cause() and not self._over.is_set():
                self._end(LINGER)
            if seconds >= self._limit and now >= again:
                self._inquire()
                again = time.monotonic() + max(SILENCE, self._limit / 10)

    def _deaths(self) -> select.poll:
        """Polls the ranks of this machine: an event is a process that has ended."""
        poll = select.poll()
        for descriptor in self._alive:
            poll.register(descriptor, select.POLLIN)
        return poll

    def _call(self) -> tuple[str | None, str | None]:
        """(call, group) as in `State`, of whatever thread, the main one first: backward may have threads of its own."""
        frames = sys._current_frames()
        for frame in (frames.pop(self._main), *frames.values()):
            if found := communication(frame):
                name, group = found
                if not isinstance(group, dist.ProcessGroup):
                    return name, None
                where = self._names.get(id(group)) or f"ranks {dist.get_process_group_ranks(group)}"
                return f"{name} ({where})", group.group_name
        return None, None

    def _mourn(self, dead: list[int]) -> None:
        """Processes of this machine have ended while the run goes on."""
        time.sleep(0.05)  # a launcher that ends all at once wants no comment
        if self._over.is_set() or self._known.is_set():
            return
        if self._speaks():
            told = some(
                f"{self._places[rank]} is gone ({self._homes[rank]}): killed, or crashed{_last(self._seen.get(rank))}"
                for rank in dead
            )
            self._say(told)
            self._tell(dead)
        self._known.set()
        self._end(LINGER)

    def _speaks(self) -> bool:
        """Whether this is the first of this machine's ranks that run."""
        running = [rank for rank in self._near if _condition(self._pids[rank]) not in ("gone", "stopped")]
        return self.rank < min(running, default=len(self._all))

    def _inquire(self) -> None:
        """This rank got no further for too long: find out who is to blame. If somebody is, the run ends."""
        states, silent, answers = self._survey()
        verdict = judge(states, silent, self._places, self._limit)
        if verdict is None or self._over.is_set() or self._known.is_set():
            return
        if self._first(answers):
            self._say(f"{verdict.line}\n{table(states, silent, self._places, verdict.culprits)}")
            self._tell(verdict.culprits, silent)
        elif answers:
            return  # the verdict comes with the next beat
        self._obey(verdict.culprits, list(silent))

    def _survey(self) -> tuple[dict[int, State], dict[int, str], bool]:
        """(what ranks said last, why some say no more, whether the store answers)."""
        before = self._read()
        if before is None:
            states = {0: self._seen.get(0, State()), self.rank: self._state}
            return states, {0: f"serves the ranks' store and {self._why_silent(0)}"} if self.rank else {}, False
        time.sleep(SILENCE)
        states = self._read() or before
        quiet = [r for r in self._all if r != self.rank and states[r].beat == before[r].beat >= 0]
        return states, {rank: self._why_silent(rank) for rank in quiet}, True

    def _first(self, answers: bool) -> bool:
        """Whether this is the rank that tells the user what all have seen."""
        return self._ask(lambda store: store.add("speakers", 1)) == 1 if answers else self._speaks()

    def _why_silent(self, rank: int) -> str:
        told = {
            "gone": "is gone",
            "stopped": "hangs: its process is stopped",
            "frozen": "hangs: its process lets no other thread run",
        }
        near = rank in self._pids
        why = told[_condition(self._pids[rank])] if near else "does not answer: it is gone or frozen, or its machine is"
        return f"{why} ({self._homes[rank]})"

    def _obey(self, culprits: list[int], silent: list[int]) -> NoReturn:
        """End as the verdict wants it: the culprits first, with their Python stacks."""
        if self._over.is_set():
            time.sleep(2 * LINGER)  # this rank ends by itself, and has more to say
        elif self.rank in culprits:
            if self.rank in culprits[:MAX_TOLD]:
                stack = "".join(traceback.format_stack(sys._current_frames()[self._main]))
                print(f"{self._places[self.rank]}, Python stack of its main thread:\n{stack}", file=sys.stderr)
            self._end(1.5 * BEAT)  # until the others have read the verdict
        self._known.set()
        if self._speaks():
            # A process that is stopped, or lets no other thread run, cannot do this itself.
            for rank in set(silent) & set(self._near):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._pids[rank], signal.SIGQUIT)  # its stacks, if it runs
                    time.sleep(2 * BEAT)
                    os.kill(self._pids[rank], signal.SIGKILL)
        self._end(LINGER)

    # Both threads and the main one.

    def _await_cause(self) -> bool:
        """Whether a communication failed because the run ends: waits for word of that, or looks who is missing."""
        if self._known.wait(LINGER):
            return True
        _, silent, answers = self._survey()
        if silent and self._first(answers) and not self._known.is_set():
            self._say(some(f"{self._places[rank]} {why}" for rank, why in silent.items()))
            self._tell(list(silent))
        return bool(silent) or self._known.is_set()

    def _tell(self, culprits: list[int], silent: Iterable[int] = ()) -> None:
        verdict = json.dumps({"culprits": culprits, "silent": list(silent)})
        self._ask(lambda store: store.set("verdict", verdict))

    def _read(self) -> dict[int, State] | None:
        """What all ranks said last; None where the store does not answer."""
        values = self._ask(lambda store: store.multi_get([f"state {rank}" for rank in self._all]))
        return values and {rank: State(**json.loads(value)) for rank, value in enumerate(values)}

    def _ask(self, action: Callable[[dist.Store], Any], seconds: float = 3.0) -> Any:
        """`action(store)` on a connection of its own; None where that fails, or takes longer than `seconds`."""
        results: list[Any] = []
        server = self._store._underlying_non_prefix_store

        def run() -> None:
            with contextlib.suppress(RuntimeError, OSError):
                if isinstance(server, dist.TCPStore):  # torch complains by the page where there is none
                    socket.create_connection((server.host, server.port)).close()
                results.append(action(self._store.clone()))

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(seconds)
        return results[0] if results else None

    def _say(self, text: str) -> None:
        print(f"error: {text}", file=sys.stderr, flush=True)

    def _end(self, seconds: float) -> NoReturn:
        sys.stdout.flush()
        sys.stderr.flush()
        with contextlib.suppress(OSError):
            # All has been said. What torch's C++ threads print when connections break, pages of it, would hide that.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        time.sleep(seconds)
        os._exit(EXIT_CODE)


def _place(rank: int, coordinates: tuple[int, ...]) -> str:
    named = zip(("stage", "data", "context", "tensor"), coordinates, strict=True)
    return f"rank {rank} ({', '.join(f'{name} {coordinate}' for name, coordinate in named)})"


def _last(state: State | None) -> str:
    return f", last seen at {state.what}" if state else ""


def _collectives(group: dist.ProcessGroup) -> int:
    """How many collectives this rank has called in the group."""
    try:
        return group._get_sequence_number_for_group()
    except RuntimeError:  # NCCL's, before the first
        return 0


def _of_communication(error: BaseException, trace: TracebackType | None) -> bool:
    """Whether torch raised an error in a communication: most often another rank's end is the cause."""
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return isinstance(error, RuntimeError) and trace is not None and communication(trace.tb_frame) is not None


def _machine() -> str:
    """Processes with the same can see each other's ids: those of one machine, if not of different containers."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return f"unknown {os.getpid()}"


def _condition(pid: int) -> str:
    """What Linux says of a process that is silent: gone, stopped, or neither of these (frozen)."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            letter = file.read().rpartition(")")[2].split()[0]
    except OSError:
        return "gone"
    return {"Z": "gone", "X": "gone", "T": "stopped", "t": "stopped"}.get(letter, "frozen")
