import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mnist.cli import parse_command_line, to_yaml
from mnist.config import TrainConfig, evolve, sections, to_flat
from mnist.recipes import RECIPES

ROOT = Path(__file__).parents[1]
RANKS = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    for name in [*RANKS, "LOCAL_WORLD_SIZE"]:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def config_file(tmp_path):
    def write(text):
        path = tmp_path / "config.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def exit_of(argv, capsys):
    """The exit code, standard output and standard error of a command line that ends by itself."""
    with pytest.raises(SystemExit) as caught:
        parse_command_line(argv)
    captured = capsys.readouterr()
    return caught.value.code, captured.out, captured.err


def run_script(*argv, **environment):
    return subprocess.run(
        [sys.executable, *argv],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


@pytest.mark.parametrize("flag", ["--help", "--list-recipes", "--print-config"])
def test_whoever_has_read_enough_may_close_the_pipe(flag):
    done = run_script("-c", f"import os; os.system('{sys.executable} train_ddp.py {flag} | head -c 9')")
    assert len(done.stdout) == 9
    assert done.stderr == ""


def test_a_pipe_that_takes_ascii_only_gets_escapes():
    done = run_script("-m", "mnist.plots", "--help", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert r"\u2022 samples" in done.stdout


def test_no_arguments_mean_the_fast_recipe():
    assert parse_command_line([]) == RECIPES["fast"]()


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_can_be_named(name):
    assert parse_command_line(["--recipe", name]) == RECIPES[name]()


@pytest.mark.parametrize(
    ("argv", "changes"),
    [
        (["--lr", "3e-4"], {"lr": 3e-4}),
        (["--lr=3e-4"], {"lr": 3e-4}),
        (["--mean", "-0.5"], {"mean": (-0.5,)}),
        (["--mean", "0.5", "0.4", "0.3"], {"mean": (0.5, 0.4, 0.3)}),
        (["--global-batch-size", "64"], {"global_batch_size": 64}),
        (["--global_batch_size=64"], {"global_batch_size": 64}),
        (["--target-accuracy", "0.99"], {"target_accuracy": 0.99}),
        (["--mixed-precision", "bf16"], {"mixed_precision": "bf16"}),
        (["--wandb-tags", "a", "b", "--lr", "1"], {"wandb_tags": ("a", "b"), "lr": 1.0}),
        (["--wandb-notes", "two words"], {"wandb_notes": "two words"}),
        (["--patience", "3", "--val-size", "10"], {"patience": 3, "val_size": 10}),
        (["--deterministic"], {"deterministic": True}),
        (["--no-pictures"], {"pictures": False}),
        (["--lr", "1", "--lr", "2"], {"lr": 2.0}),
    ],
)
def test_a_flag_sets_its_field_and_no_other(argv, changes):
    assert parse_command_line(argv) == evolve(RECIPES["fast"](), **changes)


@pytest.mark.parametrize(
    ("argv", "changes"),
    [
        (["--deterministic=True"], {"deterministic": True}),
        (["--deterministic=true"], {"deterministic": True}),
        (["--deterministic=False"], {"deterministic": False}),
        (["--no_pictures"], {"pictures": False}),
        (["--cpu=True", "--lr=0.5"], {"cpu": True, "lr": 0.5}),
    ],
)
def test_sweeps_may_write_booleans_their_way(argv, changes):
    assert parse_command_line(argv) == evolve(RECIPES["fast"](), **changes)


def test_every_field_has_its_flag():
    changes = {"val_size": 3, "patience": 2, "loss": "nll", "momentum": 0.5, "nesterov": True, "label_smoothing": 0.0}
    argv = []
    for name, value in (to_flat(TrainConfig()) | changes).items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            argv.append(flag if value else "--no-" + flag[2:])
        elif isinstance(value, list):
            argv += [flag, *map(str, value)]
        else:
            argv += [flag, str(value)]
    assert parse_command_line(argv) == evolve(TrainConfig(), **changes)


@pytest.mark.parametrize(
    ("file", "argv", "expected"),
    [
        ("", ["--recipe", "lenet5"], (1e-3, 5)),
        ("recipe: lenet5\n", [], (1e-3, 5)),
        ("recipe: lenet5\nlr: 0.5\n", [], (0.5, 5)),
        ("recipe: lenet5\nlr: 0.5\n", ["--lr", "0.25"], (0.25, 5)),
        ("recipe: lenet5\nepochs: 7\n", ["--recipe", "convnet"], (1e-4, 7)),
        ("recipe: lenet5\nepochs: 7\n", ["--recipe=convnet", "--epochs=8"], (1e-4, 8)),
    ],
)
def test_the_command_line_beats_the_file_which_beats_the_recipe(config_file, file, argv, expected):
    flags = ["--config", config_file(file)] if file else []
    for arguments in ([*flags, *argv], [*argv, *flags]):
        config = parse_command_line(arguments)
        assert (config.optim.lr, config.loop.epochs) == expected


@pytest.mark.parametrize("text", ["1e-3", "1.0e-3", "0.001", "'1e-3'", "1E-3"])
def test_a_file_may_use_scientific_notation(config_file, text):
    """YAML takes 1e-3 for a string."""
    assert parse_command_line(["--config", config_file(f"lr: {text}\n")]).optim.lr == 1e-3


@pytest.mark.parametrize(
    ("line", "changes"),
    [
        ("deterministic: true", {"deterministic": True}),
        ("pictures: false", {"pictures": False}),
        ("data-dir: elsewhere", {"data_dir": "elsewhere"}),
        ("wandb_tags: [a, b]", {"wandb_tags": ("a", "b")}),
        ("wandb_tags: []", {}),
        ("run_dir: null", {}),
        ("mean: -0.5", {"mean": (-0.5,)}),
        ("std: [0.5, 0.4]", {"std": (0.5, 0.4)}),
        ("mixed_precision: no", {"mixed_precision": "no"}),
        ("mixed_precision: 'no'", {"mixed_precision": "no"}),
    ],
)
def test_a_file_may_use_what_yaml_offers(config_file, line, changes):
    assert parse_command_line(["--config", config_file(line + "\n")]) == evolve(RECIPES["fast"](), **changes)


def test_counting_epochs_means_the_same_over_a_printed_file(config_file):
    file = config_file(to_yaml(RECIPES["fast"]()))
    assert parse_command_line(["--config", file, "--epochs", "3"]) == parse_command_line(["--epochs", "3"])


@pytest.mark.parametrize("name", RECIPES)
def test_the_printed_configuration_reproduces_the_recipe(config_file, capsys, name):
    code, out, err = exit_of(["--recipe", name, "--print-config"], capsys)
    assert (code, err) == (0, "")
    wanted = to_flat(RECIPES[name]())
    del wanted["data_dir"]  # each machine's own affair, unless it was typed
    assert yaml.safe_load(out) == wanted
    assert parse_command_line(["--config", config_file(out)]) == RECIPES[name]()


@pytest.mark.parametrize(
    "argv",
    [
        ["--recipe", "mlp", "--lr", "3e-7", "--epochs", "3", "--wandb-tags", "a", "b", "--cpu"],
        ["--epochs", "3", "--mixed-precision", "no", "--target-loss", "1e-12"],
        ["--wandb-notes", "yes", "--wandb-name", "007", "--run-dir", "1e3", "--wandb-group", "on"],
        ["--wandb-notes", "50 %: a 'quote', # no comment, ü", "--wandb-tags", "1", "null"],
        ["--wandb-notes=", "--mean", "-1e-3"],
    ],
)
def test_the_printed_configuration_reproduces_the_run(config_file, capsys, argv):
    _, out, _ = exit_of([*argv, "--print-config"], capsys)
    assert parse_command_line(["--config", config_file(out)]) == parse_command_line(argv)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--recipe", "lenet"], ["--recipe lenet", "did you mean lenet5?", "convnet", "yannet"]),
        (["--recipe=LeNet5"], ["--recipe LeNet5", "did you mean lenet5?"]),
        (["--recipe", "None"], ["--recipe None", "convnet"]),
        (["--recipe"], ["--recipe"]),
        (["--dataset", "minst"], ["--dataset minst", "did you mean mnist?", "fashion_mnist", "digits"]),
        (["--model=lenet6"], ["--model lenet6", "lenet5", "tinynet"]),
        (["--model=small"], ["--model small: unknown; choose from convnet"]),  # not "did you mean mlp?"
        (["--optimizer", "Adam"], ["--optimizer Adam", "did you mean adam?", "adadelta"]),
        (["--mixed-precision", "fp32"], ["--mixed-precision fp32", "bf16", "fp16", "no"]),
        (["--wandb", "None"], ["--wandb", "auto", "offline"]),
        (["--evaluation", "rank"], ["--evaluation rank", "did you mean rank0?", "sharded"]),
        (["--learning-rate", "1"], ["--learning-rate: unknown; here it is --lr"]),
        (["--globl-batch-size", "64"], ["--globl-batch-size: unknown; did you mean --global-batch-size?"]),
        (["--epoch", "3"], ["--epoch: unknown; did you mean --epochs?"]),
        (["--lr", "fast"], ["--lr fast: must be a number"]),
        (["--lr"], ["--lr: needs one value, not 0"]),
        (["--epochs 1.5: must be a whole number"], ["--epochs 1.5: must be a whole number"]),
        (["--lr", "-1"], ["--lr -1.0: must lie in (0, 1e38]"]),
        (["--epochs", "0"], ["--epochs 0: must lie in [1, 1e6]"]),
        (["--patience", "3"], ["--patience 3: needs --val-size"]),
        (["--label-smoothing", "0.1", "--loss", "nll"], ["--label-smoothing 0.1: needs --loss cross_entropy"]),
        (["--deterministic", "maybe"], ["--deterministic maybe: must be true or false"]),
        (["stray"], ["stray: unknown; flags begin with --"]),
        (["--lr", "1", "2"], ["--lr: needs one value, not 2"]),
        (["--xyz"], ["--xyz: unknown; --help lists all flags"]),
        (["--no-lr"], ["--no-lr: unknown"]),
        (["--wandb-notes=--lr", "--lr=x"], ["--lr x: must be a number"]),
        (["--config"], ["--config"]),
    ],
)
def test_a_mistake_is_named_with_the_way_out_and_ends_with_2(capsys, argv, words):
    code, out, err = exit_of(argv, capsys)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    for word in words:
        assert word in err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lr: [", ["cannot be read"]),
        ("- lr\n- 0.5\n", ["expected lines like"]),
        ("just words", ["expected lines like"]),
        ("", ["expected lines like"]),
        ("learning_rate: 0.5\n", ["config.yaml: learning_rate: unknown"]),
        ("epoch: 3\n", ["config.yaml: epoch: unknown; did you mean epochs?"]),
        ("lr: fast\n", ["--lr", "fast"]),
        ("lr: -1\n", ["--lr -1.0: must lie in (0, 1e38]"]),
        ("recipe: lenet\n", ["--recipe lenet", "did you mean lenet5?"]),
        ("dataset: minst\n", ["--dataset minst", "did you mean mnist?"]),
        ("epochs: true\n", ["--epochs"]),
        ("optim:\n  lr: 0.5\n", ["config.yaml: optim: unknown"]),
    ],
)
def test_a_mistake_in_a_file_is_named_like_one_on_the_command_line(config_file, capsys, text, words):
    code, out, err = exit_of(["--config", config_file(text)], capsys)
    assert (code, out) == (2, "")
    for word in words:
        assert word in err


