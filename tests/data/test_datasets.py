import gzip
import json
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits

from mnist.config import DataConfig, ImageConfig, TrainConfig, evolve
from mnist.data import datasets
from mnist.data.sources import SOURCES, find_file, is_present
from mnist.errors import UserError
from mnist.system.torchvision_compat import import_torchvision
from tests.processes import finish, train

TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS = SOURCES["mnist"].files
REAL_DIR = os.environ.get("MNIST_DATA_DIR", "")

needs_mnist = pytest.mark.skipif(not Path(REAL_DIR, "MNIST", "raw").is_dir(), reason="MNIST_DATA_DIR has no MNIST")


def idx_bytes(array):
    return struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape) + array.tobytes()


def write_files(data_dir, folder="MNIST", is_packed=False, **replaced):
    """Thirty training and ten test images as the four files; `replaced` by array, None leaves a file out."""
    rng = np.random.default_rng(0)
    arrays = {
        TRAIN_IMAGES: rng.integers(0, 256, (30, 28, 28), dtype=np.uint8),
        TRAIN_LABELS: rng.integers(0, 10, 30, dtype=np.uint8),
        TEST_IMAGES: rng.integers(0, 256, (10, 28, 28), dtype=np.uint8),
        TEST_LABELS: rng.integers(0, 10, 10, dtype=np.uint8),
    }
    arrays |= {{"train_labels": TRAIN_LABELS, "test_images": TEST_IMAGES}[k]: v for k, v in replaced.items()}
    raw = data_dir / folder / "raw"
    raw.mkdir(parents=True)
    for name, array in arrays.items():
        if array is not None and is_packed:
            (raw / f"{name}.gz").write_bytes(gzip.compress(idx_bytes(array)))
        elif array is not None:
            (raw / name).write_bytes(idx_bytes(array))
    return arrays


def listing(folder):
    return {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]}


