from __future__ import annotations

import dataclasses
import json
import shutil
import statistics
import subprocess
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from mnist import reproduce
from mnist.errors import RunError, UserError
from mnist.reproduce import Options, Side, describe, main, paired_difference, render, summarise
from tests.processes import ROOT


@pytest.fixture
def documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A README and results of their own."""
    monkeypatch.setattr(reproduce, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(reproduce, "README", tmp_path / "README.md")
    (tmp_path / "README.md").write_text("before\n<!-- results -->\nold\n<!-- /results -->\nafter\n")
    return tmp_path


def made(seed: int, accuracy: float, **changes: Any) -> dict[str, Any]:
    environment = {"ranks": [{"device": "cpu"}], "threads_per_process": 2, "packages": {"torch": "2.0"}}
    return {
        "status": "finished",
        "dataset": "mnist",
        "num_params": 10,
        "seed": seed,
        "steps": 157,
        "epochs": 1.0,
        "precision": "fp32",
        "test": {"accuracy": accuracy},
        "epoch_accuracies": [accuracy],
        "train_time_s": 2.0,
        "total_time_s": 6.0,
        "environment": environment,
        **changes,
    }


def test_a_row_is_mean_deviation_minimum_and_number_of_seeds() -> None:
    accuracies = [0.9921, 0.9910, 0.9930]
    row = summarise("fast", [made(seed, accuracy) for seed, accuracy in enumerate(accuracies)])
    assert row["accuracy_mean"] == pytest.approx(sum(accuracies) / 3)
    assert row["accuracy_std"] == pytest.approx(statistics.stdev(accuracies))
    line = next(line for line in render({"rows": [row]}).splitlines() if line.startswith("| `fast`"))
    assert "99.20 +- 0.10 | 99.10 | 3 | 2 s | not measured |" in line


def test_what_a_source_states_stands_beside_the_same_number_of_ours() -> None:
    epochs = [[0.96, 0.97, 0.98], [0.965, 0.975, 0.985]]
    runs = [made(seed, accuracies[-1], epoch_accuracies=accuracies) for seed, accuracies in enumerate(epochs)]
    rows = [summarise(name, runs) for name in ("lenet5_original", "lenet5", "yannet", "fast")]
    assert [row["epoch_accuracies"] for row in rows] == [epochs, epochs, epochs, None], "fast has one epoch"
    original, lenet5, yannet, fast = render({"rows": rows}).splitlines()[2:6]
    assert "| 97.28 (mean over epochs) | 97.25 +- 0.35 | 98.25 +- 0.35 | 98.00 | 2 |" in original
    assert "| - | - | 98.25 +- 0.35 | 98.00 | 2 |" in lenet5
    assert "| 97.29 / 98.08 / 98.33 | 96.25 / 97.25 / 98.25 | 98.25 +- 0.35 |" in yannet
    assert "| - | - | 98.25 +- 0.35 |" in fast


def test_a_row_without_accuracies_of_epochs_shows_none() -> None:
    row = summarise("lenet5_original", [made(0, 0.98, epoch_accuracies=[0.98] * 5)])
    old = {name: value for name, value in row.items() if name != "epoch_accuracies"}
    for known in (old, summarise("lenet5_original", [made(0, 0.98)], is_sample=True)):
        assert "| 97.28 (mean over epochs) | - |" in render({"rows": [known]})


def test_accuracies_of_epochs_are_the_records_of_test_at_whole_epochs(tmp_path: Path) -> None:
    place = {"dataset": "mnist", "loss": 0.1}
    records = [
        {"step": 5, "epoch": 0.5, "split": "test", "accuracy": 0.5},
        {"step": 10, "epoch": 1.0, "split": "train", "accuracy": 0.6},
        {"step": 10, "epoch": 1.0, "split": "test", "accuracy": 0.7},
        {"step": 20, "epoch": 2.0, "split": "test", "accuracy": 0.8},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record | place) + "\n" for record in records))
    assert reproduce._epoch_accuracies(tmp_path) == [0.7, 0.8]


def test_the_command_of_a_row_has_the_threads_that_were_asked_for() -> None:
    row = summarise("smoke", [made(0, 0.96)])  # which has one by itself
    assert row["command"] == "python train_ddp.py --recipe smoke --seed SEED --num-threads 2"


def test_a_sample_is_for_its_time_alone() -> None:
    row = summarise("accurate", [made(0, 0.97, epochs=0.8, train_time_s=100.0)], is_sample=True)
    assert row["train_time_s"] == pytest.approx(100.0 * 36 / 0.8)
    line = next(line for line in render({"rows": [row]}).splitlines() if line.startswith("| `accurate`"))
    assert "not measured | - | - | 1.2 h, extrapolated | not measured |" in line


def test_rows_of_other_hardware_stay_apart() -> None:
    on_cpu = summarise("fast", [made(0, 0.99)])
    gpu = made(0, 0.99)["environment"] | {"ranks": [{"device": "A GPU"}]}
    on_gpu = summarise("fast", [made(0, 0.99, environment=gpu, train_time_s=0.05)])
    table = render({"rows": [on_cpu, on_gpu]})
    assert "| 2 s | 0.05 s |" in table
    assert "A GPU" in table


def test_what_was_measured_elsewhere_than_most_is_named() -> None:
    rows = [summarise(name, [made(0, 0.99)]) for name in ("fast", "smoke", "mlp")]
    rows[1] = {**rows[1], "hardware": "another one"}
    line = render({"rows": rows}).splitlines()[-1]
    here, *elsewhere = line.partition("Measured on: ")[2].split("; ")
    assert here.endswith(", 2 threads, torch 2.0")
    assert elsewhere == ["`smoke` on: another one, 2 threads, torch 2.0."]
    assert render({"rows": []}).endswith("Measured on: nothing yet.\n")


def test_finished_runs_are_taken_as_they_are_and_the_table_is_replaced(documents: Path, smoke_run: Path) -> None:
    shutil.copytree(smoke_run, documents / "runs" / "smoke-seed0")
    assert main(Options(recipe=("smoke",), seeds=1, publish=True, runs_dir=str(documents / "runs"))) == 0
    (row,) = json.loads((documents / "results.json").read_text())["rows"]
    assert row["accuracies"] == [json.loads((smoke_run / "result.json").read_text())["test"]["accuracy"]]
    text = (documents / "README.md").read_text()
    assert text.startswith("before\n<!-- results -->\n| recipe |")
    assert text.endswith("<!-- /results -->\nafter\n")
    assert "old" not in text
    assert f"{row['accuracy_mean']:.2%}"[:-1] + " (of digits)" in text


def test_without_publish_no_document_changes_and_seeds_are_printed(
    documents: Path, smoke_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(smoke_run, documents / "runs" / "smoke-seed0")
    assert main(Options(recipe=("smoke",), seeds=1, json=True, runs_dir=str(documents / "runs"))) == 0
    printed = capsys.readouterr()
    (row,) = json.loads(printed.out)["rows"]
    assert f"smoke, seed 0: {row['accuracy_mean']:.2%}, " in printed.err
    assert "old" in (documents / "README.md").read_text()
    assert not (documents / "results.json").exists()


def test_a_paired_difference_has_the_95_percent_interval_of_student() -> None:
    """Of differences 1, 2, 3, 4: mean 2.5, standard error 0.6455; t of 3 degrees of freedom is 3.18245."""
    mean, interval = paired_difference([10, 20, 30, 40], [11, 22, 33, 44])
    assert (mean, interval) == (2.5, pytest.approx((2.5 - 2.05426, 2.5 + 2.05426), abs=1e-5))
    assert paired_difference([0.5], [0.75]) == (0.25, None)


def compared(monkeypatch: pytest.MonkeyPatch, first: list[float], second: list[float], same: bool = False) -> None:
    accuracies = {"fast": first, "mlp": second}

    def run(side: Side, seed: int, _options: Options) -> dict[str, Any]:
        return made(seed, accuracies[side.name][seed], train_time_s=2.0 if side.name == "fast" else 3.0)

    monkeypatch.setattr(reproduce, "_run", run)
    monkeypatch.setattr(reproduce, "_same_weights", lambda *_: same)
    assert main(Options(recipe=("fast",), versus="mlp", seeds=len(first))) == 0


def test_a_recipe_versus_itself_is_run_twice() -> None:
    with reproduce._sides("smoke", "smoke") as sides:
        assert [(side.recipe, side.name) for side in sides] == [("smoke", "smoke"), ("smoke", "smoke-again")]


def test_versus_ends_after_the_first_pair_where_the_data_sets_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[str] = []

    def run(side: Side, seed: int, _options: Options) -> dict[str, Any]:
        trained.append(f"{side.name} {seed}")
        return made(seed, 0.9, dataset="digits" if side.name == "smoke" else "mnist")

    monkeypatch.setattr(reproduce, "_run", run)
    with pytest.raises(reproduce.RunError, match="--versus smoke: trained on digits, but --recipe fast on mnist"):
        main(Options(recipe=("fast",), versus="smoke", seeds=5))
    assert trained == ["fast 0", "smoke 0"]


def test_versus_refuses_an_older_run_with_another_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was taken as it was, and the ratio of the times was that of the threads."""

    def run(side: Side, seed: int, _options: Options) -> dict[str, Any]:
        found = made(seed, 0.9)
        return found | {"environment": found["environment"] | {"threads_per_process": 1 if side.name == "mlp" else 2}}

    monkeypatch.setattr(reproduce, "_run", run)
    with pytest.raises(reproduce.RunError, match=r"different threads per process \(1, 2\); remove the older ones"):
        main(Options(recipe=("fast",), versus="mlp", seeds=1))