def test_a_whole_recipe_in_a_file_is_not_another_one(config_file, capsys):
    file = config_file(to_yaml(RECIPES["yannet"]()))
    code, _, err = exit_of(["--config", file, "--recipe", "fast"], capsys)
    assert code == 2
    assert f"--recipe fast: --config {file} holds all of recipe yannet" in err
    assert parse_command_line(["--config", file, "--recipe", "yannet"]) == RECIPES["yannet"]()


def test_a_data_folder_that_was_typed_is_printed(config_file, capsys):
    _, out, _ = exit_of(["--data-dir", "elsewhere", "--print-config"], capsys)
    assert parse_command_line(["--config", config_file(out)]).data.data_dir == "elsewhere"


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, capsys, content):
    path = tmp_path / "config.yaml"
    if content is not None:
        path.write_bytes(content)
    code, _, err = exit_of(["--config", str(path)], capsys)
    assert code == 2
    assert err.startswith(f"error: --config {path}: cannot be read")


def test_a_file_without_an_end_is_not_read_to_it(capsys):
    code, _, err = exit_of(["--config", "/dev/zero"], capsys)
    assert (code, err) == (2, "error: --config /dev/zero: larger than 1,000,000 bytes\n")


def test_the_recipes_are_listed_with_what_to_expect(capsys):
    code, out, err = exit_of(["--list-recipes"], capsys)
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()[::2]] == list(RECIPES)
    assert out.count("\n                 Expect: ") >= 13


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--help"], 0),
        (["--list-recipes"], 0),
        (["--print-config"], 0),
        (["--recipe", "lenet"], 2),
        (["--lr", "-1"], 2),
        (["--learning-rate", "1"], 2),
    ],
)
def test_one_rank_speaks_for_all(monkeypatch, capsys, argv, expected):
    for name, value in (RANKS | {"RANK": "1"}).items():
        monkeypatch.setenv(name, value)
    assert exit_of(argv, capsys) == (expected, "", "")
    monkeypatch.setenv("RANK", "0")
    code, out, err = exit_of(argv, capsys)
    assert code == expected
    assert out or err