@pytest.fixture
def no_network(monkeypatch):
    """Every server that would be asked refuses the connection."""
    datasets = import_torchvision("datasets")
    for name in ("MNIST", "FashionMNIST", "KMNIST"):
        monkeypatch.setattr(getattr(datasets, name), "mirrors", [])
    monkeypatch.setenv("MNIST_MIRROR", "http://127.0.0.1:9/")
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("no_proxy", "*")


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize(
    ("name", "folder"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST"), ("kmnist", "KMNIST")]
)
def test_files_become_splits_packed_or_not(tmp_path, name, folder, is_packed):
    arrays = write_files(tmp_path, folder, is_packed)
    dataset = datasets.read(name, DataConfig(data_dir=str(tmp_path)))
    assert np.array_equal(dataset.train.images, arrays[TRAIN_IMAGES])
    assert np.array_equal(dataset.train.labels, arrays[TRAIN_LABELS])
    assert np.array_equal(dataset.test.images, arrays[TEST_IMAGES])
    assert np.array_equal(dataset.test.labels, arrays[TEST_LABELS])
    assert (dataset.train.images.dtype, dataset.train.labels.dtype) == (torch.uint8, torch.int64)
    assert (dataset.name, dataset.val, len(dataset.class_names)) == (name, None, 10)


def dotted(raw):
    for path in list(raw.iterdir()):
        path.rename(raw / path.name.replace("-idx", ".idx"))


def in_folders(raw):
    for path in list(raw.iterdir()):
        aside = path.rename(raw / "aside")
        path.mkdir()
        aside.rename(path / path.name)


def named_gz(raw):
    for path in list(raw.iterdir()):
        path.rename(raw / f"{path.name}.gz")


def not_named_gz(raw):
    for path in list(raw.iterdir()):
        content = gzip.compress(path.read_bytes())
        path.write_bytes(content)


@pytest.mark.parametrize("arrange", [dotted, in_folders, named_gz, not_named_gz])
@pytest.mark.parametrize("is_raw", [False, True], ids=["data folder", "raw folder"])
def test_files_are_found_as_mirrors_name_and_unpack_them(tmp_path, no_network, arrange, is_raw):
    arrays = write_files(tmp_path)
    arrange(tmp_path / "MNIST" / "raw")
    config = DataConfig(dataset="auto", data_dir=str(tmp_path / "MNIST" / "raw" if is_raw else tmp_path))
    assert datasets.choose(config) == datasets.Choice("mnist")
    dataset = datasets.read("mnist", config)
    assert np.array_equal(dataset.train.images, arrays[TRAIN_IMAGES])
    assert np.array_equal(dataset.test.labels, arrays[TEST_LABELS])


def test_the_raw_folder_of_mnist_is_not_taken_for_kmnist(tmp_path):
    write_files(tmp_path)
    assert is_present("mnist", str(tmp_path / "MNIST" / "raw"))
    assert not is_present("kmnist", str(tmp_path / "MNIST" / "raw"))


@pytest.mark.timeout(20)
def test_a_fifo_in_the_place_of_a_file_is_named(tmp_path, no_network):
    write_files(tmp_path, train_labels=None)
    os.mkfifo(tmp_path / "MNIST" / "raw" / TRAIN_LABELS)
    config = DataConfig(dataset="mnist", data_dir=str(tmp_path))
    with pytest.raises(UserError, match=f"{TRAIN_LABELS}: cannot be read .not a regular file"):
        datasets.read(datasets.choose(config).name, config)


def test_the_validation_split_is_the_end_of_the_training_set(tmp_path):
    arrays = write_files(tmp_path)
    dataset = datasets.read("mnist", DataConfig(data_dir=str(tmp_path), val_size=7))
    assert np.array_equal(dataset.train.images, arrays[TRAIN_IMAGES][:23])
    assert np.array_equal(dataset.val.images, arrays[TRAIN_IMAGES][23:])
    assert np.array_equal(dataset.val.labels, arrays[TRAIN_LABELS][23:])


@pytest.mark.parametrize("val_size", [30, 31])
def test_a_validation_split_that_leaves_nothing_to_train_on_is_refused(tmp_path, val_size):
    write_files(tmp_path)
    with pytest.raises(UserError, match=rf"^--val-size {val_size}: .*30 training images of mnist"):
        datasets.read("mnist", DataConfig(data_dir=str(tmp_path), val_size=val_size))


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"train_labels": np.zeros(29, np.uint8)}, f"{TRAIN_LABELS}: 29 labels for the 30 images of {TRAIN_IMAGES}"),
        ({"train_labels": np.zeros(10, np.uint8)}, f"{TRAIN_LABELS}: 10 labels for the 30 images of {TRAIN_IMAGES}"),
        ({"train_labels": np.full(30, 10, np.uint8)}, f"{TRAIN_LABELS}: label 10, expected 0 to 9"),
        ({"train_labels": np.zeros((30, 28, 28), np.uint8)}, f"{TRAIN_LABELS}: holds images, expected labels"),
        ({"test_images": np.zeros(100, np.uint8)}, f"{TEST_IMAGES}: holds labels, expected images"),
        ({"test_images": np.zeros((10, 32, 32), np.uint8)}, f"{TEST_IMAGES}: images of 1x32x32 .*, expected 1x28x28"),
        ({"train_labels": None}, f"{TRAIN_LABELS} is missing"),
    ],
)
def test_files_that_do_not_fit_are_refused_by_name(tmp_path, replaced, message):
    write_files(tmp_path, **replaced)
    with pytest.raises(UserError, match=message):
        datasets.read("mnist", DataConfig(data_dir=str(tmp_path)))


@pytest.mark.parametrize(("one", "other"), [(TRAIN_LABELS, TEST_LABELS), (TRAIN_IMAGES, TEST_IMAGES)])
def test_swapped_files_are_refused(tmp_path, one, other):
    write_files(tmp_path)
    raw = tmp_path / "MNIST" / "raw"
    (raw / one).rename(raw / "aside")
    (raw / other).rename(raw / one)
    (raw / "aside").rename(raw / other)
    with pytest.raises(UserError, match=f"{TRAIN_LABELS}: .* labels for the"):
        datasets.read("mnist", DataConfig(data_dir=str(tmp_path)))


def test_files_other_than_the_published_ones_are_named_in_warnings(tmp_path):
    write_files(tmp_path)
    warnings = datasets.read("mnist", DataConfig(data_dir=str(tmp_path))).warnings
    assert [warning.split()[0] for warning in warnings] == [TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS]
    assert all("sha256" in warning for warning in warnings)


def test_a_data_set_without_pinned_hashes_warns_of_nothing(tmp_path):
    write_files(tmp_path, "KMNIST")
    assert datasets.read("kmnist", DataConfig(data_dir=str(tmp_path))).warnings == ()


def test_the_fingerprint_tells_equal_data_from_other_data(tmp_path):
    write_files(tmp_path / "plain")
    write_files(tmp_path / "packed", is_packed=True)
    write_files(tmp_path / "other", train_labels=np.zeros(30, np.uint8))
    plain, packed, other = (
        datasets.read("mnist", DataConfig(data_dir=str(tmp_path / name))).fingerprint
        for name in ("plain", "packed", "other")
    )
    assert plain == packed
    assert plain != other


