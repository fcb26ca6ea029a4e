"""FSDP2: every process holds a share of each weight, of its gradient and of its optimizer state (LEAF).

What is written is whole: process 0 gathers it, so that a checkpoint of a sharded training is one as any other.
"""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import DistributedType
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainingArguments


def fsdp_settings(model: Any) -> dict[str, Any]:
    """Arguments of `TrainingArguments` that shard a model by its decoder layers."""
    layers = sorted(model.get_base_model()._no_split_modules)
    return {
        "fsdp": True,
        "fsdp_config": {
            "version": 2,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "transformer_layer_cls_to_wrap": layers,
            "reshard_after_forward": True,
            "cpu_ram_efficient_loading": False,  # every process has loaded the base
        },
    }


def shard_on_processors(config: TrainingArguments) -> None:
    """Have accelerate shard between processors too: it looks for FSDP only where it has counted accelerators."""
    config.distributed_state.distributed_type = DistributedType.MULTI_XPU


def whole(value: Any) -> Any:
    """A tree of dicts and lists with its shards gathered; a collective call where there are any."""
    if isinstance(value, DTensor):
        return value.detach().full_tensor()
    if isinstance(value, Mapping):
        return {key: whole(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(whole(item) for item in value)
    return value


def shard_optimizer_state(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's state with each tensor sharded as the weight it belongs to; the state itself where none is."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    if not any(map(is_sharded, weights)):
        return state
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    weight_of = dict(zip(numbers, weights, strict=True))
    return {
        **state,
        "state": {
            number: {name: _like(value, weight_of[number]) for name, value in values.items()}
            for number, values in state["state"].items()
        },
    }


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_sharded(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, DTensor)


def _like(value: Any, weight: torch.Tensor) -> Any:
    if isinstance(weight, DTensor) and isinstance(value, torch.Tensor) and value.shape == weight.shape:
        return distribute_tensor(value.to(weight.device), weight.device_mesh, weight.placements)
    return value
