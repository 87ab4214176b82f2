"""The doctor finds what is wrong: real failures on real processes; where none can be made, judges get made-up facts."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

from mnist.config import RuntimeConfig
from mnist.doctor import __main__ as doctor
from mnist.doctor import checks_compute, checks_machine, checks_network
from mnist.doctor.__main__ import Options
from mnist.doctor.checkup import Fact, Judgement, judge_equal
from mnist.doctor.interconnect import Links
from mnist.errors import UserError
from mnist.system.accelerator import open_accelerator
from tests.data.test_datasets import TRAIN_IMAGES, write_files
from tests.processes import PYTHON, ROOT, TORCHRUN, Finished, finish, started
from tests.ranks import free_port, run_ranks

GIB = 1 << 30
DOCTOR = ["-m", "mnist.doctor", "--cpu"]
ONE_THREAD = ["--num-threads", "1"]


def examine(folder: Path, **options: Any) -> int:
    """The doctor on this rank, with JSON on standard output."""
    defaults = {"cpu": True, "num_threads": 1, "json": True, "data_dir": str(folder), "run_dir": str(folder / "run")}
    return doctor.main(Options(**(defaults | options)))


def report(out: str) -> dict[str, tuple[str, str]]:
    """Verdict and message by check."""
    return {check["name"]: (check["verdict"], check["message"]) for check in json.loads(out)["checks"]}


def only(*names: str) -> None:
    """Leaves out all other checks on this rank."""
    doctor.CHECKS = tuple(check for check in doctor.CHECKS if check.name in names)


# --- whole examinations on forked ranks ------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_healthy_machine_is_fit_and_nothing_is_left_behind(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], world_size: int
) -> None:
    write_files(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert run_ranks(examine, world_size, tmp_path) == [0] * world_size
    document = json.loads(capfd.readouterr().out)
    assert document["verdict"] == "fit"
    assert [check["name"] for check in document["checks"]] == [check.name for check in doctor.CHECKS]
    assert not [check for check in document["checks"] if check["verdict"] == "fail"]
    values = {check["name"]: check["values"] for check in document["checks"]}
    assert all(len(ranks) == world_size for ranks in values.values())
    assert values["all-reduce"] == [{"float32": 0, "int64": 0, "float64": 0}] * world_size
    assert values["precision"][0]["works"] == ["no", "bf16"]
    assert len(values["bandwidth"][0]["seconds"]) == 8
    assert sorted(tmp_path.rglob("*")) == before


def test_warnings_count_when_asked_to(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def strictly() -> int:
        return examine(tmp_path, strict=True)

    assert run_ranks(strictly, 1) == [1]
    found = report(capfd.readouterr().out)
    assert found["data"][0] == "warn"
    assert "fall back to the embedded digits" in found["data"][1]
    assert "fail" not in {verdict for verdict, _ in found.values()}


def test_a_slow_and_a_faulty_rank_are_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def disturb(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        time.sleep(0.1)
        optimizer.param_groups[0]["params"][0].data.add_(int.from_bytes(os.urandom(4), "big") * 1e-9)

    def suffer() -> int:
        only("determinism", "speed")
        if os.environ["RANK"] == "1":
            register_optimizer_step_post_hook(disturb)
        return examine(tmp_path, recipe="smoke")

    assert run_ranks(suffer, 2) == [1, 1]
    found = report(capfd.readouterr().out)
    assert found["speed"][0] == "warn"
    assert re.match(r"rank 1 on \S+ needs \d+\.\d ms a step, the others", found["speed"][1])
    assert found["determinism"][0] == "fail"
    assert "end in different weights on rank 1 on " in found["determinism"][1]


def test_threads_slower_than_one_are_a_warning(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def wait_for_a_core(*_: Any) -> None:
        if torch.get_num_threads() > 1:
            time.sleep(0.01)

    def examine_with_two_threads() -> int:
        only("one thread")
        register_module_forward_hook(wait_for_a_core)
        examine(tmp_path, num_threads=2)
        return torch.get_num_threads()

    assert run_ranks(examine_with_two_threads, 1) == [2], "as it was before"
    verdict, message = report(capfd.readouterr().out)["one thread"]
    assert verdict == "warn"
    assert re.match(r"rank 0 on \S+: 2 threads are \d+\.\d times slower than one here", message)


def test_an_unwritable_run_directory_is_one_failed_check(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()

    def unwritable() -> int:
        only("run directory", "all-reduce")
        return examine(tmp_path, run_dir=str(tmp_path / "file" / "run"))

    assert run_ranks(unwritable, 2) == [1, 1]
    found = report(capfd.readouterr().out)
    assert found["run directory"][0] == "fail"
    assert "Not a directory" in found["run directory"][1]
    assert found["all-reduce"][0] == "pass", "the doctor goes on"


def test_a_full_disk_and_broken_data_are_two_failed_checks(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_files(tmp_path)
    path = tmp_path / "MNIST" / "raw" / TRAIN_IMAGES
    path.write_bytes(path.read_bytes()[:-1])

    def full() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        return examine(tmp_path)

    assert run_ranks(full, 1) == [1]
    found = report(capfd.readouterr().out)
    assert {name for name, (verdict, _) in found.items() if verdict == "fail"} == {"data", "run directory"}
    assert found["data"][1].startswith("rank 0 on ")
    assert f"{path}: " in found["data"][1]
    assert "File too large" in found["run directory"][1]
    assert [entry.name for entry in tmp_path.iterdir()] == ["MNIST"]


def test_a_rank_that_hangs_ends_the_doctor_and_says_where(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Its data directory never answers, like one of a dead file server."""

    def wait() -> int:
        only("processes", "data")
        if os.environ["RANK"] == "1":
            checks_machine.is_present = lambda *_: time.sleep(600)
        return examine(tmp_path, timeout_s=6)

    with pytest.raises(RuntimeError, match="a rank died"):
        run_ranks(wait, 2)
    captured = capfd.readouterr()
    verdict, message = report(captured.out)["data"]
    assert verdict == "fail"
    assert re.match(r"rank 0 on \S+ has lost another rank, which has died or does not answer", message)
    assert re.search(r"error: data: rank 1 on \S+: no progress for 10 s", captured.err)
    assert "in measure_data" in captured.err


