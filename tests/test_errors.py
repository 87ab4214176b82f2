from __future__ import annotations

import pytest

from mnist.errors import MachineError, RankError, RunError, UserError, print_error

RANKS = {"WORLD_SIZE": "4", "MASTER_ADDR": "node0"}


@pytest.mark.parametrize(
    ("error", "printed_by"),
    [
        (UserError("all ranks know"), ["0"]),
        (RunError("all ranks know"), ["0"]),
        (MachineError("one machine knows"), ["0", "2"]),
        (RankError("one rank knows"), ["0", "1", "2", "3"]),
    ],
)
def test_an_error_is_printed_once_by_those_who_alone_know_of_it(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: UserError | RunError,
    printed_by: list[str],
) -> None:
    """Four ranks on two machines."""
    for name, value in RANKS.items():
        monkeypatch.setenv(name, value)
    found = []
    for rank, local_rank in (("0", "0"), ("1", "1"), ("2", "0"), ("3", "1")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        assert print_error(error) == (2 if isinstance(error, UserError) else 1)
        found += [rank] if capsys.readouterr().err == f"error: {error}\n" else []
    assert found == printed_by


def test_an_error_of_several_lines_is_printed_as_one(capsys: pytest.CaptureFixture[str]) -> None:
    print_error(RunError("disk full:\n  no room\n"))
    assert capsys.readouterr().err == "error: disk full: no room\n"
