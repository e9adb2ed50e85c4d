"""Runs a function on several ranks on this machine, over gloo; a rank that fails or hangs fails the test, soon."""

import faulthandler
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing


class RankFailure(AssertionError):
    """A rank raised, died or took too long; the message holds what the ranks said, the first failure first."""


def run_ranks(function: Callable, world_size: int, *args: Any, timeout: float = 60) -> list[Any]:
    """What function(*args) returns on each of `world_size` ranks, in rank order; RankFailure if one does not return.

    function: at the top of a test module, so that a fresh process can import it. It finds the default process group
    made. Results hold tensors, numbers, strings, lists and dicts. timeout: seconds for everything, start included.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as name:
        folder = Path(name)
        deadline = time.monotonic() + timeout
        # Forked from a server that has imported torch and does nothing else: starting takes no seconds, and nothing of
        # this process (threads, locks, groups) gets into the ranks.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed"])
        processes = [
            context.Process(target=_rank, args=(folder, rank, world_size, deadline, function, args), daemon=True)
            for rank in range(world_size)
        ]
        try:
            for process in processes:
                process.start()
            _wait(processes, folder, deadline)
        finally:
            for process in processes:
                if process.pid is not None:
                    process.kill()
                    process.join()
        return [torch.load(folder / f"{rank}.result", weights_only=True) for rank in range(world_size)]


def _wait(processes: list, folder: Path, deadline: float) -> None:
    """Until all have returned. The results lie in files, so nobody waits for a reader."""
    while any(process.exitcode is None for process in processes):
        if any(process.exitcode for process in processes):
            break
        if time.monotonic() > deadline:
            alive = [rank for rank, process in enumerate(processes) if process.exitcode is None]
            raise RankFailure(f"ranks {alive} still ran at the time-out\n{_reports(folder)}")
        time.sleep(0.02)
    codes = {rank: process.exitcode for rank, process in enumerate(processes) if process.exitcode}
    if codes:
        raise RankFailure(f"exit codes by rank: {codes}\n{_reports(folder)}")


def _reports(folder: Path) -> str:
    """What the ranks wrote before they failed: the oldest is the cause, the others often its effect."""
    files = sorted(folder.glob("*.report"), key=lambda file: file.stat().st_mtime_ns)
    return "\n".join(f"--- rank {file.stem}\n{text}" for file in files if (text := file.read_text()))


def _rank(folder: Path, rank: int, world_size: int, deadline: float, function: Callable, args: tuple) -> None:
    report = open(folder / f"{rank}.report", "w")  # noqa: SIM115  until the process ends
    # Where a rank hangs is what one wants to know of it; a second later it is killed.
    faulthandler.dump_traceback_later(max(0.1, deadline - time.monotonic() - 1), file=report)
    try:
        torch.set_num_threads(1)  # ranks that crowd each other out are several times slower
        store = dist.FileStore(str(folder / "store"), world_size)
        timeout = timedelta(seconds=max(1.0, deadline - time.monotonic()))
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
        torch.save(function(*args), folder / f"{rank}.result")
        dist.barrier()  # nobody leaves while another still reads from it
        dist.destroy_process_group()
    except BaseException:
        report.write(traceback.format_exc())
        report.close()
        os._exit(1)  # at once: gloo's threads may be waiting for the others
