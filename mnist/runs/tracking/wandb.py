"""The W&B run of a job: one for any number of ranks, the same one after a resume, never in the way of training.

In: points, pictures, weights. Out: a W&B run, or an offline folder that `wandb sync` uploads. Only rank 0 comes here.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import netrc
import os
import secrets
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from accelerate import Accelerator

from mnist.config import PROJECT, OutputConfig
from mnist.runs.tracking.sink import Counts
from mnist.system.files import write_atomically

INIT_TIMEOUT_S = 5  # W&B waits 10 s on top of it, and 90 s by default


FINISH_TIMEOUT_S = 15  # for ever by default; a run that a signal ends has `signals.GRACE_S` for this and all else


PROBE_TIMEOUT_S = 2


STEP = "trainer/step"  # the axis of every curve: W&B's own step would drop the points after a resume


_KEY_HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")


_OFFLINE_NAMES = ("offline", "dryrun")


_EXIT_CODES = {"finished": 0, "preempted": 75}  # not 0 when preempted: 0 is not requeued


def wandb_mode(config: OutputConfig) -> str:
    """online, offline or disabled: what --wandb, or else $WANDB_MODE asks for; auto = online if a key is configured."""
    wanted = config.wandb if config.wandb != "auto" else os.environ.get("WANDB_MODE", "auto")
    if wanted == "disabled" or importlib.util.find_spec("wandb") is None:
        return "disabled"
    if wanted in _OFFLINE_NAMES:
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


def server_answers() -> bool:
    """Whether W&B's server takes a TCP connection at all; its own client would wait much longer for the same answer."""
    url = urlsplit(importlib.import_module("wandb").Settings().base_url)
    if url.scheme in getproxies():
        return True  # the proxy's affair
    port = url.port or (80 if url.scheme == "http" else 443)
    try:
        socket.create_connection((url.hostname or "", port), timeout=PROBE_TIMEOUT_S).close()
    except OSError:
        return False
    return True


class WandbRun:
    """A started W&B run.

    Args:
        accelerator: built with `log_with=["wandb"]`; it holds the tracker.
        mode: online or offline.
        config: the output section.
        run_dir: keeps the run's files and its id.
        run_config: shown as the run's configuration.
        tags: besides those of the user.

    Raises:
        Exception: whatever W&B raises when it cannot start.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        *,
        mode: str,
        config: OutputConfig,
        run_dir: Path,
        run_config: dict[str, Any],
        tags: list[str],
    ) -> None:
        logging.raiseExceptions = False  # W&B's own log would print tracebacks over the console on a full disk
        accelerator.trackers.clear()  # an attempt before this one may have left half a tracker
        arguments = _init_arguments(config, run_dir, run_config, tags)
        project = config.wandb_project or os.environ.get("WANDB_PROJECT", PROJECT)
        accelerator.init_trackers(project, config=run_config, init_kwargs={"wandb": {**arguments, "mode": mode}})
        self._run = accelerator.get_tracker("wandb", unwrap=True)
        self._folder = Path(self._run.dir).parent
        self._run.define_metric(STEP)
        self._run.define_metric("*", step_metric=STEP)
        for split in ("train", "val", "test"):
            self._run.define_metric(f"{split}/accuracy", step_metric=STEP, summary="max,last")
            self._run.define_metric(f"{split}/loss", step_metric=STEP, summary="min,last")

    def log(self, step: int, points: dict[str, float]) -> None:
        """Adds points at a step."""
        self._run.log({**points, STEP: step})

    def pictures(self, step: int, paths: dict[str, Path]) -> None:
        """Adds PNG files as images."""
        wandb = importlib.import_module("wandb")
        self._run.log({**{f"pictures/{name}": wandb.Image(str(p)) for name, p in paths.items()}, STEP: step})

    def confusion(self, step: int, counts: Counts, class_names: Sequence[str]) -> None:
        """Adds the confusion matrix as a table of counts, a row per true class."""
        wandb = importlib.import_module("wandb")
        rows = [[name, *row] for name, row in zip(class_names, counts, strict=True)]
        self._run.log({"test/confusion": wandb.Table(columns=["true", *class_names], data=rows), STEP: step})

    def model(self, folder: Path, aliases: Sequence[str], metadata: dict[str, Any]) -> None:
        """Adds an exported model as a version of this run's artifact. (W&B keeps the alias `latest` for itself.)"""
        wandb = importlib.import_module("wandb")
        artifact = wandb.Artifact(f"model-{self._run.id}", type="model", metadata=metadata)
        for path in folder.iterdir():
            artifact.add_file(str(path.resolve()))  # `wandb sync` may be typed elsewhere
        self._run.log_artifact(artifact, aliases=list(aliases))

    def finish(self, status: str, summary: dict[str, Any]) -> None:
        """Closes the run with its final numbers."""
        self._run.summary.update({**summary, "status": status})
        if status == "preempted":
            self._run.mark_preempting()
        self._run.finish(exit_code=_EXIT_CODES.get(status, 1))

    def hints(self) -> list[tuple[str, str]]:
        """What to type next: how an offline run is looked at, and how it is uploaded."""
        if not self._folder.name.startswith("offline"):
            return []
        parts = len(list(self._folder.parent.glob("offline-run-*")))  # a run that was resumed has several
        upload = self._folder if parts == 1 else self._folder.parent / "offline-run-*"
        return [("watch", f"wandb leet {self._folder}"), ("upload", f"wandb sync {upload}")]


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
        "tags": [*tags, *config.wandb_tags, *filter(None, os.environ.get("WANDB_TAGS", "").split(","))],
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
    if not path.exists() or not path.read_text().strip():
        write_atomically(path, (os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)).encode())
    return path.read_text().strip()
