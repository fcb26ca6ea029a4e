"""gemma-tune: QLoRA fine-tuning of Google's Gemma. `load` gives a model to ask and to score, in one line."""

from importlib import import_module

# Imported when it is first used: the models' libraries take seconds.
_EXPORTS = {
    "Gemma": "gemma_tune.inference.notebook",
    "load": "gemma_tune.inference.notebook",
    "load_recipe": "gemma_tune.api",
    "plan": "gemma_tune.api",
    "train": "gemma_tune.api",
    "merge": "gemma_tune.api",
    "export": "gemma_tune.api",
    "generate": "gemma_tune.api",
    "score": "gemma_tune.api",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> object:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)