def test_fp16_on_a_cpu_is_not_fit(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def half() -> int:
        return examine(tmp_path, mixed_precision="fp16")

    assert run_ranks(half, 1) == [1]
    assert "--mixed-precision fp16: needs a GPU" in report(capfd.readouterr().out)["processes"][1]


# --- launches --------------------------------------------------------------------------------------------------------


@contextmanager
def ranks_by_hand(commands: list[list[str]], cwd: Path, *environments: dict[str, str]) -> Iterator[list[Any]]:
    """Starts a process per rank, as a scheduler would."""
    port = str(free_port())
    with ExitStack() as stack:
        processes = []
        for rank, (command, environment) in enumerate(zip(commands, environments, strict=True)):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            processes.append(stack.enter_context(started(command, cwd, **{**place, **environment})))
        yield processes


@pytest.mark.launch
def test_whoever_reads_the_first_line_only_gets_it_and_no_failure(tmp_path: Path) -> None:
    command = f"set -o pipefail; {' '.join([*PYTHON, *DOCTOR, *ONE_THREAD])} | head -n 1"
    done = finish(["bash", "-c", command], tmp_path, COLUMNS="0")
    assert done.code == 0, done.err
    assert done.out.startswith("rank")


@pytest.mark.launch
def test_a_launch_ends_with_a_table_and_a_verdict(tmp_path: Path) -> None:
    done = finish([*TORCHRUN, "--nproc-per-node", "2", *DOCTOR, *ONE_THREAD], tmp_path)
    assert done.code == 0, done.out + done.err
    lines = done.out.splitlines()
    assert re.match(r"verdict: fit to train \(\d+ passed, \d+ warnings?, 0 failed; ", lines[-1])
    assert sum(line.startswith("processes") for line in lines) == 1, "one rank speaks"
    assert re.search(r"^16,384 KB +[\d.]+ ms", done.out, re.MULTILINE)
    assert "\x1b" not in done.out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.launch
def test_ranks_that_differ_are_told_apart(tmp_path: Path) -> None:
    """Another line of code, another recipe, another byte of data, and too many threads."""
    for rank in (0, 1):
        write_files(tmp_path / f"data-{rank}")
    path = tmp_path / "data-1" / "MNIST" / "raw" / TRAIN_IMAGES
    path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))
    shutil.copytree(ROOT / "mnist", tmp_path / "copy" / "mnist")
    shutil.copy(ROOT / "train_ddp.py", tmp_path / "copy")
    with (tmp_path / "copy" / "mnist" / "losses.py").open("a") as file:
        file.write("# one line more\n")
    environments = [{"MNIST_DATA_DIR": str(tmp_path / f"data-{rank}")} for rank in (0, 1)]
    environments[1]["PYTHONPATH"] = str(tmp_path / "copy")
    all_cores = ["--num-threads", str(len(os.sched_getaffinity(0)))]
    commands = [[*PYTHON, *DOCTOR, *all_cores, "--json"], [*PYTHON, *DOCTOR, *ONE_THREAD, "--recipe", "lenet5"]]
    with ranks_by_hand(commands, tmp_path, *environments) as (first, second):
        out, _ = first.communicate(timeout=60)
        silent, _ = second.communicate(timeout=60)
    assert (first.returncode, second.returncode, silent) == (1, 1, "")
    found = report(out)
    assert {name for name, (verdict, _) in found.items() if verdict == "fail"} >= {
        "code",
        "configuration",
        "initial weights",
        "data",
        "threads",
    }
    assert re.match(r"mnist/losses\.py: \w+ on rank 1 on \S+, but \w+ on rank 0; bring every node", found["code"][1])
    assert found["configuration"][1].startswith("recipe: lenet5 on rank 1")
    assert found["data"][1].startswith(f"{TRAIN_IMAGES}: ")
    assert "set LOCAL_WORLD_SIZE, or --num-threads" in found["threads"][1]


