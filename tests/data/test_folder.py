import io
import os
import re
import shutil
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from mnist.config import DataConfig, TrainConfig
from mnist.data import datasets, folder
from mnist.data.picture_file import to_image
from mnist.data.sources import DatasetInfo
from mnist.errors import UserError
from tests.processes import finish, train
from tests.ranks import run_ranks
from tests.shapes import CLASSES, draw_shape, write_shapes


@pytest.fixture
def shapes(tmp_path):
    """Eight training pictures a class and three to test on."""
    return write_shapes(write_shapes(tmp_path / "shapes", 8, "train"), 3, "test")


def read(path, channels=3, size=20):
    return folder.read(str(path), channels, size)


def encoded(picture, kind="PNG", **settings):
    file = io.BytesIO()
    picture.save(file, kind, **settings)
    return file.getvalue()


def test_two_levels_are_the_two_splits(shapes):
    pictures = read(shapes)
    assert pictures.class_names == CLASSES
    assert pictures.train.labels.bincount().tolist() == [8, 8, 8]
    assert pictures.test.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert (pictures.test.images.shape, pictures.test.images.dtype) == ((9, 3, 20, 20), torch.uint8)
    second = to_image((shapes / "test" / "square" / "1.png").read_bytes(), ".png", 3, 20)
    assert np.array_equal(pictures.test.images[4], second)


def test_training_pictures_of_all_classes_are_mixed_so_that_a_validation_split_has_them_all(shapes):
    dataset = datasets.read("folder", DataConfig(dataset="folder", data_dir=str(shapes), val_size=12), size=28)
    assert sorted(dataset.val.labels.unique().tolist()) == [0, 1, 2]
    assert sorted(dataset.train.labels.unique().tolist()) == [0, 1, 2]
    assert dataset.info == DatasetInfo((3, 28, 28), CLASSES, has_digits=False)


@pytest.mark.parametrize("name", ["val", "test"])
def test_the_test_set_may_be_called_val(shapes, name):
    (shapes / "test").rename(shapes / name)
    assert len(read(shapes).test) == 9


def test_of_one_level_a_fifth_of_each_class_is_held_out_and_stays_so_when_pictures_are_added(tmp_path):
    write_shapes(tmp_path, 20)
    before = read(tmp_path)
    assert before.test.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert len(before.train) == 48
    shutil.copytree(tmp_path / "circle", tmp_path / "disc")
    after = read(tmp_path)
    assert torch.equal(after.test.images[:4], before.test.images[:4])
    assert after.class_names == ("circle", "disc", "square", "triangle")


def test_test_pictures_without_folders_of_classes_are_missed_in_a_warning(shapes):
    for number, picture in enumerate(list((shapes / "test").rglob("*.png"))):
        picture.rename(shapes / "test" / f"{number}.png")
    for kind in CLASSES:
        (shapes / "test" / kind).rmdir()
    config = DataConfig(dataset="folder", data_dir=str(shapes))
    dataset = datasets.read("folder", config, size=28)
    assert (len(dataset.train), len(dataset.test)) == (18, 6)
    assert "has train/ but no test/<class>/" in dataset.warnings[0]
    write_shapes(shapes / "flat", 5)
    assert datasets.read("folder", DataConfig(dataset="folder", data_dir=str(shapes / "flat")), size=28).warnings == ()


def test_a_class_may_be_called_train(tmp_path):
    write_shapes(tmp_path, 5)
    (tmp_path / "circle").rename(tmp_path / "train")
    assert read(tmp_path).class_names == ("square", "train", "triangle")


def test_names_with_spaces_accents_and_numbers_are_sorted_as_people_sort(tmp_path):
    for name in ("class 10", "class 2", "gru\u0308ne Katze", "\u5b57"):
        for number in range(2):
            (tmp_path / name).mkdir(exist_ok=True)
            draw_shape("circle", number).save(tmp_path / name / f"{number}.png")
    assert read(tmp_path).class_names == ("class 2", "class 10", "gr\u00fcne Katze", "\u5b57")


