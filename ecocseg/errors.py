"""Errors a user can mend, errors that pass, and how a command ends: 0 done, 2 bad input, 1 failure while running."""

from __future__ import annotations

import sys
from collections.abc import Callable


class InputError(ValueError):
    """Bad input. The message names the key, file or value, and the remedy."""


class StorageUnavailable(Exception):
    """A bucket that is away after all retries: nothing a user has done wrong, and worth trying again later.

    Not an `OSError`, so that nobody who handles a missing or damaged file takes it for one.
    """


class Restart(Exception):
    """Training workers were asked to begin again, in another number, and have saved."""


def run_main(main: Callable[[], int | None]) -> int:
    """Run a command's `main` and turn errors that are no bugs into one message on stderr and an exit code."""
    try:
        return main() or 0
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except StorageUnavailable as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