def test_help_shows_every_flag_and_the_commands_people_type(capsys):
    code, out, _ = exit_of(["--help"], capsys)
    assert code == 0
    assert "accelerate launch train_ddp.py" in out
    missing = [name for name in to_flat(TrainConfig()) if "--" + name.replace("_", "-") not in out]
    assert missing == []
    fields = [f for section in sections().values() for f in dataclasses.fields(section)]
    assert [f.name for f in fields if f.metadata["limits"] and f"In {f.metadata['limits']}" not in out] == []


@pytest.mark.parametrize(("argv", "code"), [(["--help"], 0), (["--learning-rate", "1"], 2)])
def test_help_and_mistakes_do_not_wait_for_slow_imports(argv, code):
    done = run_script("-X", "importtime", "train_ddp.py", *argv)
    modules = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert done.returncode == code
    assert "tyro" in modules
    assert modules & {"torch", "numpy", "wandb", "accelerate", "torchvision", "matplotlib"} == set()


def test_a_mistake_of_the_script_is_one_line_and_exit_code_2():
    done = run_script("train_ddp.py", "--recipe", "lenet")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --recipe lenet: unknown; did you mean lenet5?")
    assert done.stderr.count("\n") == 1


def test_other_ranks_of_the_script_keep_silent():
    done = run_script("train_ddp.py", "--lr", "-1", **(RANKS | {"RANK": "1"}))
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