@pytest.mark.parametrize("names", [("é", "e\u0301"), (b"bad\xff", b"bad\xfe")])
def test_two_folders_of_one_name_are_refused_and_none_is_dropped(shapes, names):
    for name in map(os.fsdecode, names):
        shutil.copytree(shapes / "train" / "circle", shapes / "train" / name)
    with pytest.raises(UserError, match=r"two folders are called .*: PosixPath\('[ -~]+'\) and PosixPath\('[ -~]+'\)$"):
        read(shapes)


def test_names_of_classes_are_one_line_and_cannot_command_a_terminal(shapes):
    for split in ("train", "test"):
        (shapes / split / "circle").rename(shapes / split / "a\nb\u2028c\x1b[31md")
    assert read(shapes).class_names[0] == "a\ufffdb\ufffdc\ufffd[31md"


def test_an_interrupt_in_a_notebook_ends_decoding(shapes, monkeypatch):
    monkeypatch.setattr(folder.signals, "stop_requested", lambda: True)
    with pytest.raises(KeyboardInterrupt):
        read(shapes)


def test_the_order_depends_on_names_only_and_not_on_the_file_system(shapes, tmp_path):
    paths = sorted(path for path in shapes.rglob("*.png"))
    for path in reversed(paths):
        copy = tmp_path / "copy" / path.relative_to(shapes)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    assert read(shapes).sha256 == read(tmp_path / "copy").sha256


def test_the_cache_can_be_read_by_whom_the_folder_can(shapes):
    (shapes / ".cache").mkdir(mode=0o755)
    folder.prepare(str(shapes), 3, 20)
    assert (shapes / ".cache" / "pictures-3x20x20.safetensors").stat().st_mode & 0o777 == 0o644


def test_pictures_of_one_class_may_have_any_sizes(shapes):
    for number, size in enumerate([(1, 1), (9, 900), (3000, 2), (640, 480)]):
        draw_shape("circle", 1, (48, 40)).resize(size).save(shapes / "train" / "circle" / f"size{number}.png")
    pictures = read(shapes)
    assert (len(pictures.train), pictures.unreadable) == (28, ())


def test_hidden_files_other_files_and_empty_folders_are_passed_over(shapes):
    for name in (".DS_Store", "._0.png", "notes.txt", "Thumbs.db"):
        (shapes / "train" / "circle" / name).write_bytes(b"no picture")
    (shapes / "__MACOSX").mkdir()
    (shapes / "train" / ".ipynb_checkpoints").mkdir()
    pictures = read(shapes)
    assert (len(pictures.train), pictures.class_names, pictures.unreadable) == (24, CLASSES, ())


def test_pictures_lie_in_subfolders_of_a_class_too(shapes):
    (shapes / "train" / "circle" / "2024").mkdir()
    draw_shape("circle", 99).save(shapes / "train" / "circle" / "2024" / "x.png")
    assert len(read(shapes).train) == 25


@pytest.mark.timeout(30)
def test_links_to_folders_in_a_class_are_passed_over_and_other_links_are_followed(shapes, tmp_path):
    (shapes / "train" / "circle" / "up").symlink_to(shapes / "train")
    (shapes / "train" / "loop").symlink_to(shapes)
    (shapes / "train" / "circle" / "itself.png").symlink_to(shapes / "train" / "circle" / "itself.png")
    shutil.move(shapes / "train" / "square", tmp_path / "elsewhere")
    (shapes / "train" / "square").symlink_to(tmp_path / "elsewhere")
    pictures = read(shapes)
    assert pictures.class_names == CLASSES
    assert pictures.train.labels.bincount().tolist() == [8, 8, 8]
    ((path, reason),) = pictures.unreadable
    assert path == "train/circle/itself.png"
    assert "symbolic links" in reason


FORMATS = [
    ("L", "PNG", {}),
    ("1", "PNG", {}),
    ("P", "GIF", {}),
    ("RGBA", "PNG", {}),
    ("LA", "PNG", {}),
    ("I;16", "PNG", {}),
    ("CMYK", "JPEG", {"quality": 95}),
    ("RGB", "JPEG", {"quality": 95}),
    ("RGB", "BMP", {}),
    ("RGB", "WEBP", {"lossless": True}),
    ("RGB", "TIFF", {}),
    ("F", "TIFF", {}),
]


