"""What the Trainer saves and loads, replaced: `training.checkpoint`'s files instead of pickles (LEAF).

The Trainer's checkpoints are written in place, are pickles but for the adapter, and hold every argument of the
training, tokens included (F33, S1, S5). It calls the methods here in their place.
"""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerState

from gemma_tune.errors import RunError
from gemma_tune.runs.layout import RunDir
from gemma_tune.runs.record import flush_metrics
from gemma_tune.training.adapter_weights import read_adapter, trained_weights, write_adapter
from gemma_tune.training.callbacks import EarlyStopCallback
from gemma_tune.training.checkpoint import (
    checkpoint_path,
    fault_of,
    remove_old_checkpoints,
    step_of,
    write_checkpoint,
)
from gemma_tune.training.guards import require_finite_adapter
from gemma_tune.training.state_file import random_state, read_state, restore_random_state, state_bytes, write_state

_FORMAT = 1  # of the state; another one is not read
_TRAINER_STATE = "trainer_state.json"  # the Trainer reads it by that name


class OwnCheckpoints(Trainer):
    """To be named before `SFTTrainer` among the bases of a class, as it comes between that and the Trainer's methods.

    Attributes:
        early_stop: ends the training by the eval loss; None where nothing does.
        num_real_tokens, seconds: trained on so far and spent on it, those before a resume included.
    """

    run: RunDir
    early_stop: EarlyStopCallback | None = None
    num_real_tokens = 0
    _seconds_before = 0.0
    _started: float | None = None
    _resumed_from: Path | None = None
    _resumed_state: dict[str, Any]
    _resumed_random_state: dict[str, Any]
    _began_epochs = False  # in this process

    @property
    def seconds(self) -> float:
        return self._seconds_before + (time.monotonic() - self._started if self._started is not None else 0.0)

    def stop_clock(self) -> None:
        self._seconds_before, self._started = self.seconds, None

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        self._started = time.monotonic()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Adapter, optimizer, scheduler, loss scale, random state and position, as tensors and JSON."""
        step = self.state.global_step
        require_finite_adapter(self.model, step=step)
        scaler = self.accelerator.scaler
        training = {
            "format": _FORMAT,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.lr_scheduler.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "num_real_tokens": self.num_real_tokens,
            "seconds": self.seconds,
            # What was trained since the last line of metrics: the next line is a mean over it as well.
            "loss_since_log": self._tr_loss,
            "last_logged_step": self._globalstep_last_logged,
            "total_loss": self._total_loss_scalar,
        }
        trainer_state = copy.copy(self.state)
        trainer_state.best_model_checkpoint = None  # an absolute path; the step says the same

        def write(folder: Path) -> None:
            write_adapter(self.model, folder)
            write_state(folder, "training", training)
            write_state(folder, f"process-{self.args.process_index}", random_state())
            trainer_state.save_to_json(str(folder / _TRAINER_STATE))

        flush_metrics(self.run)
        write_checkpoint(
            self.run,
            step=step,
            tensor_bytes=state_bytes(training) + state_bytes(trained_weights(self.model)),
            write=write,
        )
        if self.state.best_global_step:
            self._find_best()
        best, resumed = self.state.best_model_checkpoint, self._resumed_from
        remove_old_checkpoints(
            self.run,
            keep=self.args.save_total_limit,
            protected=[Path(path) for path in (best, resumed) if path is not None],
        )

    def _find_best(self) -> None:
        best = checkpoint_path(self.run, self.state.best_global_step)
        self.state.best_model_checkpoint = str(best) if best.is_dir() else None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Read all of it before anything is changed, so that what cannot be read is told before training goes on."""
        folder = Path(resume_from_checkpoint)
        self._resumed_state = read_state(folder, "training")
        if self._resumed_state.get("format") != _FORMAT:
            raise RunError(
                f"{folder} was written by another version of gemma-tune",
                hint=f"a new run with model.adapter={folder} starts from its weights",
            )
        self._resumed_random_state = read_state(folder, f"process-{self.args.process_index}")
        try:
            step = TrainerState.load_from_json(str(folder / _TRAINER_STATE)).global_step
        except (OSError, ValueError, TypeError) as error:
            raise RunError(f"{folder / _TRAINER_STATE} cannot be read: {error}") from None
        if step != step_of(folder):
            raise RunError(f"{folder} holds the state of step {step}")
        read_adapter(self.model, folder)
        self._resumed_from = folder

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> tuple[int, int]:
        position = super()._init_training_state(max_steps, *args, **kwargs)
        if self._resumed_from is not None:
            # The intervals of the saved state are those of the recipe as it was then.
            self.state.compute_steps(self.args, max_steps)
            if self.state.best_global_step:
                self._find_best()
        return position

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        state = self._resumed_state
        self.optimizer.load_state_dict(state["optimizer"])
        schedule = self.lr_scheduler
        schedule.load_state_dict(state["scheduler"])
        # The saved rate of the coming step belongs to the length that the run had then; it may have been prolonged.
        rates = [
            peak * share(schedule.last_epoch)
            for peak, share in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
        ]
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        schedule._last_lr = rates
        self.num_real_tokens, self._seconds_before = state["num_real_tokens"], state["seconds"]

    def _load_scaler(self, checkpoint: str | None) -> None:
        scaler = self.accelerator.scaler
        if checkpoint is not None and scaler is not None and self._resumed_state["scaler"] is not None:
            scaler.load_state_dict(self._resumed_state["scaler"])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            restore_random_state(self._resumed_random_state)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """The Trainer's; a run that was resumed after its last step makes no further one."""
        if self._resumed_from is not None and not self._began_epochs:
            state = self._resumed_state
            self._tr_loss = state["loss_since_log"].to(self.args.device)
            self._globalstep_last_logged = state["last_logged_step"]
            self._total_loss_scalar = state["total_loss"]
            self._resumed_state = {}  # its tensors would be held to the end
        self._began_epochs = True
        stopped_early = self.early_stop is not None and self.early_stop.is_reached(self.state)
        if self.state.global_step >= self.state.max_steps or stopped_early:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _load_best_model(self) -> None:
        best = Path(self.state.best_model_checkpoint)
        fault = fault_of(best)
        if fault is not None:
            raise RunError(f"{best}, the best checkpoint, cannot be used: {fault}", hint="resume an earlier checkpoint")
        read_adapter(self.model, best)
