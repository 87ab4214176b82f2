from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb as package

from mnist.config import OutputConfig
from mnist.runs.tracking import wandb
from mnist.runs.tracking.wandb import choose_mode
from mnist.system import signals
from tests.launch.test_launch import wait_until
from tests.processes import TORCHRUN, Finished, finish, started, train
from tests.runs.tracking.fake_wandb import KEY, fake_server

SMOKE = ["--recipe", "smoke", "--min-accuracy", "0.05", "--num-threads", "1", "--run-dir", "run", "--log-every", "10"]
SHORT = [*SMOKE, "--max-steps", "40", "--eval-every", "20"]
LONG = [*SMOKE, "--epochs", "400"]
PATIENCE_S = 30  # a busy machine


@pytest.fixture
def settings_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory, and W&B without settings and keys of the person who runs the tests."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.chdir(tmp_path)
    package.teardown()
    yield tmp_path
    package.teardown()


@pytest.fixture
def listening() -> Iterator[str]:
    """The URL of a server that takes connections."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize(
    ("flag", "environment", "expected"),
    [
        ("auto", {}, "offline"),
        ("auto", {"WANDB_API_KEY": KEY}, "online"),
        ("auto", {"WANDB_MODE": "disabled", "WANDB_API_KEY": KEY}, "disabled"),
        ("auto", {"WANDB_MODE": "offline", "WANDB_API_KEY": KEY}, "offline"),
        ("auto", {"WANDB_MODE": "dryrun", "WANDB_API_KEY": KEY}, "offline"),
        ("auto", {"WANDB_DISABLED": "true", "WANDB_API_KEY": KEY}, "disabled"),
        ("disabled", {"WANDB_API_KEY": KEY}, "disabled"),
        ("offline", {"WANDB_MODE": "online", "WANDB_API_KEY": KEY}, "offline"),
        ("online", {}, "offline"),
        ("online", {"WANDB_MODE": "offline", "WANDB_API_KEY": KEY}, "online"),
        ("online", {"WANDB_DISABLED": "true", "WANDB_API_KEY": KEY}, "online"),
    ],
)
@pytest.mark.usefixtures("settings_folder")
def test_the_mode_follows_flag_then_environment_then_key(
    listening: str, monkeypatch: pytest.MonkeyPatch, flag: Any, environment: dict[str, str], expected: str
) -> None:
    for name, value in {"WANDB_BASE_URL": listening, **environment}.items():
        monkeypatch.setenv(name, value)
    assert choose_mode(OutputConfig(wandb=flag))[0] == expected


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_wandb_offline_and_disabled_typed_in_the_folder_count(
    settings_folder: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    (settings_folder / "wandb").mkdir()
    (settings_folder / "wandb" / "settings").write_text(f"[default]\nmode = {mode}\n")  # as the command writes it
    package.teardown()  # whatever has read the settings before
    assert choose_mode(OutputConfig()) == (mode, None)


def test_the_server_of_wandb_login_host_is_the_one_that_is_asked(settings_folder: Path, listening: str) -> None:
    (settings_folder / "config").mkdir()
    (settings_folder / "config" / "settings").write_text(f"[default]\nbase_url = {listening}\n")
    netrc = settings_folder / "netrc"
    netrc.write_text(f"machine {listening.removeprefix('http://')}\n  login user\n  password {KEY}\n")
    netrc.chmod(0o644)  # Python's own reader refuses such a file where it is ~/.netrc
    assert choose_mode(OutputConfig()) == ("online", None)


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({}, "no key is configured"),
        ({"WANDB_API_KEY": "short"}, "WANDB_API_KEY invalid"),
        ({"WANDB_API_KEY": KEY, "WANDB_BASE_URL": "http://127.0.0.1:9"}, "http://127.0.0.1:9 does not answer"),
        ({"WANDB_API_KEY": KEY, "WANDB_INIT_TIMEOUT": "soon"}, "init_timeout"),
    ],
)
def test_the_reason_for_not_being_online_is_told(
    settings_folder: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], reason: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    mode, found = choose_mode(OutputConfig())
    assert mode == "offline"
    assert reason in str(found)


def test_a_name_that_no_dns_server_answers_for_costs_2_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    def look_up(*_: Any, **__: Any) -> Any:
        time.sleep(60)
        raise OSError

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    begin = time.monotonic()
    assert not wandb._takes_connections("https://wandb.example.org")
    assert time.monotonic() - begin < wandb.PROBE_TIMEOUT_S + PATIENCE_S


def test_a_proxy_decides_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert wandb._takes_connections("http://wandb.example.org")
    assert not wandb._takes_connections("http://127.0.0.1:9")


def test_the_promised_times_are_kept_by_the_limits() -> None:
    """README: 16 s at the start, 30 s at the end; an end after a signal leaves room for a checkpoint."""
    assert wandb.PROBE_TIMEOUT_S + wandb.START_TIMEOUT_S + wandb.CLOSE_TIMEOUT_S <= 14  # an offline start takes 1 s
    end_s = wandb.FINISH_TIMEOUT_S + wandb.CLOSE_TIMEOUT_S
    assert 3 * wandb.CALL_TIMEOUT_S + end_s <= 30
    assert end_s <= signals.GRACE_S - 10


def inspect(run_file: Path, *arguments: str) -> str:
    """A run's file as JSON, read back by W&B's own tool."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", *arguments, "--json", str(run_file)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def offline_file(folder: Path) -> Path:
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    return path