@pytest.mark.parametrize(("mode", "kind", "settings"), FORMATS, ids=str)
@pytest.mark.parametrize("channels", [1, 3])
def test_any_mode_and_format_becomes_the_same_image(mode, kind, settings, channels):
    picture = Image.new("L", (48, 40), 255)
    picture.paste(0, (0, 0, 24, 40))
    if mode == "I;16":
        other = Image.fromarray(np.asarray(picture).astype(np.uint16) * 257)
    else:
        other = picture.convert("RGB").convert(mode) if mode in ("CMYK", "P") else picture.convert(mode)
    expected = to_image(encoded(picture), ".png", channels, 24)
    found = to_image(encoded(other, kind, **settings), "", channels, 24)
    assert found.shape == (channels, 24, 24)
    assert np.abs(found.astype(int) - expected).max() <= 12


def test_a_picture_keeps_its_ratio_and_is_filled_with_the_colour_of_its_edge():
    picture = Image.new("RGB", (40, 20), (10, 200, 30))
    picture.paste((250, 0, 0), (10, 5, 30, 15))
    image = to_image(encoded(picture), ".png", 3, 40)
    assert image[:, 0, 0].tolist() == image[:, 39, 39].tolist() == [10, 200, 30]
    red = image[0] > 240
    assert (red.any(axis=0).sum(), red.any(axis=1).sum()) == (20, 10)
    assert np.array_equal(image[:, 10:30], np.asarray(picture).transpose(2, 0, 1))


def test_a_picture_of_the_right_size_is_taken_bit_for_bit():
    noise = np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)
    assert np.array_equal(to_image(encoded(Image.fromarray(noise)), ".png", 3, 28), noise.transpose(2, 0, 1))


