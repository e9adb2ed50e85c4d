"""Errors that are the user's to mend: one clear line, a chosen exit code, no traceback."""

import sys
from collections.abc import Callable
from typing import NoReturn


class UserError(Exception):
    """Something outside the program is wrong: a file, a disk, an argument. The message is one line."""

    exit_code = 1


class ConfigError(UserError):
    """The configuration is wrong, and starting again without a change cannot help."""

    exit_code = 78  # EX_CONFIG of sysexits.h


def run_main(main: Callable[[], int | None]) -> NoReturn:
    """Run a command's `main` and exit; a `UserError` becomes one line on stderr."""
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
