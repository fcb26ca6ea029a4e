"""From a recipe's data section to rows that can be trained; the entry that the other packages call."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from gemma_tune.data.cache import Entry, cache_key, keep_entry, new_entry, read_entry
from gemma_tune.data.chat import ChatRenderer
from gemma_tune.data.encode import Datasets, encode_examples
from gemma_tune.data.inputs import Inputs
from gemma_tune.data.read import read_examples
from gemma_tune.data.report import DataReport
from gemma_tune.data.tokenize import Encoder
from gemma_tune.recipe.schema import DataSection


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
