"""What is logged where: metrics.jsonl always, W&B through Accelerate's trackers where it can be had.

In: records (flat dictionaries with "step", "epoch", "split"). Out: one line or point each, none lost and none doubled
after a resume. Tracking never stops or delays a run for long: whatever W&B does, it costs a warning. All of it happens
on rank 0; elsewhere `Tracker` is the null object.
"""

from __future__ import annotations

import importlib.util
import json
import math
import netrc
import os
import secrets
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from accelerate import Accelerator

from mnist.config import OutputConfig, RunError

PROJECT = "mnist-ddp"
INIT_TIMEOUT_S = 5  # W&B waits 10 s on top of it, and 90 s by default
FINISH_TIMEOUT_S = 30  # for ever by default
PROBE_TIMEOUT_S = 2
_KEY_HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")

_EXIT_CODES = {"finished": 0, "preempted": 75}

Warn = Callable[[str], None]


def wandb_mode(config: OutputConfig) -> str:
    """online, offline or disabled: what --wandb, or else $WANDB_MODE asks for; auto = online if a key is configured."""
    wanted = config.wandb if config.wandb != "auto" else os.environ.get("WANDB_MODE", "auto")
    if wanted == "disabled" or importlib.util.find_spec("wandb") is None:
        return "disabled"
    if wanted == "offline":
        return "offline"
    return "online" if _has_key() else "offline"


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        hosts = [*_KEY_HOSTS, urlsplit(os.environ.get("WANDB_BASE_URL", "")).hostname or ""]
        entries = netrc.netrc(os.environ.get("NETRC")).hosts
    except (OSError, ValueError, netrc.NetrcParseError):
        return False
    return any(host in entries for host in hosts)


def trackers(config: OutputConfig) -> list[str]:
    """The names under which Accelerate knows the trackers of this run."""
    return [] if wandb_mode(config) == "disabled" else ["wandb"]


