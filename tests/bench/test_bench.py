from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest
import torch

from mnist.bench import baselines, comparison
from mnist.bench.__main__ import Options, comparable_config, loops, main
from mnist.bench.baselines import LOOPS, Job, PILImages, usual_loader
from mnist.bench.comparison import Loop, Measurement, check_losses, compare, measure_loops, paired_ratio
from mnist.bench.report import Report, print_report
from mnist.bench.scaling import ALONE, WAYS, compare_rates, measure_scaling
from mnist.config import DataConfig, TrainConfig, evolve
from mnist.data.batches import Split
from mnist.data.datasets import read
from mnist.data.transforms import BatchTransform
from mnist.errors import RunError, UserError
from mnist.recipes import RECIPES
from mnist.system.accelerator import build_accelerator
from mnist.system.torchvision_compat import import_torchvision
from tests.networks import INFO
from tests.processes import PYTHON, TORCHRUN, finish
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


def test_bf16_is_bf16_in_all() -> None:
    """One step over all images, in which no order can make a difference."""
    one_step = {"num_images": 100, "global_batch_size": 100}
    fp32 = LOOPS["bare"](job(**one_step))(0)[0]
    losses = [LOOPS[loop](job(mixed_precision="bf16", **one_step))(0)[0] for loop in LOOPS]
    assert losses == [pytest.approx(losses[0], rel=1e-3)] * len(LOOPS)
    assert fp32 not in losses


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


def test_pil_images_are_what_torchvision_hands_out() -> None:
    mnist = import_torchvision("datasets").MNIST.__new__(import_torchvision("datasets").MNIST)
    mnist.data, mnist.targets = DIGITS.train.images, DIGITS.train.labels
    mnist.transform, mnist.target_transform = import_torchvision("transforms").ToTensor(), None
    (theirs, their_label), (ours, label) = mnist[7], PILImages(DIGITS.train, mnist.transform)[7]
    assert torch.equal(ours, theirs)
    assert label == their_label


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_of_a_folder_keep_their_channels(channels: int) -> None:
    to_tensor = import_torchvision("transforms").ToTensor()
    pixels = torch.randint(0, 256, (2, channels, 8, 8), dtype=torch.uint8)
    image, _ = PILImages(Split(pixels, torch.zeros(2, dtype=torch.int64)), to_tensor)[1]
    assert torch.equal(image, pixels[1] / 255)


def passes(*rates: float, loss: float = 2.0) -> list[Measurement]:
    """An uncounted pass before those with these speeds."""
    return [Measurement(rate, loss, 10**8) for rate in (1e9, *rates)]


CAPTURED = {name: Loop(name, step_mode="captured") for name in ("bare", "project")}


def test_ratios_are_taken_within_each_round() -> None:
    """The machine was twice as slow in the second round: it was so for all."""
    rates = {"pipeline": passes(100, 50), "bare": passes(400, 200), "project": passes(320, 160)}
    rows = compare("smoke", {Loop(name): found for name, found in rates.items()})
    assert [row["x usual"] for row in rows] == [1.0, 4.0, 3.2]
    assert [row["over bare"] for row in rows] == [None, None, pytest.approx(0.25)]
    assert paired_ratio([1, 2, 30], [1, 1, 10]) == 2
    assert (rows[0]["images/s"], rows[0]["min"], rows[0]["max"]) == (75, 50, 100)


def test_each_step_mode_has_its_own_limit() -> None:
    results = {Loop("pipeline"): passes(1), Loop("bare"): passes(8), CAPTURED["bare"]: passes(16)}
    results |= {Loop("project"): passes(8), CAPTURED["project"]: passes(8)}
    assert [row["over bare"] for row in compare("smoke", results)] == [None, None, None, 0, 1]


@pytest.mark.parametrize("loss", [2.2, float("nan")])
def test_loops_that_compute_something_else_are_not_compared(loss: float) -> None:
    bare = {Loop("bare"): passes(1)}
    others = {Loop("pipeline"): passes(1, loss=loss), Loop("project"): passes(1, loss=2.05)}
    assert check_losses(bare | others) == pytest.approx(0.025)
    with pytest.raises(RunError, match="bare loop, captured: the loss of the first pass"):
        check_losses(bare | {CAPTURED["bare"]: passes(1, loss=loss)})
    with pytest.raises(RunError, match="do not compute the same"):
        check_losses(bare | {Loop("project"): passes(1, loss=loss)})


