"""A check: something that every rank measures, and a judgement of all ranks' answers.

In: a `Probe` of this rank and a `Check`. Out: a `Finding`, equal on every rank: pass, warn, fail, or skip where there
is nothing to judge, and one line that says what to do.
"""

from __future__ import annotations

import hashlib
import socket
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from accelerate import Accelerator
from accelerate.utils import gather_object

from mnist.config import TrainConfig
from mnist.errors import RunError, UserError
from mnist.system import ranks

Verdict = Literal["pass", "warn", "fail", "skip"]
Judgement = tuple[Verdict, str]


@dataclass(frozen=True)
class Probe:
    """What a check can look at on this rank.

    Attributes:
        accelerator: over all ranks.
        config: of the run that would be started.
        nccl_log: the file to which NCCL writes which links it takes, if there is one.
    """

    accelerator: Accelerator
    config: TrainConfig
    nccl_log: Path | None = None


@dataclass(frozen=True)
class Fact:
    """What one rank has measured: a plain value, or an error instead."""

    rank: int
    host: str
    value: Any
    error: str | None = None

    @property
    def where(self) -> str:
        """The rank and its host in words."""
        return f"rank {self.rank} on {self.host}"


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    measure: Callable[[Probe], Any]
    judge: Callable[[Sequence[Fact]], Judgement]


@dataclass(frozen=True)
class Finding:
    """The result of a check; `values` are those of the ranks, in order."""

    name: str
    verdict: Verdict
    message: str
    values: tuple[Any, ...] = ()


def run_check(check: Check, probe: Probe) -> Finding:
    """Measures on every rank, and judges; every rank must call this. An error on a rank fails this check only.

    Raises:
        RuntimeError: another rank has died, or does not answer.
    """
    value, error = None, None
    try:
        value = check.measure(probe)
    except Exception as caught:  # any error belongs into the report
        if ranks.is_lost_contact(caught):
            raise
        kind = "" if isinstance(caught, UserError | RunError) else f"{type(caught).__name__}: "
        error = kind + " ".join(str(caught).split())
    own = (probe.accelerator.process_index, socket.gethostname(), value, error)
    facts = [Fact(*row) for row in gather_object([own])]
    values = tuple(fact.value for fact in facts)
    for fact in facts:
        if fact.error is not None:
            return Finding(check.name, "fail", f"{fact.where}: {fact.error}", values)
    return Finding(check.name, *check.judge(facts), values)


def judge_equal(advice: str) -> Callable[[Sequence[Fact]], Judgement]:
    """A judge of dictionaries that must not differ between ranks; names the first difference from rank 0."""

    def judge(facts: Sequence[Fact]) -> Judgement:
        if len(facts) == 1:
            return "skip", "one process: nothing to compare"
        first = facts[0].value
        others = [fact for fact in facts if fact.value != first]
        if not others:
            return "pass", f"equal on {len(facts)} ranks"
        found = others[0].value
        name = next(name for name in {**first, **found} if first.get(name) != found.get(name))
        more = f" (and {len(others) - 1} more)" if len(others) > 1 else ""
        theirs, ours = found.get(name, "nothing"), first.get(name, "nothing")
        return "fail", f"{name}: {theirs} on {others[0].where}{more}, but {ours} on rank 0; {advice}"

    return judge


def short_hash(content: bytes) -> str:
    """The first 16 digits of the sha256."""
    return hashlib.sha256(content).hexdigest()[:16]


def by_host(facts: Sequence[Fact]) -> dict[str, list[Fact]]:
    """The facts of each host, in the order of ranks."""
    hosts = defaultdict(list)
    for fact in facts:
        hosts[fact.host].append(fact)
    return dict(hosts)