@pytest.mark.parametrize("flag", ["--resume", "--config"])
def test_a_file_that_one_machine_lacks_is_named_by_its_first_rank(flag, tmp_path):
    missing = str(tmp_path / "missing")
    first = run_script("train_ddp.py", flag, missing, **(RANKS | {"RANK": "1", "LOCAL_RANK": "0"}))
    second = run_script("train_ddp.py", flag, missing, **(RANKS | {"RANK": "2", "LOCAL_RANK": "1", "WORLD_SIZE": "3"}))
    assert (first.returncode, first.stderr.count(missing)) == (2, 1)
    assert (second.returncode, second.stderr) == (2, "")


@pytest.mark.parametrize(
    "left_over",
    [
        {"RANK": "1", "WORLD_SIZE": "2"},
        {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
        {"RANK": "", "WORLD_SIZE": "", "LOCAL_WORLD_SIZE": "", "MASTER_PORT": ""},
        {"RANK": "1"},
    ],
)
def test_variables_left_from_another_job_do_not_silence_a_process(monkeypatch, capsys, left_over):
    """Only a launcher sets the variables all together."""
    for name, value in left_over.items():
        monkeypatch.setenv(name, value)
    code, out, _ = exit_of(["--list-recipes"], capsys)
    assert (code, out.split()[0]) == (0, "fast")
    code, _, err = exit_of(["--recipe", "lenet"], capsys)
    assert (code, err.count("did you mean lenet5?")) == (2, 1)


@pytest.mark.parametrize("module", ["predict", "plots", "reproduce", "evaluate", "bench", "doctor"])
def test_a_command_of_one_process_prints_its_help_whatever_rank_is_left_over(module):
    ranks = {"RANK": "1", "WORLD_SIZE": "2"} if module in ("evaluate", "bench", "doctor") else RANKS | {"RANK": "1"}
    done = run_script("-m", f"mnist.{module}", "--help", **ranks)
    assert (done.returncode, done.stderr) == (0, "")
    assert "usage: " in done.stdout


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": "one"}, "RANK=one: must be a whole number of 0 or more"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0: must be a whole number of 1 or more"),
        ({"LOCAL_WORLD_SIZE": "-1"}, "LOCAL_WORLD_SIZE=-1: must be a whole number of 1 or more"),
        ({"LOCAL_RANK": "1.0"}, "LOCAL_RANK=1.0: must be"),
        ({"MASTER_PORT": "tcp://10.0.0.1:80"}, "MASTER_PORT=tcp://10.0.0.1:80: must be"),
        ({"TORCHELASTIC_RESTART_COUNT": "x"}, "TORCHELASTIC_RESTART_COUNT=x: must be"),
        ({"SLURM_RESTART_COUNT": "x"}, "SLURM_RESTART_COUNT=x: must be"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "0"}, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=0: must be"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2: must be below WORLD_SIZE=2"),
        ({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"}, "LOCAL_RANK=1: must be below LOCAL_WORLD_SIZE=1"),
    ],
)
def test_a_variable_of_a_launcher_that_makes_no_sense_is_named(monkeypatch, capsys, variables, words):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    code, out, err = exit_of([], capsys)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {words}")


