"""From a recipe's `lora` section to PEFT's names, and the check of what was attached (LEAF)."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from gemma_tune.engines.base import AttachedLora, LoadedModel
from gemma_tune.errors import EngineError
from gemma_tune.models.families.known import tower_names
from gemma_tune.recipe.schema import LoraSection
from gemma_tune.text import suggestion

_INIT = {"default": True, "gaussian": "gaussian", "pissa": "pissa", "olora": "olora"}


def is_in_tower(name: str) -> bool:
    """Tell whether a module or parameter is of the image or audio part, which a text run never trains."""
    return any(tower in name for tower in tower_names())


def to_lora_settings(section: LoraSection) -> dict[str, Any]:
    """The keyword arguments that PEFT's LoraConfig and Unsloth's get_peft_model share."""
    return {
        "r": section.rank,
        "lora_alpha": section.alpha,
        "lora_dropout": section.dropout,
        "target_modules": "all-linear" if section.targets == ("all-linear",) else list(section.targets),
        "use_rslora": section.use_rslora,
        "use_dora": section.use_dora,
        "init_lora_weights": _INIT[section.init],
        "modules_to_save": list(section.modules_to_save) or None,
    }


def require_targets(model: torch.nn.Module, *, section: LoraSection) -> None:
    """Refuse a target or a module to save that the model does not have, before anything is attached (F32)."""
    modules = [(name.rpartition(".")[2], module) for name, module in model.named_modules() if not is_in_tower(name)]
    linear = sorted({name for name, module in modules if isinstance(module, torch.nn.Linear)})
    for field, wanted, allowed in (
        ("lora.targets", set(section.targets) - {"all-linear"}, linear),
        ("lora.modules_to_save", set(section.modules_to_save), sorted({name for name, _ in modules} - {""})),
    ):
        for name in sorted(wanted - set(allowed)):
            raise EngineError(
                f"{field}: the model has no module named {name!r}{suggestion(name, allowed)}",
                hint=f"linear modules of this model: {', '.join(linear)}",
            )


def check_attached(loaded: LoadedModel, *, section: LoraSection) -> AttachedLora:
    """Count what got an adapter; a target without one, or a trained tower, stops the run (F32)."""
    model = loaded.model
    adapted = (name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    num_modules = dict(Counter(name.rpartition(".")[2] for name in adapted))
    missing = [target for target in section.targets if target != "all-linear" and target not in num_modules]
    if missing or not num_modules:
        raise EngineError(f"no adapter was attached to {', '.join(missing) or 'any module'}")
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    towers = [name for name in trainable if is_in_tower(name)]
    if towers:
        raise EngineError(f"{len(towers)} parameters of the image or audio tower would be trained, such as {towers[0]}")
    for parameter in trainable.values():
        parameter.data = parameter.data.float()  # trained weights are float32 whatever the base computes in (F32)
    num_trainable, num_total = model.get_nb_trainable_parameters()
    return AttachedLora(loaded=loaded, num_modules=num_modules, num_trainable=num_trainable, num_total=num_total)
