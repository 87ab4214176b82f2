from __future__ import annotations

import json
import os
import pickle
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from mnist.config import DataConfig, evolve, to_flat
from mnist.data.sources import DatasetInfo
from mnist.errors import RunError, UserError
from mnist.recipes import RECIPES
from mnist.runs.export import export_model, find_export, load_model
from mnist.runs.state_tensors import module_tensors
from mnist.training.build import build_network
from tests.networks import mnist_model


def exported(folder: Path, recipe: str = "smoke") -> torch.nn.Module:
    model = mnist_model(RECIPES[recipe]().optim.model)
    export_model(folder, module_tensors(model), to_flat(RECIPES[recipe]()))
    return model


@pytest.mark.parametrize("recipe", ["smoke", "fast", "lenet5", "resnet"])
def test_a_model_comes_back_as_it_went(tmp_path: Path, recipe: str) -> None:
    model = exported(tmp_path / "best", recipe)
    trained = load_model(tmp_path / "best")
    images = trained.transform(torch.randint(0, 256, (3, 28, 28), dtype=torch.uint8))
    assert not trained.model.training
    assert trained.config == evolve(RECIPES[recipe](), wandb="auto")
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
        ("config.json", b'{"model": "lenet6"}'),
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


def test_one_flipped_bit_in_the_weights_is_refused(tmp_path: Path) -> None:
    exported(tmp_path)
    content = bytearray((tmp_path / "model.safetensors").read_bytes())
    content[-3] ^= 1
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"has changed since it was written"):
        load_model(tmp_path)


def test_an_export_without_a_checksum_loads_with_a_warning(tmp_path: Path) -> None:
    exported(tmp_path)
    assert load_model(tmp_path).warning is None
    (tmp_path / "config.json").write_text(json.dumps(to_flat(RECIPES["smoke"]())))
    assert "no weights_sha256" in str(load_model(tmp_path).warning)


def test_an_export_of_an_older_version_loads_and_names_the_fields_left_out(tmp_path: Path) -> None:
    exported(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "stretch_epochs": True}))
    assert "stretch_epochs is a field of another version" in str(load_model(tmp_path).warning)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    weights = module_tensors(mnist_model("tinynet"))
    weights["linear2.bias"][3] = value
    export_model(tmp_path, weights, to_flat(RECIPES["smoke"]()))
    with pytest.raises(UserError, match=r"linear2\.bias in model\.safetensors has weights of nan or inf"):
        load_model(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_fifo_and_a_huge_file_are_refused_without_reading_them(tmp_path: Path, name: str) -> None:
    exported(tmp_path)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match="not a regular file"):
        load_model(tmp_path)
    (tmp_path / name).unlink()
    with (tmp_path / name).open("wb") as file:
        file.truncate(1 << 40)  # bytes, none of them on the disk
    with pytest.raises(UserError, match="1,099,511,627,776 bytes, expected at most"):
        load_model(tmp_path)


def test_bad_neighbours_in_runs_do_not_hide_an_older_whole_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = ["whole", "half", "flipped", "fifo", "brackets"]
    for age, name in enumerate(names):
        folder = tmp_path / "runs" / name / "export" / "best"
        exported(folder)
        os.utime(folder / "model.safetensors", (1e9 + age, 1e9 + age))
    (tmp_path / "runs" / "half" / "export" / "best" / "config.json").unlink()
    flipped = tmp_path / "runs" / "flipped" / "export" / "best" / "model.safetensors"
    flipped.write_bytes(flipped.read_bytes()[:-1] + b"\x00")
    os.utime(flipped, (2e9, 2e9))
    (tmp_path / "runs" / "fifo" / "export" / "best" / "config.json").unlink()
    os.mkfifo(tmp_path / "runs" / "fifo" / "export" / "best" / "config.json")
    (tmp_path / "runs" / "brackets" / "export" / "best" / "config.json").write_text("[" * 100_000)
    os.mkfifo(tmp_path / "runs" / "pipe")
    (tmp_path / "runs" / "file").touch()
    assert find_export(None) == Path("runs/whole/export/best")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root can become another user")