@pytest.mark.parametrize(
    ("flag", "here"),
    [
        ("--learning-rate", "--lr"),
        ("--batch-size", "--global-batch-size"),
        ("--batch_size", "--global-batch-size"),
        ("--num-epochs", "--epochs"),
        ("--output-dir", "--run-dir"),
        ("--bf16", "--mixed-precision bf16"),
        ("--fp16", "--mixed-precision fp16"),
        ("--num-workers", "not needed"),
        ("--resume_from_checkpoint", "--resume"),
        ("--with_tracking", "--wandb"),
        ("--no-cuda", "--cpu"),
        ("--log-interval", "--log-every"),
    ],
)
def test_a_flag_of_other_training_scripts_gets_the_name_that_it_has_here(capsys, flag, here):
    code, _, err = exit_of([flag, "1"], capsys)
    assert code == 2
    assert f"{flag.replace('_', '-')}: unknown; here it is {here}" in err


def test_the_rank_that_torch_distributed_launch_adds_is_ignored():
    assert parse_command_line(["--local-rank=1", "--lr", "0.5"]).optim.lr == 0.5
    assert parse_command_line(["--local_rank", "0"]) == RECIPES["fast"]()


@pytest.mark.parametrize("argv", [["--run-dir=~/x"], ["--run-dir", "~/x"]])
def test_a_tilde_in_a_path_is_the_home_folder(monkeypatch, tmp_path, config_file, argv):
    home = tmp_path / "home"
    (home / "y" / "step-1").mkdir(parents=True)
    (home / "y" / "step-1" / "manifest.json").write_text(json.dumps({"config": to_flat(RECIPES["fast"]())}))
    monkeypatch.setenv("HOME", str(home))
    assert parse_command_line(argv).output.run_dir == f"{home}/x"
    file = config_file("run_dir: ~/x\nresume: ~/y/step-1\ndata_dir: ~/z\nwandb_notes: ~/stays\n")
    config = parse_command_line(["--config", file])
    assert (config.output.run_dir, config.output.resume) == (f"{home}/x", f"{home}/y/step-1")
    assert (config.data.data_dir, config.output.wandb_notes) == (f"{home}/z", "~/stays")


