"""The W&B run of a job: one for any number of ranks, the same one after a resume; its failures do not end training.

In: points, pictures, weights. Out: a W&B run, or an offline folder that `wandb sync` uploads. Only rank 0 comes here.

W&B sends from a process of its own, wandb-core, and in many places waits for it without limit. So that process is
started here, and killed when a call takes too long: whatever the call waited for, it fails at once.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import os
import secrets
import socket
import subprocess
import threading
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from accelerate import Accelerator

from mnist.config import PROJECT, OutputConfig
from mnist.system.files import write_atomically

PROBE_TIMEOUT_S = 2
START_TIMEOUT_S = 10
CALL_TIMEOUT_S = 5  # of a call between start and end; the last three (a table, two models) ask the server
UPLOAD_TIMEOUT_S = 11  # what W&B itself may spend on what is left at the end
FINISH_TIMEOUT_S = 13  # for the end; with the next it fits into `signals.GRACE_S`, a checkpoint before it
CLOSE_TIMEOUT_S = 2  # for W&B's process to end by itself
STEP = "trainer/step"  # the axis of every curve: W&B's own step would drop the points after a resume
NO_KEY = "no key is configured: wandb login, or $WANDB_API_KEY"
_EXIT_CODES = {"finished": 0, "preempted": 75}


def choose_mode(config: OutputConfig) -> tuple[str, str | None]:
    """online, offline or disabled, by --wandb, else by W&B's own settings; and the reason where online is not possible.

    Takes at most `PROBE_TIMEOUT_S` where the server does not answer; its own client would wait much longer.
    """
    if config.wandb == "disabled" or importlib.util.find_spec("wandb") is None:
        return "disabled", None
    reason = None
    try:
        settings = _settings()
        mode = settings.mode if config.wandb == "auto" else config.wandb
        if config.wandb == "auto" and os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true"):
            mode = "disabled"
        if mode not in ("disabled", "offline", "dryrun"):
            reason = _reason_not_online(settings.base_url)
    except Exception as error:  # a setting or a key that W&B does not accept
        mode, reason = "offline", str(error)
    return "offline" if mode == "dryrun" or reason is not None else mode, reason


def _reason_not_online(base_url: str) -> str | None:
    find_key = importlib.import_module("wandb.sdk.lib.wbauth").authenticate_session
    if not find_key(host=base_url, source="", prompt=False, update_session=False):
        return NO_KEY
    return None if _takes_connections(base_url) else f"{base_url} does not answer within {PROBE_TIMEOUT_S} s"


def _settings() -> Any:
    """W&B's settings: of its files (`wandb login --host`, `wandb offline`) and of the environment."""
    settings = importlib.import_module("wandb.sdk.wandb_setup").singleton().settings
    settings.silent = True  # our warnings say what went wrong
    importlib.import_module("wandb.apis.public")  # wandb.init would, 40 frames deeper, which makes pydantic slower
    importlib.import_module("wandb").termsetup(settings, None)
    return settings


