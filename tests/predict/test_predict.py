"""The command as people type it, with models trained here: on the embedded digits, and on MNIST where it is there."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from rich.console import Console as RichConsole

from mnist.config import DataConfig, evolve, to_flat
from mnist.data.batches import Split
from mnist.data.datasets import read
from mnist.errors import RunError, UserError
from mnist.predict import __main__ as predict_command
from mnist.predict.__main__ import Options, find_pictures, main, predict, show
from mnist.predict.answers import UNSURE
from mnist.predict.digit_image import see_digits
from mnist.recipes import RECIPES
from mnist.runs.export import export_model, load_model
from mnist.runs.state_tensors import module_tensors
from tests.networks import mnist_model
from tests.processes import PYTHON, ROOT, finish
from tests.ranks import run_ranks
from tests.runs.test_run import run

REAL_DIR = os.environ.get("MNIST_DATA_DIR", "")
needs_mnist = pytest.mark.skipif(not Path(REAL_DIR, "MNIST", "raw").is_dir(), reason="MNIST_DATA_DIR has no MNIST")
TEST = read("digits", DataConfig(dataset="digits")).test
PREDICT = [*PYTHON, "-m", "mnist.predict"]


@pytest.fixture
def run_dir(smoke_run: Path) -> Path:
    """A run of `smoke`: the embedded digits."""
    return smoke_run


@pytest.fixture(scope="module")
def fast_run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `fast` on MNIST."""
    folder = tmp_path_factory.mktemp("fast")
    options = ["--dataset", "mnist", "--data-dir", str(REAL_DIR), "--num-threads", "1", "--no-pictures"]
    assert run_ranks(run, 1, folder, *options) == [0]
    return folder


def save_digits(folder: Path, split: Split) -> list[Path]:
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{index:05}-{label}.png" for index, label in enumerate(split.labels.tolist())]
    for path, image in zip(paths, split.images.numpy(), strict=True):
        Image.fromarray(image).save(path)
    return paths


def num_correct(answers: list[dict[str, object]]) -> int:
    return sum(Path(str(answer["file"])).stem[-1] == str(answer["digit"]) for answer in answers)


def ask(capsys: pytest.CaptureFixture[str], *pictures: str | Path, run: Path, code: int = 0) -> list[dict[str, object]]:
    """What --json prints."""
    assert main(Options(tuple(map(str, pictures)), run=str(run), json=True)) == code
    answers: list[dict[str, object]] = json.loads(capsys.readouterr().out)
    return answers


@pytest.mark.launch
def test_the_picture_of_the_readme(run_dir: Path, tmp_path: Path) -> None:
    drawing = tmp_path / "seen.png"
    finished = finish(
        [*PREDICT, str(ROOT / "docs" / "digit.png"), "--run", str(run_dir), "--save", str(drawing)], tmp_path
    )
    assert finished.code == 0
    assert finished.err == f"drawn: {drawing}\nmodel: {run_dir}/export/best (smoke, trained on digits, NOT on MNIST)\n"
    assert re.search(r"digit\.png  5  \d+\.\d%$", finished.out.splitlines()[0])
    assert [line.split()[0] for line in finished.out.splitlines()[1:]] == list("0123456789")
    assert "\x1b" not in finished.out
    with Image.open(drawing) as image:
        assert image.width > 800


@pytest.mark.launch
def test_a_picture_from_standard_input(run_dir: Path, tmp_path: Path) -> None:
    command = ["sh", "-c", f"cat {ROOT / 'docs' / 'digit.png'} | {' '.join(PREDICT)} - --json --run {run_dir}"]
    finished = finish(command, tmp_path)
    assert [(answer["file"], answer["digit"]) for answer in json.loads(finished.out)] == [("-", 5)]


@pytest.mark.launch
def test_help_answers_without_torch(tmp_path: Path) -> None:
    finished = finish([*PYTHON, "-X", "importtime", "-m", "mnist.predict", "--help"], tmp_path)
    assert finished.code == 0
    assert "PICTURE" in finished.out
    assert not re.search(r"\| +(torch|numpy|matplotlib|PIL)$", finished.err, re.MULTILINE)


