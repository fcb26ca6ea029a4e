"""From a recipe to rows that can be trained: the base, the opened sources, the encoded rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from gemma_tune.data.data_report import DataReport
from gemma_tune.data.encode.cache import Entry, cache_key, keep_entry, new_entry, read_entry
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
    *,
    tokenizer_files: Mapping[str, str],
    load: Callable[[], tuple[Encoder, ChatRenderer | None]],
) -> Datasets:
    """The rows of a recipe, encoded; from the token cache where nothing that decides them has changed.

    Args:
        section: the recipe's data section.
        inputs: its opened sources.
        tokenizer_files: file name → SHA-256 of the files that make the tokenizer.
        load: the encoder and, where a template needs it, the chat renderer; called when the rows must be encoded.

    Raises:
        DataError: see `read_examples` and `encode_examples`.
    """
    key = cache_key(section, inputs, tokenizer_files=tokenizer_files)
    if section.cache and (found := read_entry(key)) is not None:
        return _datasets(*found, cached=True)
    encoder, chat = load()
    with new_entry(cached=section.cache) as writer:
        examples = read_examples(section, inputs, chat=chat, scratch=writer.directory)
        report = encode_examples(examples, encoder, section, into=writer)
        entry = writer.finish()
        if section.cache:
            keep_entry(key, writer, report)
    return _datasets(entry, report, cached=False)


def _datasets(entry: Entry, report: DataReport, *, cached: bool) -> Datasets:
    return Datasets(entry.train, entry.eval, entry.train_places, entry.eval_examples, report, cached)


def open_data(recipe: Recipe) -> tuple[LocalModel, Inputs]:
    """The base, and the opened sources of the rows with the templates that read them."""
    base = fetch_model(recipe.model.name, revision=recipe.model.revision)
    return base, open_inputs(recipe.data, prefers_chat=base.knows_chat_turns)


def load_data(recipe: Recipe, *, base: LocalModel, inputs: Inputs) -> tuple[Any, Encoder, Datasets]:
    """The tokenizer of the base, and the recipe's rows as token ids and labels."""
    tokenizer, encoder, chat = load_encoder(base, inputs=inputs)
    datasets = build_datasets(
        recipe.data, inputs, tokenizer_files=tokenizer_hashes(base.directory), load=lambda: (encoder, chat)
    )
    return tokenizer, encoder, datasets


def load_encoder(base: LocalModel, *, inputs: Inputs) -> tuple[Any, Encoder, ChatRenderer | None]:
    """The tokenizer of the base, its encoder, and its chat renderer where a template needs one."""
    from gemma_tune.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(base.directory)
    return tokenizer, Encoder(tokenizer), ChatRenderer.from_tokenizer(tokenizer) if inputs.needs_chat else None