@pytest.mark.parametrize("dataset", ["auto", "mnist"])
def test_a_read_only_folder_with_the_files_is_enough_and_stays_untouched(tmp_path, no_network, dataset):
    write_files(tmp_path, is_packed=True)
    folders = [tmp_path / "MNIST" / "raw", tmp_path / "MNIST", tmp_path]
    before = listing(tmp_path)
    for folder in folders:
        folder.chmod(0o555)
    try:
        config = DataConfig(dataset=dataset, data_dir=str(tmp_path))
        assert datasets.choose(config) == datasets.Choice("mnist")
        datasets.fetch("mnist", config.data_dir)
        assert len(datasets.read("mnist", config).train) == 30
    finally:
        for folder in folders:
            folder.chmod(0o755)
    assert listing(tmp_path) == before


def test_auto_falls_back_to_the_digits_and_says_why(tmp_path, no_network):
    choice = datasets.choose(DataConfig(dataset="auto", data_dir=str(tmp_path / "data")))
    assert choice.name == "digits"
    assert "download failed" in choice.fallback_reason
    assert "refused" in choice.fallback_reason
    assert not (tmp_path / "data").exists()


def test_auto_does_not_settle_for_part_of_the_files(tmp_path, no_network):
    write_files(tmp_path, train_labels=None)
    before = set(listing(tmp_path))
    assert datasets.choose(DataConfig(dataset="auto", data_dir=str(tmp_path))).name == "digits"
    assert set(listing(tmp_path)) == before


