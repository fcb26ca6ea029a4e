"""LEAF. Several adapters of one base into one, as PEFT's add_weighted_adapter combines them.

`linear`, `ties` (arXiv:2306.01708), `dare_linear` and `dare_ties` (arXiv:2311.03099) work on the two factors, each with
the root of weight x scaling, and need equal ranks; their result is close to the weighted sum of the changes, but not
it. `cat` puts the factors side by side: exactly the weighted sum, at the sum of the ranks. The arithmetic is PEFT's own
functions, one module at a time. The result is an adapter directory like any other, with scaling 1.
"""

import hashlib
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from peft.utils.merge_utils import dare_linear, dare_ties, task_arithmetic, ties
from safetensors.torch import save_file

from gemma_tune.disk import output_directory, refuse_existing, require_free_disk, write_json
from gemma_tune.errors import ExportError
from gemma_tune.exporting.merge.tensor_io import read_tensor, same_values
from gemma_tune.exporting.text_files import licence_files, portable_settings, tokenizer_files, write_text_files
from gemma_tune.models.safetensors import StoredTensor
from gemma_tune.runs.adapter_dir import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, AdapterDir, LoraAdapter, LoraFactors

CombineMethod = Literal["linear", "cat", "ties", "dare_linear", "dare_ties"]

_PRUNING_METHODS = ("ties", "dare_linear", "dare_ties")
# Which modules an adapter reaches is told by their full names in the result.
_REACH_SETTINGS = ("layers_to_transform", "layers_pattern", "exclude_modules")


def combine_adapters(
    adapter_dirs: Sequence[Path],
    output_dir: Path,
    *,
    weights: Sequence[float],
    method: CombineMethod,
    density: float | None = None,
    seed: int = 0,
) -> None:
    """Write the combination of at least two LoRA adapters, each with its weight, which may be negative.

    `density` is the share of values that `ties` and `dare_*` keep, above 0 and at most 1; `seed` decides which ones
    `dare_*` keeps. A module that only some adapters have is combined from those. Tokenizer and licence are those of the
    first. Raises ExportError; then nothing is left.
    """
    refuse_existing(output_dir)
    _refuse_options(adapter_dirs, weights=weights, method=method, density=density)
    adapters = [AdapterDir(directory).read_lora() for directory in adapter_dirs]
    _refuse_mixture(adapters)
    modules = sorted({module for adapter in adapters for module in adapter.factors})
    first = adapter_dirs[0]
    texts = tokenizer_files(first, first) | licence_files(first)
    needed_bytes = 2 * sum(tensor.num_bytes for adapter in adapters for tensor in adapter.tensors())
    require_free_disk(output_dir, needed_bytes, what="the combined adapter")
    tensors: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    for module in modules:
        parts = [(a.factors[module], w) for a, w in zip(adapters, weights, strict=True) if module in a.factors]
        a, b = _combine_module(module, parts, method=method, density=density, seed=seed)
        ranks[module] = a.shape[0]
        names = (
            ("lora_embedding_A", "lora_embedding_B") if parts[0][0].is_embedding else ("lora_A.weight", "lora_B.weight")
        )
        tensors |= {f"base_model.model.{module}.{name}": factor for name, factor in zip(names, (a, b), strict=True)}
    tensors |= {copy.name: read_tensor(copy) for copy in _base_copies(adapters).values()}
    with output_directory(output_dir) as partial_dir:
        write_text_files(partial_dir, copied=texts)
        write_json(partial_dir / ADAPTER_CONFIG_FILE, _config(first, ranks))
        save_file(tensors, partial_dir / ADAPTER_WEIGHTS_FILE, metadata={"format": "pt"})
        AdapterDir(partial_dir).read_lora()


def module_seed(seed: int, module: str) -> int:
    """The seed of one module's random choices, so that they depend on no order."""
    return int.from_bytes(hashlib.sha256(f"{seed} {module}".encode()).digest()[:8], "big")


def _refuse_options(
    adapter_dirs: Sequence[Path], *, weights: Sequence[float], method: CombineMethod, density: float | None
) -> None:
    if len(adapter_dirs) < 2 or len(weights) != len(adapter_dirs):
        raise ExportError(
            f"{len(adapter_dirs)} adapters and {len(weights)} weights: two adapters or more are combined, each with a "
            "weight",
            hint="give as many weights as adapters, for example 0.7 and 0.3",
        )
    if not all(math.isfinite(weight) and weight for weight in weights):
        raise ExportError(
            f"weights {', '.join(map(str, weights))}: each must be a number other than 0", hint="leave it out"
        )
    if method in _PRUNING_METHODS and (density is None or not 0.0 < density <= 1.0):
        raise ExportError(
            f"{method} with density {density}: it needs the share of values to keep, above 0 and at most 1",
            hint="0.5 is a usual start",
        )
    if method not in _PRUNING_METHODS and density is not None:
        raise ExportError(f"{method} takes no density", hint=f"leave it out, or use {', '.join(_PRUNING_METHODS)}")


