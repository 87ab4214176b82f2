"""Errors that end a command in one line, and the exit codes that belong to them.

In: what went wrong. Out: a line on standard error from the rank that knows, and an exit code. Standard library only.
"""

from __future__ import annotations

import contextlib
import os
import sys


class UserError(Exception):
    """Something that the user can put right: one line that names the flag, shown without a traceback.

    No ValueError, which the parser of the command line would catch, and draw a box around.
    """


class MachineError(UserError):
    """A `UserError` that may be true of one machine only: the first rank of each one that sees it speaks."""


class RunError(RuntimeError):
    """Something that ends a run and fits in one line: a full disk, a loss of nan. Shown without a traceback."""


class RankError(RunError):
    """A `RunError` that only this rank knows of: it speaks, although it may not be rank 0."""


def print_error(error: UserError | RunError) -> int:
    """One line on standard error, from rank 0 (or whoever knows); returns the exit code that belongs to it."""
    is_first = isinstance(error, MachineError) and os.environ.get("LOCAL_RANK") == "0"
    if os.environ.get("RANK", "0") == "0" or is_first or isinstance(error, RankError):
        with contextlib.suppress(OSError):  # the exit code says it too
            sys.stderr.write("error: " + " ".join(str(error).split()) + "\n")
            sys.stderr.flush()
    return 2 if isinstance(error, UserError) else 1
