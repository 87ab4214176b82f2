"""From pictures in folders to a trained, exported model that predicts and is scored again."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mnist import evaluate
from mnist.config import evolve, to_flat
from mnist.data.batches import Split
from mnist.data.picture_file import natural_order
from mnist.data.sources import DatasetInfo
from mnist.errors import UserError
from mnist.plots import __main__ as plots
from mnist.predict.__main__ import Options, main
from mnist.runs.export import TrainedModel, export_model, load_model
from mnist.runs.state_tensors import module_tensors
from mnist.training.build import build_network
from tests.processes import finish, train
from tests.shapes import CLASSES, draw_shape, write_shapes


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the default recipe on shapes, with the pictures beside it."""
    folder = tmp_path_factory.mktemp("own")
    write_shapes(write_shapes(folder / "shapes", 40, "train"), 10, "test")
    options = "--dataset folder --data-dir shapes --global-batch-size 30 --epochs 30 --run-dir run"
    done = finish(train(*options.split(), "--num-threads", "1", "--no-pictures"), folder)
    assert done.code == 0, done.err
    assert "folder: 120 train / 30 test, 3 classes\n" in done.out
    assert "python -m mnist.evaluate --run run" in done.out
    return folder / "run"


def ask(capsys: pytest.CaptureFixture[str], *pictures: Path, run: Path) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert main(Options(tuple(map(str, pictures)), run=str(run), json=True)) == 0
    answers: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return answers


