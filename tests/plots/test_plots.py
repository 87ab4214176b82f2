from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mnist.config import evolve, to_flat
from mnist.data import download
from mnist.data.sources import DatasetInfo
from mnist.errors import RunError, UserError
from mnist.plots import __main__ as plots
from mnist.plots import run_pictures
from mnist.plots.__main__ import (
    Architecture,
    Confusion,
    Curves,
    Features,
    Filters,
    Mistakes,
    Options,
    Pixels,
    Samples,
)
from mnist.plots.features import activations
from mnist.recipes import RECIPES
from mnist.runs.export import export_model, load_model
from mnist.training.build import build_network
from tests.processes import PYTHON, ROOT, finish
from tests.ranks import run_ranks
from tests.runs.test_run import SMALL
from tests.runs.test_run import run as train_small

REAL_DIR = os.environ.get("MNIST_DATA_DIR", "")
needs_mnist = pytest.mark.skipif(not Path(REAL_DIR, "MNIST", "raw").is_dir(), reason="MNIST_DATA_DIR has no MNIST")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run of `smoke`, scored every 23 steps."""
    folder = tmp_path_factory.mktemp("trained")
    assert run_ranks(train_small, 1, folder / "run", *SMALL, "--log-every", "5", "--min-accuracy", "0.1") == [0]
    return folder / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A copy of it below runs/, the working directory around it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MNIST_DATA_DIR", raising=False)
    shutil.copytree(trained, tmp_path / "runs" / "one")
    return "runs/one"


def draw(picture: Any, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Draws; returns the lines printed, the last of which names a picture that is there."""
    assert plots.main(Options(picture)) == 0
    lines = capsys.readouterr().out.splitlines()
    with Image.open(lines[-1]) as image:
        assert len(image.convert("L").getcolors() or []) > 2
    return lines


@pytest.mark.parametrize(
    ("picture", "name"),
    [
        (Samples(), "samples"),
        (Curves(), "curves"),
        (Features(), "features"),
        (Features(image=(7,)), "features-7"),
        (Features(image=(3, 4, 5)), "features-3-4-5"),
        (Features(image=tuple(range(20)), every_layer=True), "features-20-images"),
        (Features(untrained=True), "features-untrained"),
        (Pixels(image=3), "pixels-3"),
        (Filters(), "filters"),
        (Filters(untrained=True), "filters-untrained"),
        (Confusion(), "confusion"),
        (Mistakes(), "mistakes"),
        (Architecture(), "architecture"),
    ],
)
def test_a_picture_of_the_newest_run_lies_with_it(
    run: str, capsys: pytest.CaptureFixture[str], picture: Any, name: str
) -> None:
    assert draw(picture, capsys)[-1] == f"{run}/pictures/{name}.png"


@pytest.mark.parametrize("kind", [Samples, Pixels, Features, Filters, Confusion, Mistakes, Architecture])
def test_run_and_out_are_obeyed(run: str, capsys: pytest.CaptureFixture[str], kind: Any) -> None:
    for folder in (run, f"{run}/export/last"):
        lines = draw(kind(run=folder, out="elsewhere/picture.png"), capsys)
        assert lines[-1] == "elsewhere/picture.png"
    assert not Path(run, "pictures").exists()


def test_the_title_says_which_weights_are_shown(run: str) -> None:
    result = json.loads(Path(run, "result.json").read_text())
    Path(run, "result.json").write_text(json.dumps({**result, "best": {**result["best"], "step": 46}}))
    steps = {"": "46", "/export/best": "46", "/export/last": "69"}
    titles = {folder: plots.find_subject(run + folder).title("digits") for folder in steps}
    assert titles == {folder: f"smoke-changed on digits, seed 0, step {step}" for folder, step in steps.items()}


def test_the_last_weights_are_shown_where_they_are_asked_for(run: str) -> None:
    trained = load_model(Path(run, "export", "best"))
    other = {name: value + 1 for name, value in trained.model.state_dict().items()}
    export_model(Path(run, "export", "last"), other, to_flat(trained.config))
    best, last = (plots.find_subject(run + folder).network().state_dict() for folder in ("", "/export/last"))
    assert all(torch.equal(last[name], best[name] + 1) for name in best)


def test_an_export_without_its_run_is_enough(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(Path(run, "export", "best"), "model")
    assert draw(Features(run="model"), capsys) == ["model/pictures/features.png"]
    assert draw(Mistakes(run="model"), capsys) == ["model/pictures/mistakes.png"]


@pytest.mark.parametrize(
    ("picture", "name"),
    [
        (Samples(recipe="smoke"), "smoke-samples"),
        (Features(recipe="smoke"), "smoke-features-untrained"),
        (Filters(recipe="lenet5"), "lenet5-filters-untrained"),
        (Architecture(recipe="yannet"), "yannet-architecture"),
    ],
)
def test_a_recipe_needs_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], picture: Any, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert draw(picture, capsys)[-1] == f"{name}.png"