@pytest.mark.parametrize(
    ("second", "verdict"),
    [
        ([0.991, 0.993, 0.992], "mlp is better"),
        ([0.981, 0.983, 0.982], "fast is better"),
        ([0.984, 0.992, 0.988], "no difference shown"),
    ],
)
def test_the_better_recipe_is_named_where_the_interval_excludes_zero(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], second: list[float], verdict: str
) -> None:
    compared(monkeypatch, [0.986, 0.987, 0.988], second)
    first_line, second_line, difference, time, weights = capsys.readouterr().out.splitlines()
    assert first_line == "fast: test accuracy, %: 98.70 +- 0.10, minimum 98.60, n=3; 2 s of training"
    assert second_line.startswith("mlp: ")
    assert difference.endswith(f": {verdict}")
    assert (time, weights) == (
        "training takes 1.50 times as long (median of the pairs)",
        "weights: bit-identical for 0 of 3 seeds",
    )


def test_a_commit_is_compared_in_a_checkout_of_its_own_and_its_weights_are_the_same(
    smoke_run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repository = tmp_path / "repository"
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(repository)]
    subprocess.run(["git", "init", "-q", str(repository)], check=True)
    (repository / "train_ddp.py").write_text("old")
    for content in ("old", "new"):
        (repository / "train_ddp.py").write_text(content)
        subprocess.run([*git, "add", "-A"], check=True)
        subprocess.run([*git, "commit", "-q", "-m", content], check=True)
    monkeypatch.setattr(reproduce, "ROOT", repository)
    codes = []

    def run(side: Side, seed: int, options: Options) -> dict[str, Any]:
        codes.append((side.root / "train_ddp.py").read_text())
        shutil.copytree(smoke_run, side.folder(seed, options))
        return made(seed, 0.9)

    monkeypatch.setattr(reproduce, "_run", run)
    options = Options(recipe=("smoke",), versus="HEAD~1", seeds=2, json=True, runs_dir=str(tmp_path / "runs"))
    assert main(options) == 0
    assert codes == ["new", "old"] * 2
    comparison = json.loads(capsys.readouterr().out)["comparison"]
    assert comparison["num_identical_weights"] == 2
    assert comparison["interval"] == [0.0, 0.0]
    assert len(list((tmp_path / "runs").iterdir())) == 4
    assert main(dataclasses.replace(options, versus="HEAD", seeds=1, runs_dir=str(tmp_path / "same"))) == 0
    assert len(list((tmp_path / "same").iterdir())) == 2, "this commit is run twice, not compared with the same run"
    trees = subprocess.run([*git, "worktree", "list"], check=True, capture_output=True, text=True).stdout
    assert len(trees.splitlines()) == 1
    (repository / "train_ddp.py").write_text("changed")
    with pytest.raises(UserError, match="--versus HEAD~1: compares commits; commit or stash"):
        main(options)
    with pytest.raises(UserError, match=r"--versus nothing: neither a recipe .* nor a commit"):
        main(dataclasses.replace(options, versus="nothing"))