@pytest.mark.launch
@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"WORLD_SIZE": "2"}, ["processes", "fail", "MASTER_ADDR"]),
        ({"SLURM_STEP_NUM_TASKS": "2"}, ["processes", "fail", "2 processes were started, but each sees 1"]),
        (
            {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"},
            ["processes", "fail", "the ranks have not met", "1/2 clients joined"],
        ),
    ],
    ids=["world-size-only", "srun", "rank-1-never-comes"],
)
def test_ranks_that_are_alone_are_told_so(tmp_path: Path, environment: dict[str, str], words: list[str]) -> None:
    command = [*PYTHON, *DOCTOR, *ONE_THREAD, "--timeout-s", "2"]
    done = finish(command, tmp_path, MASTER_PORT=str(free_port()), **environment)
    assert done.code == 1
    assert all(word in done.out for word in words), done.out
    assert done.out.splitlines()[-1].startswith("verdict: not fit to train")


@pytest.mark.launch
def test_an_address_that_does_not_answer_is_named_in_time(tmp_path: Path) -> None:
    place = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}
    done = finish([*PYTHON, *DOCTOR, "--timeout-s", "1"], tmp_path, timeout=60, **place)
    assert done.code == 1
    assert done.out == "", "rank 0 alone reports"
    assert "rank 1 on " in done.err
    assert "no answer from rank 0 at 127.0.0.1:9 within 1 s (Connection refused)" in done.err


