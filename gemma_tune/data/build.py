"""From a recipe's data section to rows that can be trained; the entry that the other packages call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict

from gemma_tune.data.cache import cache_key, example_from, example_to_json, read_entry, report_from, write_entry
from gemma_tune.data.chat import ChatRenderer
from gemma_tune.data.encode import Datasets, encode_examples
from gemma_tune.data.inputs import Inputs
from gemma_tune.data.read import read_examples
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
        sides, facts = found
        return Datasets(
            train=sides["train"],
            eval=sides["eval"],
            train_places=tuple(facts["train_places"]),
            eval_examples=tuple(map(example_from, facts["eval_examples"])),
            report=report_from(facts["report"]),
            cached=True,
        )
    encoder, chat = load()
    datasets = encode_examples(read_examples(section, inputs, chat=chat), encoder, section)
    if section.cache:
        facts = {
            "report": asdict(datasets.report),
            "train_places": datasets.train_places,
            "eval_examples": [example_to_json(example) for example in datasets.eval_examples],
        }
        write_entry(key, {"train": datasets.train, "eval": datasets.eval}, facts)
    return datasets
