"""The configuration of an earlier run, which --resume names: read before torch is imported.

In: `last`, a run directory, or the path of a checkpoint. Out: the configuration to start from.
"""

from __future__ import annotations

from pathlib import Path

from mnist.config import RUNS, TrainConfig, evolve, from_flat
from mnist.errors import MachineError, UserError
from mnist.runs.records import MANIFEST, runs_with
from mnist.system.files import RecordError, read_json


def resumed_config(resume: str, run_dir: str | None) -> TrainConfig:
    """The configuration of the run that `resume` names, which flags may change.

    Args:
        resume: `last` or a run directory: the same run continues, in its directory; or a checkpoint: a new run begins.
        run_dir: what --run-dir says, or None.

    Raises:
        MachineError: there is nothing of the kind; or `run_dir` names another directory than the run's own.
    """
    path = _newest_run() if resume == "last" else Path(resume)
    is_checkpoint = (path / MANIFEST).is_file()
    try:
        content = read_json(path / (MANIFEST if is_checkpoint else "config.json"))
        flat = content.get("config") if is_checkpoint else content
        config = evolve(from_flat(flat), resume=str(path), run_dir=run_dir, inject=())
    except (RecordError, UserError) as error:
        raise MachineError(f"--resume {resume}: its configuration cannot be used ({error})") from error
    if not content:
        raise MachineError(
            f"--resume {resume}: no run there; give auto, never, last, a run directory or one of its "
            "checkpoints/step-... directories"
        )
    if is_checkpoint:
        return config
    if run_dir is not None and Path(run_dir).resolve() != path.resolve():
        raise MachineError(
            f"--run-dir {run_dir}: --resume {resume} continues the run in {path}; leave one of the two out"
        )
    return evolve(config, resume="auto", run_dir=str(path))


def _newest_run() -> Path:
    runs = runs_with("config.json")
    if not runs:
        raise MachineError(f"--resume last: no run below {RUNS}/")
    return runs[0]