def test_the_embedded_test_digits_give_the_accuracy_of_the_evaluation(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_digits(tmp_path / "digits", TEST)
    answers = ask(capsys, tmp_path / "digits", run=run_dir)
    assert len(answers) == 360
    assert num_correct(answers) == json.loads((run_dir / "result.json").read_text())["test"]["num_correct"]


def photographed(digit: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """A digit drawn with dark or coloured ink somewhere on unevenly lit paper, with noise."""
    side = int(rng.integers(60, 240))
    grey = Image.fromarray(digit).resize((side, side), Image.Resampling.BICUBIC)
    height, width = (int(side * rng.uniform(1.1, 2.2)) for _ in range(2))
    top, left = int(rng.integers(0, height - side + 1)), int(rng.integers(0, width - side + 1))
    ink = np.zeros((height, width, 1), np.float32)
    ink[top : top + side, left : left + side, 0] = np.asarray(grey, np.float32) / 255
    paper_colour = rng.uniform(0.75, 1) * (1 - 0.15 * rng.random(3))
    ink_colour = rng.uniform(0.05, 0.4) + 0.25 * rng.random(3)
    y, x = np.mgrid[0:height, 0:width] / np.array([height, width])[:, None, None]
    slope, edge = rng.uniform(-0.5, 0.5, 2), rng.uniform(0.2, 0.8)
    brightness = 1 - np.abs(slope[0] * x + slope[1] * y) - rng.uniform(0, 0.4) / (1 + np.exp((edge - x) * 30))
    picture = (paper_colour + ink * (ink_colour - paper_colour)) * brightness[:, :, None]
    picture += rng.uniform(0, 0.08) * rng.standard_normal((height, width, 1), dtype=np.float32)
    return Image.fromarray((picture.clip(0, 1) * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.5))


def accuracy_of_photographs(split: Split, run: Path, num_pictures: int, folder: Path) -> float:
    rng = np.random.default_rng(0)
    chosen = rng.choice(len(split), num_pictures, replace=False)
    paths = [folder / f"{index}.jpg" for index in chosen]
    for path, index in zip(paths, chosen, strict=True):
        photographed(split.images[int(index)].numpy(), rng).save(path, quality=int(rng.integers(50, 90)))
    predictions = predict(load_model(run / "export" / "best"), list(map(str, paths)))
    return float(
        np.mean(
            [
                [a.digit for a in p.answers] == [int(split.labels[int(i)])]
                for p, i in zip(predictions, chosen, strict=True)
            ]
        )
    )


def test_photographs_of_the_embedded_digits_are_read(run_dir: Path, tmp_path: Path) -> None:
    assert accuracy_of_photographs(TEST, run_dir, 60, tmp_path) >= 0.88


@needs_mnist
def test_photographs_of_mnist_are_read(fast_run_dir: Path, tmp_path: Path) -> None:
    split = read("mnist", DataConfig(dataset="mnist", data_dir=REAL_DIR)).test
    assert accuracy_of_photographs(split, fast_run_dir, 300, tmp_path) >= 0.97


@needs_mnist
def test_predict_warns_of_a_letter_a(fast_run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    letter = Image.new("L", (400, 400), 235)
    kind = ImageFont.truetype(Path(mpl.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), 200)
    ImageDraw.Draw(letter).text((200, 200), "A", font=kind, fill=30, anchor="mm")
    letter.save(tmp_path / "A.png")
    answer, digit = ask(capsys, tmp_path / "A.png", ROOT / "docs" / "digit.png", run=fast_run_dir)
    assert answer["warning"] == "unlike all training images: perhaps no digit"
    assert digit["warning"] is None


@needs_mnist
def test_mnist_as_files_gives_exactly_the_accuracy_of_the_evaluation(
    fast_run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_digits(tmp_path / "mnist", read("mnist", DataConfig(dataset="mnist", data_dir=REAL_DIR)).test)
    answers = ask(capsys, tmp_path / "mnist", run=fast_run_dir)
    assert len(answers) == 10_000
    assert num_correct(answers) == json.loads((fast_run_dir / "result.json").read_text())["test"]["num_correct"]


def test_a_bad_file_does_not_stop_the_others(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = save_digits(tmp_path / "good", TEST[:2])
    (tmp_path / "text.png").write_text("not a picture")
    Image.new("L", (100, 100), 255).save(tmp_path / "white.png")
    (tmp_path / "empty").mkdir()
    bad = [tmp_path / "text.png", tmp_path / "white.png", tmp_path / "missing.png", tmp_path / "empty"]
    answers = ask(capsys, good[0], *bad, good[1], run=run_dir, code=1)
    assert [set(answer) for answer in answers] == [
        {"file", "digit", "probabilities", "warning"},
        *[{"file", "error"}] * 4,
        {"file", "digit", "probabilities", "warning"},
    ]
    for answer in (answers[0], answers[-1]):
        probabilities = answer["probabilities"]
        assert isinstance(probabilities, list)
        assert sum(probabilities) == pytest.approx(1, abs=1e-4)
        assert probabilities.index(max(probabilities)) == answer["digit"]
    assert main(Options(tuple(map(str, bad)), run=str(run_dir))) == 1
    printed = capsys.readouterr().out
    assert "text.png  error  not a picture" in printed
    assert "white.png  error  blank" in printed


def test_predict_warns_below_60_percent(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = TEST.images.numpy()
    rng = np.random.default_rng(0)
    for index in range(40):
        mixed = sum(images[rng.integers(360)] // 3 for _ in range(3))
        Image.fromarray(mixed.clip(0, 255).astype(np.uint8)).save(tmp_path / f"mixed-{index}.png")
    answers = ask(capsys, tmp_path, run=run_dir)
    unsure = [answer for answer in answers if max(answer["probabilities"]) < UNSURE]  # type: ignore[call-overload]
    assert unsure
    assert all("not sure" in str(answer["warning"]) for answer in unsure)


def save_42(path: Path) -> None:
    four, two = (TEST.images[TEST.labels.tolist().index(digit)].numpy() for digit in (4, 2))
    beside = Image.fromarray(255 - np.hstack([four, two]))
    beside.resize((560, 280), Image.Resampling.BICUBIC).save(path)


def test_42_is_read_as_4_and_2(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_42(tmp_path / "two.png")
    (answer,) = ask(capsys, tmp_path / "two.png", run=run_dir)
    assert list(answer) == ["file", "digit", "probabilities", "warning", "digits"]
    digits = answer["digits"]
    assert isinstance(digits, list)
    assert [digit["digit"] for digit in digits] == [4, 2]
    assert digits[0]["box"][2] <= digits[1]["box"][0]
    assert answer["digit"] in (4, 2)
    assert answer["warning"] == "2 digits in one picture: 42"
    assert main(Options((str(tmp_path / "two.png"),), run=str(run_dir), save=str(tmp_path / "seen.png"))) == 0
    output = capsys.readouterr()
    assert re.findall(r"two\.png  digit (\d) of 2  (\d)  \d", output.out) == [("1", "4"), ("2", "2")]
    assert {path.name for path in tmp_path.iterdir()} == {"two.png", "seen-digit1.png", "seen-digit2.png"}
    assert f"drawn: {tmp_path / 'seen-digit1.png'}\n" in output.err


def test_the_warning_is_in_the_saved_picture(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(predict_command, "save_picture", lambda figure, path: drawn.append(figure))
    wide = Image.new("L", (400, 200), 240)
    wide.paste(20, (60, 90, 340, 120))
    wide.save(tmp_path / "wide.png")
    assert main(Options((str(tmp_path / "wide.png"),), run=str(run_dir), save=str(tmp_path / "seen.png"))) == 0
    texts = [text.get_text() for text in drawn[0].findobj(Text)]
    assert any(text.startswith("warning: wider than a digit") for text in texts)


def test_hidden_files_are_skipped_foreign_ones_named_and_2_comes_before_10(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (path,) = save_digits(tmp_path / "one", TEST[:1])
    for name in (
        "10.png",
        "2.png",
        ".hidden.png",
        "__MACOSX/._2.png",
        ".ipynb_checkpoints/2.png",
        "3.HEIC",
        "notes.txt",
    ):
        (tmp_path / "all" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "all" / name).write_bytes(path.read_bytes() if name.endswith(("0.png", "2.png")) else b"")
    answers = ask(capsys, tmp_path / "all", run=run_dir, code=1)
    assert [Path(str(answer["file"])).name for answer in answers] == ["2.png", "3.HEIC", "10.png"]
    assert "heif-convert" in str(answers[1]["error"])


@pytest.mark.parametrize(("encoding", "character"), [("utf-8", "\u2588"), ("latin-1", "#")])
def test_bars_are_of_characters_that_the_output_has(run_dir: Path, encoding: str, character: str) -> None:
    output = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = RichConsole(file=output, force_terminal=True)
    (answered,) = predict(load_model(run_dir / "export" / "best"), [str(ROOT / "docs" / "digit.png")])
    show(console, answered, [*"0123456789"], with_bars=True)
    output.flush()
    assert character in output.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]


def test_drawings_of_1200_files_of_one_name_have_1200_names() -> None:
    files = [f"folder-{number}/a.png" for number in range(1200)] + ["a-2.png"]
    assert len(set(predict_command._drawings(files, "out"))) == 1201


def test_a_drawing_of_one_of_several_digits_never_replaces_a_picture() -> None:
    with pytest.raises(UserError, match="would write over a picture"):
        predict_command._drawings(["42.png", "42-digit1.png"], ".")


def test_an_old_export_without_a_checksum_is_used_with_a_warning(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run_dir / "export" / "best", tmp_path / "old")
    config = json.loads((tmp_path / "old" / "config.json").read_text())
    del config["weights_sha256"]
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    assert main(Options((str(ROOT / "docs" / "digit.png"),), run=str(tmp_path / "old"))) == 0
    assert "no weights_sha256" in capsys.readouterr().err


def test_files_folders_and_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("b.png", "a.jpg", "notes.txt", "deep/er/c.PNG", "[1].png", "1.png"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    assert list(find_pictures(["b.png", "missing.png"])) == ["b.png", "missing.png"]
    assert list(find_pictures(["deep"])) == ["deep/er/c.PNG"]
    assert list(find_pictures([str(tmp_path)])) == [
        str(tmp_path / name) for name in ("1.png", "[1].png", "a.jpg", "b.png", "deep/er/c.PNG")
    ]
    assert list(find_pictures(["?.png", "*.none"])) == ["1.png", "b.png", "*.none"]
    assert list(find_pictures(["[1].png"])) == ["[1].png"]


def test_drawings_of_several_pictures_go_into_a_folder(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = save_digits(tmp_path / "a", TEST[:1])
    second = save_digits(tmp_path / "b", TEST[:1])
    names = tuple(map(str, [*first, *second, tmp_path / "missing.png"]))
    assert main(Options(names, run=str(run_dir), save=str(tmp_path / "drawn"))) == 1
    assert {path.name for path in (tmp_path / "drawn").iterdir()} == {f"1-{first[0].name}", f"2-{first[0].name}"}
    with pytest.raises(UserError, match="3 pictures need a folder"):
        main(Options(names, run=str(run_dir), save=str(tmp_path / "drawn.png")))


@pytest.mark.parametrize(("target", "reason"), [("seen.what", "must be a folder"), ("file/seen.png", "not written")])
def test_a_drawing_that_cannot_be_written_is_one_line(run_dir: Path, tmp_path: Path, target: str, reason: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises((UserError, RunError), match=reason):
        main(Options((str(ROOT / "docs" / "digit.png"),), run=str(run_dir), save=str(tmp_path / target)))


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="name at least one"):
        main(Options(()))
    with pytest.raises(UserError, match=r"--run .*: no exported model"):
        main(Options(("digit.png",), run=str(tmp_path)))


def test_classes_of_other_data_sets_have_their_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = evolve(RECIPES["smoke"](), dataset="fashion_mnist")
    export_model(tmp_path, module_tensors(mnist_model(config.optim.model)), to_flat(config))
    bag = Image.new("L", (28, 28))
    bag.paste(200, (1, 6, 27, 28))  # wider than a digit and not centred: in the form of its own data set all the same
    bag.save(tmp_path / "bag.png")
    assert (see_digits(bag)[0].pixels == np.asarray(bag)).all()
    assert main(Options((str(tmp_path / "bag.png"),), run=str(tmp_path))) == 0
    assert "ankle boot" in capsys.readouterr().out


def test_many_pictures_have_a_line_each(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_digits(tmp_path / "many", TEST[:30])
    assert main(Options((str(tmp_path / "many"),), run=str(run_dir))) == 0
    assert len(capsys.readouterr().out.splitlines()) == 30


@pytest.mark.parametrize("save", ["digit.png", "."])
def test_a_drawing_never_replaces_the_picture_it_is_of(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save: str
) -> None:
    monkeypatch.chdir(tmp_path)
    content = (ROOT / "docs" / "digit.png").read_bytes()
    (tmp_path / "digit.png").write_bytes(content)
    with pytest.raises(UserError, match="would write over a picture"):
        main(Options(("digit.png",), run=str(run_dir), save=save))
    assert (tmp_path / "digit.png").read_bytes() == content


def test_a_pipe_and_a_pattern_without_match_are_named(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    errors = [answer["error"] for answer in ask(capsys, tmp_path / "pipe.png", "x/*.png", run=run_dir, code=1)]
    assert errors == ["not a regular file", "no file matches"]


def test_names_of_files_bring_no_control_characters(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(Options(("a\x1b[31m\nb.png",), run=str(run_dir))) == 1
    assert "a\\x1b[31m\\nb.png" in capsys.readouterr().out


@pytest.mark.launch
@pytest.mark.parametrize(("redirection", "code"), [(">&-", 0), ("> /dev/full", 1)])
def test_an_output_that_takes_nothing_is_no_traceback(
    smoke_run: Path, tmp_path: Path, redirection: str, code: int
) -> None:
    command = f"{' '.join(PREDICT)} {ROOT / 'docs' / 'digit.png'} --run {smoke_run} {redirection}"
    done = finish(["sh", "-c", command], tmp_path)
    assert done.code == code
    assert "Traceback" not in done.err