def test_an_error_of_git_is_one_line_that_names_its_command() -> None:
    with pytest.raises(RunError, match=r"^git rev-parse: fatal: .+$"):
        reproduce._git("rev-parse", "--verify", "no-such-commit")


def test_other_weights_are_not_the_same(smoke_run: Path, tmp_path: Path) -> None:
    shutil.copytree(smoke_run, tmp_path / "other")
    path = tmp_path / "other" / "export" / "last" / "model.safetensors"
    weights = load_file(path)
    name = next(iter(weights))
    weights[name].flat[0] += 1e-7
    save_file(weights, path)
    assert not reproduce._same_weights(smoke_run, tmp_path / "other")
    assert reproduce._same_weights(smoke_run, smoke_run)


@pytest.mark.parametrize(
    "changes",
    [{"recipe": ("fast", "mlp")}, {"publish": True}, {"sample_steps": 5}],
    ids=lambda changes: next(iter(changes)),
)
def test_versus_needs_one_recipe_run_to_the_end(changes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="--versus mlp: needs one --recipe"):
        Options(**{"recipe": ("fast",), "versus": "mlp"} | changes)


@pytest.mark.parametrize("num_finished", [0, 2])
def test_ctrl_c_keeps_the_seeds_that_are_finished(
    documents: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], num_finished: int
) -> None:
    def run(_side: Side, seed: int, _options: Options) -> dict[str, Any]:
        if seed == num_finished:
            raise KeyboardInterrupt
        return made(seed, 0.99)

    monkeypatch.setattr(reproduce, "_run", run)
    assert main(Options(recipe=("fast", "mlp"), seeds=5, json=True, publish=True)) == 130
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["recipe"], row["accuracies"]) for row in rows] == [("fast", [0.99, 0.99])] * (num_finished > 0)
    assert not (documents / "results.json").exists(), "a row of fewer seeds is not published"