def points(run_file: Path) -> list[tuple[int, str]]:
    records = [json.loads(line) for line in inspect(run_file).splitlines()]
    items = [record["history"]["item"] for record in records if record["type"] == "history"]
    return [(item["trainer/step"], name) for item in items for name in ("train/loss", "test/loss") if name in item]


def status(folder: Path) -> Any:
    return json.loads((folder / "run" / "result.json").read_text())["status"]


def has_records(folder: Path) -> bool:
    path = folder / "run" / "metrics.jsonl"
    return path.exists() and path.stat().st_size > 0


EACH_STEP_ONCE = [
    *[(10, "train/loss"), (20, "train/loss"), (20, "test/loss")],
    *[(30, "train/loss"), (40, "train/loss"), (40, "test/loss")],
]


def check_is_clean(done: Finished) -> None:
    """Nothing of W&B's own in the output."""
    for word in ("Traceback", "wandb: ", "INFO", "goroutine", "Failed to export"):
        assert word not in done.err, done.err


@pytest.mark.launch
def test_two_ranks_leave_one_offline_run_without_a_prompt(tmp_path: Path) -> None:
    command = train(*SHORT, "--wandb", "auto", launcher=[*TORCHRUN, "--nproc-per-node", "2"])
    done = finish(command, tmp_path, WANDB_MODE="offline", NETRC=os.devnull)
    assert done.code == 0, done.err
    assert "wandb sync run/wandb/offline-run-" in done.out
    run_file = offline_file(tmp_path / "run")
    found = json.loads(inspect(run_file, "--summary"))
    accuracy = json.loads((tmp_path / "run" / "result.json").read_text())["test"]["accuracy"]
    assert found["summary"]["test/accuracy"]["last"] == accuracy
    assert found["config"]["max_steps"] == 40
    assert found["exit_code"] == 0
    assert found["summary"]["best/accuracy"] == accuracy
    assert found["summary"]["test/loss"].keys() == {"min", "last"}
    assert points(run_file) == EACH_STEP_ONCE
    records = [json.loads(line) for line in inspect(run_file).splitlines()]
    items = [record["history"]["item"] for record in records if record["type"] == "history"]
    assert {item["trainer/step"] for item in items if "pictures/samples._type" in item} == {40}
    shown = {path.name.split("_")[0] for path in (tmp_path / "run").glob("wandb/*/files/media/images/pictures/*.png")}
    assert shown == {"samples", "curves", "features", "filters", "confusion", "mistakes"}
    models = [r["artifact"] for r in records if r["type"] == "artifact" and r["artifact"]["type"] == "model"]
    assert [sorted(model["aliases"]) for model in models] == [["best", "last", "latest"]]
    listed = {entry["path"] for entry in models[0]["manifest"]["contents"]}
    assert listed == {"config.json", "model.safetensors"}


@pytest.mark.launch
def test_best_and_last_are_two_versions_where_they_differ(tmp_path: Path) -> None:
    rising = ["--schedule", "one_cycle", "--warmup", "0.8", "--lr", "1", "--val-size", "300", "--eval-every", "10"]
    done = finish(train(*SHORT, *rising, "--wandb", "offline", "--no-pictures"), tmp_path)
    assert done.code == 0, done.err
    assert not (tmp_path / "run" / "pictures").exists()
    records = [json.loads(line) for line in inspect(offline_file(tmp_path / "run")).splitlines()]
    models = [r["artifact"] for r in records if r["type"] == "artifact" and r["artifact"]["type"] == "model"]
    assert [sorted(set(model["aliases"]) - {"latest"}) for model in models] == [["last"], ["best"]]