KILLED = """
import os, signal
from mnist.config import RuntimeConfig
from mnist.system.accelerator import open_accelerator

with open_accelerator(RuntimeConfig(cpu=True)):
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.launch
def test_a_rank_that_is_killed_ends_the_doctor_with_the_check_it_was_at(tmp_path: Path) -> None:
    commands = [[*PYTHON, *DOCTOR, *ONE_THREAD], [*PYTHON, "-c", KILLED]]
    with ranks_by_hand(commands, tmp_path, {}, {}) as (first, _):
        out, _ = first.communicate(timeout=60)
    assert first.returncode == 1
    assert re.search(r"^processes +fail +rank 0 on \S+ has lost another rank, which has died", out, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--recipe", "fats"], ["--recipe fats: unknown", "smoke"]),
        (["--timeout-s", "0"], ["--timeout-s 0: must lie in"]),
        (["--jsno"], ["--json"]),
    ],
)
def test_a_mistyped_flag_is_explained_without_torch(tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    done: Finished = finish([sys.executable, "-X", "importtime", *DOCTOR, *arguments], tmp_path)
    assert done.code == 2
    assert all(word in done.err for word in words), done.err
    assert not re.search(r"\| +(torch|numpy|accelerate)$", done.err, re.MULTILINE)


def test_an_unknown_recipe_is_refused_in_code_too() -> None:
    with pytest.raises(UserError, match="--recipe nonsense: unknown;"):
        Options(recipe="nonsense")


# --- judges ----------------------------------------------------------------------------------------------------------


def facts(*values: Any, hosts: str = "aabb") -> list[Fact]:
    """Ranks 0 and 1 on host a, 2 and 3 on host b."""
    return [Fact(rank, hosts[rank], value) for rank, value in enumerate(values)]


def device(uuid: str | None, num_visible: int = 2, name: str = "H200") -> dict[str, Any]:
    return {"device": name, "uuid": uuid, "driver": "1", "num_visible": num_visible}


def threads(number: int, *cores: int, quota: float | None = None, as_asked: bool = False) -> dict[str, Any]:
    return {"threads": number, "cores": list(cores), "quota": quota, "as_asked": as_asked}


def memory(host: float, device_free: float | None = None) -> dict[str, Any]:
    return {"host_gib": host, "device_gib": 80.0 if device_free else None, "device_free_gib": device_free}


def disk(bytes_per_s: float, free_gib: float, is_seen: bool = True) -> dict[str, Any]:
    return {"folder": "/", "is_seen": is_seen, "bytes_per_s": bytes_per_s, "free_gib": free_gib}


def precision(asked: str, *works: str) -> dict[str, Any]:
    return {"asked": asked, "works": ["no", *works]}


def weights(first: str, second: str) -> dict[str, str]:
    return {"first": first, "second": second}


def bandwidth(first: float, last: float, *used: str, **links: Any) -> dict[str, Any]:
    """Seconds of the smallest and the largest all-reduce, 16 MB, or 256 MB on links of GPUs."""
    num_sizes = 8 if used in ((), ("loopback",), ("Ethernet",)) else 10
    seconds = [first, *[0.001] * (num_sizes - 2), last]
    return {"seconds": seconds, "links": Links(used, **{"interface": "eth0", **links})}


machine, compute, network = checks_machine, checks_compute, checks_network
judge_bandwidth = network.judge_bandwidth
equal = judge_equal("mend it")
CASES: list[tuple[Callable[[Any], Judgement], list[Any], str, str]] = [
    (equal, [{"torch": "2"}] * 3, "pass", "equal on 3 ranks"),
    (equal, [{"torch": "2"}], "skip", "one process"),
    (equal, [{"torch": "2"}, {"torch": "3"}], "fail", "torch: 3 on rank 1 on a, but 2 on rank 0; mend it"),
    (equal, [{"a": 1}, {"a": 1}, {"a": 1, "b": 2}], "fail", "b: 2 on rank 2 on b, but nothing on rank 0"),
    (equal, [{"a": 1}, {"a": 2}, {"a": 2}], "fail", "a: 2 on rank 1 on a (and 1 more)"),
    (machine.judge_devices, [device("u"), device("v"), device("w"), device("x")], "pass", "H200"),
    (machine.judge_devices, [device("u"), device("u")], "fail", "rank 0 on a and rank 1 on a share GPU u"),
    (machine.judge_devices, [device("u"), device("v"), device("w", 8)], "warn", "8 GPUs are visible on b, 1 in use"),
    (machine.judge_devices, [device("u"), device("v", name="H100")], "warn", "H100, H200"),
    (machine.judge_devices, [device(None, 0, "cpu")] * 2, "pass", "cpu"),
    (machine.judge_threads, [threads(1, 0, 1), threads(1, 0, 1)], "pass", "2 threads of 2 ranks for 2 cores on a"),
    (machine.judge_threads, [threads(2, 0, 1), threads(2, 0, 1)], "fail", "4 threads of 2 ranks for 2 cores on a"),
    (machine.judge_threads, [threads(1, 0), threads(1, 0)], "fail", "2 threads of 2 ranks for 1 core on a"),
    (machine.judge_threads, [threads(1, 0), threads(1, 1)], "pass", "2 threads of 2 ranks for 2 cores on a"),
    (machine.judge_threads, [threads(8, *range(8), quota=1.5)], "fail", "8 threads of 1 rank for 2 cores on a"),
    (machine.judge_threads, [threads(1, *range(8))], "fail", "the rest is idle"),
    (machine.judge_threads, [threads(1, *range(8), as_asked=True)], "pass", "1 thread of 1 rank for 8 cores on a"),
    (
        machine.judge_threads,
        [threads(1, 0, 1)] * 2 + [threads(3, 0, 1)],
        "fail",
        "3 threads of 1 rank for 2 cores on b",
    ),
    (machine.judge_memory, [memory(8.0)] * 2, "pass", "at least 8.0 GiB available"),
    (machine.judge_memory, [memory(8.0), memory(8.0), memory(0.5)], "warn", "0.5 GiB are available to 1 rank on b"),
    (machine.judge_memory, [memory(8.0, 70.0), memory(8.0, 30.0)], "warn", "30.0 of 80.0 GiB of GPU memory"),
    (machine.judge_clock, [{"time_s": 100.0}, {"time_s": 100.2}], "pass", "200 ms"),
    (machine.judge_clock, [{"time_s": 100.0}, {"time_s": 101.0}, {"time_s": 97.0}], "warn", "rank 2 on b is -3.0 s"),
    (machine.judge_clock, [{"time_s": 100.0}], "skip", "one process"),
    (machine.judge_run_dir, [disk(1e9, 50.0)] * 2, "pass", "/ of rank 0 on a: 1,000 MB/s, 50.0 GiB free"),
    (machine.judge_run_dir, [*[disk(1e9, 50.0)] * 2, disk(1e9, 50.0, False)], "warn", "rank 2 on b does not see it"),
    (machine.judge_run_dir, [disk(1e9, 0.5)], "warn", "too little"),
    (machine.judge_run_dir, [disk(2e6, 0.5)], "warn", "or choose another --run-dir; checkpoints will be slow"),
    (machine.judge_run_dir, [disk(2e6, 50.0)], "warn", "checkpoints will be slow"),
    (machine.judge_wandb, [{"mode": "disabled", "reason": None}], "pass", "disabled"),
    (machine.judge_wandb, [{"mode": "offline", "reason": None}], "pass", "offline"),
    (machine.judge_wandb, [{"mode": "offline", "reason": "no key is configured"}], "warn", "no key"),
    (machine.judge_wandb, [{"mode": "offline", "reason": "it does not answer"}], "warn", "tracked offline on"),
    (machine.judge_data, [{"f": "1", "warnings": ""}], "pass", "all files are whole"),
    (machine.judge_data, [{"f": "1", "warnings": ""}] * 2, "pass", "equal on 2 ranks"),
    (machine.judge_data, [{"f": "1", "warnings": ""}, {"f": "2", "warnings": ""}], "fail", "f: 2 on rank 1 on a"),
    (machine.judge_data, [{"f": "1", "warnings": "f is not the published file"}] * 2, "warn", "not the published"),
    (machine.judge_data, [{}, {}], "warn", "fall back to the embedded digits"),
    (machine.judge_data, [{}, {"f": "1", "warnings": ""}], "fail", "missing on rank 0 on a, but not on rank 1"),
    (compute.judge_precision, [precision("bf16", "bf16")] * 2, "pass", "fp32, bf16"),
    (compute.judge_precision, [precision("bf16", "bf16"), precision("bf16")], "fail", "bf16 does not work on rank 1"),
    (compute.judge_precision, [precision("no", "bf16"), precision("no")], "warn", "not on every rank"),
    (compute.judge_determinism, [weights("x", "x")] * 2, "pass", "bit for bit"),
    (compute.judge_determinism, [weights("x", "x"), weights("x", "y")], "fail", "different weights on rank 1 on a"),
    (compute.judge_determinism, [weights("x", "x"), weights("y", "y")], "warn", "rank 1 on a computes other last bits"),
    (compute.judge_speed, [0.010], "pass", "10.0 ms"),
    (compute.judge_speed, [0.010, 0.014], "pass", "14.0 ms"),
    (compute.judge_speed, [0.010, 0.011, 0.012, 0.020], "warn", "rank 3 on b needs 20.0 ms a step, the others 11.0 ms"),
    (compute.judge_one_thread, [None, None], "pass", "one thread is not faster"),
    (compute.judge_one_thread, [None, "2 threads are slower"], "warn", "rank 1 on a: 2 threads are slower"),
    (network.judge_all_reduce, [{"float32": 0, "float64": 0}] * 2, "pass", "exact in float32, float64"),
    (network.judge_all_reduce, [{"float32": 0}, {"float32": 3}], "fail", "3 wrong sums in float32 on rank 1 on a"),
    (network.judge_all_reduce, [{"float32": 0}], "skip", "one process"),
    (judge_bandwidth, [bandwidth(1e-6, 1e-3)], "skip", "one process"),
    (
        judge_bandwidth,
        [bandwidth(2e-4, 0.016777216, "loopback", interface="lo")] * 2,
        "pass",
        "0.20 ms for 1 KB, 1,000 MB/s for 16 MB over loopback (lo)",
    ),
    (judge_bandwidth, [bandwidth(2e-4, 4.0, "loopback")] * 2, "warn", "slow, 10 MB/s are the least"),
    (judge_bandwidth, [bandwidth(0.2, 0.01, "loopback")] * 2, "warn", "slow answers"),
    (judge_bandwidth, [bandwidth(2e-4, 0.15, "Ethernet")] * 2, "pass", "112 MB/s for 16 MB over Ethernet (eth0)"),
    (judge_bandwidth, [bandwidth(2e-4, 1.5, "Ethernet")] * 2, "warn", "slow, 50 MB/s are the least"),
    (judge_bandwidth, [bandwidth(2e-4, 0.01)] * 2, "pass", "over unknown links"),
    # 256 MB: NVLink of an H100 in 0.7 ms, PCIe 4.0 in 13 ms, 100 Gb/s InfiniBand in 25 ms, TCP in 300 ms.
    (judge_bandwidth, [bandwidth(2e-5, 0.7e-3, "NVLink", has_nvlink=True)] * 2, "pass", "383,479 MB/s for 256 MB"),
    (judge_bandwidth, [bandwidth(2e-5, 25e-3, "NVLink", has_nvlink=True)] * 2, "fail", "slow, 20,000 MB/s are the"),
    (judge_bandwidth, [bandwidth(2e-5, 13e-3, "PCIe")] * 2, "pass", "MB/s for 256 MB over PCIe"),
    (judge_bandwidth, [bandwidth(2e-5, 25e-3, "InfiniBand", "NVLink")] * 2, "pass", "over InfiniBand"),
    (judge_bandwidth, [bandwidth(2e-5, 300e-3, "InfiniBand", "NVLink")] * 2, "fail", "slow, 3,000 MB/s are the least"),
    (
        judge_bandwidth,
        [
            bandwidth(2e-5, 300e-3, "NVLink", "InfiniBand", infiniband=("mlx5_0",)),
            *[bandwidth(2e-5, 300e-3, "Ethernet", infiniband=("mlx5_0", "mlx5_1"))] * 2,
        ],
        "fail",
        "rank 1 on a sends over TCP (eth0) although its host has InfiniBand (mlx5_0, mlx5_1)",
    ),
    (judge_bandwidth, [bandwidth(2e-5, 300e-3, "Ethernet")] * 2, "pass", "over Ethernet (eth0)"),
    (
        judge_bandwidth,
        [bandwidth(2e-5, 30e-3, "shared memory", has_nvlink=True)] * 2,
        "fail",
        "rank 0 on a copies through host memory although NVLink connects its GPUs: look at NCCL_P2P_DISABLE",
    ),
    (judge_bandwidth, [bandwidth(2e-5, 30e-3, "shared memory")] * 2, "pass", "over shared memory"),
]


@pytest.mark.parametrize(("judge", "values", "verdict", "words"), CASES)
def test_judges(judge: Callable[[Any], Judgement], values: list[Any], verdict: str, words: str) -> None:
    found, message = judge(facts(*values))
    assert found == verdict, message
    assert words in message


@pytest.mark.parametrize(("world_size", "share"), [(2, 1.0), (4, 1.5), (8, 1.75)])
def test_bandwidth_is_what_each_link_carries(world_size: int, share: float) -> None:
    assert network.all_reduce_table([0.5] * 8, world_size)[0] == (1024, 0.5, share * 2048)
    assert [network.all_reduce_table([0.5] * sizes, world_size)[-1][0] >> 20 for sizes in (8, 10)] == [16, 256]


def test_what_nccl_says_about_two_ranks_on_one_gpu_is_not_taken_for_a_lost_rank() -> None:
    error = RuntimeError("NCCL error ... Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1000")
    assert doctor._explain(error, "rank 1 on a").startswith("rank 1 on a shares its GPU: give each process of a host")
    assert "has lost another rank" in doctor._explain(RuntimeError("Connection closed by peer"), "rank 1 on a")


def test_a_collective_that_adds_wrongly_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def add() -> dict[str, int]:
        with open_accelerator(RuntimeConfig(cpu=True, num_threads=1)) as accelerator:
            original = torch.distributed.all_reduce

            def broken(values: torch.Tensor) -> None:
                original(values)
                values[7] += 1

            torch.distributed.all_reduce = broken
            config = Options().config()
            return network.measure_all_reduce(checks_compute.Probe(accelerator, config))

    assert run_ranks(add, 2) == [{"float32": 1, "int64": 1, "float64": 1}] * 2
