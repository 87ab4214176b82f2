from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mnist.bench import baselines
from mnist.bench.__main__ import Options, comparable_config, compare_turns, loops, main
from mnist.bench.baselines import LOOPS, Job, PILImages, has_torchvision_files, usual_loader
from mnist.bench.comparison import Loop, LoopResult, check_losses, compare, measure_loops, paired_ratio
from mnist.bench.report import Report, print_report
from mnist.bench.scaling import ALONE, WAYS, Turn, measure_scaling
from mnist.config import DataConfig, TrainConfig, evolve
from mnist.data.batches import Split
from mnist.data.datasets import read
from mnist.data.sources import SOURCES
from mnist.data.transforms import BatchTransform
from mnist.errors import RunError, UserError
from mnist.recipes import RECIPES
from mnist.system.accelerator import build_accelerator
from mnist.system.torchvision_compat import import_torchvision
from tests.networks import INFO
from tests.processes import PYTHON, finish
from tests.ranks import run_ranks

DIGITS = read("digits", DataConfig())
BENCH = [*PYTHON, "-m", "mnist.bench"]
QUICK = ["--dataset", "digits", "--num-threads", "1", "--cpu"]


def config(recipe: str = "smoke", **changes: Any) -> TrainConfig:
    fixed = {"dataset": "digits", "data_dir": "none", "schedule": "constant", "num_threads": 1, "cpu": True}
    smaller = {"global_batch_size": 64, "lr": 5e-3} if recipe == "smoke" else {}
    return evolve(RECIPES[recipe](), **fixed | {"mixed_precision": "no"} | smaller | changes)


def job(recipe: str = "smoke", num_images: int = 300, **changes: Any) -> Job:
    return Job(config(recipe, **changes), DIGITS.train[:num_images], INFO)


@pytest.mark.parametrize("loop", LOOPS)
def test_every_loop_sees_all_images_and_learns(loop: str) -> None:
    train_pass = LOOPS[loop](job())
    passes = [train_pass(index) for index in range(6)]
    assert [count for _, count in passes] == [300] * 6
    assert passes[-1][0] / 300 < 0.7 * passes[0][0] / 300 < 0.7 * 2.5


@pytest.mark.parametrize("recipe", ["smoke", "lenet5", "mlp", "fast"])
def test_the_project_computes_what_the_bare_loop_computes(recipe: str) -> None:
    """Three passes of five steps, the last one short; equal but for the order of sums."""
    bare, ours = (LOOPS[loop](job(recipe, global_batch_size=64)) for loop in ("bare", "project"))
    for index in range(3):
        (limit, _), (loss, _) = bare(index), ours(index)
        assert loss == pytest.approx(limit, rel=1e-3)


def test_bf16_is_bf16_in_both() -> None:
    fp32, bare, ours = (
        LOOPS[loop](job(mixed_precision=precision))(0)[0]
        for loop, precision in (("bare", "no"), ("bare", "bf16"), ("project", "bf16"))
    )
    assert ours == pytest.approx(bare, rel=1e-3)
    assert bare != fp32


def test_the_usual_loop_starts_where_the_bare_one_starts() -> None:
    """One step over all images: no order can make a difference."""
    losses = [LOOPS[loop](job(num_images=100, global_batch_size=100))(0)[0] for loop in LOOPS]
    assert losses == [pytest.approx(losses[0], rel=1e-5)] * len(LOOPS)