@pytest.mark.launch
def test_a_preempted_run_is_marked_and_continues_under_the_same_id(tmp_path: Path) -> None:
    command = train(*LONG, "--wandb", "offline")
    with started(command, tmp_path) as process:
        wait_until(lambda: has_records(tmp_path))
        process.terminate()
        assert process.wait(timeout=100) == 75
    run_file = offline_file(tmp_path / "run")
    assert '"preempting"' in inspect(run_file)
    assert json.loads(inspect(run_file, "--summary"))["exit_code"] == 75
    run_id = (tmp_path / "run" / "wandb_id").read_text()
    finish(train(*LONG, "--wandb", "offline", "--target-accuracy", "0.05"), tmp_path)
    names = [path.name for path in (tmp_path / "run" / "wandb").glob("offline-run-*")]
    assert len(names) == 2
    assert all(name.endswith(run_id) for name in names)


@pytest.mark.launch
def test_an_online_run_arrives_with_its_points_model_and_exit_code(tmp_path: Path) -> None:
    with fake_server() as server:
        done = finish(train(*SHORT, "--wandb", "online"), tmp_path, **server.environment)
    assert done.code == 0, done.err
    assert "warning" not in done.err
    assert f"watch  {server.url}/team/mnist-ddp/runs/" in done.out
    steps = [
        (row["trainer/step"], name) for row in server.points for name in ("train/loss", "test/loss") if name in row
    ]
    assert steps == EACH_STEP_ONCE
    assert server.exit_code == 0
    assert "model" in {artifact["input"]["artifactTypeName"] for artifact in server.artifacts}
    check_is_clean(done)


@pytest.mark.launch
@pytest.mark.parametrize(
    ("fault", "stage"),
    [("403", "start"), ("silence", "start"), ("hang up", "start"), ("html", "run"), ("500", "run"), ("drip", "run")],
)
def test_a_start_that_fails_after_the_probe_is_tracked_offline(tmp_path: Path, fault: str, stage: str) -> None:
    with fake_server(fault, stage) as server:
        done = finish(train(*SHORT, "--wandb", "online", "--no-pictures"), tmp_path, **server.environment)
    assert done.code == 0, done.err
    assert "warning  W&B (online) did not start (" in done.err
    assert status(tmp_path) == "finished"
    run_file = offline_file(tmp_path / "run")
    assert points(run_file) == EACH_STEP_ONCE
    assert run_file.parent.name.endswith((tmp_path / "run" / "wandb_id").read_text())
    assert "wandb sync run/wandb/offline-run-" in done.out
    check_is_clean(done)


@pytest.mark.launch
@pytest.mark.parametrize(
    ("fault", "stage"),
    [("403", "points"), ("500", "points"), ("silence", "model"), ("hang up", "model"), ("drip", "end"), ("500", "end")],
)
def test_a_server_that_fails_later_costs_a_warning_and_at_most_30_seconds(
    tmp_path: Path, fault: str, stage: str
) -> None:
    with fake_server(fault, stage) as server:
        done = finish(train(*SHORT, "--wandb", "online", "--no-pictures"), tmp_path, **server.environment)
        end = time.time()
    assert done.code == 0, done.err
    assert "warning  W&B (online) " in done.err
    assert "wandb sync run/wandb/run-" in done.out
    assert status(tmp_path) == "finished"
    last_record = (tmp_path / "run" / "metrics.jsonl").stat().st_mtime
    assert end - last_record < 30 + PATIENCE_S
    (run_file,) = (tmp_path / "run").glob("wandb/run-*/*.wandb")
    assert points(run_file) == EACH_STEP_ONCE, "it can be uploaded later"
    check_is_clean(done)


@pytest.mark.launch
@pytest.mark.parametrize("fault", ["drip", "silence"])
def test_a_server_that_fails_at_the_end_leaves_a_preempted_run_exit_code_75(tmp_path: Path, fault: str) -> None:
    with fake_server(fault, "points") as server:
        command = train(*LONG, "--wandb", "online")
        with started(command, tmp_path, **server.environment) as process:
            wait_until(lambda: "file_stream" in server.requests)
            wait_until(lambda: has_records(tmp_path))
            process.terminate()
            assert process.wait(timeout=100) == 75
    assert status(tmp_path) == "preempted"


@pytest.mark.launch
def test_a_dead_address_costs_a_warning(tmp_path: Path) -> None:
    environment = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": KEY}
    done = finish(train(*SHORT, "--wandb", "online", "--no-pictures"), tmp_path, **environment)
    assert done.code == 0, done.err
    assert "warning  W&B: offline (http://127.0.0.1:9 does not answer within 2 s)" in done.err
    assert points(offline_file(tmp_path / "run")) == EACH_STEP_ONCE


