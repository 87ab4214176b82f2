"""`train(config)` called by somebody else's program: a script, a server, a test, forked ranks."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import random
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import notebook_launcher
from torch.distributed.elastic.multiprocessing.api import SignalException

from mnist.config import TrainConfig, evolve
from mnist.data.batches import TrainLoader
from mnist.errors import RunError, UserError
from mnist.recipes import smoke
from mnist.runs.result import load_result
from mnist.system import signals
from mnist.training.step import TrainStep
from tests.processes import PYTHON, finish
from tests.processes import train as train_command
from tests.ranks import free_port, run_ranks
from train_ddp import train


def small(folder: Path, **changes: Any) -> TrainConfig:
    """Thirty steps on the embedded digits."""
    changes = {"max_steps": 30, "min_accuracy": None, "pictures": False, "quiet": True, **changes}
    return evolve(smoke(), run_dir=str(folder), **changes)


def state_of_the_process() -> dict[str, Any]:
    return {
        "environment": dict(os.environ),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "signal handlers": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "random numbers": (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()),  # noqa: NPY002
        "hooks": (sys.excepthook, sys.exit, threading.excepthook, logging.raiseExceptions, logging.root.handlers[:]),
        "determinism": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,
            torch.backends.cudnn.deterministic,
            torch.backends.cudnn.benchmark,
        ),
        "precision": (
            torch.get_default_dtype(),
            torch.get_float32_matmul_precision(),
            torch.backends.cuda.matmul.allow_tf32,
            torch.backends.cudnn.allow_tf32,
        ),
        "output": (sys.stdout, sys.stderr),
        "threads of Python": threading.enumerate(),
        "steps and data in memory": sum(type(thing) is TrainStep for thing in gc.get_objects()),
    }


@pytest.mark.parametrize("changes", [{"wandb": "offline", "num_threads": 3, "deterministic": True}, {"lr": 1e30}])
def test_the_process_is_as_it_was_before_the_call_also_after_an_error(tmp_path: Path, changes: dict[str, Any]) -> None:
    def call() -> None:
        torch.set_default_dtype(torch.float64)
        torch.use_deterministic_algorithms(True, warn_only=True)
        before = state_of_the_process()
        config = small(tmp_path, schedule="constant", **changes)
        if "lr" in changes:
            with pytest.raises(RunError, match="at step"):
                train(config)
        else:
            assert train(config).status == "finished"
        after = state_of_the_process()
        assert [name for name in before if before[name] != after[name]] == []

    run_ranks(call, 1)


def test_train_and_evaluate_in_one_process_never_import_torch_compile(tmp_path: Path) -> None:
    """It takes 0.8 s. Optimizers, `prepare_model`, `unwrap_model` and `backward(gradient=...)` import parts of it."""
    arguments = ["--recipe", "smoke", "--max-steps", "3", "--min-accuracy", "None", "--no-pictures"]
    for command in (train_command(*arguments)[1:], ["-m", "mnist.evaluate"]):
        done = finish([PYTHON[0], "-X", "importtime", *command], tmp_path)
        assert done.code == 0, done.err
        imported = re.findall(r"\| +([\w.]+)$", done.err, re.MULTILINE)
        assert {"torch", "accelerate"} <= set(imported)
        assert {"torch._dynamo", "torch._inductor", "sympy", "matplotlib", "wandb"} & set(imported) == set()


def test_a_mistake_is_raised_and_neither_printed_nor_an_exit(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="--global-batch-size 70000: larger than the training set"):
        train(small(tmp_path, global_batch_size=70_000))
    assert capfd.readouterr() == ("", "")


def test_the_result_has_scores_confusion_history_and_the_model(tmp_path: Path) -> None:
    started = time.perf_counter()
    result = train(small(tmp_path, log_every=10))
    assert 0 < result.record.total_time_s <= time.perf_counter() - started, "the time of the call, not of the process"
    assert (result.status, result.run_dir, result.record.recipe) == ("finished", tmp_path, "smoke-changed")
    assert result.test is not None
    assert sum(map(sum, result.test.confusion)) == result.test.num_samples == 360
    assert [row["step"] for row in result.history if row["split"] == "train"] == [10, 20, 30]
    assert {"loss", "accuracy", "lr", "images_per_s"} <= result.history[0].keys()
    model = result.load_model()
    assert model.model(model.transform(torch.zeros(2, 28, 28, dtype=torch.uint8))).shape == (2, 10)
    assert load_result(tmp_path) == result


def test_a_result_is_small_and_equal_on_all_ranks(tmp_path: Path) -> None:
    first, second = run_ranks(lambda: train(small(tmp_path)), 2)
    assert first == second == load_result(tmp_path)


def test_without_a_run_there_is_no_result(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no run there \(it has no result.json\)"):
        load_result(tmp_path)


def call_with_launcher(folder: Path, call: Callable[[], None]) -> None:
    """Runs `call`, which uses `notebook_launcher`, in a process group of its own, of which nothing is left behind."""

    def lead() -> None:
        os.setpgid(0, 0)
        (folder / "group").write_text(str(os.getpid()))
        call()

    try:
        run_ranks(lead, 1)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int((folder / "group").read_text()), signal.SIGKILL)


def interrupt_at(step: int, times: int = 1) -> None:
    """Ctrl-C when this step is about to be taken."""
    original = TrainLoader.steps

    def steps(self: TrainLoader, first: int, stop: int) -> Iterator[Any]:
        for index, micro_batches in enumerate(original(self, first, stop), start=first):
            if index == step:
                for _ in range(times):
                    signal.raise_signal(signal.SIGINT)
            yield micro_batches

    TrainLoader.steps = steps  # type: ignore[method-assign]


def test_an_interrupt_saves_and_returns_preempted_and_the_next_call_ends_bit_for_bit_the_same(tmp_path: Path) -> None:
    def call() -> None:
        gc.disable()
        gc.collect = lambda *_: 0  # type: ignore[assignment]  # the run directory must not be free by chance
        interrupt_at(17)
        result = train(small(tmp_path / "a"))
        assert (result.status, result.record.steps, result.test) == ("preempted", 18, None)
        with pytest.raises(UserError, match="no exported model there"):
            result.load_model()
        assert train(small(tmp_path / "a", log_every=7)).status == "finished", "in the same directory"
        assert train(small(tmp_path / "c")).status == "preempted"
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    run_ranks(call, 1)
    train(small(tmp_path / "b", log_every=7))
    a, b = ((tmp_path / name / "export/last/model.safetensors").read_bytes() for name in ("a", "b"))
    assert a == b


@pytest.mark.parametrize(("patience_s", "error"), [(0.0, KeyboardInterrupt), (60.0, None)])
def test_a_second_interrupt_is_obeyed_at_once_if_it_comes_2_seconds_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patience_s: float, error: type[BaseException] | None
) -> None:
    monkeypatch.setattr(signals, "FORCE_AFTER_S", patience_s)

    def call() -> None:
        interrupt_at(17, times=2)
        if error is None:
            assert train(small(tmp_path)).status == "preempted"
            return
        with pytest.raises(error):
            train(small(tmp_path))
        assert load_result(tmp_path).status == "failed"

    run_ranks(call, 1)


def test_an_interrupt_handler_of_the_caller_stays(tmp_path: Path) -> None:
    def call() -> int:
        interrupts: list[int] = []
        signal.signal(signal.SIGINT, lambda number, _: interrupts.append(number))
        interrupt_at(17)
        assert train(small(tmp_path)).status == "finished"
        return len(interrupts)

    assert run_ranks(call, 1) == [1]


def test_a_call_from_a_thread_trains(tmp_path: Path) -> None:
    results: list[str] = []
    thread = threading.Thread(target=lambda: results.append(train(small(tmp_path)).status))
    thread.start()
    thread.join()
    assert results == ["finished"]


def test_a_process_that_called_us_is_not_ended_by_the_watchdog(tmp_path: Path) -> None:
    """A person may look at something in a debugger for longer than --timeout-s."""

    def call() -> str:
        original = TrainLoader.steps

        def steps(self: TrainLoader, first: int, stop: int) -> Iterator[Any]:
            time.sleep(4)
            yield from original(self, first, stop)

        TrainLoader.steps = steps  # type: ignore[method-assign]
        return train(small(tmp_path, timeout_s=1)).status

    assert run_ranks(call, 1) == ["finished"]


@pytest.mark.launch
def test_notebook_launcher_trains_on_two_forked_processes_although_the_caller_has_used_two_threads(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """OpenMP with several threads waits for ever in a process that was forked from one that has used several."""

    def call() -> None:
        torch.set_num_threads(2)
        torch.nn.Conv2d(1, 32, 3)(torch.randn(64, 1, 28, 28)).sum().backward()
        config = small(tmp_path / "run", num_threads=2)
        notebook_launcher(train, (config,), num_processes=2, use_port=str(free_port()))

    call_with_launcher(tmp_path, call)
    result = load_result(tmp_path / "run")
    assert (result.status, result.record.world_size) == ("finished", 2)
    assert "--num-threads 2: a forked process can have one thread only" in capfd.readouterr().err


@pytest.mark.launch
def test_an_interrupt_of_two_forked_processes_saves_and_the_next_call_continues(tmp_path: Path) -> None:
    """As a notebook's kernel sends it: to the process group."""

    config = small(tmp_path / "run", log_every=5)

    def stop() -> None:
        original = TrainLoader.steps

        def steps(self: TrainLoader, first: int, stop: int) -> Iterator[Any]:
            for index, micro_batches in enumerate(original(self, first, stop), start=first):
                if index == 17 and self.rank == 0:
                    os.killpg(0, signal.SIGINT)
                yield micro_batches

        TrainLoader.steps = steps  # type: ignore[method-assign]
        with pytest.raises(SignalException):
            notebook_launcher(train, (config,), num_processes=2, use_port=str(free_port()))

    call_with_launcher(tmp_path, stop)
    stopped = load_result(tmp_path / "run").record
    assert (stopped.status, stopped.world_size) == ("preempted", 2)
    assert 17 < stopped.steps < 30
    call_with_launcher(
        tmp_path, lambda: notebook_launcher(train, (config,), num_processes=2, use_port=str(free_port()))
    )
    result = load_result(tmp_path / "run")
    assert result.status == "finished"
    assert [row["step"] for row in result.history if row["split"] == "train"] == [5, 10, 15, 20, 25, 30]
