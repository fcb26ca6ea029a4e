"""DeepSpeed's ZeRO-2: every process keeps a share of the gradients and of the optimizer's state (LEAF).

The weights stay whole in each. accelerate has DeepSpeed step within the backward pass, before anybody has seen the
gradient, and DeepSpeed's checkpoints are pickles; `take_over` puts the step back to where the Trainer makes it, and
gives the optimizer's state the form that it has in one process.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import convert_outputs_to_fp32
from accelerate.utils.deepspeed import DeepSpeedEngineWrapper, DeepSpeedOptimizerWrapper


def zero_settings() -> dict[str, Any]:
    """Arguments of `TrainingArguments` that divide gradients and optimizer state.

    The Trainer accumulates and weights the loss itself, so DeepSpeed is not told of gradient_accumulation.
    """
    return {
        "deepspeed": {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_clipping": "auto",
            # Elements in float32 of a buffer that is always there; the default is for models that are trained whole.
            "zero_optimization": {"stage": 2, "reduce_bucket_size": 2**24},
            # Not even "enabled": a yes would cast the adapter to bfloat16, a no would contradict the Trainer's.
            "bf16": {},
        }
    }


def compile_nothing() -> None:
    """Have DeepSpeed use gloo alone between processors: it would compile reductions in shared memory for inference."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def take_over(accelerator: Accelerator, *, autocast: torch.dtype | None) -> ZeroOptimizer:
    """Separate the step from the backward pass of the engine that accelerate has just prepared.

    Args:
        autocast: mixed precision of the forward pass, which accelerate leaves to DeepSpeed.
    """
    engine = accelerator.deepspeed_engine_wrapped.engine
    accelerator.deepspeed_engine_wrapped = _BackwardOnly(engine)
    if autocast is not None:
        model = engine.module
        model.forward = convert_outputs_to_fp32(torch.autocast(engine.device.type, dtype=autocast)(model.forward))
    return ZeroOptimizer(engine)


def shares_of_gradients(optimizer: Any) -> list[torch.Tensor]:
    """What this process holds of the gradient between backward pass and step; nothing without ZeRO."""
    if not isinstance(optimizer, ZeroOptimizer):
        return []
    return [gradient for group in optimizer.optimizer.averaged_gradients.values() for gradient in group]


class _BackwardOnly(DeepSpeedEngineWrapper):
    """The engine's backward pass, and the norm of the gradient that it leaves."""

    def backward(self, loss: torch.Tensor, sync_gradients: bool = True, **kwargs: Any) -> None:
        self.engine.set_gradient_accumulation_boundary(is_boundary=sync_gradients)
        self.engine.backward(loss, **kwargs)

    def get_global_grad_norm(self) -> float:
        """Over all processes, before clipping; a collective call."""
        norm = float(self.engine.optimizer.scaled_global_norm())
        return norm if norm >= 0 else math.nan  # DeepSpeed's sign for one that is not finite


class ZeroOptimizer(DeepSpeedOptimizerWrapper):
    """Steps when it is told to, and has the state of a torch optimizer over whole weights.

    DeepSpeed lays the weights of a group end to end, pads them, and gives each process an equal stretch, of which
    torch's optimizer knows as its only weight.
    """

    def __init__(self, engine: Any) -> None:
        super().__init__(engine.optimizer)
        self.engine = engine

    def step(self, closure: Any = None) -> None:
        self.engine.step()

    def state_dict(self) -> dict[str, Any]:
        """A collective call."""
        states: dict[int, dict[str, Any]] = {}
        groups = []
        first = 0
        for group, share, weights in self._groups():
            numbers = range(first, first := first + len(weights))
            groups.append({**group, "params": list(numbers)})
            states |= {number: {} for number in numbers}
            for name, value in self.optimizer.optimizer.state[share].items():
                values = _whole(value, weights) if _lies_along(value, share) else [value] * len(weights)
                for number, each in zip(numbers, values, strict=True):
                    states[number][name] = each
        return {"state": states, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        states, groups = {}, []
        for index, (saved, (_, share, weights)) in enumerate(
            zip(state_dict["param_groups"], self._groups(), strict=True)
        ):
            saved_states = [state_dict["state"][number] for number in saved["params"]]
            states[index] = {
                name: _share([state[name] for state in saved_states], share)
                if _lies_along(value, weights[0])
                else value
                for name, value in saved_states[0].items()
            }
            groups.append({**saved, "params": [index]})
        self.optimizer.optimizer.load_state_dict({"state": states, "param_groups": groups})

    def _groups(self) -> Iterator[tuple[dict[str, Any], torch.Tensor, Sequence[torch.Tensor]]]:
        """Each group with the share of this process and the weights it is of."""
        for group, weights in zip(self.param_groups, self.optimizer.bit16_groups, strict=True):
            yield group, group["params"][0], weights


def _lies_along(value: Any, weight: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == weight.shape


def _whole(share: torch.Tensor, weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The shares of all processes, cut into the weights; what is left is padding."""
    shares = [torch.empty_like(share) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(shares, share)
    end_to_end = torch.cat(shares)
    sizes = [weight.numel() for weight in weights]
    pieces = end_to_end.split([*sizes, len(end_to_end) - sum(sizes)])
    return [piece.view(weight.shape) for piece, weight in zip(pieces, weights, strict=False)]


def _share(values: Sequence[torch.Tensor], share: torch.Tensor) -> torch.Tensor:
    """What `_whole` has put together, laid end to end and cut for this process."""
    end_to_end = torch.cat([value.flatten() for value in values])
    start = torch.distributed.get_rank() * len(share)
    mine = end_to_end[start : start + len(share)]
    return torch.nn.functional.pad(mine, (0, len(share) - len(mine)))
