"""Whether an adapter and a base fit: every tensor has its weight there, and no module of its config is missing."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from gemma_tune.errors import ExportError
from gemma_tune.models.families.known import canonical_name, tower_names
from gemma_tune.models.safetensors import StoredTensor
from gemma_tune.runs.adapter_dir import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, FLOAT_DTYPES, LoraAdapter
from gemma_tune.text import listed

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
_LAYER = re.compile(r"\.layers\.(\d+)\.")


def require_fit(adapter: LoraAdapter, base: Mapping[str, StoredTensor], *, base_config: Mapping[str, Any]) -> None:
    """Refuse an adapter with a tensor that has no weight in the base or another shape, or that lacks a module.

    The two ends are left out of the comparison of shapes, as a vocabulary may be resized, and so are packed weights.

    Raises:
        ExportError: see above.
    """
    refuse_strangers(adapter, base.keys())
    refuse_missing(adapter, base.keys(), base_config=base_config)
    shapes = {canonical_name(name): tensor.shape for name, tensor in base.items() if tensor.dtype in FLOAT_DTYPES}
    for module, change in adapter.factors.items():
        name = canonical_name(f"{module}.weight")
        if name not in (EMBEDDING, HEAD) and shapes.get(name, change.weight_shape) != change.weight_shape:
            raise ExportError(
                f"{adapter.directory}: {module}: the adapter fits a weight of shape {change.weight_shape}, the base "
                f"has {shapes[name]}",
                hint=f"was it trained on another size? The adapter names {adapter.base_name or 'no base'}",
            )


def refuse_strangers(adapter: LoraAdapter, base_names: Iterable[str]) -> None:
    """Refuse adapter tensors that have no weight in the base. A head may be new: a tied base stores none."""
    wanted = [module + ".weight" for module in (*adapter.factors, *adapter.base_copies)] + list(adapter.trained)
    known = {canonical_name(name) for name in base_names} | {HEAD}
    strangers = sorted({name for name in wanted if canonical_name(name) not in known})
    if strangers:
        raise ExportError(
            f"{adapter.directory}: {len(strangers)} of {len(wanted)} adapter tensors have no weight in the base: "
            f"{listed(strangers)}",
            hint=f"was it trained on another model? The adapter names {adapter.base_name or 'no base'}",
        )
    ends = (EMBEDDING.split(".")[-2], HEAD.split(".")[0], *tower_names())  # tied, and never trained on text
    left_out = [
        module
        for module in adapter.factors
        if not any(end in module for end in ends) and not _is_targeted(canonical_name(module), adapter, stored=module)
    ]
    if left_out:
        raise ExportError(
            f"{adapter.directory / ADAPTER_CONFIG_FILE} names no module like these of {ADAPTER_WEIGHTS_FILE}, so PEFT "
            f"would leave them out: {listed(left_out)}; target_modules is {adapter.config.get('target_modules')!r}",
            hint="config and weights do not belong together: copy or save the adapter again",
        )


def refuse_missing(adapter: LoraAdapter, base_names: Iterable[str], *, base_config: Mapping[str, Any]) -> None:
    """Refuse an adapter without a module that its config names: the file was cut or put together by hand."""
    present = {canonical_name(module) for module in (*adapter.factors, *adapter.base_copies)}
    present |= {canonical_name(name).removesuffix(".weight") for name in adapter.trained}
    modules = [canonical_name(name).removesuffix(".weight") for name in base_names if name.endswith(".weight")]
    missing = [
        module
        for module in modules
        if module not in present and _is_targeted(module, adapter) and not _shares_keys(module, base_config)
    ]
    if adapter.config.get("task_type") in (None, "CAUSAL_LM"):
        whole = [canonical_name(name).removesuffix(".weight") for name in adapter.trained]
        missing += [name for name in adapter.modules_to_save if not any(_ends_with(found, name) for found in whole)]
    if missing:
        raise ExportError(
            f"{adapter.directory / ADAPTER_WEIGHTS_FILE} lacks modules that its config names: {listed(missing)}",
            hint="the file is incomplete: copy or save it again, or take a checkpoint",
        )


def _is_targeted(module: str, adapter: LoraAdapter, *, stored: str | None = None) -> bool:
    """Whether PEFT puts an adapter on a module of the language model (tuners_utils.check_target_module_exists).

    Args:
        stored: its name in the adapter's file.
    """
    config = adapter.config
    layer = _LAYER.search(f".{module}.")
    layers = config.get("layers_to_transform")
    if layers is not None:
        layers = [layers] if isinstance(layers, int) else layers
        if layer is None or int(layer[1]) not in layers:
            return False
    if any(tower in module for tower in tower_names()) or _matches(module, config.get("exclude_modules"), adapter):
        return False
    wanted = config.get("target_modules")
    return _matches(module, wanted, adapter) or (stored is not None and _matches(stored, wanted, adapter))


def _matches(module: str, wanted: Any, adapter: LoraAdapter) -> bool:
    """PEFT's rule: a list of endings, or a regular expression over the name that some release of transformers has."""
    if isinstance(wanted, str):
        if wanted == "all-linear":  # what that was is seen from what there is
            return module.rpartition(".")[2] in {found.rpartition(".")[2] for found in adapter.factors}
        names = (module, f"language_model.{module}", module.replace("model.", "model.language_model.", 1))
        return any(re.fullmatch(wanted, name) for name in names)
    return any(_ends_with(module, name) for name in wanted or ())


def _ends_with(module: str, name: str) -> bool:
    return module == name or module.endswith(f".{name}")


def _shares_keys(module: str, config: Mapping[str, Any]) -> bool:
    """Whether a layer takes keys and values of another one: its own projections need no adapter (Gemma 3n and 4)."""
    text = config.get("text_config", config)
    shared, layer = text.get("num_kv_shared_layers") or 0, _LAYER.search(f".{module}.")
    is_key_or_value = module.rpartition(".")[2] in ("k_proj", "v_proj")
    return bool(shared and is_key_or_value and layer and int(layer[1]) >= text["num_hidden_layers"] - shared)