def test_a_tilde_is_the_home_folder_in_other_commands_too(tmp_path):
    done = run_script("-m", "mnist.evaluate", "--run=~/nowhere", HOME=str(tmp_path))
    assert done.returncode == 2
    assert str(tmp_path / "nowhere") in done.stderr


def test_python_without_docstrings_lists_recipes():
    plain, optimised = run_script("train_ddp.py", "--list-recipes"), run_script("-OO", "train_ddp.py", "--list-recipes")
    assert optimised.returncode == 0, optimised.stderr
    assert optimised.stdout == plain.stdout


@pytest.mark.parametrize("columns", ["0", "5", "x"])
@pytest.mark.parametrize("command", [["train_ddp.py"], ["-m", "mnist.plots"]])
def test_help_ends_in_any_width(command, columns):
    done = run_script(*command, "--help", COLUMNS=columns)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--help" in done.stdout


def test_help_ends_on_a_narrow_terminal():
    """A terminal of four columns, which COLUMNS does not tell."""
    code = (
        "import fcntl, os, pty, struct, sys, termios;"
        "pid, fd = pty.fork();"
        "pid or (fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack('HHHH', 9, 4, 0, 0)),"
        "os.execv(sys.executable, [sys.executable, 'train_ddp.py', '--help']));"
        "exec('while True:\\n try:\\n  if not os.read(fd, 65536): break\\n except OSError: break');"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, timeout=100, check=False)
    assert done.returncode == 0


