from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from mnist.errors import MachineError, RunError, UserError, print_error
from mnist.runs import console
from mnist.runs.console import Console

ROOT = Path(__file__).parents[2]


def speak(voice: Console) -> None:
    voice.banner([("recipe", "fast [1]")])
    voice.warn("careful")
    voice.warn("careful")
    voice.start_progress(100, 0)
    voice.progress(50, 0.5, 0.25, 1234.5)
    voice.epoch_row(1.0, 100, (0.5, 0.25), "test", (0.1, 0.99, "99/100"))
    voice.summary([("test", "accuracy 99.00%")])


@pytest.mark.parametrize("path", ["runs/a[b]", r"runs/a\[/b]", r"runs/a\[b]c"])
def test_a_path_is_printed_as_it_is(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    Console().say(path)
    Console().banner([("run", path)])
    assert capsys.readouterr().err == f"{path}\n         run  {path}\n"


def test_without_a_terminal_there_are_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    speak(Console())
    text = capsys.readouterr().err
    assert "\x1b" not in text
    assert "\r" not in text
    assert "fast [1]" in text
    assert text.count("careful") == 1
    assert (
        "epoch 1  step 100/100  |  train loss 0.5000 accuracy 25.00%  |  test loss 0.1000 accuracy 99.00% (99/100)"
        in text
    )
    assert "step 50" not in text, "a line every ten seconds only"


def test_a_long_silence_is_broken_by_a_plain_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "PLAIN_EVERY_S", 0.0)
    speak(Console())
    assert "step 50/100  loss 0.5000  accuracy 25.00%  1,234 images/s" in capsys.readouterr().err


def test_quiet_keeps_warnings_and_the_closing_lines(capsys: pytest.CaptureFixture[str]) -> None:
    speak(Console(quiet=True))
    assert [line.split()[0] for line in capsys.readouterr().err.splitlines()] == ["warning", "test"]


def test_other_ranks_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    speak(Console(is_main=False))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("variable", "is_live"), [({}, True), ({"CI": "true"}, False), ({"TERM": "dumb"}, False)])
def test_on_a_terminal_the_bar_is_live_unless_nobody_can_see_it(variable: dict[str, str], is_live: bool) -> None:
    program = "from tests.runs.test_console import speak; from mnist.runs.console import Console; speak(Console())"
    environment = {name: value for name, value in os.environ.items() if name not in ("CI", "NO_COLOR")}
    parent, child = pty.openpty()
    subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**environment, "TERM": "xterm", **variable},
        stderr=child,
        check=True,
        timeout=60,
    )
    os.close(child)
    text = os.read(parent, 100_000).decode()
    os.close(parent)
    assert ("\x1b[" in text) is is_live
    assert "accuracy 99.00%" in text


@pytest.mark.parametrize(("error", "code"), [(UserError("--lr 0:\nbad"), 2), (RunError("disk full"), 1)])
def test_an_error_is_one_line_from_rank_0(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: UserError | RunError, code: int
) -> None:
    assert print_error(error) == code
    assert capsys.readouterr().err == f"error: {' '.join(str(error).split())}\n"
    monkeypatch.setenv("RANK", "1")
    assert print_error(error) == code
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("LOCAL_RANK", "0")
    print_error(error)
    assert capsys.readouterr().err == ""
    print_error(MachineError("8 processes but 4 GPUs on here"))  # which rank 0, elsewhere, may know nothing of
    assert capsys.readouterr().err == "error: 8 processes but 4 GPUs on here\n"
