"""What happens between the steps: metrics and progress, checkpoints on a clock, early and asked-for ends (LEAF)."""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from gemma_tune.machine.main_memory import peak_memory_bytes
from gemma_tune.machine.processes import stop_signals
from gemma_tune.recipe.methods import MethodFacts, MethodMetric
from gemma_tune.runs.context import RunContext
from gemma_tune.runs.manifest import update_manifest
from gemma_tune.runs.metrics_log import append_metrics
from gemma_tune.runs.reporter import StepProgress

_SECONDS_OF_ONE_STOP = 3.0


class MetricsCallback(TrainerCallback):
    """Writes metrics.jsonl and tells the reporter.

    Args:
        method: names the figures that are kept with those of `StepProgress`.
        count_tokens, count_seconds: return the real tokens trained on so far, in all processes, and the time spent,
            those before a resume included.
    """

    def __init__(
        self,
        context: RunContext,
        *,
        method: MethodFacts,
        count_tokens: Callable[[], int],
        count_seconds: Callable[[], float],
    ) -> None:
        self.run = context.run
        self.reporter = context.reporter
        self.figures = [metric.name for metric in method.metrics]
        self.count_tokens = count_tokens
        self.count_seconds = count_seconds
        self.started = self.last_time = 0.0
        self.first_step = self.last_tokens = 0

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.started = self.last_time = time.monotonic()
        self.first_step = state.global_step
        self.last_tokens = self.count_tokens()
        update_manifest(self.run, total_steps=state.max_steps)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True  # the last line, whatever the interval

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        if "eval_loss" in logs:
            append_metrics(self.run, {"step": state.global_step, "eval_loss": logs["eval_loss"]})
            self.reporter.evaluated(step=state.global_step, loss=logs["eval_loss"])
        if "loss" not in logs:
            return
        now, tokens = time.monotonic(), self.count_tokens()
        steps_done = max(state.global_step - self.first_step, 1)
        progress = StepProgress(
            step=state.global_step,
            total_steps=state.max_steps,
            epoch=float(logs["epoch"]),
            loss=float(logs["loss"]),
            learning_rate=float(logs["learning_rate"]),
            grad_norm=float(logs.get("grad_norm", 0.0)),
            tokens_per_second=(tokens - self.last_tokens) / max(now - self.last_time, 1e-9),
            eta_seconds=(now - self.started) / steps_done * (state.max_steps - state.global_step),
            memory_bytes=peak_memory_bytes(),
        )
        self.last_time, self.last_tokens = now, tokens
        figures = {name: float(logs[name]) for name in self.figures if name in logs}
        seconds = round(self.count_seconds(), 3)
        append_metrics(self.run, {**vars(progress), **figures, "num_tokens": tokens, "seconds": seconds})
        self.reporter.step(progress)


class CheckpointCallback(TrainerCallback):
    """Saves on a clock as well as on steps, and records the step of the newest checkpoint in the manifest.

    Args:
        every_minutes: longest time without a checkpoint, by the clock of process 0; None saves on steps alone.
    """

    def __init__(self, context: RunContext, *, every_minutes: float | None) -> None:
        self.run = context.run
        self.world = context.world
        self.every_seconds = 60 * every_minutes if every_minutes else math.inf
        self.last_save = time.monotonic()

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.last_save = time.monotonic()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if math.isinf(self.every_seconds):
            return
        if self.world.broadcast(lambda: time.monotonic() - self.last_save >= self.every_seconds):
            control.should_save = True

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.last_save = time.monotonic()
        update_manifest(self.run, step=state.global_step)


class EarlyStopCallback(TrainerCallback):
    """Stops after `patience` evaluations in which the watched figure has not got better.

    The Trainer's own counts in the process and starts again in a resumed one; this one counts in the log that every
    checkpoint carries.
    """

    def __init__(self, patience: int, *, watch: MethodMetric) -> None:
        self.patience = patience
        self.key = f"eval_{watch.name}"
        self.sign = 1 if watch.better == "lower" else -1

    def is_reached(self, state: TrainerState) -> bool:
        found = [self.sign * row[self.key] for row in state.log_history if self.key in row]
        if not found:
            return False
        best = min(range(len(found)), key=lambda index: found[index] if math.isfinite(found[index]) else math.inf)
        return len(found) - 1 - best >= self.patience

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.is_reached(state):
            control.should_training_stop = True


class InterruptCallback(TrainerCallback):
    """Ends the run after the current step, with a checkpoint, when a signal has come or the time is up.

    All processes end after the same step, whichever of them it was that got the signal.

    Args:
        max_minutes: of training in this command; None sets no limit.

    Attributes:
        reason: why the run was ended; None while it was not.
    """

    def __init__(self, context: RunContext, *, max_minutes: float | None) -> None:
        self.max_minutes = max_minutes
        self.world = context.world
        self.reporter = context.reporter
        self.started = time.monotonic()
        self.signal: signal.Signals | None = None
        self.reason: str | None = None

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.started = time.monotonic()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        reason = None
        minutes = (time.monotonic() - self.started) / 60
        if self.signal is not None:
            reason = self.signal.name
        elif self.max_minutes is not None and minutes >= self.max_minutes and state.global_step < state.max_steps:
            reason = f"training.max_minutes={self.max_minutes:g}"
        self.reason = next(filter(None, self.world.all_gather(reason)), None)
        if self.reason is not None:
            control.should_save = True
            control.should_training_stop = True

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catch what asks to stop; a second SIGINT, or a later signal, acts at once, as if nothing listened.

        That does no harm: a checkpoint that is being written then is not in the list. A SIGTERM or SIGHUP that follows
        another signal within moments is not a second one: a scheduler sends it to every process of a job, the process
        that started this one passes on its own, and a terminal that closes is heard of more than once.
        """
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may set handlers; a notebook's worker keeps its own
            return
        before = {number: signal.getsignal(number) for number in stop_signals()}

        signalled_at = 0.0

        def on_signal(number: int, frame: object) -> None:
            nonlocal signalled_at
            if self.signal is None:
                self.signal, signalled_at = signal.Signals(number), time.monotonic()
                self.reporter.warn(f"{self.signal.name}: saving after this step; once more leaves at once")
            elif number == signal.SIGINT or time.monotonic() - signalled_at > _SECONDS_OF_ONE_STOP:
                for known, handler in before.items():
                    signal.signal(known, handler)
                signal.raise_signal(number)

        for number in before:
            signal.signal(number, on_signal)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
