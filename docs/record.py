"""Draws what a command prints as a picture of a terminal: python docs/record.py docs/run.svg python train_ddp.py

In: a file name and a command. Out: an SVG; the command's own exit code.
"""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

WIDTH = 120  # columns


def main(path: Path, command: list[str]) -> int:
    """Runs `command` and records its lines."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)  # noqa: S603
    console = Console(record=True, width=WIDTH, file=io.StringIO())
    console.print(Text(f"$ {' '.join(command)}", style="bold green"))
    console.print(Text(done.stdout.rstrip()))
    console.save_svg(str(path), title=Path(command[-1]).name if len(command) < 3 else " ".join(command[:2]))
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
