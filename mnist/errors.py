"""Errors that end a command in one line, their exit codes, and which rank prints them.

In: an error. Out: a line on standard error from the rank that knows of it, and an exit code. Standard library only.
"""

from __future__ import annotations

import contextlib
import os
import sys


class UserError(Exception):
    """A mistake that the user can correct: one line that names the flag, shown without a traceback."""


class MachineError(UserError):
    """A `UserError` that may be true of one machine only: the first rank of each machine that sees it prints it."""


class RunError(RuntimeError):
    """An error that ends a run and fits in one line, such as a full disk. Shown without a traceback."""


class RankError(RunError):
    """A `RunError` that only this rank knows of: it is printed although this may not be rank 0."""


def is_one_of_several() -> bool:
    """Whether a launcher has started this process as one of several ranks. RANK alone may be left from another job."""
    variables = [os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR")]
    return all(variables) and variables[1] != "1"


def is_first_rank() -> bool:
    """Whether this process prints what all ranks know: rank 0, or the only process."""
    return not is_one_of_several() or os.environ["RANK"] == "0"


def print_error(error: UserError | RunError) -> int:
    """Prints one line on standard error, on rank 0 or where only this rank knows; returns the error's exit code."""
    is_first_here = isinstance(error, MachineError) and os.environ.get("LOCAL_RANK") == "0"
    if is_first_rank() or is_first_here or isinstance(error, RankError):
        with contextlib.suppress(OSError):  # a closed standard error; the exit code tells it too
            sys.stderr.write("error: " + " ".join(str(error).split()) + "\n")
            sys.stderr.flush()
    return 2 if isinstance(error, UserError) else 1
