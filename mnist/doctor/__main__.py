"""Is this machine or cluster fit to train? Starts like a training run, checks each rank, gives a verdict.

In: the processes of any launcher. Out: a table on standard output, or one JSON document (--json), from rank 0; and an
exit code: 0 fit, 1 not fit, 2 wrong usage (torchrun and accelerate launch make 1 of every failure).

  python -m mnist.doctor
  accelerate launch -m mnist.doctor
  torchrun --nproc-per-node 2 -m mnist.doctor --json
  srun python -m mnist.doctor            with RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT set

Ranks that cannot reach one another give up after --timeout-s. Under torchrun and accelerate launch with several
machines the launchers meet first, with a time-out of their own (--rdzv-conf join_timeout=60).
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from mnist.cli import parse_options, run_command
from mnist.config import DataConfig, Precision, TrainConfig, check_choice, evolve
from mnist.errors import UserError
from mnist.recipes import RECIPES


@dataclass(frozen=True)
class Options:
    """What to check for; the flags that `train_ddp.py` has too mean the same there."""

    recipe: str = "fast"
    """The recipe whose network, batch and data are tried."""
    data_dir: str = field(default_factory=lambda: DataConfig().data_dir)
    """Folder of the data; default $MNIST_DATA_DIR, else "data"."""
    run_dir: str | None = None
    """Where runs would be written; default "runs"."""
    mixed_precision: Precision | None = None
    """Default: the launcher's choice, else no (fp32)."""
    cpu: bool = False
    """Use the CPU even where there is a GPU."""
    num_threads: int = 0
    """CPU threads per process; 0 = as training would choose."""
    timeout_s: int = 60
    """Seconds that a rank waits for another one."""
    json: bool = False
    """Print one JSON document instead of the table."""
    strict: bool = False
    """Warnings count as failures."""

    def __post_init__(self) -> None:
        self.config()

    def config(self) -> TrainConfig:
        """The configuration of the run that would be started, deterministic, because the same steps are taken twice.

        Raises:
            UserError: no such recipe, or a value out of its range.
        """
        check_choice("--recipe", self.recipe, list(RECIPES))
        recipe = RECIPES[self.recipe]
        config = recipe()
        return evolve(
            config,
            data_dir=self.data_dir,
            run_dir=self.run_dir,
            mixed_precision=self.mixed_precision,
            cpu=self.cpu,
            num_threads=self.num_threads or config.runtime.num_threads,
            timeout_s=self.timeout_s,
            deterministic=True,
        )


if __name__ == "__main__":
    OPTIONS = parse_options(Options, "doctor", __doc__, has_ranks=True)

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mnist.doctor.checks_compute import COMPUTE_CHECKS
from mnist.doctor.checks_machine import MACHINE_CHECKS
from mnist.doctor.checks_network import NETWORK_CHECKS, all_reduce_table
from mnist.doctor.checkup import Finding, Probe, run_check
from mnist.doctor.interconnect import nccl_log
from mnist.errors import RankError, RunError, print_error
from mnist.runs.console import count
from mnist.system.accelerator import open_accelerator
from mnist.system.watchdog import Watchdog

EXIT_FIT, EXIT_UNFIT = 0, 1
CHECKS = (*MACHINE_CHECKS, *COMPUTE_CHECKS, *NETWORK_CHECKS)
STYLES = {"pass": "green", "warn": "yellow", "fail": "bold red", "skip": "dim"}
# What is shown of each rank: title, check, key of its value.
COLUMNS = (
    ("host", "processes", "host"),
    ("device", "devices", "device"),
    ("uuid", "devices", "uuid"),
    ("driver", "devices", "driver"),
    ("CUDA", "versions", "cuda"),
    ("NCCL", "versions", "nccl"),
    ("torch", "versions", "torch"),
    ("threads", "threads", "threads"),
    ("host GiB", "memory", "host_gib"),
    ("GPU GiB", "memory", "device_gib"),
    ("clock (UTC)", "clock", "utc"),
)


def main(options: Options) -> int:
    """Runs all checks, reports from rank 0, returns the exit code. Every rank calls it."""
    started = time.perf_counter()
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    findings: list[Finding] = []
    signal.signal(signal.SIGTERM, _end)
    try:
        findings.extend(examine(options))  # an error leaves those before it
    except (UserError, RuntimeError, OSError, SystemExit) as error:
        name, where = CHECKS[min(len(findings), len(CHECKS) - 1)].name, f"rank {rank} on {socket.gethostname()}"
        findings.append(Finding(name, "fail", _explain(error, where)))
        if rank != "0":
            print_error(error if isinstance(error, UserError) else RankError(f"{name}: {_explain(error, where)}"))
    unfit = ("fail", "warn") if options.strict else ("fail",)
    is_fit = not any(finding.verdict in unfit for finding in findings)
    if rank == "0":
        seconds = time.perf_counter() - started
        if options.json:
            checks = [dataclasses.asdict(finding) for finding in findings]
            document = {"verdict": "fit" if is_fit else "not fit", "time_s": round(seconds, 3), "checks": checks}
            sys.stdout.write(json.dumps(document, indent=2) + "\n")
        else:
            show(findings, is_fit, seconds)
    return EXIT_FIT if is_fit else EXIT_UNFIT


