"""The adapter between the model in memory and PEFT's files, without the base and without a pickle (LEAF)."""

from pathlib import Path
from typing import Any

import torch
from peft import set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file

from gemma_tune.engines.lora import rename_keys
from gemma_tune.errors import RunError
from gemma_tune.machine.world import ALONE, World
from gemma_tune.runs.adapter_dir import ADAPTER_WEIGHTS_FILE
from gemma_tune.text import listed


def trained_weights(model: Any) -> dict[str, torch.nn.Parameter]:
    """The weights that the optimizer changes, by name."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def name_base(model: Any, *, name: str, revision: str | None) -> None:
    """Have the saved adapter name its base as the recipe does, not by the directory it was loaded from (S5, F44)."""
    for config in model.peft_config.values():
        config.base_model_name_or_path = name
        config.revision = revision


def write_adapter(model: Any, directory: Path, *, weights: dict[str, torch.Tensor] | None = None) -> None:
    """Write the adapter in PEFT's format, from `weights` by name where those of the model are sharded.

    PEFT is handed the trained weights, so that the frozen base is not gathered for it (F40). An embedding that is
    trained is among `modules_to_save` and saved as such; PEFT's `auto` would ask the hub whether the vocabulary changed
    (F6), and its `True` writes such an embedding twice.
    """
    model.save_pretrained(
        str(directory),
        state_dict=weights or trained_weights(model),
        save_embedding_layers=False,
        safe_serialization=True,
    )
    (directory / "README.md").unlink(missing_ok=True)  # PEFT's blank model card


def read_adapter(model: Any, directory: Path, *, world: World = ALONE) -> None:
    """Put an adapter's weights, as process 0 reads them, into the one that is attached in every process.

    Raises:
        RunError: the file is missing, is not safetensors, or does not hold exactly the weights of this adapter (F31).
    """

    def load() -> dict[str, torch.Tensor]:
        try:
            return load_file(directory / ADAPTER_WEIGHTS_FILE)
        except (OSError, SafetensorError) as error:
            raise _unreadable(directory, error) from None

    tensors = world.broadcast(load)
    try:
        renamed = rename_keys(model, tensors)
        result = set_peft_model_state_dict(model, {renamed[key]: tensor for key, tensor in tensors.items()})
    except RuntimeError as error:
        raise _unreadable(directory, error) from None
    missing = sorted(set(result.missing_keys) & set(trained_weights(model)))
    if missing or result.unexpected_keys:
        strangers = [
            *(f"{name} is missing" for name in missing),
            *(f"{name} has no place" for name in result.unexpected_keys),
        ]
        raise RunError(
            f"{directory / ADAPTER_WEIGHTS_FILE} is not of this adapter: {listed(strangers, shown=1)}",
            hint="the lora section of the recipe must be the one that the adapter was trained with",
        )


def _unreadable(directory: Path, error: Exception) -> RunError:
    return RunError(f"{directory / ADAPTER_WEIGHTS_FILE} cannot be read: {str(error).strip()}")
