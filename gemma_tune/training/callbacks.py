"""What happens beside the steps: metrics and progress, guards against a ruined run, interruption (LEAF)."""

from __future__ import annotations

import math
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gemma_tune.errors import TrainingStopped
from gemma_tune.runs.layout import RunDir
from gemma_tune.runs.record import append_metrics, update_manifest
from gemma_tune.runs.reporter import Reporter, StepProgress
from gemma_tune.training.checkpoint import seal_checkpoint

# A float16 loss scale starts at 65536 and halves at every overflow; a sound run overflows a few times at its start.
MAX_FP16_OVERFLOWS = 16


def peak_memory_bytes() -> int:
    """Peak memory allocated on the card, or resident in this process where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes on Linux


class MetricsCallback(TrainerCallback):
    """Writes metrics.jsonl and tells the reporter.

    Args:
        count_tokens: returns the real tokens trained on so far in this process.
    """

    def __init__(self, run: RunDir, *, reporter: Reporter, count_tokens: Callable[[], int]) -> None:
        self.run = run
        self.reporter = reporter
        self.count_tokens = count_tokens
        self.started = self.last_time = 0.0
        self.first_step = self.last_tokens = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.started = self.last_time = time.monotonic()
        self.first_step = state.global_step
        update_manifest(self.run, total_steps=state.max_steps)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **kwargs: Any
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
        append_metrics(self.run, {**vars(progress), "num_tokens": tokens, "seconds": round(now - self.started, 3)})
        self.reporter.step(progress)


class GuardCallback(TrainerCallback):
    """Stops before a non-finite gradient reaches the weights, so that they and the last checkpoint stay good (F24)."""

    def __init__(self) -> None:
        self.overflows = 0
        self.trained: list[torch.nn.Parameter] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        # Once: a walk through every module at every step costs a hundredth of a small model's step.
        self.trained = [weight for weight in model.parameters() if weight.requires_grad]

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        gradients = [weight.grad for weight in self.trained if weight.grad is not None]
        if not gradients:
            raise TrainingStopped(
                f"step {state.global_step + 1}: no trained weight received a gradient", hint="report this: it is a bug"
            )
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        if math.isfinite(float(norm)):
            self.overflows = 0
            return
        self.overflows += 1
        if args.fp16 and self.overflows <= MAX_FP16_OVERFLOWS:
            return
        raise TrainingStopped(
            f"step {state.global_step + 1}: the gradient is {float(norm)}; training stopped before it reached the "
            f"weights",
            hint=_likely_cause(model, args),
        )


def _likely_cause(model: Any, args: TrainingArguments) -> str:
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and not bool(torch.isfinite(weight).all()):
            return f"the weight {name} of the base holds NaN or infinity: download the model again"
    if args.fp16:
        return "float16 overflowed: use a card with bfloat16 (compute capability 8.0), or model.dtype=float32"
    return f"the loss diverged: try training.learning_rate={args.learning_rate / 4:g} or training.max_grad_norm=0.3"


class CheckpointCallback(TrainerCallback):
    """Seals every checkpoint once its last file is written, and records the step in the manifest."""

    def __init__(self, run: RunDir) -> None:
        self.run = run

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        seal_checkpoint(self.run.checkpoints / f"checkpoint-{state.global_step}")
        update_manifest(self.run, step=state.global_step)


class InterruptCallback(TrainerCallback):
    """Ends the run after the current step, with a checkpoint, when a signal has come."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.signal is not None:
            control.should_save = True
            control.should_training_stop = True

    @contextmanager
    def listening(self, reporter: Reporter) -> Iterator[None]:
        """Catch SIGINT and SIGTERM; a second one acts at once, as if nothing listened."""
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may set handlers; a notebook's worker keeps its own
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def on_signal(number: int, frame: object) -> None:
            self.signal = signal.Signals(number)
            reporter.warn(f"{self.signal.name}: saving after this step; once more leaves at once")
            for known, handler in before.items():
                signal.signal(known, handler)

        for number in before:
            signal.signal(number, on_signal)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
