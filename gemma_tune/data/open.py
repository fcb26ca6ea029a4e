"""From a recipe to rows that can be trained: the base, the opened sources, the encoded rows."""

from collections.abc import Mapping
from typing import Any

from gemma_tune.data.encode.cache import cache_key, keep_entry, new_entry, read_entry
from gemma_tune.data.encode.encode_rows import Datasets, encode_examples
from gemma_tune.data.encode.encoder import Encoder
from gemma_tune.data.inputs import Inputs, open_inputs
from gemma_tune.data.rows.chat_template import ChatRenderer
from gemma_tune.data.rows.read import read_examples
from gemma_tune.models.fetch import LocalModel, fetch_model
from gemma_tune.models.safetensors import tokenizer_hashes
from gemma_tune.recipe.schema import DataSection, Recipe


def build_datasets(
    section: DataSection,
    inputs: Inputs,
    encoder: Encoder,
    *,
    chat: ChatRenderer | None,
    tokenizer_files: Mapping[str, str],
) -> Datasets:
    """Encode the rows of a recipe; read them from the token cache where nothing that decides them has changed.

    `tokenizer_files`: file name → SHA-256 of the files that make the tokenizer. Raises as `read_examples` and
    `encode_examples`.
    """
    key = cache_key(section, inputs, tokenizer_files=tokenizer_files)
    if section.cache and (found := read_entry(key)) is not None:
        return found
    with new_entry(cached=section.cache) as writer:
        examples = read_examples(section, inputs, chat=chat, scratch=writer.directory)
        made = writer.finish(encode_examples(examples, encoder, section, add=writer.add))
        if section.cache:
            keep_entry(key, writer, made.report)
    return made


def open_data(recipe: Recipe) -> tuple[LocalModel, Inputs]:
    """The base, and the opened sources of the rows with the templates that read them."""
    base = fetch_model(recipe.model.name, revision=recipe.model.revision)
    return base, open_inputs(recipe.data, prefers_chat=base.knows_chat_turns)


def load_data(recipe: Recipe, *, base: LocalModel, inputs: Inputs) -> tuple[Any, Encoder, Datasets]:
    """The tokenizer of the base, and the recipe's rows as token ids and labels."""
    tokenizer, encoder, chat = load_encoder(base, inputs=inputs)
    files = tokenizer_hashes(base.directory)
    return tokenizer, encoder, build_datasets(recipe.data, inputs, encoder, chat=chat, tokenizer_files=files)


def load_encoder(base: LocalModel, *, inputs: Inputs) -> tuple[Any, Encoder, ChatRenderer | None]:
    """The tokenizer of the base, its encoder, and its chat renderer where a template needs one."""
    from gemma_tune.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(base.directory)
    return tokenizer, Encoder(tokenizer), ChatRenderer.from_tokenizer(tokenizer) if inputs.needs_chat else None
