"""validate reads the first rows as a training would and says the same of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gemma_tune.data.open import load_data, open_data
from gemma_tune.errors import DataError
from gemma_tune.flows import check_rows as module
from gemma_tune.flows.check_rows import check_rows
from gemma_tune.models.fetch import fetch_model
from gemma_tune.recipe.schema import DataSection, Recipe


def _recipe(folder: Path, rows: list[Any], **settings: Any) -> Recipe:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Recipe(data=DataSection(**{"source": str(path), "max_seq_tokens": 128, "cache": False} | settings))


def _row(number: int, **more: Any) -> dict[str, Any]:
    return {"instruction": f"How many are {number}?", "response": f"{number} it is.", "ticket": number, **more}


def test_validate_says_of_rows_what_a_training_says(tmp_path: Path) -> None:
    rows = [_row(number) for number in range(30)] + [_row(30, tools=[{"name": "f"}])]
    recipe = _recipe(tmp_path, rows)
    said = list(check_rows(recipe, fetch_model("gemma-tiny")))
    assert said == [
        "1 row left out:",
        "  rows.jsonl:31: tools cannot be rendered; data.drop_fields: [tools] trains the row without",
        "1 column is not used: ticket (in 31 rows)",
        "refused for what cannot be rendered: tools in 1 row; data.drop_fields: [tools] trains such rows without",
    ]
    base, inputs = open_data(recipe)
    lines = load_data(recipe, base=base, inputs=inputs)[2].report.lines()
    assert [line for line in lines if line in said] == said


def test_rows_that_no_training_takes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="3 of 3 rows of rows"):
        check_rows(_recipe(tmp_path, [_row(number, tools=["f"]) for number in range(3)]), fetch_model("gemma-tiny"))


def test_the_head_of_a_long_source_does_not_decide_for_all_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_ROWS", 4)
    rows = [_row(number, tools=["f"]) for number in range(3)] + [_row(number) for number in range(3, 20)]
    assert check_rows(_recipe(tmp_path, rows, eval_fraction=0.0), fetch_model("gemma-tiny"))[0] == "3 rows left out:"


def test_files_that_are_not_here_are_not_looked_at(tmp_path: Path) -> None:
    recipe = Recipe(data=DataSection(source=str(tmp_path / "gone.jsonl"), max_seq_tokens=8))
    assert check_rows(recipe, fetch_model("gemma-tiny")) == ()
