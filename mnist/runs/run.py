"""A run from its first record to its last: what is written at the start, at the end, and when it fails.

In: the objects that `train_ddp.py` has built. Out: a run directory that says how the run ended, and a `Result`. Every
rank must call everything here; what only rank 0 may do is done inside.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator, Sequence
from typing import Any, Self

from accelerate.utils import ProfileKwargs

from mnist.config import TrainConfig, to_flat
from mnist.data.batches import MicroBatch, TrainLoader
from mnist.errors import RankError, is_one_of_several
from mnist.runs import report
from mnist.runs.checkpointing import Checkpointing
from mnist.runs.console import Console, count
from mnist.runs.directory import RunDirectory, is_restart
from mnist.runs.finish import Draw, export_and_score
from mnist.runs.model_card import write_card
from mnist.runs.records import Status
from mnist.runs.result import Result
from mnist.runs.resume import how_to_continue
from mnist.runs.setup import RunSetup
from mnist.runs.tracking.tracker import Hint, Tracker, open_tracker
from mnist.runs.validation import Validation
from mnist.system import process, ranks, signals
from mnist.system.accelerator import is_out_of_memory, set_step_timeouts
from mnist.system.environment import describe_environment, peak_memory_mb
from mnist.system.fault_injection import inject
from mnist.system.files import write_json
from mnist.system.heartbeats import Heartbeats
from mnist.system.watchdog import Watchdog
from mnist.training.cuda_graph import choose_step_mode
from mnist.training.loop import TrainRecord
from mnist.training.metrics import Scores
from mnist.training.step import DivergedError, warm_up
from mnist.training.threads import advise_on_threads


class Run:
    """A run in progress, a context manager. It shows the plan, writes it down and opens the trackers at the start.

    However the block ends, result.json says how.

    Args:
        setup: the parts of the run.
        console: of this rank.
        notes: what a resume starts from, and what changes; empty where the run begins at its first step.
        started_s: `time.perf_counter()` at the start; --max-time counts from there.
        draw: writes the pictures of a finished run and returns the files by name.
    """

    def __init__(
        self, setup: RunSetup, console: Console, *, notes: Sequence[str], started_s: float, draw: Draw
    ) -> None:
        self._setup = setup
        self._plan = setup.plan
        self._state = setup.state
        self._console = console
        self._has_resumed = is_restart() or bool(notes)
        self._started_s = started_s
        self._draw = draw
        self._warmup_time_s = 0.0
        self._num_profile_steps = setup.config.output.profile
        environment = describe_environment(setup.accelerator)
        self._facts = {**report.run_facts(setup), **environment["ranks"][0]}
        console.banner(report.banner(setup, self._facts, environment))
        for line in notes[:1]:
            console.say(line)
        for line in [*notes[1:], *report.warnings(setup, has_resumed=self._has_resumed)]:
            console.warn(line)
        self.tracker = ranks.together(setup.accelerator, lambda: self._write_start(environment), on="all")
        self._heartbeats = Heartbeats(setup.accelerator, lambda: setup.state.step)
        self._watchdog = Watchdog(setup.config.runtime.timeout_s, self._heartbeats.publish, self._record_stall)
        # The watchdog ends the process: a command's or a rank's, but not a notebook's that has called `train`.
        self._may_end_process = signals.are_installed() or is_one_of_several()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        try:
            if error is not None:
                self._record_failure(error)
        finally:  # takes the bar away, ends the watchdog and frees the run directory, for the next call in this process
            self._console.stop_progress()
            self._watchdog.stop()
            if self._setup.directory.lock is not None:
                self._setup.directory.lock.release()

    def _write_start(self, environment: dict[str, Any]) -> Tracker:
        if not self._setup.accelerator.is_main_process:
            return Tracker(None, "", self._console.warn)
        directory, config = self._setup.directory, to_flat(self._setup.config)
        write_json(directory.path / "config.json", config)
        write_json(directory.path / "environment.json", environment)
        directory.write_result("running", **self._facts)
        run_config = {**config, "recipe": self._facts["recipe"], "environment": environment}
        return open_tracker(self._setup, run_config, self._console)

    # --- while it trains ---------------------------------------------------------------------------------------------

    def warm_up(self, train_loader: TrainLoader) -> None:
        """Does what happens once, before the first step: kernels are chosen, a step is captured. Not training time."""
        self.heartbeat()
        signals.training_begins()
        started = time.perf_counter()
        self._console.show("warming up")
        images = self._setup.dataset.train.images
        zeros = images.new_zeros((self._plan.micro_batch_size, *images.shape[1:]))
        inputs = self._setup.train_step.transform(zeros)
        warm_up(self._setup.train_step.model, inputs)
        if advice := advise_on_threads(self._setup.train_step.bare_model, inputs):
            self._console.warn(advice)
        if not self.is_over():
            mode, remark = choose_step_mode(
                self._setup.train_step,
                self._setup.config.runtime.step_mode,
                self._plan.accumulation_steps,
                train_loader,
            )
            self._facts["step_mode"] = mode
            if remark is not None:
                self._console.warn(remark)
        self._watchdog.timeout_s = set_step_timeouts(self._setup.config.runtime.timeout_s)
        self._warmup_time_s = round(time.perf_counter() - started, 3)
        state = self._state  # the console outlives the process group: it must not hold the model
        self._console.start_progress(
            self._plan.num_steps,
            lambda: state.step,
            self._plan.epoch_steps,
            best=state.best["accuracy"] if state.best else 0.0,
            loss="smoothed loss" if self._setup.config.optim.label_smoothing else "train loss",
        )

    def heartbeat(self) -> bool:
        """Shows that this rank is alive; returns whether a signal, or --max-time, has asked it to end."""
        if self._may_end_process:
            self._watchdog.heartbeat()
        return signals.stop_requested() or self._is_time_over()

    def _is_time_over(self) -> bool:
        limit_s = 60 * self._setup.config.runtime.max_time
        return 0 < limit_s <= self._total_time_s()

    def is_over(self) -> bool:
        """Whether no other step is to be taken."""
        state = self._state
        return state.step >= self._plan.num_steps or state.stop_reason is not None or state.is_stopping

    def log(self, record: TrainRecord) -> None:
        """Writes a training record down."""
        speed, means = record.sums.images_per_s, record.sums.means()
        performance = {
            "images_per_s": round(speed, 1),
            "images_per_s_per_device": round(speed / self._plan.world_size, 1),
            "memory_mb": round(peak_memory_mb(self._setup.accelerator.device)),
        }
        if self._plan.epoch_ends_at(record.step):
            performance["epoch_time_s"] = round(self._state.epoch_sums.time_s, 3)
        self.tracker.log(
            "train",
            record.step,
            self._plan.epochs_done(record.step),
            **means,
            lr=record.lr,
            grad_norm=record.grad_norm,
            **performance,
        )
        if not self._plan.evaluates_at(record.step):  # an evaluation prints a row of its own
            self._console.progress(record.step, means["loss"], means["accuracy"], speed)

    def with_injected_faults(self, steps: Iterator[Sequence[MicroBatch]]) -> Iterator[Sequence[MicroBatch]]:
        """`steps` with the faults that --inject asks for; a resumed run is spared."""
        texts = () if self._has_resumed else self._setup.config.output.inject
        rank, weights = self._setup.accelerator.process_index, self._setup.train_step.model.parameters()
        return inject(steps, texts, rank, self._state.step, weights)

    def with_profile(self, steps: Iterator[Sequence[MicroBatch]]) -> Iterator[Sequence[MicroBatch]]:
        """`steps`. With --profile N, the trace of N steps is written, beginning with the third step of this start."""
        num_steps, self._num_profile_steps = self._num_profile_steps, 0
        if num_steps:
            yield from itertools.islice(steps, 2)
            first = next(steps, None)
            if first is None:
                self._console.warn(f"--profile {num_steps}: no trace, this start has no more than two steps")
                return
            folder = self._setup.directory.path / "profile"
            with self._setup.accelerator.profile(ProfileKwargs(output_trace_dir=str(folder))):
                yield first
                yield from itertools.islice(steps, num_steps - 1)
            self._console.say(f"a trace of at most {count(num_steps, 'step')}: {folder} (open it in Perfetto)")
        yield from steps

    # --- the end -----------------------------------------------------------------------------------------------------

    def finish(self, validation: Validation, checkpointing: Checkpointing) -> Result:
        """Leaves the results of a run that has taken its last step; or saves one that was asked to stop."""
        state, path = self._state, self._setup.directory.path
        if state.is_stopping and state.step < self._plan.num_steps and state.stop_reason is None:
            checkpointing.save()
            return self._end_preempted()
        ranks.together(self._setup.accelerator, self.tracker.check)
        test, pictures = export_and_score(
            self._setup, validation, checkpointing, tracker=self.tracker, console=self._console, draw=self._draw
        )
        if missed := report.missed_gate(self._setup.config, test.accuracy):
            self._console.warn(missed)
        result, hints = ranks.together(
            self._setup.accelerator, lambda: self._end("finished", test, gate_passed=missed is None)
        )
        starts, span = (" over all starts", "since this start") if self._has_resumed else ("", "in all")
        seconds = state.run_sums.time_s
        times = f"{seconds:.{1 if seconds >= 10 else 2}f} s training{starts}, {result.record.total_time_s:.1f} s {span}"
        rows = [*report.closing(self._setup, test), ("time", times), ("run", str(path))]
        rows += [("pictures", str(path / "pictures"))] if pictures else []
        title, commands = report.headline(test.accuracy), report.next_commands(path, self._setup.dataset.name)
        self._console.summary(title, [*rows, *hints], commands)
        return result

    def _end_preempted(self) -> Result:
        path, signal = self._setup.directory.path, signals.signal_name()
        cause = signal or (f"--max-time {self._setup.config.runtime.max_time:g}" if self._is_time_over() else None)
        result, _ = ranks.together(self._setup.accelerator, lambda: self._end("preempted", signal=signal, reason=cause))
        again = report.command_to_continue(path)
        where = f"after step {self._state.step}" + (f" ({cause})" if cause else "")
        self._console.summary("saved, not finished", [("preempted", where), ("continue", again)])
        if self._setup.accelerator.is_main_process and signal == "SIGINT":
            process.print_after_launcher(f"preempted after step {self._state.step}; to continue: {again}")
        return result

    def _end(self, status: Status, test: Scores | None = None, **more: Any) -> tuple[Result, list[Hint]]:
        """Writes result.json and closes the trackers, on rank 0; returns what was written, and what to type next."""
        result = self._write_result(status, test, **more)
        if test is not None:
            write_card(result, self._setup.config, self._setup.dataset.info, self._console.warn)
        best = {f"best/{key}": value for key, value in (self._state.best or {}).items()}
        times = {"train_time_s": result.record.train_time_s, "total_time_s": result.record.total_time_s}
        with self._console.doing("closing trackers"):
            hints = self.tracker.finish(status, {**best, **times, "warmup_time_s": self._warmup_time_s})
        return result, hints

    def _write_result(self, status: Status, test: Scores | None, **more: Any) -> Result:
        times = {"warmup_time_s": self._warmup_time_s, "total_time_s": round(self._total_time_s(), 3)}
        content = {**self._facts, **report.result(self._plan, self._state, test), **times, **more}
        return Result(self._setup.directory.path, self._setup.directory.write_result(status, **content))

    def _total_time_s(self) -> float:
        return time.perf_counter() - self._started_s

    # --- errors ------------------------------------------------------------------------------------------------------

    def _record_failure(self, error: BaseException) -> None:
        """Writes into result.json how the run failed; says it in one line where that is possible.

        Raises:
            RankError: the run has lost another rank, or has no memory left; only this rank knows.
        """
        where = f"rank {self._setup.accelerator.process_index} after step {self._state.step}"
        if self._setup.accelerator.is_main_process:
            with contextlib.suppress(OSError):  # on a full disk; the error itself says so
                if isinstance(error, DivergedError):
                    self._state.step = error.step
                    self._end("diverged", reason=str(error), rank=error.rank)
                else:
                    self._end("failed", reason=f"{type(error).__name__}: {error}", where=where)
        if ranks.is_lost_contact(error):
            cause = str(error).splitlines()[0]
            raise RankError(f"{where}: lost another rank, which has died or does not answer ({cause})") from error
        if is_out_of_memory(error):
            parts = 2 * self._plan.accumulation_steps
            raise RankError(
                f"{where}: out of memory; try --gradient-accumulation-steps {parts} or a smaller "
                f"--global-batch-size than {self._plan.global_batch_size}"
            ) from error
        error.add_note(f"on {where}")

    def _record_stall(self, reason: str) -> None:
        """For the watchdog's thread, which ends the process afterwards."""
        reason = self._heartbeats.explain(reason)
        if self._setup.accelerator.is_main_process:
            self._write_result("failed", None, reason=reason)


def report_finished(directory: RunDirectory, config: TrainConfig, console: Console) -> Result:
    """Shows and returns the result of an earlier start, which has done all that is asked for now."""
    found = directory.result
    assert found is not None
    assert found.test is not None  # or the record of a finished run would have been refused
    accuracy = found.test["accuracy"]
    if missed := report.missed_gate(config, accuracy):
        console.warn(missed)
    rows = [
        ("finished", f"{directory.path}: {found.steps} steps, test accuracy {accuracy:.2%}"),
        ("", how_to_continue(directory, config)),
    ]
    console.summary(report.headline(accuracy), rows, report.next_commands(directory.path, config.data.dataset))
    return Result(directory.path, found)


def exit_code(config: TrainConfig, result: Result) -> int:
    """Of the command: 0, 1 where the test accuracy misses --min-accuracy, 75 where the run was preempted."""
    if result.test is None:
        return signals.EXIT_PREEMPTED
    return 0 if report.missed_gate(config, result.test.accuracy) is None else 1
