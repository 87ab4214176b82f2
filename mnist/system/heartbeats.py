"""Heartbeats of all ranks: each writes about once a second how far it is, and at a stall they show who is missing.

In: an `Accelerator`. Out: the rank that hangs, with host and step, on every rank. For the thread of `Watchdog`.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterable
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch.distributed import PrefixStore, distributed_c10d

from mnist.system import signals

LOST_S = 10.0  # without progress after a signal, until a rank looks whether the others are still there
OBSERVE_S = 4.0  # in which a living rank writes its entry several times


class Heartbeats:
    """An entry of each rank in the process group's key-value store: a counter, collectives begun, host, step.

    A rank that hangs has begun fewer collectives than those that wait for it. A rank whose counter stands still was
    killed or stopped, or its machine is gone. Every rank must make one, at the same point.

    Args:
        accelerator: knows the ranks.
        step: gives the number of steps that this rank has done.
    """

    def __init__(self, accelerator: Accelerator, step: Callable[[], int]) -> None:
        self._rank, self._world_size = accelerator.process_index, accelerator.num_processes
        self._step, self._counter, self._host = step, 0, socket.gethostname()
        self._lost: list[int] = []
        if self._world_size > 1:
            self._group = distributed_c10d._get_default_group()
            prefix = broadcast_object_list([os.urandom(8).hex()])[0]  # a restart may find the store as it was
            self._store = PrefixStore(prefix, distributed_c10d._get_default_store().clone())  # type: ignore[attr-defined]
        self.publish(0.0)

    def publish(self, idle_s: float) -> str | None:
        """Writes this rank's entry; returns why all ranks must end, once one of them has found a reason.

        Args:
            idle_s: seconds in which this rank has made no progress.
        """
        if self._world_size == 1:
            return None
        self._counter += 1
        begun = self._group._get_sequence_number_for_group()  # type: ignore[attr-defined]
        self._store.set(str(self._rank), json.dumps([self._counter, begun, self._host, self._step()]))
        if self._store.check(["reason"]):
            return self._store.get("reason").decode()
        if idle_s >= LOST_S and signals.stop_requested():
            self._lost = self._find_lost()
        return "no progress after a signal" if self._lost else None

    def explain(self, reason: str) -> str:
        """`reason`, with the ranks that the others wait for. The first rank to ask prints it; all get the same."""
        if self._world_size == 1:
            return _print(f"{reason} after step {self._step()}")
        if self._store.check(["reason"]):
            return self._store.get("reason").decode()
        lost, entries = self._lost or self._find_lost(), self._read()
        fewest = min(entry[1] for entry in entries.values())
        behind = [rank for rank, entry in entries.items() if entry[1] == fewest]
        if lost:
            text = f"{_names(lost, entries)} no longer answers ({reason})"
        elif len(behind) < self._world_size:
            text = f"{_names(behind, entries)} hangs: {reason}, and the other ranks wait for it"
        else:
            text = f"{reason}, and all ranks wait for the same exchange: is the network between them working?"
        if self._store.add("reasons", 1) > 1:  # another rank was first
            return self._store.get("reason").decode()
        self._store.set("reason", text)
        return _print(text)

    def _read(self) -> dict[int, list[Any]]:
        keys = [str(rank) for rank in range(self._world_size)]
        return {int(key): json.loads(self._store.get(key)) for key in keys if self._store.check([key])}

    def _find_lost(self) -> list[int]:
        """Ranks whose entries do not change while this rank keeps writing its own."""
        before, start = self._read(), time.monotonic()
        while time.monotonic() < start + OBSERVE_S:
            time.sleep(0.5)
            self._counter += 1
            entry = [self._counter, *before[self._rank][1:]]
            self._store.set(str(self._rank), json.dumps(entry))
        after = self._read()
        return [rank for rank in range(self._world_size) if rank not in after or before.get(rank) == after[rank]]


def _names(ranks: Iterable[int], entries: dict[int, list[Any]]) -> str:
    shown = [f"rank {rank} on {entries[rank][2]} after step {entries[rank][3]}" for rank in ranks if rank in entries]
    shown += [f"rank {rank}" for rank in ranks if rank not in entries]
    return ", ".join(shown[:8]) + (" and others" if len(shown) > 8 else "")


def _print(text: str) -> str:
    os.write(2, f"error: {text}\n".encode())
    return text
