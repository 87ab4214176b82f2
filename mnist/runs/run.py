"""What happens around the steps of a run: records, scores, checkpoints, the end.

In: the pieces that `train_ddp.py` has built. Out: a run directory, and an exit code. Every method must be called by
every rank; what only rank 0 may do is done inside.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, cast

import torch
from accelerate import Accelerator
from torch import nn

from mnist.config import Fault, TrainConfig, evolve, fields_on_resume, parse_fault, to_flat
from mnist.data.batches import TrainLoader
from mnist.data.datasets import Choice, Dataset, Split
from mnist.errors import RankError
from mnist.models import count_parameters
from mnist.runs import report
from mnist.runs import resume as resuming
from mnist.runs.checkpoint_files import (
    Checkpoint,
    CheckpointError,
    load_checkpoint,
    save_checkpoint,
)
from mnist.runs.console import Console
from mnist.runs.directory import RunDir, is_restart, open_run_dir, resume_mode
from mnist.runs.export import export_model
from mnist.runs.live_state import module_tensors
from mnist.runs.report import hardware_warnings
from mnist.runs.tracking.sink import Hint
from mnist.runs.tracking.tensorboard import TensorBoardRun
from mnist.runs.tracking.tracker import Tracker
from mnist.runs.tracking.wandb import wandb_mode
from mnist.system import ranks, signals
from mnist.system.accelerator import executed_precision, hand_stalls_to_watchdog, is_out_of_memory
from mnist.system.environment import describe_environment, peak_memory_mb
from mnist.system.files import write_json
from mnist.system.roll_call import RollCall
from mnist.system.watchdog import Watchdog
from mnist.training.cuda_graph import choose_step_mode
from mnist.training.evaluation import evaluate
from mnist.training.loop import TrainRecord, TrainState
from mnist.training.losses import build_loss
from mnist.training.metrics import Scores, TrainSums
from mnist.training.plan import Plan
from mnist.training.step import DivergedError, TrainStep, warm_up
from mnist.training.threads import advise_on_threads

EXIT_FINISHED, EXIT_FAILED = 0, 1

T = TypeVar("T")


@dataclass
class Run:
    """A run in progress, a context manager: however it ends, result.json says how.

    Attributes:
        config: resolved configuration.
        plan: its algebra.
        dataset: splits on the device.
        choice: why it is this one.
        accelerator, console: of this process.
        train_step: model, optimizer, schedule and, where there is one, the average of the weights.
        started: `time.perf_counter()` at the start of the process.
        draw: writes the pictures of a finished run; takes the run directory and what `_draw` hands over, returns the
            files by name.
    """

    config: TrainConfig
    plan: Plan
    dataset: Dataset
    choice: Choice
    accelerator: Accelerator
    console: Console
    train_step: TrainStep
    started: float
    draw: Callable[..., dict[str, Path]]

    def __post_init__(self) -> None:
        self.state = TrainState()
        self.model = cast("nn.Sequential", self.train_step.bare_model)
        average = self.train_step.average
        self.eval_model = self.model if average is None else cast("nn.Sequential", average.module)
        self.eval_loss = build_loss(self.config.optim.loss)  # without smoothing, which is a means of training
        self._scores: dict[str, Scores] = {}  # of the last evaluation
        self._scores_step = -1
        self.val_scores: dict[str, Any] | None = None  # of the last evaluation on validation
        self.warmup_time_s = 0.0
        self._directory: RunDir | None = None  # on rank 0
        self._saved_step = -1
        self._has_begun = False
        self._has_resumed = is_restart()
        self._roll_call = RollCall(self.accelerator, lambda: self.state.step)
        self._watchdog = Watchdog(self.config.runtime.timeout_s, self._roll_call.answer, self._note_stall)
        self._hints: list[Hint] = []
        self._drawn: list[Hint] = []

    # --- beginning -----------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        opened = self._together(lambda: self._open(open_run_dir(self.config, self.dataset.name)))
        self.path = Path(opened["path"])
        self.previous = opened["result"]
        self._previous_config = opened["config"]
        self._facts = {
            "recipe": self.config.recipe,
            "dataset": self.dataset.name,
            "seed": self.config.loop.seed,
            "num_params": count_parameters(self.model),
            "world_size": self.accelerator.num_processes,
            "precision": executed_precision(self.accelerator),
            "evaluation": self.config.loop.evaluation,
        }
        self.tracker = Tracker(None, self.dataset.name, self.console.warn)
        return self

    def _open(self, directory: RunDir) -> dict[str, Any]:
        self._directory = directory
        if not directory.is_locked:
            self.console.warn(f"--run-dir {directory.path}: no locks on this file system; start no second run there")
        if resume_mode(self.config) == "never":
            before = directory.set_aside()
            if before is not None:
                self.console.say(f"the run that was here is in {before}")
        return {
            "path": str(directory.path),
            "result": directory.read("result.json"),
            "config": directory.read("config.json"),
        }

    def is_finished(self) -> bool:
        """Whether an earlier start in this directory has done all that is asked for now; says so.

        Raises:
            UserError: that start had another configuration.
            RunError: that start diverged, and would again.
        """
        if not resuming.check_finished(self.previous, self._previous_config, self.config, self.plan, self.path):
            return False
        steps, accuracy = self.previous["steps"], self.previous["test"]["accuracy"]
        self._warn_of_changes()
        rows = [
            ("finished", f"{self.path}: {steps} steps, test accuracy {accuracy:.2%}"),
            ("", resuming.ways_on(self.config)),
        ]
        self.console.summary(rows, report.next_commands(self.path))
        return True

    def exit_code(self) -> int:
        """0, or 1 if the finished run misses the gate."""
        return self._gate(self.previous["test"]["accuracy"])

    def _warn_of_changes(self) -> None:
        for name in (*fields_on_resume("noted"), *fields_on_resume("course")):
            was, now = self._previous_config.get(name), to_flat(self.config)[name]
            if was != now:
                self.console.warn(f"--{name.replace('_', '-')} was {was}, now {now}: not trained again")

    def resume(self) -> None:
        """Takes up the newest valid checkpoint, or the one named by --resume, if there is any."""
        found = self._together(self._find_checkpoint)
        if found is None:
            return
        saved, notes = found
        self.state = resuming.restore(saved, self.train_step)
        self.val_scores = saved.scores.get("val")
        self._saved_step = self.state.step
        self._has_resumed = True
        way_out = "" if self.config.output.run_dir else "; --resume never would start a new run"
        self.console.say(f"resuming {self.path} at step {self.state.step}{way_out}")
        for note in notes:
            self.console.warn(note)

    def _find_checkpoint(self) -> tuple[Checkpoint, list[str]] | None:
        assert self._directory is not None
        return resuming.find_checkpoint(self._directory, self.config, self.plan, self._checkpoint_facts())

    def begin(self, train_loader: TrainLoader) -> None:
        """Writes down what is about to happen, starts the trackers, shows the plan, warms up."""
        environment = describe_environment(self.accelerator)
        plan = report.banner(self.config, self.plan, self.dataset, self._facts, environment)
        self.console.banner([*plan, ("run", str(self.path)), ("W&B", wandb_mode(self.config.output))])
        warnings = hardware_warnings(self.accelerator)
        warnings += report.data_warnings(self.dataset, self.choice)
        warnings += report.drill_warnings(self.config, has_resumed=self._has_resumed)
        for line in warnings:
            self.console.warn(line)
        self._together(lambda: self._write_down(environment))
        self._has_begun = True
        self._watchdog.sign_of_life()
        signals.training_begins()
        started = time.perf_counter()
        self.console.show("warming up")
        zeros = self.dataset.train.images.new_zeros((self.plan.micro_batch_size, 28, 28))
        inputs = self.train_step.transform(zeros)
        warm_up(self.train_step.model, inputs)
        if advice := advise_on_threads(self.model, inputs):
            self.console.warn(advice)
        if self.goes_on():
            self._choose_step_mode(train_loader)
        self._watchdog.timeout_s = hand_stalls_to_watchdog(self.config.runtime.timeout_s)
        self.warmup_time_s = time.perf_counter() - started
        self.console.start_progress(
            self.plan.num_steps,
            lambda: self.state.step,
            self.plan.epoch_steps,
            best=self.state.best["accuracy"] if self.state.best else 0.0,
            loss="smoothed loss" if self.config.optim.label_smoothing else "train loss",
        )

    def _choose_step_mode(self, train_loader: TrainLoader) -> None:
        mode, remark = choose_step_mode(
            self.train_step,
            self.config.runtime.step_mode,
            self.plan.accumulation_steps,
            lambda: train_loader.steps(self.state.step, self.plan.num_steps),
        )
        self._facts["step_mode"] = mode
        if remark is not None:
            self.console.warn(remark)

    def _write_down(self, environment: dict[str, Any]) -> None:
        assert self._directory is not None
        write_json(self.path / "config.json", to_flat(self.config))
        write_json(self.path / "environment.json", environment)
        self._directory.write_result("running", **self._facts, **environment["ranks"][0])
        self.tracker = Tracker(self.path, self.dataset.name, self.console.warn)
        tags = [self.dataset.name, self.config.optim.model, self._facts["precision"], f"w{self._facts['world_size']}"]
        run_config = {**to_flat(self.config), "environment": environment}
        self.tracker.start_wandb(self.accelerator, self.config.output, self.path, run_config, tags)
        if self.config.output.tensorboard:
            self.tracker.attach("TensorBoard", partial(TensorBoardRun, self.path, self.tracker.next_step))

    # --- during --------------------------------------------------------------------------------------------------

    def heartbeat(self) -> bool:
        """Shows that this rank is alive; says whether a signal has asked it to end."""
        self._watchdog.sign_of_life()
        return signals.stop_requested()

    def _note_stall(self, reason: str) -> None:
        """For the watchdog's thread, which ends the process afterwards."""
        reason = self._roll_call.explain(reason)
        if self._directory is not None:
            self._directory.write_result("failed", **self._facts, reason=reason, steps=self.state.step)

    def goes_on(self) -> bool:
        """Whether another step is to be taken."""
        return self.state.step < self.plan.num_steps and not self.state.is_stopping and self.state.stop_reason is None

    def faults(self) -> list[Fault]:
        """What --inject has in store for this rank; nothing once it has been started again, or it would never end."""
        if self._has_resumed:
            return []
        rank = self.accelerator.process_index
        return [fault for fault in map(parse_fault, self.config.output.inject) if fault.rank == rank]

    @property
    def scores(self) -> dict[str, Scores]:
        """By split, of the weights of this very step; empty where they have not been evaluated."""
        return self._scores if self._scores_step == self.state.step else {}

    @property
    def _epoch(self) -> float:
        """Epochs done, fractions included."""
        return self.state.step / self.plan.epoch_steps

    def next_epoch_end(self) -> int:
        """The step at which the current epoch, or the run, is over."""
        epoch_steps = self.plan.epoch_steps
        return min(self.plan.num_steps, (self.state.step // epoch_steps + 1) * epoch_steps)

    def log(self, record: TrainRecord) -> None:
        """Writes a training record down."""
        speed, means = record.sums.images_per_s, record.sums.means()
        performance = {
            "images_per_s": round(speed, 1),
            "images_per_s_per_device": round(speed / self.plan.world_size, 1),
            "memory_mb": round(peak_memory_mb(self.accelerator.device)),
        }
        if self.plan.epoch_ends_at(record.step):
            performance["epoch_time_s"] = round(self.state.epoch_sums.time_s, 3)
        self.tracker.log(
            "train",
            record.step,
            self._epoch,
            **means,
            lr=record.lr,
            grad_norm=record.grad_norm,
            **performance,
        )
        if not self.plan.evaluates_at(record.step):  # an evaluation prints a row of its own
            self.console.progress(record.step, means["loss"], means["accuracy"], speed)

    def score(self) -> None:
        """Evaluates on validation, or on test where nothing is held out, and decides about best and early stopping."""
        self._together(self.tracker.check)
        split = "test" if self.dataset.val is None else "val"
        scores = self._evaluate(split, self.dataset.val or self.dataset.test)
        best = self.state.best
        is_new_best = best is None or scores.accuracy > best["accuracy"]
        if is_new_best or split == "test":  # without validation, "best" can only mean "last"
            self.state.best = {"step": self.state.step, **scores.as_dict()}
        self.state.evals_since_best = 0 if is_new_best else self.state.evals_since_best + 1
        self.state.stop_reason = self._reason_to_stop(scores)
        self._show(scores, split)
        if self.plan.epoch_ends_at(self.state.step):
            self.state.epoch_sums = TrainSums()

    def _evaluate(self, name: str, split: Split) -> Scores:
        with self.console.doing("evaluating"):
            scores = evaluate(
                self.eval_model,
                split,
                accelerator=self.accelerator,
                loss_fn=self.eval_loss,
                transform=self.train_step.transform,
                sharded=self.config.loop.evaluation == "sharded",
                after_chunk=lambda _: self._watchdog.sign_of_life(),
            )
        self._watchdog.sign_of_life()
        if not math.isfinite(scores.loss):
            raise DivergedError(self.state.step, 0)
        self._scores = {**self.scores, name: scores}
        self._scores_step = self.state.step
        if name == "val":
            self.val_scores = scores.as_dict()
        self.tracker.log(name, self.state.step, self._epoch, **scores.as_dict())
        return scores

    def _reason_to_stop(self, scores: Scores) -> str | None:
        loop = self.config.loop
        targets = [
            loop.target_accuracy is None or scores.accuracy >= loop.target_accuracy,
            loop.target_loss is None or scores.loss <= loop.target_loss,
        ]
        if all(targets) and (loop.target_accuracy is not None or loop.target_loss is not None):
            return "target reached"
        if loop.patience and self.state.evals_since_best >= loop.patience:
            return f"no better for {loop.patience} evaluations"
        return None

    def _show(self, scores: Scores, split: str) -> None:
        means = self.state.epoch_sums.means()
        self.console.epoch_row(
            round(self._epoch, 2),
            self.state.step,
            (means["loss"], means["accuracy"]),
            split,
            (scores.loss, scores.accuracy),
            lr=self.train_step.lr,
            seconds=self.state.epoch_sums.time_s,
        )

    def save(self) -> None:
        """Writes a checkpoint of this step, unless it is there."""
        if self._saved_step == self.state.step:
            return
        finite = torch.stack([weight.isfinite().all() for weight in self.model.parameters()])
        if not bool(finite.all()):  # alike on every rank
            raise DivergedError(self.state.step, self.accelerator.process_index, "weights are")
        self._together(self._write_checkpoint)
        self._saved_step = self.state.step

    def _checkpoint_facts(self) -> dict[str, Any]:
        return {
            "data_files": self.dataset.fingerprint,
            "precision": self._facts["precision"],
            "threads": torch.get_num_threads(),
        }

    def _write_checkpoint(self) -> None:
        assert self._directory is not None
        self.tracker.check()
        saved = resuming.capture(
            self.train_step,
            self.state,
            self.scores,
            config=self.config,
            plan=self.plan,
            facts=self._checkpoint_facts(),
        )
        output = self.config.output
        save_checkpoint(self._directory.checkpoints, saved, output.keep_last, output.keep_best)

    def should_save(self) -> bool:
        """Whether this step's checkpoint is due: by its cadence, or as the best on validation so far."""
        best_step = self.state.best["step"] if self.state.best and self.dataset.val is not None else None
        return self.plan.saves_at(self.state.step) or best_step == self.state.step or self.state.stop_reason is not None

    # --- end -----------------------------------------------------------------------------------------------------

    def finish(self) -> int:
        """Exports weights, scores the test set, writes result.json, closes the trackers; returns the exit code."""
        if self.state.is_stopping and self.state.step < self.plan.num_steps and self.state.stop_reason is None:
            return self._end_preempted()
        self._together(self.tracker.check)
        self._export("last")
        if self.dataset.val is not None:
            self._load_best()
        if self.dataset.val is not None or "test" not in self.scores:
            self._evaluate("test", self.dataset.test)
        self._export("best")
        test = self.scores["test"]
        code = self._gate(test.accuracy)
        self._together(lambda: self._show_results(test))
        self._together(lambda: self._close("finished", gate_passed=code == EXIT_FINISHED))
        rows = [
            *report.closing(test, self.dataset, self.choice, self.plan, self.state),
            ("worst", report.worst_classes(test, self.dataset.class_names)),
        ]
        starts, span = (" over all starts", "since this start") if self._has_resumed else ("", "in all")
        times = f"{self.state.run_sums.time_s:.1f} s training{starts}, {self._total_time_s():.1f} s {span}"
        rows += [("time", times), ("run", str(self.path)), *self._drawn, *self._hints]
        self.console.summary(rows, report.next_commands(self.path))
        return code

    def _end_preempted(self) -> int:
        self.save()
        self._together(lambda: self._close("preempted", signal=signals.signal_name()))
        again = "type the same command again" + (", without --resume" if self.config.output.resume != "auto" else "")
        self.console.summary([("preempted", f"after step {self.state.step}"), ("continue", again)])
        return signals.EXIT_PREEMPTED

    def _gate(self, accuracy: float) -> int:
        gate = self.config.loop.min_accuracy
        if gate is None or accuracy >= gate:
            return EXIT_FINISHED
        self.console.warn(f"--min-accuracy {gate}: missed with {accuracy:.4f}")
        return EXIT_FAILED

    def _load_best(self) -> None:
        """Puts the weights of the best validation score into the evaluated model, for its one look at the test set."""
        assert self.state.best is not None
        best_step = int(self.state.best["step"])
        if best_step == self.state.step:
            return

        def read() -> dict[str, Any] | str:
            assert self._directory is not None
            try:
                saved = load_checkpoint(self._directory.checkpoints / f"step-{best_step:08d}")
            except CheckpointError as error:
                return str(error)
            return saved.tensors["model" if self.train_step.average is None else "ema"]

        found = self._together(read)
        if isinstance(found, str):
            self.console.warn(f"the best weights are lost ({found}); the last ones are scored and exported instead")
            self.state.best = {**self.state.best, "step": self.state.step}
        else:
            self.eval_model.load_state_dict(found)

    def _export(self, name: str) -> None:
        executed = evolve(
            self.config, mixed_precision=self.accelerator.mixed_precision, num_threads=torch.get_num_threads()
        )
        weights = partial(module_tensors, self.eval_model)
        self._together(lambda: export_model(self.path / "export" / name, weights(), to_flat(executed)))

    def _show_results(self, test: Scores) -> None:
        """Pictures, confusion matrix and models, for the run directory and the trackers."""
        step = int(self.state.best["step"]) if self.state.best else self.state.step  # of the weights that were scored
        if self.config.output.pictures:
            with self.console.doing("drawing pictures"):
                drawn = self._draw(test, step)
                self.tracker.pictures(self.state.step, drawn)
            self._drawn = [("pictures", str(self.path / "pictures"))] if drawn else []
        self.tracker.confusion(self.state.step, test.confusion, self.dataset.class_names)
        if step == self.state.step:
            self.tracker.model(self.path / "export" / "best", ["best", "last"], {"step": step, **test.as_dict()})
        else:
            self.tracker.model(self.path / "export" / "last", ["last"], {"step": self.state.step})
            self.tracker.model(self.path / "export" / "best", ["best"], {"step": step, **test.as_dict()})

    def _draw(self, test: Scores, step: int) -> dict[str, Path]:
        return self.draw(
            self.path,
            config=self.config,
            dataset=self.dataset,
            model=self.eval_model,
            transform=self.train_step.transform,
            augment=self.train_step.augment,
            confusion=test.confusion,
            step=step,
            warn=self.console.warn,
        )

    def _close(self, status: str, **facts: Any) -> None:
        """result.json and trackers; nothing on other ranks than 0."""
        if self._directory is None:
            return
        numbers = report.result(self.plan, self.state, self.scores, self.val_scores)
        times = {"warmup_time_s": round(self.warmup_time_s, 3), "total_time_s": round(self._total_time_s(), 3)}
        self._directory.write_result(status, **self._facts, **numbers, **times, **facts)
        best = {f"best/{key}": value for key, value in (self.state.best or {}).items()}
        with self.console.doing("closing W&B and other trackers"):
            self._hints = self.tracker.finish(status, {**best, **times, "train_time_s": numbers["train_time_s"]})

    def _total_time_s(self) -> float:
        return time.perf_counter() - self.started

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.console.stop_progress()
        self._watchdog.rest()
        if error is None or not self._has_begun:
            return
        where = f"rank {self.accelerator.process_index} after step {self.state.step}"
        with contextlib.suppress(OSError):  # on a full disk; the error itself says so
            if isinstance(error, DivergedError):
                self.state.step = error.step
                self._close("diverged", reason=str(error), rank=error.rank)
            else:
                self._close("failed", reason=f"{type(error).__name__}: {error}", where=where)
        if ranks.is_lost_contact(error):
            cause = str(error).splitlines()[0]
            raise RankError(f"{where}: lost another rank, which has died or does not answer ({cause})") from error
        if is_out_of_memory(error):
            parts = 2 * self.plan.accumulation_steps
            raise RankError(
                f"{where}: out of memory; try --gradient-accumulation-steps {parts} or a smaller "
                f"--global-batch-size than {self.plan.global_batch_size}"
            ) from error
        error.add_note(f"on {where}")

    def _together(self, work: Callable[[], T]) -> T:
        return ranks.together(self.accelerator, work)
