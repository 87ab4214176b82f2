from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mnist.errors import MachineError, RunError, UserError, print_error
from mnist.runs.console import Console

ROOT = Path(__file__).parents[2]


def speak(console: Console) -> None:
    with console:
        with console.doing("importing torch"):
            time.sleep(0.3)
        console.banner([("recipe", "fast [1]")])
        console.warn("careful")
        console.warn("careful")
        steps = [0]
        console.start_progress(200, lambda: steps[0], 100.0)
        for epoch in (1, 2):
            steps[0] = 100 * epoch - 50
            time.sleep(0.3)
            console.progress(steps[0], 0.5, 0.25, 1234.5)
            steps[0] += 50
            with console.doing("evaluating"):
                time.sleep(0.3)
            console.epoch_row(epoch, steps[0], (0.5, 0.25), "test", (0.1, 1 - epoch / 100), lr=0.001, seconds=3.21)
        console.summary("99% right", [("test", "accuracy 99.00%")], ["python -m mnist.predict"])


SPEAK = "from tests.runs.test_console import speak; from mnist.runs.console import Console; speak(Console())"


def at_a_terminal(program: str = SPEAK, **environment: str) -> str:
    """What a program writes to a terminal of 80 columns, control characters included."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("CI", "NO_COLOR")}
    parent, child = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**inherited, "TERM": "xterm", "COLUMNS": "80", **environment},
        stdout=child,
        stderr=child,
    )
    os.close(child)
    text = b""
    try:
        while chunk := os.read(parent, 100_000):
            text += chunk
    except OSError:  # the other end is closed
        pass
    os.close(parent)
    assert process.wait(60) == 0
    return text.decode()


@pytest.mark.parametrize("path", ["runs/a[b]", r"runs/a\[/b]", r"runs/a\[b]c", "runs/a\\"])
def test_a_path_is_printed_as_it_is(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    Console().say(path)
    Console().banner([("run", path)])
    assert capsys.readouterr().out == f"{path}\n         run  {path}\n"


def test_records_go_to_standard_output_and_warnings_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    speak(Console())
    out, err = capsys.readouterr()
    assert err == "warning  careful\n"
    numbers = "train loss   0.5000  accuracy   25.00%  test loss   0.1000"
    assert out.splitlines() == [
        "      recipe  fast [1]",
        "step  50/200  train loss 0.5000  accuracy  25.00%      1,234 images/s",
        f"epoch      1  step     100  {numbers}  accuracy   99.00%  lr    0.001  train s     3.21  best",
        "step 150/200  train loss 0.5000  accuracy  25.00%      1,234 images/s",
        f"epoch      2  step     200  {numbers}  accuracy   98.00%  lr    0.001  train s     3.21",
        "        test  accuracy 99.00%",
        "        next  python -m mnist.predict",
    ]


def test_quiet_keeps_warnings_and_the_closing_lines(capsys: pytest.CaptureFixture[str]) -> None:
    speak(Console(quiet=True))
    out, err = capsys.readouterr()
    assert err == "warning  careful\n"
    assert [line.split()[0] for line in out.splitlines()] == ["test", "next"]


def test_other_ranks_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    speak(Console(is_main=False))
    assert capsys.readouterr() == ("", "")


def test_a_closed_pipe_does_not_end_the_run() -> None:
    program = (
        "import sys; from tests.runs.test_console import speak; from mnist.runs.console import Console\n"
        "console = Console(); [console.say('line') for _ in range(10_000)]; speak(console); sys.stderr.write('end\\n')"
    )
    command = f'"{sys.executable}" -c "$PROGRAM" | head -1; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env={**os.environ, "PROGRAM": program}, capture_output=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"line\n", b"warning  careful\nend\n")


def test_a_log_file_has_a_line_of_long_work_every_five_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now_s = 0.0
    monkeypatch.setattr("mnist.runs.console.time.monotonic", lambda: now_s)
    console = Console(is_main=True)
    for now_s in range(12):
        console.show_progress(f"decoding pictures  {now_s} of 12")
    assert capsys.readouterr().err == "decoding pictures  5 of 12\ndecoding pictures  10 of 12\n"


@pytest.mark.parametrize("variable", [{"CI": "true"}, {"TERM": "dumb"}])
def test_a_terminal_that_nobody_watches_gets_plain_lines(variable: dict[str, str]) -> None:
    text = at_a_terminal(**variable)
    assert "\x1b" not in text
    assert "step  50/200" in text
    assert "accuracy 99.00%" in text


def test_a_terminal_gets_a_bar_that_names_epoch_and_activity() -> None:
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", at_a_terminal())
    for shown in ("importing torch", "epoch 1/2", "50/200", "evaluating", "epoch 2/2", "150/200"):
        assert shown in text, shown


def test_the_bar_moves_between_records() -> None:
    program = (
        "import time; from mnist.runs.console import Console; console, step = Console(), [0]\n"
        "console.start_progress(1000, lambda: step[0], 1000)\n"
        "for step[0] in range(300): time.sleep(0.01)\n"
        "console.stop_progress()"
    )
    text = at_a_terminal(program)
    assert len(set(re.findall(r"(\d+)/1000", text))) >= 5


def test_the_table_fits_80_columns_and_marks_the_best_epoch() -> None:
    lines = at_a_terminal().split("\n")
    plain = [re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", line).strip("\r").rpartition("\r")[2] for line in lines]
    header, first, second = (next(line for line in plain if line.split()[:1] == [word]) for word in ("epoch", "1", "2"))
    assert header.split() == [
        "epoch",
        "step",
        "train",
        "loss",
        "accuracy",
        "test",
        "loss",
        "accuracy",
        "lr",
        "train",
        "s",
    ]
    assert first.split() == ["1", "100", "0.5000", "25.00%", "0.1000", "99.00%", "0.001", "3.21", "best"]
    assert second.split() == ["2", "200", "0.5000", "25.00%", "0.1000", "98.00%", "0.001", "3.21"]
    assert max(map(len, (header, first, second))) <= 80


@pytest.mark.parametrize(("columns", "width"), [(80, 80), (200, 100)])
def test_the_closing_lines_stand_between_two_rules_and_commands_begin_at_the_left(columns: int, width: int) -> None:
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", at_a_terminal(COLUMNS=str(columns)))
    lines = [line.rpartition("\r")[2] for line in text.replace("\r\n", "\n").rstrip("\n").split("\n")]
    assert lines[-5:] == [
        "99% right " + "\u2501" * (width - len("99% right ")),
        "        test  accuracy 99.00%",
        "        next",
        "  python -m mnist.predict",
        "\u2501" * width,
    ]
    assert max(map(len, lines)) <= width


def test_what_must_be_read_has_the_terminals_own_colour() -> None:
    """On a white page green, yellow and cyan are pale, on a black one blue is dark."""
    text = at_a_terminal()
    coloured = re.findall(r"\x1b\[(?:[0-9]+;)*(?:3[0-7]|38;[0-9;]+|9[0-7])m([^\x1b]*)", text)
    assert {part.strip() for part in coloured if not re.fullmatch(r"[\u2500-\u257f\s]*", part)} == {"warning"}


@pytest.mark.parametrize(("error", "code"), [(UserError("--lr 0:\nbad"), 2), (RunError("disk full"), 1)])
def test_an_error_is_one_line_from_rank_0(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: UserError | RunError, code: int
) -> None:
    assert print_error(error) == code
    assert capsys.readouterr().err == f"error: {' '.join(str(error).split())}\n"
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    assert print_error(error) == code
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("LOCAL_RANK", "0")
    print_error(error)
    assert capsys.readouterr().err == ""
    print_error(MachineError("8 processes but 4 GPUs on here"))  # which rank 0, elsewhere, may know nothing of
    assert capsys.readouterr().err == "error: 8 processes but 4 GPUs on here\n"


def test_the_recorded_picture_of_a_run_shows_colours_and_the_bar(tmp_path: Path) -> None:
    command = [sys.executable, "docs/record.py", str(tmp_path / "run.svg"), sys.executable, "-c", SPEAK]
    subprocess.run(command, cwd=ROOT, check=True, timeout=60)
    svg = (tmp_path / "run.svg").read_text().replace("&#160;", " ")
    assert svg.count("━") > 10
    assert "accuracy 99.00%" in svg
    assert "importing torch" not in svg
    assert len(set(re.findall(r"fill: (#\w{6})", svg))) >= 4
