from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from mnist import export
from mnist.config import IMAGE_SIZES, TrainConfig, evolve, to_flat
from mnist.data.sources import DatasetInfo, is_present
from mnist.data.transforms import BatchTransform
from mnist.errors import RunError, UserError
from mnist.export import Options, WholeModel, main
from mnist.models import MODELS
from mnist.recipes import smoke
from mnist.runs.export import TrainedModel, export_model
from mnist.runs.state_tensors import module_tensors
from mnist.training.build import build_network
from tests.processes import PYTHON, ROOT, finish

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
DIGITS = DatasetInfo((1, 28, 28), tuple("0123456789"), has_digits=True)
COLOUR = DatasetInfo((3, 40, 36), tuple("abcde"))


def trained(config: TrainConfig, info: DatasetInfo) -> TrainedModel:
    """A network with random weights; its batch norms have seen something."""
    torch.manual_seed(0)
    model = build_network(config, info)
    for module in model.modules():
        if isinstance(module, BATCH_NORMS):
            module.running_mean.uniform_(-1, 1)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    return TrainedModel(Path(), config, info, model.eval(), BatchTransform(config.image), "0" * 64)


def images_of(info: DatasetInfo, number: int) -> Tensor:
    channels, height, width = info.image_shape
    shape = (number, height, width) if channels == 1 else (number, *info.image_shape)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


CASES = [(name, DIGITS) for name in MODELS] + [("mycnn", COLOUR), ("lenet5", COLOUR), ("mlp", COLOUR)]


@pytest.mark.parametrize(("name", "info"), CASES, ids=[f"{name}-{info.image_shape[0]}" for name, info in CASES])
@torch.no_grad()
def test_every_network_answers_in_onnx_as_in_torch(name: str, info: DatasetInfo) -> None:
    config = evolve(smoke(), model=name, image_size=IMAGE_SIZES.get(name, 28), mean=(0.2,), std=(0.3,))
    model = WholeModel(trained(config, info)).eval()
    content = export._convert(model, images_of(info, 2), "onnx", {})
    recogniser = export._open_onnx(content)
    for number in (1, 7):
        images = images_of(info, number)
        torch.testing.assert_close(recogniser(images), model(images), rtol=0, atol=2e-6)


@pytest.mark.parametrize("info", [DIGITS, COLOUR], ids=["grey", "colour"])
@torch.no_grad()
def test_a_program_of_torch_export_answers_the_same_for_any_number_of_images(info: DatasetInfo) -> None:
    config = evolve(smoke(), model="lenet5", image_size=32)
    model = WholeModel(trained(config, info)).eval()
    recogniser = export._open_torch(export._convert(model, images_of(info, 2), "torch", {}))
    for number in (1, 7):
        images = images_of(info, number)
        torch.testing.assert_close(recogniser(images), model(images), rtol=0, atol=2e-6)