@pytest.mark.launch
def test_what_is_missing_is_run(documents: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = documents / "runs"
    options = Options(
        ("smoke",), seeds=1, sample_steps=2, num_threads=1, mixed_precision="bf16", publish=True, runs_dir=str(folder)
    )
    (documents / "runs").touch()
    with pytest.raises(reproduce.RunError, match="smoke, seed 0"):
        main(options)
    (documents / "runs").unlink()
    main(options)
    out, err = capfd.readouterr()
    assert "python -m mnist." not in out + err, "what a single training would say of the commands to type next"
    (row,) = json.loads((documents / "results.json").read_text())["rows"]
    assert row["train_time_is_extrapolated"]
    assert row["accuracies"] == []
    assert row["command"] == "python train_ddp.py --recipe smoke --seed SEED --mixed-precision bf16"
    assert [path.name for path in folder.iterdir()] == ["smoke-seed0-bf16-sample"], "apart from runs in fp32"
    assert f"1 thread, bf16, torch {row['torch']}." in (documents / "README.md").read_text()


def test_every_published_recipe_has_a_source_and_stated_numbers_are_found() -> None:
    published = json.loads((ROOT / "docs" / "results.json").read_text())["rows"]
    assert all(describe(row["recipe"])[0] for row in published)
    assert describe("lenet5") == ('coursework "LeNet-5 on MNIST"', "-")
    assert describe("lenet5_original")[1] == "97.28 (mean over epochs)"
    assert describe("lenet5_classic")[1] == "about 92"
    assert describe("yannet")[1] == "97.29 / 98.08 / 98.33"
    assert describe("convnet") == ("dwgan/MNIST-PyTorch", "-")


def test_mistakes_name_the_flag() -> None:
    with pytest.raises(UserError, match="--recipe fst: unknown; did you mean fast"):
        Options(recipe=("fst",))
    with pytest.raises(UserError, match=r"--seeds 0: must lie in \[1, 1e6\]"):
        Options(seeds=0)
