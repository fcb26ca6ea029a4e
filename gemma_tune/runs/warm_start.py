"""The adapter that a training starts from (`model.adapter`): found and compared before anything is loaded."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_tune.errors import RunError
from gemma_tune.identity import file_sha256
from gemma_tune.models.fetch import LocalModel
from gemma_tune.models.resolve import refuse_other
from gemma_tune.recipe.schema import LoraSection
from gemma_tune.runs.adapter_base import require_base
from gemma_tune.runs.adapter_dir import AdapterDir, open_run_adapter
from gemma_tune.runs.layout import RunDir


@dataclass(frozen=True)
class StartAdapter:
    """An adapter on disk."""

    name: str  # as the recipe gives it
    directory: Path
    base: str | None  # the base that it says it was trained on
    sha256: str  # of its weights
    note: str | None = None  # what of the base could not be compared with the adapter's own, in a sentence


def find_adapter(name: str, *, lora: LoraSection, base: LocalModel | None = None) -> StartAdapter:
    """Find the adapter of a run, or in a directory such as a checkpoint, and compare it with the recipe and the base.

    Raises:
        RunError: there is none, it is damaged, or it was trained with other settings or on another base.
    """
    path = Path(name)
    adapter = open_run_adapter(RunDir(path)) if RunDir(path).manifest.is_file() else AdapterDir(path, RunError)
    if not adapter.exists:
        refuse_other(path, "a run or an adapter", error=RunError)
    weights = adapter.require_weights()
    different = [
        f"lora.{field} is {wanted}, the adapter has {found!r}"
        for field, wanted, found in _settings(lora, adapter.config)
        if wanted != found
    ]
    if different:
        raise RunError(f"model.adapter={name}: {'; '.join(different)}", hint="set lora to what the adapter has")
    note = require_base(adapter, base) if base is not None else None
    return StartAdapter(name, adapter.path, adapter.base_name, file_sha256(weights), note)


def _settings(lora: LoraSection, config: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """What decides an adapter's effect besides its weights: name, value of the recipe, value of the adapter.

    Which modules it is on shows when its weights are put in.
    """
    return [
        ("peft_type", "LORA", config["peft_type"]),
        ("rank", lora.rank, config.get("r")),
        ("alpha", float(lora.alpha), float(config.get("lora_alpha", 0))),
        ("use_rslora", lora.use_rslora, bool(config.get("use_rslora"))),
        ("use_dora", lora.use_dora, bool(config.get("use_dora"))),
    ]