def test_a_run_of_another_user_is_passed_over(tmp_path: Path) -> None:
    for name in ("mine", "theirs"):
        exported(tmp_path / "runs" / name / "export" / "best")
    (tmp_path / "runs" / "theirs").chmod(0o700)
    for folder in (tmp_path, *tmp_path.parents[:-2]):
        folder.chmod(0o755)
    process_id = os.fork()
    if process_id == 0:  # another user, until it exits
        os.chdir(tmp_path)
        os.setuid(65534)
        os._exit(0 if find_export(None) == Path("runs/mine/export/best") else 1)
    assert os.waitpid(process_id, 0)[1] == 0


@pytest.mark.parametrize("link", ["export", "export/best"])
def test_an_export_is_not_written_through_a_symbolic_link(tmp_path: Path, link: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run" / link).parent.mkdir(parents=True)
    (tmp_path / "run" / link).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="symbolic link"):
        exported(tmp_path / "run" / "export" / "best")
    assert not list((tmp_path / "elsewhere").iterdir())


def test_what_a_killed_writer_left_is_removed_by_the_next_one(tmp_path: Path) -> None:
    for name in (".tmp-model.safetensors", ".tmp-config.json"):
        (tmp_path / name).write_bytes(b"half")
    exported(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_new_weights_take_away_the_card_and_the_onnx_file_of_the_old_ones(tmp_path: Path) -> None:
    exported(tmp_path)
    for name in ("README.md", "model.onnx", "model.pt2", "my notes.txt"):
        (tmp_path / name).write_text("of the old weights")
    exported(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors", "my notes.txt"}


def test_paths_and_remarks_are_not_exported_but_the_data_are_still_found(tmp_path: Path) -> None:
    secret = {"data_dir": "/home/me/data", "run_dir": "/home/me/run", "init_from": "/home/me/old", "wandb_notes": "me"}
    flat = to_flat(evolve(RECIPES["smoke"](), **secret))
    folder = tmp_path / "run" / "export" / "best"
    export_model(folder, module_tensors(mnist_model("tinynet")), flat)
    assert "me" not in json.loads((folder / "config.json").read_text()).values()
    assert "/home" not in (folder / "config.json").read_text()
    assert load_model(folder).config.data.data_dir == DataConfig().data_dir
    (tmp_path / "run" / "config.json").write_text(json.dumps(flat))
    assert load_model(folder).config.data.data_dir == "/home/me/data"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    exported(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json"):
        load_model(tmp_path)


def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="export not written"):
        exported(tmp_path / "file" / "best")


def test_an_export_knows_its_classes_and_an_older_one_those_of_its_data_set(tmp_path: Path) -> None:
    info = DatasetInfo((3, 28, 28), ("grüne Katze", "dog"), has_digits=False)
    config = evolve(RECIPES["smoke"](), mean=(0.1, 0.2, 0.3))
    weights = module_tensors(build_network(config, info))
    export_model(tmp_path / "new", weights, {**to_flat(config), **asdict(info)})
    trained = load_model(tmp_path / "new")
    assert (trained.info, trained.config, trained.warning) == (info, evolve(config, wandb="auto"), None)
    old = {**to_flat(RECIPES["smoke"]()), "mean": 0.5, "std": 0.25, "dataset": "fashion_mnist"}
    export_model(tmp_path / "old", module_tensors(mnist_model("tinynet")), old)
    trained = load_model(tmp_path / "old")
    assert trained.info.class_names[-1] == "ankle boot"
    assert (trained.config.image.mean, trained.config.image.std) == ((0.5,), (0.25,))


@pytest.mark.parametrize("damage", [{"class_names": [1]}, {"image_shape": [1, 28]}])
def test_an_export_with_damaged_classes_is_refused(tmp_path: Path, damage: dict[str, Any]) -> None:
    exported(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    info = {"image_shape": [1, 28, 28], "class_names": ["0", "1"], "has_digits": True}
    (tmp_path / "config.json").write_text(json.dumps({**content, **info, **damage}))
    with pytest.raises(UserError, match="image_shape or class_names is damaged"):
        load_model(tmp_path)
