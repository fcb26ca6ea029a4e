"""What a base's config.json, tokenizer.json and headers say about a recipe: refused before training, by `validate` too.

Loads nothing heavy.
"""

import contextlib
from collections.abc import Mapping
from pathlib import Path

from gemma_tune.data.rows.chat_template import ChatRenderer
from gemma_tune.data.rows.segments import RowError
from gemma_tune.data.rows.template import named_templates
from gemma_tune.errors import ExportError, ModelError, RecipeError
from gemma_tune.models.config import TextConfig
from gemma_tune.models.describe import list_rows
from gemma_tune.models.families.known import canonical_name
from gemma_tune.models.safetensors import StoredTensor, stored_tensors
from gemma_tune.models.token_ids import ids_beyond, read_token_ids
from gemma_tune.recipe.schema import DataSection, LoraSection, ModelSection, Recipe

_EMBEDDING = "embed_tokens.weight"


def check_base(recipe: Recipe, config: TextConfig, directory: Path | None) -> tuple[str, ...]:
    """Refuse what this base can neither be trained as nor exported to.

    Args:
        config: the facts of its config.json.
        directory: where its files are; None when they are not here.

    Returns:
        What is to be said before the training, a sentence each.

    Raises:
        GemmaTuneError: with the path of the setting, or the file, that is at fault.
    """
    notes = _check_quantization(recipe.model, config)
    if directory is not None:
        tensors = stored_tensors(directory)
        _check_embedding(directory, config, tensors)
        _check_shapes(config, tensors)
        _check_targets(recipe.lora, tensors)
        _check_chat_template(recipe.data, directory)
    _check_formats(recipe, config, directory)
    return notes


def _check_quantization(section: ModelSection, config: TextConfig) -> tuple[str, ...]:
    """Files in 4 or 8 bits are loaded as they are, and cannot be merged into."""
    if config.quantization is None:
        return ()
    bits = "8bit" if "8-bit" in config.quantization else "4bit"
    if not getattr(section, f"load_in_{bits}"):
        other = "load_in_4bit" if bits == "8bit" else "load_in_8bit"
        raise RecipeError(
            f"model.load_in_{bits} is false, and the files of {section.name} are quantised ({config.quantization})",
            hint=f"model.load_in_{bits}=true model.{other}=false; or name the model in 16 bits",
        )
    return (
        f"{section.name} is quantised ({config.quantization}), and no adapter can be merged into it: keep the adapter, "
        "or merge it into the same model in 16 bits with gemma-tune merge RUN/adapter --base DIR",
    )


def _check_embedding(directory: Path, config: TextConfig, tensors: Mapping[str, StoredTensor]) -> None:
    """Refuse a tokenizer with tokens that have no row, and an embedding of another size than config.json says."""
    num_rows = config.vocab_size
    stored = next((each for name, each in tensors.items() if f".{name}".endswith(f".{_EMBEDDING}")), None)
    if stored is not None and stored.shape[:1] != (num_rows,):
        raise ModelError(
            f"{stored.file}: {stored.name} has {stored.shape[0]} rows, and vocab_size in config.json is {num_rows}",
            hint="download the model again, or save it again with save_pretrained",
        )
    path = directory / "tokenizer.json"
    beyond = ids_beyond(read_token_ids(path).items(), num_rows=num_rows) if path.is_file() else {}
    if beyond:
        first = min(beyond, key=lambda text: beyond[text])
        raise ModelError(
            f"{path}: the tokenizer has {max(beyond.values()) + 1} tokens and the embedding {num_rows} rows; "
            f"{first!r} has id {beyond[first]}",
            hint="call model.resize_token_embeddings(len(tokenizer)) and save the model, or restore its own tokenizer",
        )


def _check_shapes(config: TextConfig, tensors: Mapping[str, StoredTensor]) -> None:
    """Refuse weights of other shapes, or of fewer layers, than config.json says; quantised ones are packed."""
    if config.quantization is not None:
        return
    stored = {canonical_name(name): tensor for name, tensor in tensors.items()}
    hint = "download the model again: config.json and weights belong together"
    for row in list_rows(config):
        tensor = stored.get(f"{row.name}.weight")
        if tensor is not None and row.weight_shape and tensor.shape != row.weight_shape:
            shapes = f"shape {list(tensor.shape)}, and config.json means {list(row.weight_shape)}"
            raise ModelError(f"{tensor.file}: {tensor.name} has {shapes}", hint=hint)
    last = f"model.layers.{len(config.layers) - 1}."
    if not any(name.startswith(last) for name in stored):
        raise ModelError(
            f"config.json means {len(config.layers)} layers, and the weights hold none of the last", hint=hint
        )


def _check_targets(section: LoraSection, tensors: Mapping[str, StoredTensor]) -> None:
    """Refuse names that occur nowhere in the model. A tied head is not stored."""
    parts = {part for name in tensors for part in name.split(".")} | {"all-linear", "lm_head"}
    for field in ("targets", "modules_to_save"):
        unknown = [name for name in getattr(section, field) if name.rpartition(".")[2] not in parts]
        if unknown:
            modules = sorted({name.split(".")[-2] for name in tensors if name.endswith("_proj.weight")})
            raise RecipeError(
                f"lora.{field}: the model has no module named {unknown[0]!r}",
                hint=f"linear modules of this model: {', '.join(modules)}",
            )


def _check_chat_template(section: DataSection, directory: Path) -> None:
    """Refuse a chat template that not even a question and an answer can be trained with, where rows need one."""
    if any(template.needs_chat for template in named_templates(section)):
        chat = ChatRenderer.from_directory(directory)
        turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
        with contextlib.suppress(RowError):  # other conversations may be taken
            if chat is not None:
                chat.row(turns, where="a question and an answer")


def _check_formats(recipe: Recipe, config: TextConfig, directory: Path | None) -> None:
    if not recipe.export.formats:
        return
    from gemma_tune.exporting.formats.registry import name_formats

    for each in name_formats(recipe.export.formats):
        try:
            each.check_base(config, directory)
        except ExportError as error:
            raise ExportError(f"export.formats: {each.name}: {error.message}", hint=error.hint) from None