def test_a_camera_held_upright_is_turned():
    picture = draw_shape("triangle", 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to see it
    turned = encoded(picture.rotate(90, expand=True), "PNG", exif=exif)
    assert np.array_equal(to_image(turned, ".png", 3, 32), to_image(encoded(picture), ".png", 3, 32))


@pytest.mark.parametrize(("ink", "ground"), [((200, 0, 0), 255), ((0, 0, 0), 255), ((250, 240, 255), 0)])
def test_transparent_ground_becomes_white_and_black_below_a_light_drawing(ink, ground):
    picture = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    picture.paste((*ink, 255), (5, 5, 15, 15))
    image = to_image(encoded(picture), ".png", 3, 20)
    assert image[:, 0, 0].tolist() == [ground] * 3
    assert image[:, 10, 10].tolist() == list(ink)


def test_a_few_unreadable_files_are_left_out_counted_and_named(shapes):
    (shapes / "train" / "circle" / "0.png").write_bytes(b"text")
    (shapes / "train" / "square" / "1.png").write_bytes(encoded(draw_shape("square", 0))[:80])
    (shapes / "test" / "circle" / "photo.heic").write_bytes(b"\0\0\0\x24ftypheic")
    (shapes / "test" / "circle" / "gone.jpg").symlink_to("nowhere.jpg")
    dataset = datasets.read("folder", DataConfig(dataset="folder", data_dir=str(shapes)), size=28)
    assert (len(dataset.train), len(dataset.test)) == (22, 9)
    (warning,) = dataset.warnings
    assert warning.startswith("4 of 35 pictures cannot be read and are left out: ")
    assert "train/circle/0.png (not a picture" in warning
    assert warning.endswith(", ...")


def remove_all(path):
    shutil.rmtree(path)


def remove_pictures(path):
    for picture in path.rglob("*.png"):
        picture.unlink()


def leave_one_class(path):
    for kind in CLASSES[1:]:
        shutil.rmtree(path / "train" / kind)
        shutil.rmtree(path / "test" / kind)


def empty_a_class(path):
    remove_pictures(path / "train" / "square")


def damage_a_class(path):
    for picture in (path / "test" / "square").iterdir():
        picture.write_bytes(b"text")


def misspell_a_class(path):
    (path / "test" / "circle").rename(path / "test" / "Circle")


def damage_most(path):
    for picture in list(path.rglob("*.png"))[::2] + list(path.rglob("*.png"))[1:9:2]:
        picture.write_bytes(b"text")


def damage_all(path):
    for picture in path.rglob("*.png"):
        picture.write_bytes(b"text")


def put_all_in_one_folder(path):
    for number, picture in enumerate(list(path.rglob("*.png"))):
        picture.rename(path / f"{number}.png")
    shutil.rmtree(path / "train")
    shutil.rmtree(path / "test")


def leave_one_picture(path):
    shutil.rmtree(path / "test")
    for picture in list((path / "train" / "circle").iterdir())[1:]:
        picture.unlink()


BAD = [
    (remove_all, "no such folder; expected train/<class>/ and test/<class>/"),
    (remove_pictures, "no pictures in folders below it"),
    (leave_one_class, "one class only (circle), at least two are needed"),
    (empty_a_class, "class square has no training pictures"),
    (damage_a_class, "class square has no test pictures that can be read"),
    (misspell_a_class, "test/Circle is no class of train/"),
    (damage_most, "of 33 pictures cannot be read; the first: "),
    (damage_all, "33 of 33 pictures cannot be read; the first: "),
    (put_all_in_one_folder, "no pictures in folders below it"),
    (leave_one_picture, "class circle has one picture; without test/ it needs two or more"),
]


@pytest.mark.parametrize(("spoil", "message"), BAD, ids=lambda value: getattr(value, "__name__", ""))
def test_a_bad_folder_is_refused_in_one_line(shapes, spoil, message):
    spoil(shapes)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        read(shapes)
    assert str(caught.value).startswith(f"--data-dir {shapes}: ")
    assert "\n" not in str(caught.value)


def test_a_bad_folder_ends_the_command_with_2_and_one_line(shapes, tmp_path):
    leave_one_class(shapes)
    done = finish(train("--dataset", "folder", "--data-dir", str(shapes), "--run-dir", "run"), tmp_path)
    assert (done.code, done.err.count("\n")) == (2, 1), done.err
    assert done.err.startswith(f"error: --data-dir {shapes}: one class only (circle)")


def test_pictures_are_decoded_once_and_then_read_from_the_cache(shapes, monkeypatch):
    folder.prepare(str(shapes), 3, 20)
    first = read(shapes)
    monkeypatch.setattr(folder, "to_image", lambda *_: pytest.fail("decoded again"))
    again = read(shapes)
    folder.prepare(str(shapes), 3, 20)
    assert first.sha256 == again.sha256
    assert torch.equal(first.train.images, again.train.images)
    assert sorted(path.name for path in (shapes / ".cache").iterdir()) == [".lock", "pictures-3x20x20.safetensors"]


def add(path):
    draw_shape("circle", 77).save(path / "train" / "circle" / "new.png")


def change(path):
    draw_shape("circle", 77).save(path / "train" / "circle" / "0.png")
    os.utime(path / "train" / "circle" / "0.png", (time.time() + 5, time.time() + 5))


def rename_class(path):
    (path / "train" / "circle").rename(path / "train" / "disc")
    (path / "test" / "circle").rename(path / "test" / "disc")


@pytest.mark.parametrize("edit", [add, change, rename_class])
def test_a_changed_folder_is_decoded_again(shapes, edit):
    folder.prepare(str(shapes), 3, 20)
    before = read(shapes).sha256
    edit(shapes)
    after = read(shapes).sha256
    assert before != after
    folder.prepare(str(shapes), 3, 20)
    shutil.rmtree(shapes / ".cache")
    assert read(shapes).sha256 == after


@pytest.mark.parametrize("place", [-100, 500, None])
def test_a_damaged_cache_is_not_believed(shapes, place):
    folder.prepare(str(shapes), 3, 20)
    before = read(shapes).sha256
    cache = shapes / ".cache" / "pictures-3x20x20.safetensors"
    content = bytearray(cache.read_bytes())
    if place is None:
        content = content[: len(content) // 2]
    else:
        content[place] ^= 1
    cache.write_bytes(content)
    assert read(shapes).sha256 == before


def test_unreadable_files_are_named_again_when_the_cache_is_read(shapes):
    (shapes / "train" / "circle" / "0.png").write_bytes(b"text")
    folder.prepare(str(shapes), 3, 20)
    assert [path for path, _ in read(shapes).unreadable] == ["train/circle/0.png"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_folder_is_enough(shapes):
    shapes.chmod(0o555)
    folder.prepare(str(shapes), 3, 20)
    assert len(read(shapes).train) == 24


def test_where_the_cache_cannot_be_written_pictures_are_decoded_each_time(shapes):
    (shapes / ".cache").write_text("a file in its place")
    folder.prepare(str(shapes), 3, 20)
    assert len(read(shapes).train) == 24


def test_two_ranks_decode_once_and_have_the_same_pictures(shapes, tmp_path):
    decode = folder.Listing.decode

    def counted(listing, *show):
        (tmp_path / f"decoded-{os.getpid()}").touch()
        return decode(listing, *show)

    def load():
        folder.Listing.decode = counted
        config = DataConfig(dataset="folder", data_dir=str(shapes))
        return datasets.load(config, Accelerator(cpu=True), 20).fingerprint

    first, second = run_ranks(load, 2)
    assert first == second
    assert len(list(tmp_path.glob("decoded-*"))) == 1


def test_how_far_decoding_is_shown(shapes, monkeypatch):
    monkeypatch.setattr(folder, "PICTURES_PER_TASK", 16)
    shown = []
    folder.prepare(str(shapes), 3, 20, shown.append)
    assert shown == [f"decoding pictures  {number} of 33" for number in (0, 16, 32)]


def test_pictures_that_do_not_fit_into_memory_are_refused_before_they_are_decoded(shapes, monkeypatch):
    monkeypatch.setattr(folder.psutil, "virtual_memory", lambda: SimpleNamespace(available=30_000))
    with pytest.raises(UserError, match=r"33 pictures of --image-size 20 take 0\.0 GB, but 0\.0 GB of memory are free"):
        read(shapes)


def test_mean_and_std_are_those_of_the_training_pictures_per_channel(shapes):
    dataset = datasets.read("folder", DataConfig(dataset="folder", data_dir=str(shapes)), size=28)
    image = datasets.resolve(TrainConfig(), dataset).image
    pixels = dataset.train.images / 255
    assert image.mean == pytest.approx(pixels.mean(dim=(0, 2, 3)).tolist(), abs=6e-5)
    assert image.std == pytest.approx(pixels.std(dim=(0, 2, 3), correction=0).tolist(), abs=6e-5)


@pytest.mark.parametrize("channels", [2, 4, 0])
def test_other_channels_than_1_and_3_are_refused(channels):
    with pytest.raises(UserError, match=f"^--channels {channels}: must"):
        DataConfig(dataset="folder", channels=channels)


def test_channels_of_a_data_set_with_channels_of_its_own_are_refused():
    with pytest.raises(UserError, match=r"^--channels 3: needs --dataset folder"):
        DataConfig(dataset="mnist", channels=3)


def test_grey_pictures_have_one_channel(shapes):
    config = DataConfig(dataset="folder", data_dir=str(shapes), channels=1)
    assert datasets.read("folder", config, None, 32).info.image_shape == (1, 32, 32)


def test_evaluation_looks_where_the_run_had_its_pictures_and_not_in_the_folder_of_mnist(monkeypatch, tmp_path):
    monkeypatch.setenv("MNIST_DATA_DIR", "elsewhere")
    config = DataConfig(dataset="folder", data_dir="pictures", channels=1)
    assert datasets.relocate(config, None, None) == config
    assert datasets.relocate(config, None, "here").data_dir == "here"
    assert datasets.relocate(config, "mnist", None) == DataConfig(dataset="mnist", data_dir="elsewhere")
