"""What the Trainer saves and loads, replaced: `training.checkpoint`'s files instead of pickles (LEAF).

The Trainer's checkpoints are written in place, are pickles but for the adapter, and hold every argument of the
training, tokens included (F33, S1, S5). It calls the methods here in their place.
"""

import copy
import time
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerState

from gemma_tune.errors import RunError
from gemma_tune.machine.world import ALONE, World
from gemma_tune.runs.checkpoints import checkpoint_path, fault_of, remove_old_checkpoints, step_of, write_checkpoint
from gemma_tune.runs.layout import RunDir
from gemma_tune.runs.metrics_log import flush_metrics
from gemma_tune.training.adapter_weights import read_adapter, trained_weights, write_adapter
from gemma_tune.training.callbacks import EarlyStopCallback
from gemma_tune.training.guards import require_finite_adapter
from gemma_tune.training.sharding import shard_optimizer_state, whole
from gemma_tune.training.state_file import random_state, read_state, restore_random_state, state_bytes, write_state

_FORMAT = 1  # of the state; another one is not read
TRAINER_STATE = "trainer_state.json"  # the Trainer reads it by that name


class OwnCheckpoints(Trainer):
    """To be named before `SFTTrainer` among the bases of a class, as it comes between that and the Trainer's methods.

    Attributes:
        early_stop: ends the training by the eval loss; None where nothing does.
        num_real_tokens: trained on so far by this process; process 0 counts those before a resume.
        seconds: spent on it, those before a resume included.
    """

    run: RunDir
    world: World = ALONE
    early_stop: EarlyStopCallback | None = None
    num_real_tokens = 0
    _seconds_before = 0.0
    _started: float | None = None
    _resumed_from: Path | None = None
    _resumed_state: dict[str, Any]
    _resumed_process: dict[str, Any]
    _began_epochs = False  # in this process

    @property
    def seconds(self) -> float:
        return self._seconds_before + (time.monotonic() - self._started if self._started is not None else 0.0)

    def whole_weights(self) -> dict[str, torch.Tensor]:
        """The trained weights by name, gathered where they are sharded; a collective call."""
        weights: dict[str, torch.Tensor] = whole(trained_weights(self.model))
        return weights

    def count_real_tokens(self) -> int:
        """Tokens that were trained on so far by all processes; a collective call."""
        return int(self.world.all_reduce(self.num_real_tokens)[0])

    def stop_clock(self) -> None:
        self._seconds_before, self._started = self.seconds, None

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        self._started = time.monotonic()
        if resume_from_checkpoint:
            self._read(Path(str(resume_from_checkpoint)))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Adapter, optimizer, scheduler, loss scale, random states and position, as tensors and JSON.

        Process 0 writes, and an error of its disk ends all of them.
        """
        step = self.state.global_step
        weights = self.whole_weights()
        require_finite_adapter(weights, step=step)
        scaler = self.accelerator.scaler
        training = {
            "format": _FORMAT,
            "optimizer": whole(self.optimizer.state_dict()),
            "scheduler": self.lr_scheduler.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "num_real_tokens": self.count_real_tokens(),
            "seconds": self.seconds,
            "last_logged_step": self._globalstep_last_logged,
            "total_loss": self._total_loss_scalar,
        }
        # The loss that was trained since the last line of metrics: the next line is a mean over it as well.
        processes = self.world.all_gather({"random": random_state(), "loss_since_log": self._tr_loss.cpu()})
        trainer_state = copy.copy(self.state)
        trainer_state.best_model_checkpoint = None  # an absolute path; the step says the same

        def write(folder: Path) -> None:
            write_adapter(self.model, folder, weights=weights)
            write_state(folder, "training", training)
            for rank, process in enumerate(processes):
                write_state(folder, f"process-{rank}", process)
            trainer_state.save_to_json(str(folder / TRAINER_STATE))

        def save() -> None:
            flush_metrics(self.run)
            write_checkpoint(
                self.run, step=step, tensor_bytes=state_bytes(training) + state_bytes(weights), write=write
            )
            best = checkpoint_path(self.run, self.state.best_global_step) if self.state.best_global_step else None
            protected = [path for path in (best, self._resumed_from) if path is not None]
            remove_old_checkpoints(self.run, keep=self.args.save_total_limit, protected=protected)

        self.world.broadcast(save)
        self._find_best()

    def _find_best(self) -> None:
        if not self.state.best_global_step:
            return
        best = checkpoint_path(self.run, self.state.best_global_step)
        self.state.best_model_checkpoint = self.world.broadcast(lambda: str(best) if best.is_dir() else None)

    def _read(self, folder: Path) -> None:
        """Read all of it before anything is changed, so that what cannot be read is told before training goes on."""

        def read() -> tuple[dict[str, Any], list[dict[str, Any]]]:
            training = read_state(folder, "training")
            if training.get("format") != _FORMAT:
                raise RunError(
                    f"{folder} was written by another version of gemma-tune",
                    hint=f"a new run with model.adapter={folder} starts from its weights",
                )
            processes = [read_state(folder, f"process-{rank}") for rank in range(self.world.size)]
            try:
                step = TrainerState.load_from_json(str(folder / TRAINER_STATE)).global_step
            except (OSError, ValueError, TypeError) as error:
                raise RunError(f"{folder / TRAINER_STATE} cannot be read: {error}") from None
            if step != step_of(folder):
                raise RunError(f"{folder} holds the state of step {step}")
            return training, processes

        self._resumed_state, processes = self.world.broadcast(read)
        self._resumed_process = processes[self.world.rank]
        read_adapter(self.model, folder, world=self.world)
        self._resumed_from = folder

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Nothing is left to read: `train` has put the weights in, before the model was wrapped for its processes."""

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> tuple[int, int]:
        position = super()._init_training_state(max_steps, *args, **kwargs)
        if self._resumed_from is not None:
            # The intervals of the saved state are those of the recipe as it was then.
            self.state.compute_steps(self.args, max_steps)
            self._find_best()
        return position

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        state = self._resumed_state
        self.optimizer.load_state_dict(shard_optimizer_state(state["optimizer"], self.optimizer))
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
        self.num_real_tokens = state["num_real_tokens"] if self.world.is_main else 0
        self._seconds_before = state["seconds"]

    def _load_scaler(self, checkpoint: str | None) -> None:
        scaler = self.accelerator.scaler
        if checkpoint is not None and scaler is not None and self._resumed_state["scaler"] is not None:
            scaler.load_state_dict(self._resumed_state["scaler"])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            restore_random_state(self._resumed_process["random"])

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """The Trainer's; a run that was resumed after its last step makes no further one."""
        if self._resumed_from is not None and not self._began_epochs:
            state = self._resumed_state
            self._tr_loss = self._resumed_process["loss_since_log"].to(self.args.device)
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
        fault = self.world.broadcast(lambda: fault_of(best))
        if fault is not None:
            raise RunError(f"{best}, the best checkpoint, cannot be used: {fault}", hint="resume an earlier checkpoint")
        read_adapter(self.model, best, world=self.world)
