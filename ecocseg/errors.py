"""Errors a user can mend, and how a command ends: 0 done, 2 bad input, 1 failure while running."""

from __future__ import annotations

import sys
from collections.abc import Callable


class InputError(ValueError):
    """Bad input. The message names the key, file or value, and the remedy."""


def run_main(main: Callable[[], int | None]) -> int:
    """Run a command's `main` and turn an `InputError` into one message on stderr and exit code 2."""
    try:
        return main() or 0
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