@pytest.mark.parametrize(
    ("name", "folder"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST"), ("kmnist", "KMNIST")]
)
def test_a_data_set_asked_for_by_name_never_falls_back(tmp_path, no_network, name, folder):
    with pytest.raises(UserError) as caught:
        datasets.choose(DataConfig(dataset=name, data_dir=str(tmp_path)))
    message = str(caught.value)
    assert message.startswith(f"--dataset {name}: not in {tmp_path / folder / 'raw'}")
    for way_out in ("--data-dir", "$MNIST_DATA_DIR", "copy the four", "--dataset digits"):
        assert way_out in message


def test_the_digits_need_neither_files_nor_network(tmp_path, no_network):
    config = DataConfig(dataset="digits", data_dir=str(tmp_path / "absent"))
    assert datasets.choose(config) == datasets.Choice("digits")
    datasets.fetch("digits", config.data_dir)
    assert len(datasets.read("digits", config).test) == 360
    assert not (tmp_path / "absent").exists()


def test_the_embedded_digits_are_those_of_scikit_learn():
    reference = load_digits()
    with np.load(datasets.DIGITS_FILE, allow_pickle=False) as archive:
        assert np.array_equal(archive["images"], reference.images)
        assert np.array_equal(archive["labels"], reference.target)


def test_the_digits_are_split_in_their_order():
    dataset = datasets.read("digits", DataConfig(dataset="digits"))
    assert (len(dataset.train), dataset.val, len(dataset.test)) == (42 * 1437, None, 360)
    labels = torch.cat([dataset.train.labels[:1437], dataset.test.labels])
    assert labels.tolist() == load_digits().target.tolist()


@pytest.mark.parametrize("val_size", [0, 437])
def test_an_epoch_of_the_digits_shows_each_training_image_42_times(val_size):
    dataset = datasets.read("digits", DataConfig(dataset="digits", val_size=val_size))
    images, counts = dataset.train.images.flatten(1).unique(dim=0, return_counts=True)
    assert dataset.train_copies == 42
    assert (len(images), set(counts.tolist())) == (1437 - val_size, {42})
    if val_size:
        held_out = {image.numpy().tobytes() for image in dataset.val.images}
        assert len(dataset.val) == val_size
        assert not held_out & {image.numpy().tobytes() for image in dataset.train.images}


def test_images_of_files_are_stored_once_however_few_they_are(tmp_path):
    write_files(tmp_path)
    dataset = datasets.read("mnist", DataConfig(data_dir=str(tmp_path)))
    assert (len(dataset.train), dataset.train_copies) == (30, 1)


def test_the_digits_have_the_form_of_mnist():
    images = datasets.read("digits", DataConfig(dataset="digits")).train.images[:1437]
    assert images.shape == (1437, 28, 28)
    assert images.dtype == torch.uint8
    pixels = torch.arange(28.0)
    mass = images.float().sum(dim=(1, 2))
    for axis in (1, 2):
        centres = images.float().sum(dim=3 - axis) @ pixels / mass
        assert (centres - 14).abs().max() <= 0.51
        has_ink = images.amax(dim=3 - axis) > 0
        extent = 28 - has_ink.int().argmax(dim=1) - has_ink.flip(1).int().argmax(dim=1)
        assert extent.max() <= 20


def test_a_digit_keeps_its_orientation():
    """Shrunk to the size it came in, a digit looks like what it was, and not like its mirror image."""
    originals = torch.from_numpy(load_digits().images[:200]).to(torch.uint8)
    formed = datasets.to_mnist_form(originals).float()
    plain = torch.zeros(200, 28, 28)
    plain[:, 4:24, 4:24] = originals.float().repeat_interleave(5, 1).repeat_interleave(5, 2)[:, ::2, ::2]
    upright = torch.nn.functional.cosine_similarity(formed.flatten(1), plain.flatten(1)).mean()
    mirrored = torch.nn.functional.cosine_similarity(formed.flip(2).flatten(1), plain.flatten(1)).mean()
    assert upright > 0.8
    assert upright > mirrored + 0.1


@pytest.mark.parametrize("val_size", [0, 100])
def test_all_splits_move_to_the_device_together(val_size):
    dataset = datasets.read("digits", DataConfig(dataset="digits", val_size=val_size)).to(torch.device("meta"))
    splits = [split for split in (dataset.train, dataset.val, dataset.test) if split is not None]
    assert len(splits) == (3 if val_size else 2)
    assert {tensor.device.type for split in splits for tensor in (split.images, split.labels)} == {"meta"}


def write_qmnist(data_dir):
    """Thirty training and ten test images with labels of eight numbers, as QMNIST has them."""
    rng = np.random.default_rng(0)
    raw = data_dir / "QMNIST" / "raw"
    raw.mkdir(parents=True)
    for name, num_images in (("train", 30), ("test", 10)):
        images = rng.integers(0, 256, (num_images, 28, 28), dtype=np.uint8)
        labels = rng.integers(0, 10, (num_images, 8)).astype(">i4")
        header = struct.pack(">3I", 0x0C02, *labels.shape)
        (raw / f"qmnist-{name}-images-idx3-ubyte").write_bytes(idx_bytes(images))
        (raw / f"qmnist-{name}-labels-idx2-int").write_bytes(header + labels.tobytes())


def test_qmnist_is_what_torchvision_reads(tmp_path):
    write_qmnist(tmp_path)
    dataset = datasets.read("qmnist", DataConfig(dataset="qmnist", data_dir=str(tmp_path)))
    for split, is_train in ((dataset.train, True), (dataset.test, False)):
        reference = import_torchvision("datasets").QMNIST(str(tmp_path), train=is_train)
        assert torch.equal(split.images, reference.data)
        assert torch.equal(split.labels, reference.targets[:, 0])


@needs_mnist
def test_mnist_is_what_torchvision_reads():
    dataset = datasets.read("mnist", DataConfig(dataset="mnist", data_dir=REAL_DIR))
    for split, is_train in ((dataset.train, True), (dataset.test, False)):
        reference = import_torchvision("datasets").MNIST(REAL_DIR, train=is_train)
        assert torch.equal(split.images, reference.data)
        assert torch.equal(split.labels, reference.targets)


@needs_mnist
def test_the_published_files_raise_no_warning_and_one_changed_byte_does(tmp_path):
    assert datasets.read("mnist", DataConfig(data_dir=REAL_DIR)).warnings == ()
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in (TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS):
        source = find_file(SOURCES["mnist"], REAL_DIR, name)
        shutil.copy(source, raw / source.name)
    labels = next(raw.glob(f"{TEST_LABELS}*"))
    content = bytearray(gzip.decompress(labels.read_bytes()) if labels.suffix == ".gz" else labels.read_bytes())
    content[-1] ^= 1
    labels.unlink()
    (raw / TEST_LABELS).write_bytes(content)
    warnings = datasets.read("mnist", DataConfig(data_dir=str(tmp_path))).warnings
    assert len(warnings) == 1
    assert warnings[0].startswith(TEST_LABELS)


def test_digits_are_normalised_by_the_constants_of_mnist_and_others_by_their_own(tmp_path):
    write_files(tmp_path, "KMNIST")
    kmnist = datasets.read("kmnist", DataConfig(data_dir=str(tmp_path)))
    pixels = kmnist.train.images / 255
    resolved = datasets.resolve(TrainConfig(), kmnist)
    assert resolved.data.dataset == "kmnist"
    assert resolved.image.mean == (pytest.approx(float(pixels.mean()), abs=6e-5),)
    assert resolved.image.std == (pytest.approx(float(pixels.std(correction=0)), abs=6e-5),)
    digits = datasets.read("digits", DataConfig())
    assert datasets.resolve(TrainConfig(), digits).image == ImageConfig(mean=(0.1307,), std=(0.3081,))


@needs_mnist
def test_mnist_has_the_mean_and_std_that_are_its_constants():
    images = datasets.read("mnist", DataConfig(data_dir=REAL_DIR)).train.images
    assert datasets._mean_and_std(images) == ((0.1307,), (0.3081,))


def test_a_recipes_own_mean_and_std_hold_on_every_data_set(tmp_path):
    write_files(tmp_path, "KMNIST")
    kmnist = datasets.read("kmnist", DataConfig(data_dir=str(tmp_path)))
    plain = evolve(TrainConfig(), mean=(0.0,), std=(1.0,))
    assert datasets.resolve(plain, kmnist).image == plain.image


def test_mean_and_std_are_of_each_channel_and_never_zero():
    images = torch.zeros(4, 3, 5, 6, dtype=torch.uint8)
    images[:, 1], images[::2, 2] = 255, 255
    assert datasets._mean_and_std(images) == ((0.0, 1.0, 0.5), (0.001, 0.001, 0.5))


def test_numbers_for_other_channels_than_the_images_have_are_refused():
    digits = datasets.read("digits", DataConfig())
    with pytest.raises(UserError, match=r"^--std: 3 numbers, but the images of digits have 1 channel"):
        datasets.resolve(evolve(TrainConfig(), std=(0.2, 0.2, 0.3)), digits)


def write_emnist(data_dir, split, labels_seen):
    """Thirty training and ten test images as EMNIST has them, with labels from `labels_seen`."""
    rng = np.random.default_rng(0)
    raw = data_dir / "EMNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for part, num_images in (("train", 30), ("test", 10)):
        images = rng.integers(0, 256, (num_images, 28, 28), dtype=np.uint8)
        labels = rng.choice(labels_seen, num_images).astype(np.uint8)
        labels[:2] = labels_seen[0], labels_seen[-1]
        (raw / f"emnist-{split}-{part}-images-idx3-ubyte").write_bytes(idx_bytes(images))
        (raw / f"emnist-{split}-{part}-labels-idx1-ubyte").write_bytes(idx_bytes(labels))


@pytest.mark.parametrize(
    ("split", "labels_seen"), [("letters", range(1, 27)), ("balanced", range(47)), ("digits", range(10))]
)
def test_emnist_is_what_torchvision_reads_but_upright_and_with_labels_from_0(tmp_path, split, labels_seen):
    write_emnist(tmp_path, split, labels_seen)
    dataset = datasets.read(f"emnist_{split}", DataConfig(data_dir=str(tmp_path)))
    assert len(dataset.class_names) == len(labels_seen)
    for part, is_train in ((dataset.train, True), (dataset.test, False)):
        reference = import_torchvision("datasets").EMNIST(str(tmp_path), split, train=is_train)
        assert torch.equal(part.images, reference.data.transpose(1, 2))
        names = [reference.classes[label] for label in reference.targets]
        assert [dataset.class_names[label] for label in part.labels] == names
        assert part.images.is_contiguous()


@pytest.mark.parametrize(("split", "labels_seen"), [("letters", range(1, 27)), ("balanced", range(47))])
def test_a_run_on_emnist_has_as_many_classes_as_it(tmp_path, split, labels_seen):
    write_emnist(tmp_path / "data", split, labels_seen)
    options = f"--dataset emnist_{split} --data-dir data --run-dir run --global-batch-size 10 --no-pictures"
    done = finish(train(*options.split(), "--num-threads", "1"), tmp_path)
    assert done.code == 0, done.err
    exported = json.loads((tmp_path / "run" / "export" / "best" / "config.json").read_text())
    confusion = json.loads((tmp_path / "run" / "result.json").read_text())["test_confusion"]
    assert len(exported["class_names"]) == len(confusion) == len(confusion[0]) == len(labels_seen)
    assert exported["mean"] != [0.1307]


def test_a_label_outside_emnists_letters_is_named_as_the_file_has_it(tmp_path):
    write_emnist(tmp_path, "letters", [0, 1])
    with pytest.raises(UserError, match="train-labels-idx1-ubyte: label 0, expected 1 to 26"):
        datasets.read("emnist_letters", DataConfig(data_dir=str(tmp_path)))


def test_images_that_do_not_fit_on_the_gpu_are_one_line_with_their_size(monkeypatch):
    def fail(_dataset, _device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(datasets.Dataset, "to", fail)
    with pytest.raises(
        UserError, match=r"^--dataset digits: 0\.0 GB of images do not fit on cpu; try a smaller --image-"
    ):
        datasets.load(DataConfig(dataset="digits"), Accelerator(cpu=True), 28)