def _refuse_mixture(adapters: Sequence[LoraAdapter]) -> None:
    """Refuse what has no weighted sum of factors, and adapters of different bases."""
    for adapter in adapters:
        if any(factors.magnitude is not None for factors in adapter.factors.values()):
            raise ExportError(
                f"{adapter.directory}: DoRA adapters cannot be combined: their change is no product of two factors",
                hint="merge one into the base, and train or merge the other on the result",
            )
        if adapter.trained:
            raise ExportError(
                f"{adapter.directory}: holds {next(iter(adapter.trained))} as a whole, which cannot be combined",
                hint="merge this one into the base, and train or merge the other on the result",
            )
    names = {adapter.base_name: adapter.directory for adapter in adapters if adapter.base_name}
    if len(names) > 1:
        told = ", ".join(f"{directory} of {name}" for name, directory in names.items())
        raise ExportError(f"the adapters are of different bases: {told}", hint="combine adapters of one base")


def _base_copies(adapters: Sequence[LoraAdapter]) -> dict[str, StoredTensor]:
    """Module -> the base's weight that came with a change of it (PEFT saves the embedding so); the same in all."""
    copies: dict[str, StoredTensor] = {}
    for adapter in adapters:
        for module, copy in adapter.base_copies.items():
            known = copies.setdefault(module, copy)
            if known is not copy and not same_values(known, copy, False):
                raise ExportError(
                    f"{adapter.directory}: brings another {module} of the base than {known.file.parent}",
                    hint="combine adapters of one base, with one vocabulary",
                )
    return copies


def _combine_module(
    module: str, parts: Sequence[tuple[LoraFactors, float]], *, method: CombineMethod, density: float | None, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The two factors of one module, in float32 and in the adapters' own layout, for scaling 1."""
    shapes = {factors.weight_shape for factors, _ in parts}
    if len(shapes) > 1 or len({factors.is_embedding for factors, _ in parts}) > 1:
        raise ExportError(
            f"{module}: the adapters fit weights of shapes {sorted(shapes)}", hint="combine adapters of one base"
        )
    if method == "cat":
        scaled = [read_tensor(f.a).float() * weight * f.scaling for f, weight in parts]
        return torch.cat(scaled, dim=0), torch.cat([read_tensor(f.b).float() for f, _ in parts], dim=1)
    ranks = [factors.a.shape[0] for factors, _ in parts]
    if len(set(ranks)) > 1:
        raise ExportError(
            f"{module}: {method} needs adapters of one rank, found {', '.join(map(str, ranks))}",
            hint="use cat, which takes any ranks",
        )
    strengths = [weight * factors.scaling for factors, weight in parts]
    # The sign goes to one factor alone: on both it would cancel.
    roots_a = torch.tensor([math.copysign(math.sqrt(abs(strength)), strength) for strength in strengths])
    roots_b = roots_a.abs()
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of a density of 1
        torch.manual_seed(module_seed(seed, module))
        a = _combine_factor([read_tensor(f.a).float() for f, _ in parts], roots_a, method=method, density=density)
        b = _combine_factor([read_tensor(f.b).float() for f, _ in parts], roots_b, method=method, density=density)
    return a, b


def _combine_factor(
    factors: list[torch.Tensor], weights: torch.Tensor, *, method: CombineMethod, density: float | None
) -> torch.Tensor:
    functions: dict[str, Any] = {"ties": ties, "dare_linear": dare_linear, "dare_ties": dare_ties}
    combined: torch.Tensor = (
        functions[method](factors, weights, density) if method in functions else task_arithmetic(factors, weights)
    )
    return combined.contiguous()


def _config(first: Path, ranks: Mapping[str, int]) -> dict[str, Any]:
    """adapter_config.json for scaling 1 everywhere. PEFT leaves use_rslora on, which would scale by the root of r."""
    config: dict[str, Any] = portable_settings(AdapterDir(first).config)
    rank = max(ranks.values())
    others = {module: other for module, other in ranks.items() if other != rank}
    changes = {
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "use_rslora": False,
        "target_modules": sorted(ranks),
        "modules_to_save": None,
        "inference_mode": True,
    }
    return config | changes | dict.fromkeys(_REACH_SETTINGS)