@pytest.fixture
def copied_run(smoke_run: Path, tmp_path: Path) -> Path:
    shutil.copytree(smoke_run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    return tmp_path / "run"


def test_an_onnx_file_finds_as_many_right_as_the_training_and_says_what_it_is(
    copied_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(Options(str(copied_run))) == 0
    path = copied_run / "export" / "best" / "model.onnx"
    test = json.loads((copied_run / "result.json").read_text())["test"]
    out = capsys.readouterr().out
    assert f"360 test images of digits: {test['num_correct']} right and the same predictions" in out
    assert float(re.findall(r"probabilities within (\S+)", out)[0]) < 1e-4
    assert len(re.findall(r"\d+\.\d\d ms", out)) == 4
    session = onnxruntime.InferenceSession(path)
    facts = session.get_modelmeta().custom_metadata_map
    config = json.loads((path.parent / "config.json").read_text())
    assert json.loads(facts["class_names"]) == list("0123456789")
    assert (facts["dataset"], facts["weights_sha256"]) == ("digits", config["weights_sha256"])
    assert (float(facts["accuracy"]), facts["accuracy_on"]) == (
        pytest.approx(test["accuracy"], abs=1e-6),
        "360 test images of digits",
    )
    (images,), (probabilities,) = session.get_inputs(), session.get_outputs()
    assert (images.name, images.type, images.shape) == ("images", "tensor(uint8)", ["N", 28, 28])
    assert (probabilities.name, probabilities.type, probabilities.shape) == (
        *("probabilities", "tensor(float)", ["N", 10]),
    )
    onnx.checker.check_model(onnx.load(path), full_check=True)


@pytest.mark.parametrize("form", ["onnx", "torch"])
def test_nothing_in_the_file_tells_of_paths(copied_run: Path, tmp_path: Path, form: str) -> None:
    assert main(Options(str(copied_run), form, str(tmp_path / "new" / "file"))) == 0
    content = (tmp_path / "new" / "file").read_bytes()
    assert b"weights_sha256" in content
    for text in (str(ROOT), str(tmp_path), "site-packages", ".py"):
        assert text.encode() not in content


def test_a_file_of_another_name_beside_the_weights_is_not_in_the_card(copied_run: Path) -> None:
    folder = copied_run / "export" / "best"
    before = (folder / "README.md").read_text()
    assert main(Options(str(copied_run), "torch", str(folder / "mine.pt2"))) == 0
    assert (folder / "README.md").read_text() == before


@pytest.mark.launch
def test_the_card_says_how_both_files_are_loaded_and_its_python_runs_without_this_project(
    copied_run: Path, tmp_path: Path
) -> None:
    assert main(Options(str(copied_run))) == 0
    assert main(Options(str(copied_run), "torch")) == 0
    assert main(Options(str(copied_run), "torch")) == 0  # the card does not get a second section
    folder = tmp_path / "elsewhere" / "model"
    shutil.copytree(copied_run / "export" / "best", folder)
    blocks = re.findall(r"^```python\n(.*?)^```$", (folder / "README.md").read_text(), flags=re.DOTALL | re.MULTILINE)
    with_project, *without = blocks
    assert "from mnist" in with_project
    assert len(without) == 2
    for code in without:
        assert len(code.splitlines()) <= 12
        done = finish([*PYTHON, "-c", code], folder.parent, PYTHONPATH="")
        assert done.code == 0, done.err
        assert re.match(r"\d \S*0\.\d+", done.out)


@pytest.mark.skipif(not is_present("mnist", TrainConfig().data.data_dir), reason="MNIST is not here")
def test_all_10000_test_images_of_mnist_are_compared(copied_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = copied_run / "export" / "best" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dataset": "mnist"}))
    assert main(Options(str(copied_run))) == 0
    out, err = capsys.readouterr()
    assert "10,000 test images of mnist: " in out
    assert err == ""


def test_without_its_test_images_it_is_compared_on_the_digits_in_their_form(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = evolve(smoke(), dataset="kmnist", mean=(0.1, 0.2, 0.3))
    weights = module_tensors(trained(config, COLOUR).model)
    export_model(tmp_path, weights, {**to_flat(config), **asdict(COLOUR)})
    assert main(Options(str(tmp_path), data_dir=str(tmp_path / "none"))) == 0
    out, err = capsys.readouterr()
    assert "uint8 images (N, 3, 40, 36) -> probabilities (N, 5)\n360 test images of digits: " in out
    assert "compared on digits: kmnist is not here (--data-dir names the folder that has it)" in err
    assert "accuracy" not in onnxruntime.InferenceSession(tmp_path / "model.onnx").get_modelmeta().custom_metadata_map


@pytest.mark.parametrize("are_here", [True, False])
def test_a_model_of_own_pictures_is_compared_on_them_where_they_are_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], are_here: bool
) -> None:
    pictures = tmp_path / "pictures"
    for name, colour in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        (pictures / name).mkdir(parents=True)
        for number in range(10):
            Image.new("RGB", (30 + number, 20), colour).save(pictures / name / f"{number}.png")
    info = DatasetInfo((3, 28, 28), ("blue", "red"))
    config = evolve(smoke(), dataset="folder", channels=3)
    export_model(tmp_path / "model", module_tensors(trained(config, info).model), {**to_flat(config), **asdict(info)})
    assert main(Options(str(tmp_path / "model"), data_dir=str(pictures if are_here else tmp_path / "gone"))) == 0
    out, err = capsys.readouterr()
    assert ("4 test images of folder: " in out, "compared on digits: folder is not here" in err) == (
        are_here,
        not are_here,
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda p: p.flip(1), r"3\d\d of 360 predictions differ from the model's, probabilities by up to [1-9]"),
        (lambda p: 0.99 * p, r"0 of 360 predictions differ from the model's, probabilities by up to 1\.0e-02"),
        (lambda p: p + float("nan"), r"probabilities by up to nan"),
    ],
    ids=["other predictions", "other probabilities", "nan"],
)
def test_a_file_that_answers_otherwise_is_not_written(
    copied_run: Path, monkeypatch: pytest.MonkeyPatch, wrong: export.Recogniser, message: str
) -> None:
    before = copied_run / "export" / "best" / "model.onnx"
    before.write_text("as it was")
    card = (copied_run / "export" / "best" / "README.md").read_text()
    right = export._open_onnx
    monkeypatch.setattr(export, "_open_onnx", lambda content: lambda images: wrong(right(content)(images)))
    with pytest.raises(RunError, match=f"model.onnx: not written: .*{message}"):
        main(Options(str(copied_run)))
    assert before.read_text() == "as it was"
    assert (copied_run / "export" / "best" / "README.md").read_text() == card


class Undecided(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, :10] if images.sum() > 0 else -images.flatten(1)[:, :10]


@pytest.mark.parametrize("form", ["onnx", "torch"])
def test_a_network_that_cannot_be_written_is_one_line(form: str) -> None:
    model = WholeModel(replace(trained(smoke(), DIGITS), model=Undecided()))
    with pytest.raises(RunError, match=f"^--format {form}: this network cannot be written so") as caught:
        export._convert(model, images_of(DIGITS, 2), form, {})
    assert "\n" not in str(caught.value)


@contextlib.contextmanager
def missing(package: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, package, None)
        yield


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_one_line_that_says_what_to_install(copied_run: Path, package: str) -> None:
    with missing(package), pytest.raises(UserError, match=r"pip install onnx onnxscript onnxruntime") as caught:
        main(Options(str(copied_run)))
    assert str(caught.value).startswith("--format onnx: ")
    assert package in str(caught.value).partition(";")[0]


def test_a_folder_a_device_or_a_pipe_as_output_is_not_replaced(copied_run: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(UserError, match=rf"--output {place}: not a file; name one"):
            main(Options(run=str(copied_run), format="torch", output=str(place)))
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.launch
def test_export_help_answers_without_torch(tmp_path: Path) -> None:
    done = finish([*PYTHON, "-X", "importtime", "-m", "mnist.export", "--help"], tmp_path)
    assert done.code == 0
    assert "--format {onnx,torch}" in done.out
    assert "torch" not in done.err


@pytest.mark.launch
def test_export_of_no_run_is_one_line(tmp_path: Path) -> None:
    done = finish([*PYTHON, "-m", "mnist.export"], tmp_path)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert done.err.startswith("error: --run: no finished run below runs/")