def test_which_loops_are_compared() -> None:
    usual = [Loop("pipeline"), Loop("pipeline", num_workers=3), Loop("prepared")]
    assert loops(Options(workers=3)) == [*usual, Loop("bare"), Loop("project")]
    assert Loop("pipeline", num_workers=3) not in loops(Options(workers=0))


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ({"images": 0}, "--images 0: must lie in [1, 1e9]"),
        ({"repeats": 0}, "--repeats 0: must lie in"),
        ({"workers": -1}, "--workers -1: must lie in [0, 1024]"),
        ({"num_threads": -1}, "--num-threads -1: must lie in [0, 1024]"),
        ({"recipe": ("lenet",)}, "--recipe lenet: unknown; did you mean lenet5"),
    ],
)
def test_mistakes_name_the_flag(mistake: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        Options(**mistake)


def test_one_process_measures_all_but_scaling(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="start this without a launcher"):
        main(Options())


def test_scaling_says_which_launcher_it_needs() -> None:
    with pytest.raises(UserError, match=r"scaling: needs several processes: torchrun --nproc-per-node 2"):
        main(Options(measure="scaling"))


@pytest.mark.parametrize("recipe", ["accurate", "lenet5_original"])
def test_a_recipe_with_augmentation_is_refused(recipe: str) -> None:
    with pytest.raises(UserError, match=f"--recipe {recipe}: has augmentation"):
        comparable_config(recipe, Options(dataset="digits"))


def test_a_report_is_a_table_or_one_json_document(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report("loops", {"torch": "2"}, [{"loop": "a", "images/s": 1234.5, "over bare": None}], ["so"])
    print_report(report, as_json=False)
    table = capsys.readouterr().out
    assert "images/s" in table
    assert "1,234" in table
    print_report(report, as_json=True)
    assert json.loads(capsys.readouterr().out) == dataclasses.asdict(report)


def test_processes_are_measured_against_processes_that_do_not_communicate() -> None:
    """On three ranks; all learn, and all know all figures."""

    def measure() -> dict[str, list[float]]:
        accelerator = build_accelerator(config().runtime)
        return measure_scaling(accelerator, config(), DIGITS, num_steps=2, repeats=2)

    first, *others = run_ranks(measure, 3)
    assert tuple(first) == WAYS
    assert all(len(rates) == 2 and min(rates) > 0 for rates in first.values())
    assert others == [first] * 2


def test_scaling_is_a_ratio_within_each_round() -> None:
    row = compare_rates([90, 40, 60], alone=[100, 50, 50])
    assert (row["images/s"], row["ratio"], row["min"], row["max"]) == (60, 0.9, 0.8, 1.2)


@pytest.mark.launch
def test_loops_are_measured_each_in_its_own_process() -> None:
    both = [Loop("bare"), Loop("project")]
    results = measure_loops(both, config(num_threads=2), num_images=100, repeats=2)
    assert list(results) == both
    for found in results.values():
        assert len(found) == 3
        assert found[2].loss < found[0].loss
        assert min(found[1]) > 0
        assert found[2].peak_memory_mb > 50
    bare, ours = ([one.loss for one in results[loop]] for loop in both)
    assert ours == [pytest.approx(loss, rel=1e-4) for loss in bare]
    with pytest.raises(RunError, match="--step-mode captured: "):
        measure_loops([Loop("project", step_mode="captured")], config(), num_images=100, repeats=1)


def test_a_loop_whose_process_dies_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Dying(ProcessPoolExecutor):
        def submit(self, *_: Any) -> Future[Any]:  # type: ignore[override]
            future: Future[Any] = Future()
            future.set_exception(BrokenProcessPool())
            return future

    monkeypatch.setattr(comparison, "ProcessPoolExecutor", Dying)
    with pytest.raises(RunError, match="the process of bare loop, eager has died"):
        measure_loops([Loop("bare")], config(), num_images=100, repeats=1)


@pytest.mark.launch
def test_the_command_compares_loops(tmp_path: Path) -> None:
    done = finish(
        [*BENCH, *QUICK, "--recipe", "smoke", "--images", "128", "--repeats", "1", "--workers", "0"], tmp_path
    )
    assert (done.code, done.err) == (0, "")
    assert done.out.count("this project") == 2, "its row, and a note on its losses"
    assert "\x1b" not in done.out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.launch
def test_scaling_prints_json(tmp_path: Path) -> None:
    launcher = [*TORCHRUN, "--nproc-per-node", "2", "-m", "mnist.bench", "scaling"]
    done = finish([*launcher, *QUICK, "--recipe", "smoke", "--repeats", "1", "--images", "64", "--json"], tmp_path)
    assert done.code == 0, done.err
    rows = json.loads(done.out)["rows"]
    assert [row["ranks"] for row in rows] == list(WAYS)
    assert [row["ratio"] for row in rows if row["ranks"] == ALONE] == [1.0]


@pytest.mark.launch
def test_a_mistake_is_one_line(tmp_path: Path) -> None:
    done = finish([*BENCH, *QUICK, "--recipe", "accurate"], tmp_path)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert done.err.startswith("error: --recipe accurate: has augmentation")


@pytest.mark.launch
def test_a_long_tmpdir_is_one_line(tmp_path: Path) -> None:
    """Its data-loading processes waited for ever."""
    folder = tmp_path / ("a" * 100)
    folder.mkdir()
    done = finish([*BENCH, *QUICK, "--recipe", "smoke"], tmp_path, TMPDIR=str(folder))
    assert (done.code, done.err) == (1, "error: AF_UNIX path too long (a shorter TMPDIR helps)\n")


@pytest.mark.launch
def test_a_mistyped_recipe_is_answered_before_torch_is_imported(tmp_path: Path) -> None:
    done = finish([sys.executable, "-X", "importtime", "-m", "mnist.bench", "--recipe", "lenet"], tmp_path)
    assert done.code == 2
    assert "--recipe lenet: unknown" in " ".join(done.err.split())
    assert " torch\n" not in done.err
