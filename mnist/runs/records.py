"""Reads the records that the project has written itself, and checks them against the types of their fields.

In: a JSON file, and a dataclass. Out: an object of that class, or one line that names file and field. No torch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypedDict, TypeVar, Union, get_args, get_origin, get_type_hints, is_typeddict

from mnist.config import TrainConfig, from_flat
from mnist.errors import UserError
from mnist.system.files import RecordError, read_json

WEIGHTS_CHECKSUM = "weights_sha256"  # in the config.json of an exported model, beside the configuration
MANIFEST = "manifest.json"  # what makes a folder a checkpoint

Status = Literal["running", "finished", "preempted", "failed", "diverged"]
_WORDS = {bool: "true or false", int: "a whole number", str: "text"}

T = TypeVar("T")


class ScoreRecord(TypedDict):
    """What `Scores.as_dict` has written."""

    loss: float
    accuracy: float
    num_correct: int
    num_samples: int


class BestRecord(ScoreRecord):
    """The best evaluation, and the step that it was of."""

    step: int


@dataclass(frozen=True)
class ResultRecord:
    """What is read back from result.json: the first eleven from the start of a run on, the others at its end."""

    status: Status
    recipe: str
    dataset: str
    seed: int
    num_params: int
    world_size: int
    precision: str
    job: str
    host: str
    pid: int
    origin: str | None
    epochs: float = 0.0
    steps: int = 0
    planned_steps: int = 0
    stop_reason: str | None = None
    test: ScoreRecord | None = None
    val: ScoreRecord | None = None
    best: BestRecord | None = None
    test_confusion: list[list[int]] | None = None
    train_time_s: float = 0.0
    total_time_s: float = 0.0

    def __post_init__(self) -> None:
        rows = self.test_confusion or []
        if any(len(row) != len(rows) or min(row) < 0 for row in rows):
            raise ValueError("test_confusion must be a square of counts")
        if self.status == "finished" and self.test is None:
            raise ValueError("test must be an object in a finished run")


def read_result(run_dir: Path) -> ResultRecord | None:
    """result.json of a run; None where there is none.

    Raises:
        RecordError: it is not what a run writes; names file and field.
    """
    path = run_dir / "result.json"
    content = read_json(path)
    return check_record(path, content, ResultRecord, complete=content.get("status") != "running") if content else None


def read_config(path: Path) -> TrainConfig:
    """A config.json, of a run or of an exported model.

    Raises:
        RecordError: missing, or not a configuration; names file and field.
    """
    content = read_json(path)
    if not content:
        raise RecordError(f"{path}: missing or empty")
    content.pop(WEIGHTS_CHECKSUM, None)
    try:
        return from_flat(content)
    except (UserError, TypeError, RecursionError) as error:
        raise RecordError(f"{path}: {error}"[:300]) from error


def check_record(path: Path, content: Any, kind: type[T], *, complete: bool) -> T:
    """`content` as a `kind`, a dataclass or TypedDict; all fields, also nested ones, must have the declared types.

    Args:
        path: named in the message.
        content: as JSON has it.
        kind: fields of bool, int, float, str, Any, Literal, list, dict[str, ...], `... | None`, or of other such types.
        complete: fields with a default must be there, too. Unknown names are ignored.

    Raises:
        RecordError: a field is missing or has another type; names file and field.
    """
    try:
        made: T = _convert(content, kind, "", complete)
    except ValueError as error:
        raise RecordError(f"{path}: {error}") from error
    return made


def _convert(value: Any, hint: Any, field: str, complete: bool) -> Any:
    origin, parts = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, UnionType):
        return None if value is None else _convert(value, parts[0], field, complete)
    if origin is list:
        _require(isinstance(value, list), field, "a list", value)
        return [_convert(item, parts[0], f"{field}[{index}]", complete) for index, item in enumerate(value)]
    if origin in (dict, Mapping):
        _require(isinstance(value, dict), field, "an object", value)
        return {name: _convert(item, parts[1], f"{field}.{name}".lstrip("."), complete) for name, item in value.items()}
    if dataclasses.is_dataclass(hint) or is_typeddict(hint):
        _require(isinstance(value, dict), field, "an object", value)
        return hint(**_convert_fields(value, hint, f"{field}.".lstrip("."), complete))
    _check_value(value, hint, field)
    return value


def _check_value(value: Any, hint: Any, field: str) -> None:
    if get_origin(hint) is Literal:
        words = get_args(hint)
        _require(isinstance(value, str) and value in words, field, f"one of {', '.join(words)}", value)
    elif hint is float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        _require(is_number, field, "a finite number", value)
    else:
        _require(type(value) is hint, field, _WORDS[hint], value)


def _convert_fields(content: Mapping[str, Any], kind: Any, prefix: str, complete: bool) -> dict[str, Any]:
    hints = get_type_hints(kind)
    fields = () if complete or is_typeddict(kind) else dataclasses.fields(kind)
    optional = {f.name for f in fields if not f.default is f.default_factory is dataclasses.MISSING}
    for name in hints:
        if name not in content and name not in optional:
            raise ValueError(f"{prefix}{name} is missing")
    known = {name: hint for name, hint in hints.items() if name in content}
    return {name: _convert(content[name], hint, prefix + name, complete) for name, hint in known.items()}


def _require(condition: bool, field: str, expected: str, found: Any) -> None:
    if not condition:
        shown = type(found).__name__ if isinstance(found, dict | list) else repr(found)[:40]
        raise ValueError(f"{field or 'the content'} must be {expected}, not {shown}")