def _takes_connections(base_url: str) -> bool:
    """Whether a server takes a TCP connection. A proxy may reach one that we cannot, so it decides."""
    url = urlsplit(base_url)
    address = (url.hostname or "", url.port or (80 if url.scheme == "http" else 443))
    if url.scheme in getproxies() and not proxy_bypass(address[0]):
        return True
    answered = threading.Event()

    def connect() -> None:
        with contextlib.suppress(OSError), socket.create_connection(address, timeout=PROBE_TIMEOUT_S):
            answered.set()

    threading.Thread(target=connect, daemon=True).start()  # in a thread: no time-out covers the look-up of a name
    return answered.wait(PROBE_TIMEOUT_S)


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
        Exception: whatever W&B raises when it cannot start; TimeoutError where that takes `START_TIMEOUT_S`.
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
        logging.raiseExceptions = False  # W&B's own log would print tracebacks over the console on a full disk,
        threading.excepthook = _print_unless_wandb  # and its threads do when its process is gone
        self._core: subprocess.Popen[bytes] | None = None
        self._messages: list[str] = []  # of W&B to its users
        self._is_uploaded = False
        try:
            project, arguments = _init_arguments(config, run_dir, run_config, tags)
            for name, folder in (("WANDB_DATA_DIR", "wandb"), ("WANDB_CACHE_DIR", "wandb/cache")):
                os.environ.setdefault(name, str(run_dir.resolve() / folder))  # below the home by default
            os.environ.pop("WANDB_SERVICE", None)  # somebody else's process
            os.environ["WANDB_ERROR_REPORTING"] = "false"  # W&B's telemetry goes out at the exit, in offline mode, too
            self._core = _start_core(run_dir / "wandb")
            listener = SimpleNamespace(info=len, warning=self._messages.append, error=self._messages.append)
            importlib.import_module("wandb").termsetup(_settings(), listener)
            with self._at_most(START_TIMEOUT_S):
                accelerator.init_trackers(
                    project, config=run_config, init_kwargs={"wandb": {**arguments, "mode": mode}}
                )
                self._run = accelerator.get_tracker("wandb", unwrap=True)
                self._define_metrics()
        except BaseException:
            accelerator.trackers.clear()
            self._close()
            raise
        self._folder = Path(self._run.dir).parent

    def _define_metrics(self) -> None:
        self._run.define_metric(STEP)
        self._run.define_metric("*", step_metric=STEP)
        for split in ("train", "val", "test"):
            self._run.define_metric(f"{split}/accuracy", step_metric=STEP, summary="max,last")
            self._run.define_metric(f"{split}/loss", step_metric=STEP, summary="min,last")

    @contextlib.contextmanager
    def _at_most(self, seconds: float) -> Iterator[None]:
        """Kills W&B's process when the calls within take longer: they fail then, and so does every later one."""
        is_late = threading.Event()

        def kill() -> None:
            is_late.set()
            if self._core is not None:
                self._core.kill()

        timer = threading.Timer(seconds, kill)
        timer.start()
        try:
            yield
        except Exception as error:
            raise (TimeoutError(f"not done within {seconds} s") if is_late.is_set() else error) from error
        finally:
            timer.cancel()

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Adds values at a step: numbers, PNG files (paths), tables (rows of texts and numbers, the header first)."""
        wandb = importlib.import_module("wandb")

        def convert(value: Any) -> Any:
            if isinstance(value, Path):
                return wandb.Image(str(value))
            return wandb.Table(columns=value[0], data=value[1:]) if isinstance(value, list) else value

        with self._at_most(CALL_TIMEOUT_S):
            self._run.log({**{name: convert(value) for name, value in values.items()}, STEP: step})

    def model(self, folder: Path, aliases: Sequence[str], metadata: dict[str, Any]) -> None:
        """Adds an exported model as a version of this run's artifact. (W&B keeps the alias `latest` for itself.)"""
        artifact = importlib.import_module("wandb").Artifact(f"model-{self._run.id}", type="model", metadata=metadata)
        for path in folder.iterdir():
            artifact.add_file(str(path.resolve()))  # `wandb sync` may be typed elsewhere
        with self._at_most(CALL_TIMEOUT_S):
            self._run.log_artifact(artifact, aliases=list(aliases))

    def finish(self, status: str, summary: dict[str, Any]) -> None:
        """Closes the run with its final numbers."""
        try:
            with self._at_most(FINISH_TIMEOUT_S):
                self._run.summary.update({**summary, "status": status})
                if status == "preempted":
                    self._run.mark_preempting()
                self._run.finish(exit_code=_EXIT_CODES.get(status, 1))
            for message in self._messages:
                if "Fatal error" in message:
                    raise ConnectionError(message.partition("WARNING ")[2])
            self._is_uploaded = not self._folder.name.startswith("offline")
        finally:
            self._close()

    def _close(self) -> None:
        """Waits until W&B's process has written everything and ended, or kills it."""
        with contextlib.suppress(Exception, SystemExit), self._at_most(CLOSE_TIMEOUT_S):
            importlib.import_module("wandb").teardown()
        if self._core is not None:
            self._core.kill()
            self._core.wait()

    def hints(self) -> list[tuple[str, str]]:
        """Where to look at the run, and how to upload what is not uploaded."""
        if self._is_uploaded:
            return [("watch", str(self._run.url))]
        parts = len(list(self._folder.parent.glob("offline-run-*")))  # a run that was resumed has several
        upload = self._folder.parent / "offline-run-*" if parts > 1 else self._folder
        return [("watch", f"wandb leet {self._folder}"), ("upload", f"wandb sync {upload}")]


_excepthook = threading.excepthook


def _print_unless_wandb(event: threading.ExceptHookArgs) -> None:
    frames = [frame for frame, _ in traceback.walk_tb(event.exc_traceback)]
    if not any(str(frame.f_globals.get("__name__")).startswith("wandb.") for frame in frames):
        _excepthook(event)


def _start_core(folder: Path) -> subprocess.Popen[bytes]:
    """Starts W&B's process; what it prints goes into core.log in `folder`, and not into the console."""
    setup = importlib.import_module("wandb.sdk.wandb_setup").singleton()
    folder.mkdir(exist_ok=True)
    console = os.dup(2)
    try:
        with (folder / "core.log").open("ab") as output:
            os.dup2(output.fileno(), 2)
        process: subprocess.Popen[bytes] = setup.ensure_service()._proc._process
    finally:
        os.dup2(console, 2)
        os.close(console)
    return process


def _init_arguments(
    config: OutputConfig, run_dir: Path, run_config: dict[str, Any], tags: list[str]
) -> tuple[str, dict[str, Any]]:
    """Project and arguments for `wandb.init`: what a flag says, else what W&B's settings say, else our defaults."""
    settings = _settings()
    limits = {"init_timeout": START_TIMEOUT_S, "finish_timeout": UPLOAD_TIMEOUT_S, "finish_timeout_raises": True}
    flushing = {"x_transaction_log_flush_interval": 1.0}  # seconds: what a kill may lose; 15 by default
    return config.wandb_project or settings.project or PROJECT, {
        "name": config.wandb_name or settings.run_name or run_dir.name,
        "group": config.wandb_group or settings.run_group or f"{run_config['recipe']}-{run_config['dataset']}",
        "notes": config.wandb_notes or settings.run_notes,
        "job_type": settings.run_job_type or "train",
        "tags": [*tags, *config.wandb_tags, *(settings.run_tags or ())],
        "id": _run_id(run_dir, settings.run_id),
        "resume": "allow",
        "dir": settings.root_dir if "root_dir" in settings.model_fields_set else str(run_dir),
        "settings": importlib.import_module("wandb").Settings(**limits, **flushing, console="off", silent=True),
    }


def _run_id(run_dir: Path, wanted: str | None = None) -> str:
    """The W&B id of this run directory, so that a resumed job continues the same W&B run."""
    path = run_dir / "wandb_id"
    if not path.exists() or not path.read_text().strip():
        write_atomically(path, (wanted or secrets.token_hex(4)).encode())
    return path.read_text().strip()
