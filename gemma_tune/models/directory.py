"""The check of a model directory before anything opens its files."""

from collections.abc import Container
from pathlib import Path

from gemma_tune.disk import read_json_object
from gemma_tune.errors import GemmaTuneError, ModelError
from gemma_tune.models.config import TextConfig, read_config
from gemma_tune.models.hash_cache import cached_sha256
from gemma_tune.models.safetensors import GENERATION_CONFIG_FILE, PROCESSOR_FILES, read_header, weight_files
from gemma_tune.models.untrusted import check_no_code
from gemma_tune.text import listed

EXPORT_FILE = "export.json"
BASE_FILE = "base.json"


def check_directory(directory: Path) -> TextConfig:
    """Check that a local model is a whole Gemma, without loading it.

    Raises:
        ModelError: no config.json of a supported type, no safetensors weights as long as their own header says, no
            tokenizer; or it has an adapter, pickled weights or model code.
    """
    if (directory / "adapter_config.json").is_file():
        # transformers would load the adapter's base instead of the weights that are here.
        raise ModelError(f"{directory}: holds a LoRA adapter next to a model", hint="move adapter_config.json away")
    config = read_config(directory)
    for name in ("tokenizer_config.json", GENERATION_CONFIG_FILE, *PROCESSOR_FILES):
        if (directory / name).is_file():
            check_no_code(read_json_object(directory / name, error=ModelError), str(directory / name))
    for path in weight_files(directory):
        read_header(path)
    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise ModelError(
            f"{directory}: has no tokenizer",
            hint="Copy tokenizer.json and tokenizer_config.json of the base model next to it.",
        )
    require_recorded(directory)
    return config


def require_recorded(
    directory: Path, *, only: Container[str] | None = None, error: type[GemmaTuneError] = ModelError
) -> None:
    """Refuse files that do not hold the bytes that were written, as an export or a run has recorded them next to them.

    Args:
        only: the names of the files that are read; all of them unless given.
    """
    for record in (directory / EXPORT_FILE, directory / BASE_FILE):
        wanted = read_json_object(record, error=error).get("sha256") if record.is_file() else None
        if not isinstance(wanted, dict):
            continue
        wanted = {name: digest for name, digest in wanted.items() if only is None or name in only}
        found = cached_sha256([directory / name for name in wanted if (directory / name).is_file()])
        differ = [name if name in found else f"{name} (missing)" for name in wanted if found.get(name) != wanted[name]]
        if differ:
            raise error(
                f"{directory} is not as it was written: {listed(differ)} changed, by what {record.name} says",
                hint=f"copy or make it again; where it was changed on purpose, remove {record}",
            )
