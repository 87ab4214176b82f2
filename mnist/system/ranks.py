"""Work that some ranks do for all, and values on which all ranks must agree.

In: an `Accelerator` and a callable. Out: its result on every rank, or the same error on every rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from mnist.errors import RunError, UserError

T = TypeVar("T")


def together(accelerator: Accelerator, work: Callable[[], T], on: Literal["main", "local_main", "all"] = "main") -> T:
    """Does `work` on some ranks; every rank must call this, and all of them succeed, or raise the same error.

    Args:
        accelerator: knows the ranks.
        work: must not communicate with other ranks.
        on: "main" = rank 0, whose result every rank gets; "local_main" = one rank per node, likewise rank 0's result is
            everyone's; "all" = every rank, each keeps its own result.

    Raises:
        UserError, RunError: the error of the first rank that failed; an OSError becomes a RunError.
    """
    chosen = {"main": accelerator.is_main_process, "local_main": accelerator.is_local_main_process, "all": True}[on]
    result: T | None = None
    error: UserError | RunError | None = None
    try:
        result = work() if chosen else None
    except (UserError, RunError) as caught:
        error = caught
    except OSError as caught:  # a full disk, a folder that is gone
        error = RunError(f"{caught.filename or 'a file'}: {caught.strerror or caught}")
    if error is not None and accelerator.num_processes == 1:
        raise error
    if accelerator.num_processes > 1:
        for failure in gather_object([(isinstance(error, UserError), str(error)) if error else None]):
            if failure is not None:
                is_usage, message = failure
                raise (UserError if is_usage else RunError)(message) from error
        if on != "all":
            shared: list[Any] = [result]
            result = broadcast_object_list(shared)[0]
    return result  # type: ignore[return-value]  # None only where `work` returned it


def is_lost_contact(error: BaseException) -> bool:
    """Whether `error` is what a rank sees when another one has died or does not answer."""
    words = (
        "Connection closed by peer",
        "Connection reset by peer",
        "Broken pipe",
        "Timed out waiting",
        "NCCL",
        "gloo",
    )
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def require_agreement(accelerator: Accelerator, name: str, value: object) -> None:
    """Compares a value across ranks; every rank must call this.

    Raises:
        UserError: on all ranks, if any rank's value differs from rank 0's. Names both.
    """
    if accelerator.num_processes == 1:
        return
    first, *others = gather_object([value])
    for rank, other in enumerate(others, start=1):
        if other != first:
            raise UserError(f"ranks 0 and {rank} differ in {name}: {first}, {other}")
