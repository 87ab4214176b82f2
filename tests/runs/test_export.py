from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch

from mnist.config import evolve, to_flat
from mnist.errors import RunError, UserError
from mnist.models import build_model
from mnist.recipes import RECIPES
from mnist.runs.checkpoint_files import module_tensors
from mnist.runs.export import export_model, find_export, load_model


def exported(folder: Path, recipe: str = "smoke") -> torch.nn.Module:
    model = build_model(RECIPES[recipe]().optim.model)
    export_model(folder, module_tensors(model), to_flat(RECIPES[recipe]()))
    return model


@pytest.mark.parametrize("recipe", ["smoke", "fast", "lenet5"])
def test_a_model_comes_back_as_it_went(tmp_path: Path, recipe: str) -> None:
    model = exported(tmp_path / "best", recipe)
    trained = load_model(tmp_path / "best")
    images = trained.transform(torch.randint(0, 256, (3, 28, 28), dtype=torch.uint8))
    assert not trained.model.training
    assert trained.config == evolve(RECIPES[recipe]())
    torch.testing.assert_close(trained.model(images), model.eval()(images), rtol=0, atol=0)


def test_the_best_of_the_newest_run_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no finished run below runs/"):
        find_export(None)
    for age, name in ((10, "older"), (0, "newer"), (20, "oldest")):
        exported(tmp_path / "runs" / name / "export" / "best")
        path = tmp_path / "runs" / name / "export" / "best" / "model.safetensors"
        os.utime(path, (1e9 - age, 1e9 - age))
    assert find_export(None) == Path("runs/newer/export/best")
    assert find_export("runs/older") == Path("runs/older/export/best")
    assert find_export("runs/older/export/best") == Path("runs/older/export/best")
    with pytest.raises(UserError, match=r"--run runs/none: no such folder"):
        find_export("runs/none")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("model.safetensors", b"cut"),
        ("model.safetensors", pickle.dumps({"conv1.weight": 1})),
        ("config.json", b"{"),
        ("config.json", b"[]"),
        ("config.json", b'{"model": "resnet"}'),
        ("config.json", b'{"model": "convnet"}'),
        ("config.json", b'{"modle": "convnet"}'),
    ],
)
def test_a_broken_export_is_one_line(tmp_path: Path, file: str, content: bytes) -> None:
    exported(tmp_path)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=r"not readable as an exported model") as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    exported(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json"):
        load_model(tmp_path)


def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="export not written"):
        exported(tmp_path / "file" / "best")