def test_a_model_of_coloured_shapes_names_the_class_of_nine_new_pictures_in_ten(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [tmp_path / f"{kind}-{seed}.png" for kind in CLASSES for seed in range(10)]
    for path in paths:
        kind, seed = path.stem.split("-")
        draw_shape(kind, 5_000 + int(seed)).save(path)
    answers = ask(capsys, *paths, run=run)
    assert sum(answer["class"] == Path(answer["file"]).stem.split("-")[0] for answer in answers) >= 27
    assert list(answers[0]["probabilities"]) == list(CLASSES)
    assert sum(answers[0]["probabilities"].values()) == pytest.approx(1, abs=1e-4)


def test_what_predict_shows_the_network_is_what_it_was_trained_on(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = json.loads((run / "result.json").read_text())
    answers = ask(capsys, run.parent / "shapes" / "test", run=run)
    right = sum(answer["class"] == Path(answer["file"]).parent.name for answer in answers)
    assert (right, len(answers)) == (result["test"]["num_correct"], 30)


def test_the_export_holds_classes_shape_mean_and_std(run: Path) -> None:
    trained = load_model(run / "export" / "best")
    assert (trained.info.class_names, trained.info.image_shape, trained.info.has_digits) == (
        CLASSES,
        (3, 28, 28),
        False,
    )
    image = trained.config.image
    assert (len(image.mean), len(image.std)) == (3, 3)
    assert image.mean[0] > 0.5  # light ground
    assert trained.model(trained.transform(torch.zeros(1, 3, 28, 28, dtype=torch.uint8))).shape == (1, 3)


def test_a_picture_has_a_line_with_its_class_and_a_bar_for_each(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw_shape("square", 5_001).save(tmp_path / "x.png")
    assert main(Options((str(tmp_path / "x.png"),), run=str(run), save=str(tmp_path / "seen.png"))) == 0
    line, *bars = capsys.readouterr().out.splitlines()
    assert "square" in line
    assert [bar.split()[0] for bar in bars] == list(CLASSES)
    assert Image.open(tmp_path / "seen.png").width > 500


def test_an_unsure_answer_speaks_of_classes_and_not_of_digits(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mnist.predict.answers.UNSURE", 1.1)
    Image.new("RGB", (30, 30), "grey").save(tmp_path / "nothing.png")
    (answer,) = ask(capsys, tmp_path / "nothing.png", run=run)
    assert answer["warning"] == "not sure: no class is much more probable than the others"


def test_the_numbers_of_a_coloured_picture_are_three_tables(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.parent)
    picture = plots.Pixels(run=str(run), out=str(tmp_path / "pixels.png"), image=3)
    assert plots.main(plots.Options(picture)) == 0
    *tables, _file = capsys.readouterr().out.splitlines()
    assert [len(line.split()) for line in tables] == [*[28] * 28, 0, *[28] * 28, 0, *[28] * 28]


def test_a_run_without_an_export_is_drawn_with_the_classes_of_its_pictures(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.parent)
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("export", "checkpoints", "result.json"))
    assert plots.main(plots.Options(plots.Architecture(run=str(tmp_path / "run")))) == 0
    *_, last, _total, _file = capsys.readouterr().out.splitlines()
    assert "  3 units  " in last
    assert plots.main(plots.Options(plots.Features(run=str(tmp_path / "run"), untrained=True))) == 0
    assert (tmp_path / "run" / "pictures" / "features-untrained.png").is_file()


def test_evaluate_gives_the_same_numbers_and_finds_the_pictures_by_itself(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.parent)
    monkeypatch.setenv("MNIST_DATA_DIR", "elsewhere")
    assert evaluate.main(evaluate.Options(run=str(run), num_threads=1)) == 0
    assert "exactly as in training" in capsys.readouterr().out


def test_other_classes_than_the_models_are_refused_by_name(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run.parent / "shapes", tmp_path / "shapes")
    for split in ("train", "test"):
        (tmp_path / "shapes" / split / "square").rename(tmp_path / "shapes" / split / "box")
    with pytest.raises(UserError, match=r"has the classes box, circle, triangle, but the model was trained for circle"):
        evaluate.main(evaluate.Options(run=str(run), data_dir=str(tmp_path / "shapes")))


def test_a_run_resumes_on_the_same_pictures_and_not_on_changed_ones(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run.parent, tmp_path / "own")
    folder = tmp_path / "own"
    options = "--dataset folder --data-dir shapes --global-batch-size 30 --schedule constant --run-dir other"
    command = train(*options.split(), "--num-threads", "1", "--no-pictures")
    assert finish([*command, "--epochs", "1"], folder).code == 0
    shutil.rmtree(folder / "shapes" / ".cache")
    assert finish([*command, "--epochs", "2"], folder).code == 0
    draw_shape("circle", 9).save(folder / "shapes" / "train" / "circle" / "0.png")
    done = finish([*command, "--epochs", "3"], folder)
    assert (done.code, "--mean was" in done.err, "the data files have changed" in done.err) == (2, True, True), done.err


def test_names_of_classes_are_printed_as_they_are_and_not_as_markup(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run, tmp_path / "run")
    names = sorted(["[bold]x", "cat [old]", ":cat:"], key=natural_order)
    path = tmp_path / "run" / "export" / "best" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "class_names": names}))
    shutil.copytree(run.parent / "shapes", tmp_path / "shapes")
    for split in ("train", "test"):
        for name, kind in zip(names, CLASSES, strict=True):
            (tmp_path / "shapes" / split / kind).rename(tmp_path / "shapes" / split / name)
    assert (
        main(Options((str(next((tmp_path / "shapes" / "test" / ":cat:").iterdir())),), run=str(tmp_path / "run"))) == 0
    )
    predicted = capsys.readouterr().out
    evaluate.main(evaluate.Options(run=str(tmp_path / "run"), data_dir=str(tmp_path / "shapes"), num_threads=1))
    evaluated = capsys.readouterr().out
    for name in names:
        assert name in predicted
        assert name in evaluated


def test_two_models_are_compared_on_pictures_in_the_size_and_channels_of_each(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = load_model(run / "export" / "best")
    grey, config = DatasetInfo((1, 40, 40), CLASSES), evolve(trained.config, image_size=40, mean=(0.5,), std=(0.2,))
    weights = module_tensors(build_network(config, grey))
    export_model(tmp_path, weights, {**to_flat(config), **asdict(grey)})
    shapes, score = [], evaluate._score

    def seen(trained: TrainedModel, split: Split, *others: Any) -> Any:
        shapes.append(split.image_shape)
        return score(trained, split, *others)

    monkeypatch.setattr(evaluate, "_score", seen)
    options = evaluate.Options(run=str(run), versus=str(tmp_path), data_dir=str(run.parent / "shapes"), num_threads=1)
    assert evaluate.main(options) == 0
    assert shapes == [(3, 28, 28), (1, 40, 40)]


def test_the_model_that_does_not_fit_the_pictures_is_named(run: Path, smoke_run: Path) -> None:
    options = evaluate.Options(run=str(run), versus=str(smoke_run), data_dir=str(run.parent / "shapes"))
    with pytest.raises(UserError, match=r"folder: has 3 classes, but the model of --versus was trained for 10"):
        evaluate.main(options)
