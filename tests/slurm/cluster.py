"""A real SLURM of two nodes on this machine, for as long as a test needs it.

    apt-get install --no-install-recommends slurm-wlm munge

Needs root. Keys, sockets, logs and state live in a folder of its own, ports are free ones, and every daemon is a child
that is ended with the test: nothing of the machine's own SLURM, if it has one, is touched.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.ranks import free_port

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch")
TEMPLATE = Path(__file__).with_name("slurm.conf")
START_TIMEOUT_S = 60.0


def why_not() -> str | None:
    """Why there can be no cluster here, or None."""
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (apt-get install slurm-wlm munge)"
    return None if os.geteuid() == 0 else "SLURM's daemons need root"


@contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """Two idle nodes; yields the environment in which sbatch and its like find them."""
    configure(folder)
    environment = {"SLURM_CONF": str(folder / "slurm.conf")}
    daemons: list[subprocess.Popen[bytes]] = []

    def start(*command: str) -> None:
        with (folder / "daemons.log").open("ab") as log:
            options: dict[str, Any] = {"stdout": log, "stderr": log, "cwd": folder, "preexec_fn": die_with_parent}
            daemons.append(subprocess.Popen(command, env={**os.environ, **environment}, **options))

    try:
        munge = [f"--{name}-file={folder / name}" for name in ("key", "pid", "log", "seed")]
        start("munged", "--foreground", "--force", f"--socket={folder / 'munge.socket'}", *munge)
        wait_for((folder / "munge.socket").exists, daemons)
        start("slurmctld", "-D", "-c")
        for node in ("n1", "n2"):
            start("slurmd", "-D", "-N", node)
        wait_for(lambda: ask(environment, "sinfo", "--noheader", "--format=%T").split() == ["idle"], daemons)
    except AssertionError as error:
        stop(daemons)
        raise AssertionError(f"{error}\n{(folder / 'daemons.log').read_text()}") from error
    try:
        yield environment
        cancel_everything(environment)
    finally:
        stop(daemons)


def stop(daemons: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ends the daemons, the last one first."""
    for process in reversed(daemons):
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def die_with_parent() -> None:
    """A test run that is killed leaves no daemon behind."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def configure(folder: Path) -> None:
    """Configuration, key and folders. Two pretended GPUs a node let `--gpus-per-node` scripts run unchanged."""
    for name in ("state", "spool-n1", "spool-n2"):
        (folder / name).mkdir()
    for name in ("gpu0", "gpu1"):
        (folder / name).touch()
    key = folder / "key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o600)
    host = socket.gethostname().split(".")[0]
    ports = {name: free_port() for name in ("port", "port_n1", "port_n2")}
    (folder / "slurm.conf").write_text(TEMPLATE.read_text().format(folder=folder, host=host, **ports))
    (folder / "gres.conf").write_text(f"NodeName=n[1-2] Name=gpu File={folder}/gpu[0-1]\n")


def ask(environment: dict[str, str], *command: str) -> str:
    """What a SLURM command prints, or "" while its controller does not answer."""
    found = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=30, check=False
    )
    return found.stdout.strip()


def wait_for(
    condition: Callable[[], bool],
    daemons: Sequence[subprocess.Popen[bytes]] = (),
    timeout_s: float = START_TIMEOUT_S,
) -> None:
    """Waits until `condition()` holds; a daemon that ends first is an error."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        for process in daemons:
            assert process.poll() is None, f"{process.args} has ended"
        assert time.monotonic() < deadline, "never happened"
        time.sleep(0.1)


def cancel_everything(environment: dict[str, str]) -> None:
    """Ends all jobs, so that no step outlives its daemon."""
    ask(environment, "scancel", "--user=root")
    wait_for(lambda: ask(environment, "squeue", "--noheader") == "", timeout_s=30)