def test_the_bare_loop_computes_the_same_when_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU the work stands in for its recording; 300 images are two full batches and a short one."""

    def record(work: Callable[[], object]) -> Callable[[], object]:
        work()
        return work

    monkeypatch.setattr(baselines, "record_cuda_graph", record)
    sizes = {"num_images": 300, "global_batch_size": 128}
    captured, eager = LOOPS["bare"](job(step_mode="captured", **sizes)), LOOPS["bare"](job(**sizes))
    for index in range(3):
        assert captured(index) == pytest.approx(eager(index), rel=1e-5)  # its learning rate is in fp32


def test_workers_load_the_same_images() -> None:
    alone, helped = usual_loader(job()), usual_loader(dataclasses.replace(job(), num_workers=2))
    sums = [sorted(float(image.sum()) for images, _ in loader for image in images) for loader in (alone, helped)]
    assert sums[0] == sums[1]
    assert len(sums[0]) == 300


@pytest.mark.parametrize("recipe", ["smoke", "lenet5", "mlp"])
def test_the_pil_pipeline_makes_the_same_images_as_ours(recipe: str) -> None:
    """Resizing ends in 8 bits there, hence the tolerance of a grey level and a bit."""
    image = config(recipe).image
    dataset = usual_loader(job(recipe)).dataset
    theirs = torch.stack([dataset[index][0] for index in range(50)])
    tolerance = 1e-5 if image.image_size == 28 else 1.1 / 255 / image.std[0]
    torch.testing.assert_close(theirs, BatchTransform(image)(DIGITS.train.images[:50]), rtol=0, atol=tolerance)


def test_the_stand_in_hands_out_what_torchvision_would(tmp_path: Path) -> None:
    assert not has_torchvision_files("mnist", str(tmp_path))
    assert not has_torchvision_files("digits", str(tmp_path))
    image, label = PILImages(DIGITS.train, import_torchvision("transforms").ToTensor())[7]
    assert label == int(DIGITS.train.labels[7])
    torch.testing.assert_close(image, DIGITS.train.images[7:8].float() / 255)


def test_the_usual_pipeline_shows_letters_upright_and_pictures_in_colour(tmp_path: Path) -> None:
    for file in SOURCES["emnist_letters"].files:
        (tmp_path / "EMNIST" / "raw").mkdir(parents=True, exist_ok=True)
        (tmp_path / "EMNIST" / "raw" / file).touch()
    assert not has_torchvision_files("emnist_letters", str(tmp_path))  # torchvision's class shows them transposed
    to_tensor = import_torchvision("transforms").ToTensor()
    for channels in (1, 3):
        pixels = torch.randint(0, 256, (2, channels, 8, 8), dtype=torch.uint8)
        image, _ = PILImages(Split(pixels, torch.zeros(2, dtype=torch.int64)), to_tensor)[1]
        assert torch.equal(image, pixels[1] / 255)


def result(loop: str, rates: list[float], loss: float = 2.0, **mode: Any) -> LoopResult:
    return LoopResult(Loop(loop, **mode), rates, [loss, 1.0], 30, 10**8)


def test_ratios_are_taken_within_each_round() -> None:
    """The machine was twice as slow in the second round: it was so for all."""
    rows = compare("smoke", [result("pipeline", [100, 50]), result("bare", [400, 200]), result("project", [320, 160])])
    assert [row["x usual"] for row in rows] == [1.0, 4.0, 3.2]
    assert [row["over bare"] for row in rows] == [None, None, pytest.approx(0.25)]
    assert paired_ratio([1, 2, 30], [1, 1, 10]) == 2
    assert (rows[0]["images/s"], rows[0]["min"], rows[0]["max"]) == (75, 50, 100)


def test_each_precision_has_its_own_limit() -> None:
    results = [result("pipeline", [1]), result("bare", [8]), result("project", [4], precision="bf16")]
    assert [row["over bare"] for row in compare("smoke", results)] == [None, None, None]
    results.append(result("bare", [6], precision="bf16"))
    assert compare("smoke", results)[2]["over bare"] == pytest.approx(0.5)


def test_each_step_mode_has_its_own_limit() -> None:
    modes: list[dict[str, Any]] = [{}, {"step_mode": "captured"}]
    results = [result("pipeline", [1]), *(result("bare", [8 * k], **mode) for k, mode in enumerate(modes, start=1))]
    results += [result("project", [8], **mode) for mode in modes]
    assert [row["over bare"] for row in compare("smoke", results)] == [None, None, None, 0, 1]


@pytest.mark.parametrize("loss", [2.2, float("nan")])
def test_loops_that_compute_something_else_are_not_compared(loss: float) -> None:
    check_losses([result("bare", [1]), result("project", [1], loss=2.05)])
    check_losses([result("bare", [1], precision="bf16"), result("project", [1], loss=loss)])
    with pytest.raises(RunError, match="bare loop, fp32, captured"):
        check_losses([result("bare", [1]), result("bare", [1], loss=loss, step_mode="captured")])
    with pytest.raises(RunError, match="do not compute the same"):
        check_losses([result("bare", [1]), result("project", [1], loss=loss)])


def test_which_loops_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    options = Options(precisions=("bf16",), workers=3)
    usual = [Loop("pipeline"), Loop("pipeline", num_workers=3), Loop("prepared")]
    ours = [Loop("bare", "bf16"), Loop("project", "bf16")]
    assert loops(options) == [*usual, *ours]
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    assert loops(options) == [*usual, *ours, Loop("project", "bf16", dynamo="inductor")]


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ({"images": 0}, "--images 0: must be 1 or more"),
        ({"repeats": 0}, "--repeats 0: must be"),
        ({"processes": 1}, "--processes 1: must be 2 or more"),
        ({"workers": -1}, "--workers -1: must be 0 or more"),
        ({"num_threads": -1}, "--num-threads -1: must be 0 or more"),
        ({"recipe": ("lenet",)}, "--recipe lenet: unknown; did you mean lenet5"),
        ({"precisions": ()}, "--precisions: "),
    ],
)
def test_mistakes_name_the_flag(mistake: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Options(**mistake)


def test_one_process_measures_all_but_scaling(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="loops: is measured by one process"):
        main(Options())


@pytest.mark.parametrize("recipe", ["accurate", "lenet5_original"])
def test_a_recipe_with_augmentation_is_refused(recipe: str) -> None:
    with pytest.raises(UserError, match=f"--recipe {recipe}: has augmentation"):
        comparable_config(recipe, Options(dataset="digits"))


REPORT = Report("loops", {"torch": "2"}, [{"loop": "a", "images/s": 1234.5, "over bare": None, "loss": 1}], ["so"])


def test_a_report_is_a_table_or_one_json_document(capsys: pytest.CaptureFixture[str]) -> None:
    report = dataclasses.replace(REPORT, hidden=["loss"])
    print_report(report, as_json=False)
    table = capsys.readouterr().out
    assert "images/s" in table
    assert "1,234" in table
    assert "loss" not in table
    print_report(report, as_json=True)
    assert json.loads(capsys.readouterr().out) == dataclasses.asdict(report)


def test_processes_are_measured_against_processes_that_do_not_communicate() -> None:
    """On three ranks; all learn, and all know all figures."""

    def measure() -> dict[str, list[Turn]]:
        accelerator = build_accelerator(config().runtime)
        return measure_scaling(accelerator, config(), DIGITS, num_steps=2, repeats=2)

    first, *others = run_ranks(measure, 3)
    assert tuple(first) == WAYS
    assert all(len(turns) == 2 and min(min(turn) for turn in turns) > 0 for turns in first.values())
    assert others == [first] * 2


def test_scaling_is_a_ratio_within_each_round() -> None:
    alone, ours = [Turn(100, 2), Turn(50, 2), Turn(50, 3)], [Turn(90, 2.5), Turn(40, 2), Turn(60, 3)]
    row = compare_turns(ours, alone)
    assert (row["images/s"], row["ratio"], row["min"], row["max"], row["CPU ratio"]) == (60, 0.9, 0.8, 1.2, 1.0)


@pytest.mark.launch
def test_loops_are_measured_each_in_its_own_process() -> None:
    both = [Loop("bare"), Loop("project"), Loop("project", "bf16")]
    results = measure_loops(both, config(), num_images=100, repeats=2)
    for found, loop in zip(results, both, strict=True):
        assert (found.loop, found.num_images, len(found.images_per_s)) == (loop, 300, 2)
        assert found.losses[2] < found.losses[0]
        assert found.peak_memory_mb > 50
    assert results[1].losses == [pytest.approx(loss, rel=1e-4) for loss in results[0].losses]
    with pytest.raises(RunError, match=r"the process of .* has died"):
        measure_loops([Loop("project", "fp16")], config(), num_images=100, repeats=1)


@pytest.mark.launch
def test_the_command_compares_loops(tmp_path: Path) -> None:
    done = finish(
        [*BENCH, *QUICK, "--recipe", "smoke", "--images", "128", "--repeats", "1", "--workers", "0"], tmp_path
    )
    assert (done.code, done.err) == (0, "")
    assert "a stand-in for torchvision's class" in done.out
    assert done.out.count("this project  ") == 2
    assert "\x1b" not in done.out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.launch
def test_scaling_prints_json(tmp_path: Path) -> None:
    done = finish(
        [*BENCH, "scaling", *QUICK, "--recipe", "smoke", "--repeats", "1", "--images", "64", "--json"], tmp_path
    )
    assert done.code == 0, done.err
    rows = json.loads(done.out)["rows"]
    assert [row["ranks"] for row in rows] == list(WAYS)
    assert [row["ratio"] for row in rows if row["ranks"] == ALONE] == [1.0]


@pytest.mark.launch
@pytest.mark.parametrize("measure", ["loops", "scaling"])
def test_a_mistake_is_one_line(tmp_path: Path, measure: str) -> None:
    done = finish([*BENCH, measure, *QUICK, "--recipe", "accurate"], tmp_path)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert done.err.startswith("error: --recipe accurate: has augmentation")


@pytest.mark.launch
def test_a_mistyped_recipe_is_answered_before_torch_is_imported(tmp_path: Path) -> None:
    done = finish([sys.executable, "-X", "importtime", "-m", "mnist.bench", "--recipe", "lenet"], tmp_path)
    assert done.code == 2
    assert "--recipe lenet: unknown" in " ".join(done.err.split())
    assert " torch\n" not in done.err