@pytest.mark.launch
def test_offline_makes_no_connection(tmp_path: Path) -> None:
    if shutil.which("strace") is None:
        pytest.skip("needs strace")
    trace = ["strace", "-f", "-qq", "-e", "trace=connect,sendto,sendmsg", "-o", str(tmp_path / "trace")]
    if subprocess.run([*trace, "true"], check=False, capture_output=True).returncode != 0:
        pytest.skip("needs the right to trace processes")
    done = finish([*trace, *train(*SHORT, "--wandb", "offline", "--no-pictures")], tmp_path, timeout=300)
    assert done.code == 0, done.err
    calls = (tmp_path / "trace").read_text().splitlines()
    assert any("AF_UNIX" in call for call in calls), "the tracer sees W&B's own process"
    assert [call for call in calls if "AF_INET" in call] == []


@pytest.mark.launch
@pytest.mark.parametrize("home", [None, "/", "read-only"])
def test_an_unusable_home_takes_nothing_from_the_run(tmp_path: Path, home: str | None) -> None:
    (tmp_path / "read-only").mkdir(mode=0o500)
    command = ["env", "-i", *(["HOME=" + (str(tmp_path / home) if home != "/" else home)] if home else [])]
    command += [f"PYTHONPATH={Path(__file__).parents[3]}", "CI=true"]
    begin = time.time()
    done = finish([*command, *train(*SHORT, "--wandb", "offline", "--no-pictures")], tmp_path)
    assert done.code == 0, done.err
    assert "warning" not in done.err
    check_is_clean(done)
    records = [json.loads(line) for line in inspect(offline_file(tmp_path / "run")).splitlines()]
    assert "model" in [r["artifact"]["type"] for r in records if r["type"] == "artifact"]
    for folder in ("/.local/share/wandb", "/.cache/wandb", "/.config/wandb"):
        assert not Path(folder).exists() or Path(folder).stat().st_mtime < begin


@pytest.mark.launch
def test_wandb_dir_is_where_the_files_go(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    done = finish(train(*SHORT, "--wandb", "offline", "--no-pictures"), tmp_path, WANDB_DIR=str(tmp_path / "elsewhere"))
    assert done.code == 0, done.err
    assert points(offline_file(tmp_path / "elsewhere")) == EACH_STEP_ONCE


@pytest.mark.launch
def test_a_wandb_process_that_is_stopped_does_not_hold_up_the_end(tmp_path: Path) -> None:
    with started(train(*SMOKE, "--wandb", "offline", "--no-pictures", "--max-steps", "400"), tmp_path) as process:
        wait_until(lambda: has_records(tmp_path))
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        (core,) = [child for child in children if "wandb-core" in Path(f"/proc/{child}/cmdline").read_text()]
        subprocess.run(["kill", "-STOP", core], check=True)
        _, errors = process.communicate(timeout=100)
    assert process.returncode == 0, errors
    assert status(tmp_path) == "finished"
    assert "warning  W&B (offline) is incomplete (" in errors


def test_an_error_in_a_thread_of_wandb_is_not_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    printed = []
    monkeypatch.setattr(wandb, "_excepthook", lambda event: printed.append(event.exc_type))
    manager = package.sdk.lib.asyncio_manager.AsyncioManager()
    manager.start()
    manager.join()
    for target in (lambda: manager.run(lambda: None), lambda: 1 / 0):  # type: ignore[arg-type,return-value]
        try:
            target()
        except Exception as error:
            wandb._print_unless_wandb(threading.ExceptHookArgs((type(error), error, error.__traceback__, None)))
    assert printed == [ZeroDivisionError]


@pytest.mark.parametrize("content", ["", "\n", None])
def test_an_id_that_a_crash_has_left_empty_is_made_anew(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "wandb_id").write_text(content)
    found = wandb._run_id(tmp_path)
    assert len(found) == 8
    assert wandb._run_id(tmp_path, "another") == found


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder with room for the first kilobytes only."""
    folder = tmp_path / "run" / "wandb"
    folder.mkdir(parents=True)
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True, check=False
    )
    if mount.returncode != 0:
        pytest.skip("needs the right to mount a small tmpfs")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.launch
def test_a_full_disk_below_wandb_costs_a_warning(tmp_path: Path, full_disk: Path) -> None:
    done = finish(train(*SHORT, "--wandb", "offline", "--log-every", "1", "--max-steps", "300"), tmp_path)
    assert done.code == 0, done.err
    assert "Traceback" not in done.err
    assert shutil.disk_usage(full_disk).free < 4096, "the disk was not full"
    assert status(tmp_path) == "finished"
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count('"split": "train"') == 300
