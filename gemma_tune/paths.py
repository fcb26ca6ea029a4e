"""Where the shipped files are, in a checkout next to the package, in a wheel inside it; and where the cache is."""

import os
import tomllib
from pathlib import Path
from typing import Any

PACKAGE_DIR = Path(__file__).resolve().parent
TINY_MODEL_DIR = PACKAGE_DIR / "models" / "tiny" / "model"
TINY_ROWS_DIR = PACKAGE_DIR / "models" / "tiny" / "rows"


def _shipped(name: str) -> Path:
    """`gemma_tune/_shipped/<name>` in a wheel (pyproject.toml puts it there), `<checkout>/<name>` otherwise."""
    installed = PACKAGE_DIR / "_shipped" / name
    return installed if installed.is_dir() else PACKAGE_DIR.parent / name


RECIPES_DIR = _shipped("recipes")
DATA_TEMPLATES_DIR = _shipped("data_templates")
CACHE_VARIABLE = "GEMMA_TUNE_CACHE"


def cache_dir() -> Path:
    """`$GEMMA_TUNE_CACHE`, or `gemma-tune` in the user's cache directory."""
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gemma-tune"


def read_table(name: str) -> dict[str, Any]:
    """Return a TOML file of the package, such as models/catalogue.toml."""
    return tomllib.loads((PACKAGE_DIR / name).read_text(encoding="utf-8"))
