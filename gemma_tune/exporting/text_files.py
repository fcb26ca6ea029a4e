"""The small files of an exported directory: where each comes from, and what they must not carry away."""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemma_tune.disk import to_json, write_text
from gemma_tune.models.catalogue import LICENCE_NOTICES, GemmaModel
from gemma_tune.models.safetensors import CHAT_TEMPLATE_FILES, GENERATION_CONFIG_FILE, PROCESSOR_FILES, TOKENIZER_FILES

NOTICE_FILE = "NOTICE"
LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", NOTICE_FILE, "USE_POLICY.md")
_ABSOLUTE_PATH = re.compile(r"(/|~/|[A-Za-z]:[\\/]|\\\\|file:).*", re.DOTALL)
# Settings that make a loader import a package or run code of the repository (S2).
_CODE_SETTINGS = ("auto_map", "auto_mapping")


def tokenizer_files(base_dir: Path, adapter_dir: Path) -> dict[str, Path]:
    """Tokenizer and chat template: name -> where it is copied from.

    A tokenizer next to the adapter is the one that it was trained with, so it is taken whole and not mixed with the
    base's; only tokenizer.model comes from the base then, because transformers 5 no longer writes it and GGUF
    converters ask for it.
    """
    own = [directory for directory in (adapter_dir / "tokenizer", adapter_dir) if directory.is_dir()]
    with_tokenizer = [d for d in own if (d / "tokenizer.json").is_file() or (d / "tokenizer.model").is_file()]
    tokenizer_dir = with_tokenizer[0] if with_tokenizer else base_dir
    found = {name: tokenizer_dir / name for name in (*TOKENIZER_FILES, *CHAT_TEMPLATE_FILES)}
    if not found["tokenizer.model"].is_file():
        found["tokenizer.model"] = base_dir / "tokenizer.model"
    if tokenizer_dir is base_dir:
        for name in CHAT_TEMPLATE_FILES:
            trained_with = [d / name for d in own if (d / name).is_file()]
            if trained_with:
                found[name] = trained_with[0]
    return {name: path for name, path in found.items() if path.is_file()}


def licence_files(base_dir: Path) -> dict[str, Path]:
    """The licence texts that lie next to the base: name -> file."""
    return {name: base_dir / name for name in LICENCE_FILES if (base_dir / name).is_file()}


def generation_files(base_dir: Path) -> dict[str, Path]:
    """How a whole model is asked: name -> file."""
    names = (GENERATION_CONFIG_FILE, *PROCESSOR_FILES)
    return {name: base_dir / name for name in names if (base_dir / name).is_file()}


def write_text_files(directory: Path, *, copied: Mapping[str, Path], given: Mapping[str, str] | None = None) -> None:
    """Copy files (name -> file), without local paths and code in JSON settings, and write texts (name -> content)."""
    for name, source in copied.items():
        target = directory / name
        shutil.copyfile(source, target)
        if name.endswith("_config.json") or name == "special_tokens_map.json":
            _clean_settings(target)
    for name, text in (given or {}).items():
        write_text(directory / name, text)


def _clean_settings(path: Path) -> None:
    """Rewrite a JSON file that has something to leave out; another keeps its bytes."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return  # whoever reads it says so
    cleaned = portable_settings(settings)
    if cleaned != settings:
        path.write_text(to_json(cleaned), encoding="utf-8")


def portable_settings(value: Any) -> Any:
    """A JSON value without settings that hold a path of this machine or that run code elsewhere (S2, S5)."""
    if isinstance(value, dict):
        return {
            key: portable_settings(inner)
            for key, inner in value.items()
            if key not in _CODE_SETTINGS and not (isinstance(inner, str) and _is_path_setting(key, inner))
        }
    if isinstance(value, list):
        return [portable_settings(inner) for inner in value]
    return value


def _is_path_setting(key: str, value: str) -> bool:
    """A token or a pattern may well begin with a slash, so the name of the setting counts, too."""
    return key.endswith(("_file", "_path", "_dir")) and _ABSOLUTE_PATH.fullmatch(value) is not None


def licence_notice(model: GemmaModel | None) -> str | None:
    """What must go with a model made from a Gemma, as the text of a NOTICE file; None where the licence is not known.

    The Gemma Terms of Use (section 3.1) prescribe the sentence.
    """
    if model is None or model.licence_url is None:
        return None
    if model.licence in LICENCE_NOTICES:
        return f"{LICENCE_NOTICES[model.licence]}\n"
    return f"Made from {model.hub_id or model.name}, which is licensed under {model.licence}: {model.licence_url}\n"
