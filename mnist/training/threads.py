"""Whether several CPU threads are faster than one, measured with the network of the run.

In: a network and a batch. Out: a line of advice, or None. It depends on what else the machine does: on a busy one a
thread that has no core keeps all others waiting (measured: 16.0 s of training with two threads, 3.3 s with one).
"""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor, nn

from mnist.training.step import warm_up

SLOWER = 1.3  # times the duration of one thread: less may be chance
BUDGET_S = 0.1  # or two rounds, where they take longer


def advise_on_threads(model: nn.Module, inputs: Tensor) -> str | None:
    """Times forward and backward passes with all threads and with one, in turns; changes nothing.

    Args:
        model: bare, so that no rank waits for another one; after its warm-up.
        inputs: zeros in the shape of a micro-batch (B, C, S, S).

    Returns:
        One line, where one thread is clearly faster; None otherwise, on a GPU, and with one thread.
    """
    num_threads = torch.get_num_threads()
    if inputs.device.type != "cpu" or num_threads == 1:
        return None
    all_s: list[float] = []
    one_s: list[float] = []
    started = time.perf_counter()
    try:
        while len(all_s) < 2 or (len(all_s) < 10 and time.perf_counter() - started < BUDGET_S):
            for threads, times in ((num_threads, all_s), (1, one_s)):
                torch.set_num_threads(threads)
                times.append(_time_pass(model, inputs))
    finally:
        torch.set_num_threads(num_threads)
    ratio = statistics.median(all_s) / statistics.median(one_s)
    if ratio < SLOWER:
        return None
    return f"{num_threads} threads are {ratio:.1f} times slower than one here, now: add --num-threads 1"


def _time_pass(model: nn.Module, inputs: Tensor) -> float:
    started = time.perf_counter()
    warm_up(model, inputs, num_passes=1)
    return time.perf_counter() - started
