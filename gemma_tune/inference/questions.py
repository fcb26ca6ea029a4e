"""What a model is asked: rows for its data template, from single questions, a file, or stdin."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_tune.data.rows.render import question_fields
from gemma_tune.data.rows.template import DataTemplate
from gemma_tune.data.sources.source import open_source, read_whole
from gemma_tune.errors import DataError
from gemma_tune.identity import text_sha256

STDIN = "-"
# A column that holds a bare question, whatever the data template calls its own field.
PROMPT_COLUMN = "prompt"
_TEXT_SUFFIXES = (".txt", ".text")


@dataclass(frozen=True)
class Questions:
    """Rows to ask, in order."""

    # the fields that the data template reads, and whatever else a row of the file holds
    rows: tuple[dict[str, Any], ...]
    sha256: str  # of the file, or of the rows


def questions_of(template: DataTemplate, prompts: Sequence[str], *, context: str = "") -> Questions:
    """A row for every question, each with the same context.

    Raises:
        DataError: the template has no field for a question, or none for a context.
    """
    rows = [question_fields(template, prompt) for prompt in prompts]
    if context:
        if "context" not in template.fields:
            raise DataError(
                f"the data template {template.name} has no context", hint=f"its fields: {', '.join(template.fields)}"
            )
        rows = [{**row, "context": context} for row in rows]
    return _hashed(rows)


def read_questions(template: DataTemplate, file: str) -> Questions:
    """The rows of a file.

    Args:
        file: rows (.jsonl, .json, .csv, .parquet…) with the template's fields or a column `prompt`; a .txt with a
            question a line; `-` for the same on stdin, where lines that start with { are rows.

    Raises:
        DataError: the file cannot be read, holds nothing, or a line of it is not a row.
    """
    if file == STDIN:
        return _hashed(_rows_of_lines(template, sys.stdin.read(), name="stdin"))
    path = Path(file).expanduser()
    if path.suffix.lower() in _TEXT_SUFFIXES:
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
            raise DataError(
                f"cannot read {path}: {reason}", hint="give a text file in UTF-8, a question a line"
            ) from None
        return _hashed([question_fields(template, line) for line in _lines(text, name=path.name)])
    source = open_source(file)
    return Questions(tuple(_row(template, row.fields) for row in read_whole(source)), source.sha256)


def read_stdin_question() -> str:
    """All of stdin as one question.

    Raises:
        DataError: it is empty, or a terminal, at which nobody would know that we wait.
    """
    text = "" if sys.stdin.isatty() else sys.stdin.read().strip()
    if not text:
        raise DataError("nothing is asked", hint='give --prompt "…" or --file FILE, or write the question to stdin')
    return text


def _rows_of_lines(template: DataTemplate, text: str, *, name: str) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(_lines(text, name=name), start=1):
        if not line.lstrip().startswith("{"):
            rows.append(question_fields(template, line))
            continue
        try:
            rows.append(_row(template, json.loads(line)))
        except json.JSONDecodeError as error:
            raise DataError(f"{name}, question {number}: broken JSON: {error.msg}") from None
    return rows


def _lines(text: str, *, name: str) -> list[str]:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise DataError(f"{name} is empty", hint="it needs at least one line")
    return lines


def _row(template: DataTemplate, fields: dict[str, Any]) -> dict[str, Any]:
    """The row; a bare `prompt` becomes the template's own question where the row has nothing else that it reads."""
    prompt = fields.get(PROMPT_COLUMN)
    reads = {*template.fields, *template.conversation}
    if isinstance(prompt, str) and not reads & set(fields):
        return {**fields, **question_fields(template, prompt)}
    return dict(fields)


def _hashed(rows: Sequence[dict[str, Any]]) -> Questions:
    text = json.dumps(list(rows), sort_keys=True, ensure_ascii=False)
    return Questions(tuple(rows), text_sha256(text))
