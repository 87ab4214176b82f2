import dataclasses
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


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.delenv("RANK", raising=False)


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
        (["--mean", "-0.5"], {"mean": -0.5}),
        (["--global-batch-size", "64"], {"global_batch_size": 64}),
        (["--global_batch_size=64"], {"global_batch_size": 64}),
        (["--target-accuracy", "0.99"], {"target_accuracy": 0.99}),
        (["--mixed-precision", "bf16"], {"mixed_precision": "bf16"}),
        (["--wandb-tags", "a", "b", "--lr", "1"], {"wandb_tags": ("a", "b"), "lr": 1.0}),
        (["--wandb-notes", "two words"], {"wandb_notes": "two words"}),
        (["--patience", "3", "--val-size", "10"], {"patience": 3, "val_size": 10}),
        (["--deterministic"], {"deterministic": True}),
        (["--no-stretch-epochs"], {"stretch_epochs": False}),
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
        (["--stretch_epochs=False"], {"stretch_epochs": False}),
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
            argv.append(flag)
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
        ("stretch_epochs: false", {"stretch_epochs": False}),
        ("stretch-epochs: false", {"stretch_epochs": False}),
        ("wandb_tags: [a, b]", {"wandb_tags": ("a", "b")}),
        ("wandb_tags: []", {}),
        ("run_dir: null", {}),
        ("mean: -0.5", {"mean": -0.5}),
        ("mixed_precision: no", {"mixed_precision": "no"}),
        ("mixed_precision: 'no'", {"mixed_precision": "no"}),
    ],
)
def test_a_file_may_use_what_yaml_offers(config_file, line, changes):
    assert parse_command_line(["--config", config_file(line + "\n")]) == evolve(RECIPES["fast"](), **changes)


@pytest.mark.parametrize(
    ("argv", "is_stretched"),
    [
        ([], True),
        (["--epochs", "3"], False),
        (["--epochs=3"], False),
        (["--epochs", "3", "--stretch-epochs"], True),
        (["--epochs=3", "--stretch-epochs=True"], True),
        (["--no-stretch-epochs"], False),
    ],
)
def test_whoever_counts_epochs_means_passes_over_this_data_set(argv, is_stretched):
    assert parse_command_line(argv).loop.stretch_epochs is is_stretched


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
        ["--epochs", "3", "--stretch-epochs", "--mixed-precision", "no", "--target-loss", "1e-12"],
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
        (["--model=resnet"], ["--model resnet", "lenet5", "tinynet"]),
        (["--optimizer", "Adam"], ["--optimizer Adam", "did you mean adam?", "adadelta"]),
        (["--mixed-precision", "fp32"], ["--mixed-precision fp32", "bf16", "fp16", "no"]),
        (["--wandb", "None"], ["--wandb", "auto", "offline"]),
        (["--evaluation", "rank"], ["--evaluation rank", "did you mean rank0?", "sharded"]),
        (["--learning-rate", "1"], ["--learning-rate"]),
        (["--globl-batch-size", "64"], ["--globl-batch-size", "Perhaps you meant", "--global-batch-size"]),
        (["--epoch", "3"], ["--epoch", "Perhaps you meant", "--epochs"]),
        (["--lr", "fast"], ["--lr", "fast", "float"]),
        (["--lr"], ["--lr", "Missing"]),
        (["--epochs", "1.5"], ["--epochs", "1.5"]),
        (["--lr", "-1"], ["--lr -1.0: must lie in (0, 1e4]"]),
        (["--epochs", "0"], ["--epochs 0: must lie in [1, 1e6]"]),
        (["--patience", "3"], ["--patience 3: needs --val-size"]),
        (["--label-smoothing", "0.1", "--loss", "nll"], ["--label-smoothing 0.1: needs --loss cross_entropy"]),
        (["--deterministic", "maybe"], ["maybe"]),
        (["stray"], ["stray"]),
        (["--config"], ["--config"]),
    ],
)
def test_a_mistake_is_named_with_the_way_out_and_ends_with_2(capsys, argv, words):
    code, out, err = exit_of(argv, capsys)
    assert (code, out) == (2, "")
    assert "Traceback" not in err
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
        ("lr: -1\n", ["--lr -1.0: must lie in (0, 1e4]"]),
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


def test_the_recipes_are_listed_with_what_to_expect(capsys):
    code, out, err = exit_of(["--list-recipes"], capsys)
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()[::2]] == list(RECIPES)
    assert all(line.strip().startswith("Expect: ") for line in out.splitlines()[1::2])


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
    monkeypatch.setenv("RANK", "1")
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
    done = run_script("train_ddp.py", "--lr", "-1", RANK="1")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")