def _end(_number: int, _frame: FrameType | None) -> None:
    """Lets rank 0 report what it has found so far when a launcher ends it because another rank was killed."""
    raise SystemExit("ended by SIGTERM, as launchers do when another rank has died")


def _explain(error: BaseException, where: str) -> str:
    reason = " ".join(str(error).split())
    if isinstance(error, UserError):
        return reason
    if isinstance(error, RunError | SystemExit):
        return f"{where}: {reason}"
    if "Duplicate GPU" in reason:  # NCCL finds out before ranks can compare devices
        return f"{where} shares its GPU: give each process of a host its own LOCAL_RANK ({reason})"
    cause = reason.partition(" This is typically")[0]  # gloo's own advice
    return f"{where} has lost another rank, which has died or does not answer ({cause})"


def examine(options: Options) -> Iterator[Finding]:
    """Opens the process group and goes through all checks; every rank gets the same findings.

    Raises:
        UserError, RuntimeError, OSError: ranks do not find one another, or one is lost on the way.
    """
    config = options.config()
    doing = ["starting"]
    watchdog = Watchdog(options.timeout_s + 4, at_stall=lambda reason: _say_stalled(doing[-1], reason))

    def begin(name: str) -> None:
        doing.append(name)
        watchdog.heartbeat()

    with ExitStack() as stack:
        stack.callback(watchdog.stop)
        log = stack.enter_context(nccl_log())
        begin("reaching rank 0")
        reach_rank_0(options.timeout_s)
        begin("meeting the other ranks")
        try:
            accelerator = stack.enter_context(open_accelerator(config.runtime))
        except RuntimeError as error:
            raise RunError(f"the ranks have not met ({error}): is each of them started, and let through?") from error
        probe = Probe(accelerator, config, log)
        for check in CHECKS:
            begin(check.name)
            yield run_check(check, probe)


def _say_stalled(doing: str, reason: str) -> None:
    rank, host = os.environ.get("RANK", "0"), socket.gethostname()
    os.write(2, f"error: {doing}: rank {rank} on {host}: {reason}\n".encode())


def reach_rank_0(timeout_s: float) -> None:
    """Waits, on the other ranks, until rank 0 accepts connections; torch would print pages and not name the rank.

    Raises:
        RunError: it does not within `timeout_s`.
    """
    if os.environ.get("RANK", "0") == "0" or "MASTER_ADDR" not in os.environ:
        return
    address, port = os.environ["MASTER_ADDR"], os.environ.get("MASTER_PORT", "29500")
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            with socket.create_connection((address, port), timeout=max(0.1, deadline - time.monotonic())):
                return
        except OSError as error:
            if time.monotonic() > deadline - 0.2:
                raise RunError(
                    f"no answer from rank 0 at {address}:{port} within {timeout_s} s ({error.strerror or error}): is "
                    "it running, are MASTER_ADDR and MASTER_PORT right, does a firewall let them through?"
                ) from error
            time.sleep(0.2)


def show(findings: Sequence[Finding], is_fit: bool, seconds: float) -> None:
    """The report for people: ranks, all-reduce by size, a line per check, the verdict."""
    is_terminal = sys.stdout.isatty()
    width = None if is_terminal else 10_000  # a line stays a line
    console = Console(width=width, highlight=False, markup=False, force_terminal=is_terminal, legacy_windows=False)
    values = {finding.name: finding.values for finding in findings}
    for table in (_rank_table(values), _all_reduce_table(values.get("bandwidth", ()))):
        if table is not None:
            console.print(table)
    checks = _table("check", "", "finding")
    for finding in findings:
        checks.add_row(finding.name, Text(finding.verdict, STYLES[finding.verdict]), finding.message)
    console.print(checks)
    counts = Counter(finding.verdict for finding in findings)
    outcome = Text("fit to train", "bold green") if is_fit else Text("not fit to train", "bold red")
    numbers = f"{counts['pass']} passed, {count(counts['warn'], 'warning')}, {counts['fail']} failed"
    numbers += f", {counts['skip']} skipped" if counts["skip"] else ""
    if not is_fit and not counts["fail"]:
        numbers += "; --strict counts warnings"
    console.print(Text.assemble("verdict: ", outcome, f" ({numbers}; {seconds:.1f} s)"))


def _rank_table(values: dict[str, tuple[Any, ...]]) -> Table | None:
    shown = [column for column in COLUMNS if any((value or {}).get(column[2]) for value in values.get(column[1], ()))]
    if not shown:
        return None
    table = _table("rank", *(title for title, _, _ in shown))
    for rank in range(len(values["processes"])):
        cells = ((values[check][rank] or {}).get(key) for _, check, key in shown)
        table.add_row(str(rank), *("-" if cell is None else str(cell) for cell in cells))
    return table


def _all_reduce_table(values: Sequence[dict[str, Any] | None]) -> Table | None:
    if len(values) < 2 or values[0] is None:
        return None
    table = _table("all-reduce of", "takes", "per rank")
    for size, seconds, bandwidth in all_reduce_table(values[0]["seconds"], len(values)):
        table.add_row(f"{size >> 10:,} KB", f"{1e3 * seconds:.3f} ms", f"{bandwidth / 1e6:,.1f} MB/s")
    return table


def _table(*titles: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), title_justify="left")
    for title in titles:
        table.add_column(title, overflow="fold")
    return table


if __name__ == "__main__":
    run_command(main, OPTIONS)