def test_untrained_means_the_weights_that_the_run_began_with(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[torch.nn.Sequential] = []
    monkeypatch.setattr(run_pictures, "filter_figure", lambda model, *rest: drawn.append(model))
    monkeypatch.setattr(plots.pictures, "save_picture", lambda figure, path: path)
    for untrained in (True, True, False):
        plots.main(Options(Filters(untrained=untrained)))
    before, again, after = (model.state_dict() for model in drawn)
    assert all(torch.equal(before[name], again[name]) for name in before)
    assert not any(torch.equal(before[name], after[name]) for name in before)
    assert all(
        torch.equal(after[name], value)
        for name, value in load_model(Path(run, "export", "best")).model.state_dict().items()
    )


def test_features_are_those_of_the_image_that_was_asked_for(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, Any] = {}

    def remember(outputs: dict[str, torch.Tensor], names: Any, title: str, subtitle: str, said: Any) -> None:
        drawn.update(outputs=outputs, title=title, subtitle=subtitle)

    monkeypatch.setattr(run_pictures.pictures, "draw_features", remember)
    monkeypatch.setattr(plots.pictures, "save_picture", lambda figure, path: path)
    plots.main(Options(Features(image=(11,), every_layer=True)))
    trained = load_model(Path(run, "export", "best"))
    dataset = plots.find_subject(run).dataset
    expected = activations(trained.model, trained.transform(dataset.test.images[11:12]))
    assert all(torch.equal(drawn["outputs"][name], output) for name, output in expected.items())
    assert drawn["title"] == "smoke-changed on digits, seed 0, step 69"
    assert f"test image 11: true {int(dataset.test.labels[11])}" in drawn["subtitle"]


def test_the_mistakes_of_a_run_are_as_many_as_it_counted(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = []
    monkeypatch.setattr(run_pictures.pictures, "draw_mistakes", lambda _split, mistakes, *rest: found.extend(mistakes))
    monkeypatch.setattr(plots.pictures, "save_picture", lambda figure, path: path)
    plots.main(Options(Mistakes()))
    scores = json.loads(Path(run, "result.json").read_text())["test"]
    wrong, _, confidences = found
    assert len(wrong) == scores["num_samples"] - scores["num_correct"]
    assert confidences[wrong].tolist() == sorted(confidences[wrong].tolist(), reverse=True)


def test_curves_of_a_run_that_has_not_finished(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(Path(run, "export"))
    Path(run, "result.json").unlink()
    with Path(run, "metrics.jsonl").open("a") as file:
        file.write('{"step": 70, "epo')
    assert draw(Curves(), capsys) == [f"{run}/pictures/curves.png"]
    assert draw(Samples(run=run), capsys) == [f"{run}/pictures/samples.png"]


@pytest.mark.parametrize("runs", [(("runs/one", "runs/two"),), (("runs/one",), ("runs/two",))])
def test_curves_of_two_runs(run: str, capsys: pytest.CaptureFixture[str], runs: tuple[tuple[str, ...], ...]) -> None:
    shutil.copytree(run, "runs/two")
    assert draw(Curves(run=runs), capsys) == ["runs/one/pictures/comparison.png"]


def test_curves_of_all_folders_below_runs_leave_out_those_without_records(
    run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--run runs/*/` ended with an error after `python -m mnist.reproduce`, which keeps its runs in runs/reproduce."""
    shutil.copytree(run, "runs/two")
    Path("runs/a-reproduce").mkdir()
    assert plots.main(Options(Curves(run=(("runs/a-reproduce", "runs/one", "runs/two"),)))) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines() == ["runs/one/pictures/comparison.png"]
    assert "left out: --run runs/a-reproduce: no metrics.jsonl there" in printed.err


def test_the_table_of_layers_is_printed(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = draw(Architecture(recipe="convnet"), capsys)
    assert lines[0].split() == ["layer", "what", "it", "is", "output", "neurons", "parameters", "connections", "MAC"]
    assert lines[-2].split() == ["total", "1,007,590", "1,337,270", "1,329,000"]


def test_the_numbers_of_an_image_are_printed(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    *lines, _ = draw(Pixels(image=3), capsys)
    expected = plots.find_subject(run).dataset.test.images[3].tolist()
    assert [[int(number) for number in line.split()] for line in lines] == expected


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (Samples(run="none"), "--run none: no run there"),
        (Curves(run=(("none",),)), "--run none: no metrics.jsonl there"),
        (Features(run="none"), "--run none: no run there"),
        (Filters(run="bare"), "--run bare: no exported model there"),
        (Confusion(run="bare"), "--run bare: no test scores in result.json"),
        (Mistakes(run="bare"), "--run bare: no exported model there"),
        (Samples(run="broken"), "broken/config.json: holds no JSON object"),
        (Curves(run=(("bare",),)), "--run bare: no record in metrics.jsonl yet"),
        (Samples(recipe="lenet"), "--recipe lenet: unknown; did you mean lenet5"),
        (Samples(recipe="smoke", run="bare"), "--run and --recipe: give one of them"),
        (Samples(augmented=True), "--augmented: smoke trains on its images as they are"),
        (Features(image=(0, 360)), r"--image 360: must lie in 0\.\.359"),
        (Features(image=()), "--image: name an image"),
        (Pixels(image=360), r"--image 360: must lie in 0\.\.359"),
        (Features(image=(-1,)), r"--image -1: must lie in 0\.\.359"),
        (Curves(out="picture.gif"), r"--out picture.gif: must end in \.png, \.pdf, \.svg"),
        (Confusion(out="picture"), "--out picture: must end in"),
    ],
)
def test_a_mistake_is_one_line(run: str, picture: Any, message: str) -> None:
    Path("bare").mkdir()
    shutil.copy(Path(run, "config.json"), "bare")
    Path("bare", "metrics.jsonl").touch()
    Path("broken").mkdir()
    Path("broken", "config.json").write_text("[]")
    with pytest.raises((UserError, RunError), match=message) as caught:
        plots.main(Options(picture))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [Samples, Curves, Features, Filters, Confusion, Mistakes, Architecture])
def test_without_any_run_each_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"--run: no .*run below runs/; train one"):
        plots.main(Options(kind()))


def test_data_that_are_not_there_are_one_line(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "download", lambda *_: (_ for _ in ()).throw(OSError("no network")))
    for folder in (Path(run), Path(run, "export", "best")):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "dataset": "mnist"}))
    for picture in (Samples(data_dir="nowhere"), Features(data_dir="nowhere"), Mistakes(data_dir="nowhere")):
        with pytest.raises(UserError, match="--dataset mnist: not in nowhere/MNIST/raw and the download failed"):
            plots.main(Options(picture))


@needs_mnist
def test_the_data_folder_of_now_counts_more_than_the_one_of_then(
    run: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads(Path(run, "config.json").read_text())
    Path(run, "config.json").write_text(json.dumps({**config, "dataset": "mnist", "data_dir": "gone"}))
    draw(Samples(run=run, data_dir=REAL_DIR), capsys)
    monkeypatch.setenv("MNIST_DATA_DIR", REAL_DIR)
    draw(Samples(run=run), capsys)


@pytest.mark.launch
def test_the_command_prints_the_path_alone_and_errors_in_one_line(run: str, tmp_path: Path) -> None:
    command = [*PYTHON, "-m", "mnist.plots"]
    notebook = "module://matplotlib_inline.backend_inline"  # in the environment of whatever a notebook starts
    done = finish([*command, "curves", "--run", run, "--out", "a.png"], tmp_path, MPLBACKEND=notebook)
    assert (done.code, done.out, done.err) == (0, "a.png\n", "")
    wrong = finish([*command, "confusion", "--run", "none"], tmp_path)
    assert (wrong.code, wrong.out, wrong.err.count("\n")) == (2, "", 1)
    assert wrong.err.startswith("error: --run none: no run there")


@pytest.mark.launch
def test_help_needs_no_torch(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('torch was imported')")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    for arguments in (["--help"], ["curves", "--help"]):
        done = finish([*PYTHON, "-m", "mnist.plots", *arguments], tmp_path, PYTHONPATH=path)
        assert done.code == 0
        assert "--run" in done.out or "curves" in done.out
    assert finish([*PYTHON, "-m", "mnist.plots", "curvs"], tmp_path, PYTHONPATH=path).code == 2


def test_a_copied_export_has_its_own_classes_and_channels(tmp_path):
    info = DatasetInfo((3, 28, 28), ("cat", "dog"))
    config = evolve(RECIPES["smoke"](), dataset="folder")
    weights = build_network(config, info).state_dict()
    export_model(tmp_path / "copy", weights, {**to_flat(config), **dataclasses.asdict(info)})
    subject = plots.find_subject(str(tmp_path / "copy"))
    assert (subject.info, subject.image_shape) == (info, (3, 28, 28))