def test_a_deleted_working_directory_is_one_line(tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    code = f"import os, sys; os.chdir({str(gone)!r}); os.rmdir({str(gone)!r}); os.execv(sys.executable, sys.argv[1:])"
    done = run_script("-c", code, sys.executable, str(ROOT / "train_ddp.py"), "--recipe", "smoke")
    assert (done.returncode, done.stderr) == (2, "error: the working directory was deleted; change to another one\n")


def test_too_few_open_files_are_one_line():
    limited = f"ulimit -n 16; exec {sys.executable} train_ddp.py --recipe smoke"
    done = subprocess.run(["bash", "-c", limited], cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stderr) == (2, "error: ulimit -n 16: too few open files; 256 are needed\n")


def test_a_low_limit_on_open_files_is_raised_where_it_may_be():
    code = "import resource; from mnist.cli import parse_command_line; parse_command_line([])"
    limited = (
        f"ulimit -S -n 20; exec {sys.executable} -c '{code}; print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])'"
    )
    done = subprocess.run(["bash", "-c", limited], cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stdout) == (0, "256\n")


FAILING = """
import os, socket, sys
from mnist.cli import run_command
def command(options):
    print("x" * {size})
    {body}
    return 0
run_command(command, None)
"""


@pytest.mark.parametrize("size", [1, 100_000])
@pytest.mark.parametrize(
    ("body", "out", "expected"),
    [
        ("raise OSError(12, 'no memory')", subprocess.DEVNULL, (1, "error: no memory\n")),
        ("open('/nowhere/x')", subprocess.DEVNULL, (1, "error: /nowhere/x: No such file or directory\n")),
        ("raise BrokenPipeError(32, 'a socket')", subprocess.DEVNULL, (1, "error: a socket\n")),
        (
            "socket.socket(socket.AF_UNIX).bind('x' * 200)",
            subprocess.DEVNULL,
            (1, "error: AF_UNIX path too long (a shorter TMPDIR helps)\n"),
        ),
        ("pass", "/dev/full", (1, "error: standard output: No space left on device\n")),
    ],
)
def test_an_error_without_a_file_is_not_always_standard_output_s(size, body, out, expected):
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", FAILING.format(size=size, body=body)],
            cwd=ROOT,
            stdout=full if out == "/dev/full" else out,
            stderr=subprocess.PIPE,
            text=True,
            timeout=100,
            check=False,
        )
    assert (done.returncode, done.stderr) == expected


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        ("max_steps: 010\n", {"max_steps": 10}),
        ("run_dir: 0123\nwandb_name: yes\nwandb_notes: on\nwandb_group: 1_000\n",
         {"run_dir": "0123", "wandb_name": "yes", "wandb_notes": "on", "wandb_group": "1_000"}),
        ("wandb_name: 1.10\nrun_dir: runs/1.10\nwandb_project: 007\n",
         {"wandb_name": "1.10", "run_dir": "runs/1.10", "wandb_project": "007"}),
        ('wandb_tags: ["a", "--lr", "0.7"]\n', {"wandb_tags": ("a", "--lr", "0.7")}),
        ("wandb_notes: --lr\n", {"wandb_notes": "--lr"}),
        ("wandb_name: 2026-11-25\n", {"wandb_name": "2026-11-25"}),
        ("wandb_name: 'null'\n", {"wandb_name": "null"}),
    ],
)  # fmt: skip
def test_a_value_in_a_file_is_what_is_written_there(config_file, text, changes):
    """YAML 1.1 reads octal and sexagesimal numbers, booleans and dates into them."""
    assert parse_command_line(["--config", config_file(text)]) == evolve(RECIPES["fast"](), **changes)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("max_steps: 1:30\n", "--max-steps 1:30: must be a whole number"),
        ("lr: 0.001\nlr: 0.5\n", "lr: given twice"),
        ("wandb-tags: [a]\nwandb_tags: [b]\n", "wandb_tags: given twice"),
        (f"wandb_tags: {'[' * 5000}{']' * 5000}\n", "nested too deeply"),
        (f"wandb_tags: {'{a: ' * 5000}1{'}' * 5000}\n", "nested too deeply"),
        ("wandb_tags: [[a]]\n", "wandb_tags: must be one value, or a list"),
        ("lr: [0.1]\n", "lr: must be one value, or a list"),
        ("lr: {a: 1}\n", "lr: must be one value"),
        ("a: &a [x,x]\nwandb_tags: [*a,*a]\n", "a: unknown"),
        ("config: other.yaml\n", "config: unknown"),
        ("help: true\n", "help: unknown"),
        ("deterministic: yes\n", "--deterministic yes: must be true or false"),
        ("lr: null\n", "--lr None: must be a number"),
        ("learning_rate: 0.5\n", "learning_rate: unknown; here it is --lr"),
    ],
)  # fmt: skip
def test_a_file_that_says_something_odd_is_refused_in_one_line(config_file, capsys, text, words):
    code, out, err = exit_of(["--config", config_file(text)], capsys)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert words in err


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_a_file_of_powershell_is_read(tmp_path, encoding):
    bom = {"utf-16-le": b"\xff\xfe", "utf-16-be": b"\xfe\xff"}.get(encoding, b"")
    path = tmp_path / "config.yaml"
    path.write_bytes(bom + to_yaml(RECIPES["lenet5"]()).encode(encoding))
    assert parse_command_line(["--config", str(path)]) == RECIPES["lenet5"]()
