"""metrics.jsonl: append-only, a record a line, none doubled after a resume.

In: records. Out: the file. Only rank 0 comes here.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from mnist.errors import RunError


class JsonlFile:
    """Append-only metrics.jsonl; knows what it already holds."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._last_step: dict[str, int] = {}
        complete = 0
        if path.exists():
            content = path.read_bytes()
            complete = content.rfind(b"\n") + 1  # a process killed while writing leaves a torn last line
            for number, line in enumerate(content[:complete].splitlines(), start=1):
                try:
                    record = json.loads(line)
                    self._last_step[record["split"]] = record["step"]
                except (ValueError, KeyError, TypeError) as error:
                    raise RunError(f"{path}: line {number} is no record; mend it, or start over elsewhere") from error
            if complete < len(content):
                os.truncate(path, complete)
        self._file = path.open("a", encoding="utf-8", buffering=1)

    @property
    def last_step(self) -> int:
        """The largest step of any record; -1 without one."""
        return max(self._last_step.values(), default=-1)

    def check(self) -> None:
        """Raises a RunError where the file is gone: what is written into it then goes nowhere."""
        if not self._path.exists():
            raise RunError(f"{self._path}: removed or moved while the run was writing it")

    def append(self, record: dict[str, Any]) -> bool:
        """Writes one line unless the file holds this step of this split, or a later one; says whether it did."""
        if record["step"] <= self._last_step.get(record["split"], -1):
            return False
        self._last_step[record["split"]] = record["step"]
        valid = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        try:
            self.check()
            self._file.write(json.dumps(valid) + "\n")  # JSON has no inf, which an fp16 gradient norm can be
        except OSError as error:
            raise RunError(f"{self._path}: not written ({error.strerror}); free some space there") from error
        return True
