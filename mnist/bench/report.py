"""The report of a benchmark: a table for people, JSON for programs.

In: rows of figures. Out: text or one JSON document on standard output.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from mnist.system.process import cpu_name, num_usable_cores

Row = dict[str, Any]


@dataclass(frozen=True)
class Report:
    """What was measured and how often; where, see `environment`; a dictionary a row (None = does not apply); notes."""

    title: str
    environment: dict[str, Any]
    rows: list[Row]
    notes: Sequence[str]


def environment(num_threads: int, device_name: str, mixed_precision: str = "no") -> dict[str, Any]:
    """What figures depend on: hardware, threads, precision, versions, and the load of the machine."""
    return {
        "device": device_name,
        "precision": "fp32" if mixed_precision == "no" else mixed_precision,
        "cpu": cpu_name(),
        "cores": num_usable_cores(),
        "threads": num_threads,
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("torch", "accelerate", "torchvision")},
    }


def print_report(report: Report, *, as_json: bool) -> None:
    """One JSON document on standard output; or a table between title and notes, plain where that is no terminal."""
    if as_json:
        sys.stdout.write(json.dumps(dataclasses.asdict(report), indent=2) + "\n")
        return
    console = Console(highlight=False) if sys.stdout.isatty() else Console(width=120, color_system=None)
    facts = ", ".join(f"{name} {value}" for name, value in report.environment.items())
    console.print(f"{report.title}\n{facts}", markup=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name, value in report.rows[0].items():
        table.add_column(name, justify="left" if isinstance(value, str) else "right", no_wrap=True)
    for row in report.rows:
        table.add_row(*(show(name, value) for name, value in row.items()))
    console.print(table)
    for note in report.notes:
        console.print(note, markup=False)


def show(column: str, value: Any) -> str:
    """A cell: with as many digits as are useful in its column."""
    if value is None or isinstance(value, str):
        return value or ""
    if column == "accuracy":
        return f"{value:.2%}"
    if column == "over bare":
        return f"{value:+.1%}"
    return f"{value:,.0f}" if abs(value) >= 100 or isinstance(value, int) else f"{value:.2f}"
