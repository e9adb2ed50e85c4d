"""What every process that tokenizes owes its parent: to end with it, and to leave Ctrl-C to it."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def deaf_to_interrupts() -> Iterator[None]:
    """Processes that are started inside don't hear Ctrl-C, which reaches the whole group: the parent answers it, after.

    They inherit that SIGINT is blocked, and so are deaf to it even while they still start. Blocked in one thread it may
    reach another, and the main thread would still answer in the middle of a start: so that is put off, too.
    """
    heard: list[int] = []
    in_main = threading.current_thread() is threading.main_thread()
    answer = signal.signal(signal.SIGINT, lambda number, frame: heard.append(number)) if in_main else None
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if in_main:
            signal.signal(signal.SIGINT, answer)
            if heard:
                signal.raise_signal(signal.SIGINT)


def begin_child() -> None:
    """In a new process: end with the parent, even where this one is busy, and leave the cores to the other workers."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    # A killed parent leaves its workers waiting for work for ever; and a fork of it may hold their connection open.
    multiprocessing.parent_process().join()
    os._exit(1)
