"""Runs a function on ranks forked from this process, which has imported what they need and has no threads."""

import faulthandler
import gc
import importlib
import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

# What torch.optim, and DeepSpeed as it starts an engine, import only then: seconds, on each rank.
LATE = ("torch._dynamo", "torch._inductor.compile_fx")
GRACE = 1.0  # seconds in which ranks say what they know
FRAME = re.compile(r'File "([^"]+)", line (\d+),? in (\S+)')


class RanksFailed(Exception):
    """A rank raised, died or took too long; the message says which and what it was doing."""


def prepare() -> None:
    """Once, before `run_forked`: import what would be imported on every rank, and keep it out of their collections."""
    for name in LATE:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()


def run_forked(ranks: int, function: Callable[[int, Path], dict], folder: Path, timeout: float) -> list[dict]:
    """What function(rank, folder) returns on each rank, as JSON has it, in rank order.

    folder: empty. Raises RanksFailed where a rank fails, or does not return within `timeout` seconds; no rank is left
    behind, whatever happens.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    running: dict[int, int] = {}  # rank by process
    deadline = time.monotonic() + timeout
    try:
        for rank in range(ranks):
            (folder / f"{rank}.said").touch()
            process = os.fork()
            if not process:
                _be_rank(function, rank, folder, timeout)
            running[process] = rank
        failed = _wait(running, deadline)
        hung = dict(running) if not failed else {}
        for process in hung:
            os.kill(process, signal.SIGUSR1)  # it writes down where it is
        time.sleep(GRACE if hung else 0)
    finally:
        for process in running:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
    said = {rank: (folder / f"{rank}.said").read_text(errors="replace") for rank in (*failed, *hung.values())}
    if hung:
        lines = [f"rank {rank}: {_innermost(said[rank])}" for rank in sorted(hung.values())]
        raise RanksFailed("\n".join([f"no end after {timeout:g} s; the ranks were in", *lines]))
    if failed:
        rank = min(failed, key=lambda rank: (folder / f"{rank}.said").stat().st_mtime_ns)
        code = failed[rank]
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed (exit code {code})"
        raise RanksFailed(f"rank {rank} {how}\n{said[rank]}".rstrip())
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]


def _wait(running: dict[int, int], deadline: float) -> dict[int, int]:
    """Until all have ended, or one failed, or the deadline; takes those that ended out of `running`.

    Returns the exit codes of those that failed, by rank.
    """
    failed: dict[int, int] = {}
    while running and time.monotonic() < deadline:
        for process in list(running):
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                rank, code = running.pop(process), os.waitstatus_to_exitcode(status)
                if code:
                    failed[rank] = code
                    deadline = min(deadline, time.monotonic() + GRACE)
        time.sleep(0.005)
    return failed


def _be_rank(function: Callable[[int, Path], dict], rank: int, folder: Path, timeout: float) -> None:
    """The life of a forked process; does not return."""
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its ranks
        said = os.open(folder / f"{rank}.said", os.O_WRONLY | os.O_APPEND)
        os.dup2(said, 1)
        os.dup2(said, 2)
        faulthandler.enable(2)
        faulthandler.register(signal.SIGUSR1, 2)
        faulthandler.dump_traceback_later(timeout + 60, exit=True, file=2)  # should the parent have been killed
        result = function(rank, folder)
        (folder / f"{rank}.json").write_text(json.dumps(result))
        code = 0
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code)  # at once: gloo's threads may be waiting for the others


def _innermost(text: str) -> str:
    """Of the stacks that faulthandler wrote, the main thread's calls, innermost first, as far as they say much."""
    stack = re.split(r"\n(?=(?:Current thread|Thread) )", text)[-1]  # the main thread comes last
    shown = []
    for path, line, function in FRAME.findall(stack.partition("in _be_rank")[0]):
        if "/megalite/" in path or not (shown or "/torch/_" in path):  # of others the innermost, if it has a name
            shown.append(f"{function} ({'/'.join(Path(path).parts[-2:])}:{line})")
    return " < ".join(shown[:6]) or "no answer"