class Tracker:
    """Receives records. On ranks other than 0 every method does nothing."""

    def __init__(self, accelerator: Accelerator, run_dir: Path | None, dataset: str, warn: Warn) -> None:
        self._accelerator = accelerator
        self._dataset = dataset
        self._warn = warn
        self._jsonl = JsonlFile(run_dir / "metrics.jsonl") if run_dir is not None else None
        self._wandb: Any = None

    def start_wandb(
        self, mode: str, config: OutputConfig, run_dir: Path, run_config: dict[str, Any], tags: list[str]
    ) -> None:
        """Starts, or continues, the one W&B run of this job; rank 0 only. Without an answer the run goes on offline."""
        if self._jsonl is None or mode == "disabled":
            return
        if config.wandb == "online" and mode != "online":
            self._warn("--wandb online: no key is configured (wandb login, or $WANDB_API_KEY): tracking offline")
        if mode == "online" and not server_answers():
            self._warn(f"W&B does not answer within {PROBE_TIMEOUT_S} s: this run is tracked offline")
            mode = "offline"
        for attempt in dict.fromkeys((mode, "offline")):
            try:
                self._init_wandb(attempt, config, run_dir, run_config, tags)
            except Exception as error:  # whatever it is, training goes on
                self._warn(f"W&B did not start {attempt} ({_first_line(error)})")
            else:
                return

    def _init_wandb(
        self, mode: str, config: OutputConfig, run_dir: Path, run_config: dict[str, Any], tags: list[str]
    ) -> None:
        arguments = _init_arguments(config, run_dir, run_config, tags)
        self._accelerator.init_trackers(
            config.wandb_project or os.environ.get("WANDB_PROJECT", PROJECT),
            config=run_config,
            init_kwargs={"wandb": {**arguments, "mode": mode}},
        )
        self._wandb = self._accelerator.get_tracker("wandb", unwrap=True)
        self._wandb.define_metric("trainer/step")
        self._wandb.define_metric("*", step_metric="trainer/step")
        for split in ("train", "val", "test"):
            self._wandb.define_metric(f"{split}/accuracy", step_metric="trainer/step", summary="max,last")
            self._wandb.define_metric(f"{split}/loss", step_metric="trainer/step", summary="min,last")

    def log(self, split: str, step: int, epoch: float, **values: float) -> None:
        """Records values of one split at one step, once: a step that was recorded before a crash is passed over."""
        if self._jsonl is None:
            return
        record = {"step": step, "epoch": round(epoch, 4), "split": split, "dataset": self._dataset, **values}
        if self._jsonl.append(record) and self._wandb is not None:
            points = {_wandb_key(split, name): value for name, value in values.items()}
            self._guarded(lambda: self._accelerator.log({**points, "epoch": record["epoch"], "trainer/step": step}))

    def finish(self, status: str, summary: dict[str, Any]) -> str | None:
        """Closes W&B with the final numbers; returns the command that uploads an offline run, if there is one."""
        if self._wandb is None:
            return None
        run = self._wandb

        def close() -> None:
            run.summary.update(summary)
            if status == "preempted":
                run.mark_preempting()
            run.finish(exit_code=_EXIT_CODES.get(status, 1))  # not 0 when preempted: 0 is not requeued

        folder = Path(run.dir).parent
        self._guarded(close)
        return f"wandb sync {folder}" if folder.name.startswith("offline") else None

    def _guarded(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # telemetry never ends a run
            self._warn(f"W&B failed and is left alone from here on ({_first_line(error)})")
            self._wandb = None


def _wandb_key(split: str, name: str) -> str:
    return f"perf/{name}" if name.startswith(("images_per_s", "memory", "epoch_time")) else f"{split}/{name}"


def _init_arguments(config: OutputConfig, run_dir: Path, run_config: dict[str, Any], tags: list[str]) -> dict[str, Any]:
    """Arguments of `wandb.init`. What the user left open stays open where the environment has a word in it."""
    wandb = importlib.import_module("wandb")  # half a second, which only a rank 0 that uses it pays
    defaults = {
        "name": (config.wandb_name, "WANDB_NAME", run_dir.name),
        "group": (config.wandb_group, "WANDB_RUN_GROUP", f"{run_config['recipe']}-{run_config['dataset']}"),
        "notes": (config.wandb_notes, "WANDB_NOTES", None),
        "job_type": (None, "WANDB_JOB_TYPE", "train"),
    }
    chosen = {key: own or default for key, (own, env, default) in defaults.items() if own or env not in os.environ}
    return {
        **chosen,
        "tags": [*tags, *config.wandb_tags],
        "id": _run_id(run_dir),
        "resume": "allow",
        "dir": str(run_dir),
        "settings": wandb.Settings(
            init_timeout=INIT_TIMEOUT_S, finish_timeout=FINISH_TIMEOUT_S, console="off", silent=True
        ),
    }


def _run_id(run_dir: Path) -> str:
    """The W&B id of this run directory, so that a resumed job continues the same W&B run."""
    path = run_dir / "wandb_id"
    if not path.exists():
        path.write_text(os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4))
    return path.read_text().strip()


def server_answers() -> bool:
    """Whether W&B's server takes a TCP connection at all; its own client would wait much longer for the same answer."""
    url = urlsplit(importlib.import_module("wandb").Settings().base_url)
    try:
        socket.create_connection((url.hostname or "", url.port or 443), timeout=PROBE_TIMEOUT_S).close()
    except OSError:
        return False
    return True


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


class JsonlFile:
    """Append-only metrics.jsonl; knows what it already holds."""

    def __init__(self, path: Path) -> None:
        self._last_step: dict[str, int] = {}
        complete = 0
        if path.exists():
            content = path.read_bytes()
            complete = content.rfind(b"\n") + 1  # a process killed while writing leaves a torn last line
            for line in content[:complete].splitlines():
                record = json.loads(line)
                self._last_step[record["split"]] = record["step"]
            if complete < len(content):
                os.truncate(path, complete)
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def append(self, record: dict[str, Any]) -> bool:
        """Writes one line unless the file holds this step of this split, or a later one; says whether it did."""
        if record["step"] <= self._last_step.get(record["split"], -1):
            return False
        self._last_step[record["split"]] = record["step"]
        valid = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        try:
            self._file.write(json.dumps(valid) + "\n")  # JSON has no inf, which an fp16 gradient norm can be
        except OSError as error:
            raise RunError(f"{self._file.name}: not written ({error.strerror}); free some space there") from error
        return True
