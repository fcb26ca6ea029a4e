"""What stops a training that would be lost, before the weights or a checkpoint take harm (LEAF; F23, F24, F32)."""

import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gemma_tune.errors import TrainingStopped
from gemma_tune.runs.context import RunContext
from gemma_tune.training.adapter_weights import trained_weights
from gemma_tune.training.sharding import is_sharded, local_part

# A float16 loss scale starts at 65536 and halves at every overflow; a sound run overflows a few times at its start.
MAX_FP16_OVERFLOWS = 16


class GuardCallback(TrainerCallback):
    """Looks at loss and gradient of every step before the optimizer does, at the price of one transfer from the card.

    All processes stop when one of them finds something.

    Args:
        take_loss: returns the loss of the step's forward passes in this process, a scalar tensor.
    """

    def __init__(self, context: RunContext, *, take_loss: Callable[[], torch.Tensor]) -> None:
        self.take_loss = take_loss
        self.reporter = context.reporter
        self.world = context.world
        self.overflows = 0
        self.trained: dict[str, torch.nn.Parameter] = {}
        self.looked_for_idle = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        # Once: a walk through every module at every step costs a hundredth of a small model's step.
        self.trained = trained_weights(model)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        step, loss = state.global_step + 1, self.take_loss()
        gradients = [weight.grad for weight in self.trained.values() if weight.grad is not None]
        if not gradients:
            raise _no_gradient(step)
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm([local_part(grad) for grad in gradients])))
        loss_value, norm_value = torch.stack((loss.float(), norm.float())).tolist()
        found = self.world.all_gather((loss_value, norm_value))
        losses = [each_loss for each_loss, _ in found]
        if is_sharded(gradients[0]):
            norm_value = math.hypot(*(each_norm for _, each_norm in found))
        if all(map(math.isfinite, (*losses, norm_value))):
            self.overflows = 0
            if norm_value == 0.0:
                raise _no_gradient(step) if any(losses) else _nothing_to_learn(step)
            self._tell_idle_weights()
            return
        self.overflows += 1
        if args.fp16 and self.overflows <= MAX_FP16_OVERFLOWS:
            return  # the loss scaler skips the step
        raise TrainingStopped(
            f"step {step}: the loss is {sum(losses) / len(losses):g} and its gradient {norm_value:g}; training stopped "
            f"before they reached the weights",
            hint=likely_cause(model, float16=args.fp16, learning_rate=args.learning_rate),
        )

    def _tell_idle_weights(self) -> None:
        """Once: weights outside of the graph, such as projections of layers that share another layer's keys."""
        if self.looked_for_idle:
            return
        self.looked_for_idle = True
        idle = [name for name, weight in self.trained.items() if weight.grad is None]
        if idle:
            self.reporter.warn(
                f"{len(idle)} of {len(self.trained)} trained weights receive no gradient and stay as they are, such as "
                f"{idle[0]}"
            )


def require_finite_adapter(weights: Mapping[str, torch.Tensor], *, step: int) -> None:
    """Raise before an adapter with NaN or infinity is saved (F24, F43)."""
    norms = torch.stack(torch._foreach_norm([weight.detach() for weight in weights.values()]))
    if not math.isfinite(float(norms.sum())):
        bad = next(name for name, norm in zip(weights, norms.tolist(), strict=True) if not math.isfinite(norm))
        raise TrainingStopped(
            f"after step {step} the adapter's weight {bad} holds NaN or infinity; it is not saved",
            hint="start again with a smaller training.learning_rate; model.adapter=RUN/checkpoints/checkpoint-N starts "
            "from what was good",
        )


def weights_sha256(model: Any) -> str:
    """Return the hash of this process's part of the trained weights."""
    digest = hashlib.sha256()
    for weight in trained_weights(model).values():
        digest.update(local_part(weight.detach()).contiguous().view(torch.uint8).cpu().numpy())
    return digest.hexdigest()


def refuse_unchanged(state: TrainerState, *, keeps_best: bool, context: RunContext) -> None:
    """Say that what a training keeps is bit for bit what it began with.

    Raises:
        TrainingStopped: no step moved anything. Where the best of several checkpoints was chosen, the later ones may
            have, so that the run is kept and the sentence is a warning.
    """
    if keeps_best and state.best_global_step:
        context.reporter.warn(
            f"the best checkpoint, of step {state.best_global_step}, is the adapter as it began: by the loss of the "
            "eval rows nothing was learned; a smaller training.learning_rate may help, and later checkpoints are kept"
        )
        return
    raise TrainingStopped(
        f"after step {state.global_step} the adapter is as it began, so nothing was learned; it is not saved",
        hint="raise training.learning_rate; with float16 every step may have overflowed: model.dtype=float32",
    )


def likely_cause(model: Any, *, float16: bool, learning_rate: float) -> str:
    """Why a loss is not finite, and what to try."""
    weight = find_non_finite(model)
    if weight is not None:
        source = "give another model.adapter" if ".lora_" in weight else "download the model again"
        return f"the weight {weight} holds NaN or infinity: {source}"
    if float16:
        return "float16 overflowed: use a card with bfloat16 (compute capability 8.0), or model.dtype=float32"
    return f"the loss diverged: try training.learning_rate={learning_rate / 4:g} or training.max_grad_norm=0.3"


def find_non_finite(model: Any) -> str | None:
    """The first weight with NaN or infinity. In 4 bits one such value spoils the offset of its layer's scales."""
    quantized = {f"{name}.weight": module.quant_state for name, module in model.named_modules() if _is_4bit(module)}
    for name, weight in model.named_parameters():
        # Codes in 4 bits are packed into any dtype, a floating one where the model is sharded.
        values = getattr(quantized[name], "offset", None) if name in quantized else weight
        if values is not None and not bool(torch.isfinite(values).all()):
            return str(name)
    return None


def _is_4bit(module: torch.nn.Module) -> bool:
    return getattr(module, "quant_state", None) is not None


def _no_gradient(step: int) -> TrainingStopped:
    return TrainingStopped(
        f"step {step}: no trained weight received a gradient, so nothing would be learned",
        hint="look at lora.targets; with training.gradient_checkpointing=off as well it is a bug: report it",
    )


def _nothing_to_learn(step: int) -> TrainingStopped:
    return TrainingStopped(
        f"step {step}: loss and gradient are exactly 0: no token of these rows is in the loss, or all are known",
        hint="look at what is trained with: gemma-tune data preview",
    )
