"""Draws what a command prints at a terminal: python docs/record.py docs/run.svg python train_ddp.py

In: a file name and a command. Out: an SVG with colours and with the progress bar as it was half-way, above the lines
that came later; the command's own exit code.
"""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

WIDTH = 100  # columns


def main(path: Path, command: list[str]) -> int:
    """Runs `command` at a terminal of its own and records its lines."""
    parent, child = pty.openpty()
    inherited = {name: value for name, value in os.environ.items() if name not in ("CI", "NO_COLOR")}
    terminal = {"TERM": "xterm-256color", "COLORTERM": "truecolor", "COLUMNS": str(WIDTH), "LINES": "60"}
    process = subprocess.Popen(command, stdout=child, stderr=child, env=inherited | terminal)  # noqa: S603
    os.close(child)
    output = b""
    while chunk := _read(parent):
        output += chunk
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Text(f"$ {' '.join(command)}", style="bold green"))
    for line in on_screen(output.decode()):
        console.print(Text.from_ansi(line))
    console.save_svg(str(path), title=command[-1])
    return process.wait()


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 100_000)
    except OSError:  # Linux, when the command has ended
        return b""


def on_screen(output: str) -> list[str]:
    """The lines that stay, and one bar: a terminal that knows line feeds, "erase this line" and "one line up"."""
    lines, row, bars = [""], 0, []
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", output):
        if part == "\n":
            row += 1
            lines += [""] * (row - len(lines) + 1)
        elif part == "\x1b[2K":
            if lines[row].startswith("epoch") and "img/s" in lines[row]:
                bars.append((row, lines[row]))
            lines[row] = ""
        elif part == "\x1b[1A":
            row -= 1
        elif part.endswith("m") or not part.startswith(("\x1b", "\r")):
            lines[row] += part
    if bars:
        place, bar = bars[len(bars) // 2]
        lines.insert(place, bar)
    return lines[: max((number for number, line in enumerate(lines, start=1) if line), default=0)]


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
