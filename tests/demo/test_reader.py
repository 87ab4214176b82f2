"""What the page is told of a picture, without a browser; with a model of the embedded digits."""

from __future__ import annotations

import io
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
from PIL import Image, ImageOps

from mnist.config import evolve, to_flat
from mnist.data.sources import DatasetInfo
from mnist.demo.reader import Reading, find_models, load, read
from mnist.errors import UserError
from mnist.predict.__main__ import predict
from mnist.recipes import RECIPES
from mnist.runs.export import export_model, load_model
from mnist.runs.state_tensors import module_tensors
from mnist.training.build import build_network
from tests.processes import ROOT

PICTURE = ROOT / "docs" / "digit.png"


@pytest.fixture
def two_runs(smoke_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with runs/old and runs/new."""
    for age_s, name in ((10, "new"), (1000, "old")):
        shutil.copytree(smoke_run, tmp_path / "runs" / name)
        weights = tmp_path / "runs" / name / "export" / "best" / "model.safetensors"
        os.utime(weights, (weights.stat().st_mtime - age_s,) * 2)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


def test_the_page_answers_as_predict_does(smoke_run: Path) -> None:
    folder = smoke_run / "export" / "best"
    (prediction,) = predict(load_model(folder), [str(PICTURE)])
    answers = read(PICTURE.read_bytes(), str(folder), with_layers=False).answers
    assert [answer.as_dict() for answer in answers] == [answer.as_dict() for answer in prediction.answers]
    assert (answers[0].seen.pixels == prediction.answers[0].seen.pixels).all()


def test_a_picture_without_a_digit_is_an_error_of_one_line(smoke_run: Path) -> None:
    reading = read(b"no picture", str(smoke_run / "export" / "best"), with_layers=True)
    assert reading.answers == ()
    assert reading.error is not None
    assert reading.error.startswith("not a picture")
    assert reading.class_names == tuple("0123456789")


def test_layers_go_from_the_input_to_ten_logits_and_only_if_asked_for(smoke_run: Path) -> None:
    folder = str(smoke_run / "export" / "best")
    reading = read(PICTURE.read_bytes(), folder, with_layers=True)
    names = list(reading.outputs)
    assert names[0] == "input"
    probabilities = reading.outputs[names[-1]].softmax(dim=1)[0].tolist()
    assert probabilities == pytest.approx(reading.answers[0].probabilities, abs=1e-5)
    assert read(PICTURE.read_bytes(), folder, with_layers=False).outputs == {}


def test_the_newest_run_comes_first_or_the_one_that_is_named(two_runs: Path) -> None:
    assert [Path(folder).parents[1].name for folder in find_models(None)] == ["new", "old"]
    assert [Path(folder).parents[1].name for folder in find_models("runs/old")] == ["old", "new"]
    assert all(
        text.startswith(f"{Path(f).parents[1].name} (smoke on digits, 9") for f, text in find_models(None).items()
    )


def test_a_damaged_run_is_no_choice_and_an_error_where_it_is_named(two_runs: Path) -> None:
    (two_runs / "old/export/best/config.json").write_text("{")
    assert [Path(folder).parents[1].name for folder in find_models(None)] == ["new"]
    with pytest.raises(UserError, match=r"^--run runs/old.*not readable"):
        find_models("runs/old")


def test_a_model_that_was_trained_again_is_read_again_and_one_that_is_gone_is_named(two_runs: Path) -> None:
    folder = two_runs / "new" / "export" / "best"
    trained, _ = load(str(folder))
    assert load(str(folder))[0] is trained
    os.utime(folder / "model.safetensors", (5, 5))
    assert load(str(folder))[0] is not trained
    shutil.rmtree(folder)
    error = read(PICTURE.read_bytes(), str(folder), with_layers=False).error
    assert error == f"{folder}: no model there any more; reload the page"


@pytest.mark.filterwarnings("error::UserWarning")  # of arrays that torch may not write to
@pytest.mark.parametrize("num_channels", [1, 3])
def test_a_model_of_47_other_classes_is_shown_the_whole_picture_as_predict_shows_it(
    num_channels: int, tmp_path: Path
) -> None:
    info = DatasetInfo((num_channels, 28, 28), tuple(f"kind {k}" for k in range(47)), has_digits=False)
    config = evolve(RECIPES["smoke"](), mean=(0.1,) * num_channels, std=(1.0,) * num_channels)
    export_model(tmp_path, module_tensors(build_network(config, info)), {**to_flat(config), **asdict(info)})
    assert read(b"", str(tmp_path), with_layers=True) == Reading(info.class_names)
    reading = read(PICTURE.read_bytes(), str(tmp_path), with_layers=True)
    (prediction,) = predict(load_model(tmp_path), [str(PICTURE)])
    assert [answer.as_dict() for answer in reading.answers] == [answer.as_dict() for answer in prediction.answers]
    assert reading.answers[0].seen.pixels.shape == (num_channels, 28, 28)
    assert reading.class_names == info.class_names
    assert list(reading.outputs.values())[-1].shape == (1, 47)


@pytest.mark.parametrize(("dataset", "is_inverted"), [("emnist_letters", True), ("folder", False)])
def test_dark_ink_on_light_paper_is_inverted_for_data_sets_of_light_ink_only(
    dataset: str, is_inverted: bool, tmp_path: Path
) -> None:
    info = DatasetInfo((1, 28, 28), tuple("abc"))
    config = {**to_flat(RECIPES["smoke"]()), "dataset": dataset}
    export_model(tmp_path, module_tensors(build_network(RECIPES["smoke"](), info)), {**config, **asdict(info)})
    dark_on_light = Image.new("L", (28, 28), 255)
    dark_on_light.paste(0, (10, 10, 18, 18))
    seen = []
    for picture in (dark_on_light, ImageOps.invert(dark_on_light)):
        file = io.BytesIO()
        picture.save(file, "PNG")
        seen.append(read(file.getvalue(), str(tmp_path), with_layers=False).answers[0].seen.pixels[0, 0, 0])
    assert seen == [0 if is_inverted else 255, 0]
