"""Errors that are the user's to mend: one clear line, a chosen exit code, no traceback."""

import os
import sys
import time
from collections.abc import Callable
from typing import NoReturn, Self

SPEAKER_SECONDS = 20
"""How long a rank that has not met the others waits for the first of its machine to say what is wrong for all."""


class UserError(Exception):
    """Something outside the program is wrong: a file, a disk, an argument. The message is one line."""

    exit_code = 1
    on_every_rank = False
    """Whether all ranks raise it, so that one of them speaks for all."""

    def everywhere(self) -> Self:
        """The same error, marked as raised on every rank."""
        self.on_every_rank = True
        return self


class ConfigError(UserError):
    """The configuration is wrong, and starting again without a change cannot help."""

    exit_code = 78  # EX_CONFIG of sysexits.h


def nearest_multiples(value: int, unit: int) -> str:
    """For a message: the multiples of `unit` around a value that is none."""
    below = value // unit * unit
    return f"{below} or {below + unit}" if below else str(unit)


def run_main(main: Callable[[], int | None], *, rank: int = 0, local_rank: int = 0) -> NoReturn:
    """Run a command's `main` and exit; a `UserError` becomes one line on stderr, however many ranks raise it.

    What goes wrong before the ranks have met goes wrong on all processes of a machine, so the first of them speaks. The
    others wait: a launcher ends all ranks as soon as one has ended, and the first may still be importing. Whoever is
    not ended so had a problem of its own, and speaks too.
    """
    try:
        code = main()
        sys.stdout.flush()
        sys.exit(code)
    except UserError as error:
        met = "torch" in sys.modules and sys.modules["torch"].distributed.is_initialized()
        if not met and local_rank > 0:
            time.sleep(SPEAKER_SECONDS)
        if rank == 0 or not (met and error.on_every_rank):
            where = f"rank {rank}: " if rank else ""
            for line in str(error).splitlines():
                print(f"error: {where}{line}", file=sys.stderr)
        sys.stderr.flush()
        sys.exit(error.exit_code)
    except BrokenPipeError:  # whoever read our output has seen enough, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes at exit
        sys.exit(141)  # 128 + SIGPIPE, as the shell has it for other programs
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
