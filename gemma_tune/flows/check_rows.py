"""What the first rows of a recipe say about it, read as a training reads them. Loads nothing heavy."""

import os
from dataclasses import replace
from itertools import islice

from gemma_tune.data.inputs import Input, Inputs, open_inputs, require_rows
from gemma_tune.data.rows.chat_template import ChatRenderer
from gemma_tune.data.rows.read import read_examples
from gemma_tune.data.sources.source import TINY_WORLD, split_count
from gemma_tune.models.fetch import LocalModel
from gemma_tune.recipe.methods import METHODS
from gemma_tune.recipe.schema import Recipe

MAX_ROWS = 500  # of each source


def check_rows(recipe: Recipe, base: LocalModel) -> tuple[str, ...]:
    """Read the first rows of every source; those of the hub, and of files that are not here, are not looked at.

    Returns:
        What is to be said of them, a line each, in the words of a training's report.

    Raises:
        DataError: the rows cannot be read, do not fit the template, or too many of them cannot be used.
    """
    named = (recipe.data.source, recipe.data.eval_source, *(part.source for part in recipe.data.mix))
    if not all(_is_here(name) for name in named if name is not None):
        return ()
    inputs = open_inputs(recipe.data, prefers_chat=base.knows_chat_turns)
    require_rows(inputs, METHODS[recipe.method.name])
    chat = ChatRenderer.from_directory(base.directory) if inputs.needs_chat else None
    if inputs.needs_chat and chat is None:
        return ()
    section = recipe.data
    if any(next(islice(item.source.rows(), MAX_ROWS, None), None) for item in inputs.all):
        # What needs all rows is left to the training.
        clean = section.clean.model_copy(update={"drop_duplicates": "off"})
        section = section.model_copy(update={"clean": clean, "max_bad_fraction": 1.0})
    heads = Inputs(tuple(map(_head, inputs.train)), inputs.eval and _head(inputs.eval))
    report = read_examples(section, heads, chat=chat).report
    return (*report.bad_lines(), *report.notes)


def _is_here(name: str) -> bool:
    path = os.path.expanduser(split_count(name)[0])
    return path == TINY_WORLD or os.path.isfile(path)


def _head(item: Input) -> Input:
    return replace(item, source=item.source.head(MAX_ROWS))
