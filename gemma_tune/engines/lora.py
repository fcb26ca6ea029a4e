"""From a recipe's `lora` section, or an adapter on disk, to PEFT's names, and the check of what was attached (LEAF)."""

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer

from gemma_tune.engines.base import AttachedLora, LoadedModel
from gemma_tune.errors import EngineError, ModelError
from gemma_tune.models.families.known import canonical_name, tower_names
from gemma_tune.recipe.schema import LoraSection
from gemma_tune.runs.adapter_dir import KEY_PREFIX, AdapterDir
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


def load_adapter(model: Any, directory: Path) -> Any:
    """Put an adapter on its base; a module that another release of transformers named otherwise is found.

    Raises:
        ModelError: not every tensor lands: PEFT only warns, and adds nothing (F31).
    """
    # Before PEFT looks for the weights: it would open a pickle, or ask the hub for the path.
    stored = AdapterDir(directory, ModelError).read_header()
    renamed = rename_keys(model, stored)
    mapping = {
        f"^{re.escape(old.removeprefix(KEY_PREFIX))}$": new.removeprefix(KEY_PREFIX)
        for old, new in renamed.items()
        if old != new
    }
    try:
        config = PeftConfig.from_pretrained(str(directory))
        if mapping:
            config.target_modules = {_module_of(key) for key in renamed.values() if ".lora_" in key}
        model = PeftModel.from_pretrained(model, str(directory), config=config, key_mapping=mapping)
    except (KeyError, TypeError, ValueError) as cause:
        kind = AdapterDir(directory, ModelError).config["peft_type"]
        raise ModelError(f"{directory}: PEFT cannot load it; its peft_type is {kind!r}: {str(cause).strip()}") from None
    wanted = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    known = wanted | {name for name, _ in model.named_parameters(remove_duplicate=False)}  # an embedding saved with it
    odd = sorted((wanted - set(renamed.values())) | (set(renamed.values()) - known))
    if odd:
        raise ModelError(
            f"the adapter {directory} does not fit the base: {len(odd)} tensors find no partner, such as {odd[0]}"
        )
    return model


def rename_keys(model: torch.nn.Module, keys: Iterable[str]) -> dict[str, str]:
    """Return key of an adapter file -> the same key with the name that its module has in this model."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    here = {canonical_name(name): name for name, _ in base.named_modules()}
    modules = {key: _module_of(key) for key in keys}
    return {
        key: key.replace(f"{KEY_PREFIX}{module}", f"{KEY_PREFIX}{here.get(canonical_name(module), module)}", 1)
        for key, module in modules.items()
    }


def _module_of(key: str) -> str:
    return re.split(r"\.lora_|\.weight$", key.removeprefix(KEY_PREFIX), maxsplit=1)[0]
