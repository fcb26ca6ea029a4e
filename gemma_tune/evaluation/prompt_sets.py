"""What models are compared on: the shipped prompt sets, or a file of the user's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gemma_tune.data.sources.source import open_source, read_whole
from gemma_tune.errors import DataError
from gemma_tune.evaluation.answer_rules import check_rules
from gemma_tune.identity import json_sha256
from gemma_tune.text import suggestion

_FOLDER = Path(__file__).with_name("prompts")
PROMPT_SETS = ("factuality", "instruction_following", "safety", "creativity")


@dataclass(frozen=True)
class Prompt:
    """One question."""

    id: str  # unlike that of every other prompt of a comparison
    group: str  # the set or category that it is counted under
    text: str
    # what an answer has to keep, see `answer_rules.RULES`; empty where only a judge can say
    rules: Mapping[str, Any] = field(default_factory=dict)
    reference: str | None = None  # a right answer, for the judge to see


@dataclass(frozen=True)
class Prompts:
    """All prompts of a comparison, and where they come from."""

    label: str
    items: tuple[Prompt, ...]

    @property
    def sha256(self) -> str:
        """Of what a model is asked and what its answer is held against."""
        return json_sha256([asdict(item) for item in self.items])

    def first(self, count: int | None) -> Prompts:
        """The first prompts of each group, or all of them."""
        if count is None:
            return self
        seen: dict[str, int] = {}
        kept = []
        for item in self.items:
            seen[item.group] = seen.get(item.group, 0) + 1
            if seen[item.group] <= count:
                kept.append(item)
        return Prompts(self.label, tuple(kept))


def load_prompt_sets(names: Sequence[str]) -> Prompts:
    """Shipped sets, by name.

    Raises:
        DataError: there is no set of that name.
    """
    items: list[Prompt] = []
    for name in dict.fromkeys(names):
        if name not in PROMPT_SETS:
            raise DataError(
                f"there is no prompt set {name!r}{suggestion(name, PROMPT_SETS)}",
                hint=f"sets: {', '.join(PROMPT_SETS)}; your own prompts with --file",
            )
        items += _read(str(_FOLDER / f"{name}.jsonl"), group=name)
    return Prompts(", ".join(dict.fromkeys(names)), tuple(items))


def load_prompt_file(file: str) -> Prompts:
    """The rows of a file: `prompt`, and if they have them `id`, `category`, `rules`, `reference`.

    Raises:
        DataError: the file cannot be read, a row has no prompt or wrong rules, or two rows have the same id.
    """
    items = _read(file, group=Path(file).stem)
    return Prompts(Path(file).name, tuple(items))


def _read(file: str, *, group: str) -> list[Prompt]:
    items: dict[str, Prompt] = {}
    for number, row in enumerate(read_whole(open_source(file)), start=1):
        where = f"{Path(file).name}, row {number}"
        fields = {name: value for name, value in row.fields.items() if value is not None}
        text = fields.get("prompt")
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{where} has no prompt", hint='a row needs a text in the field "prompt"')
        prompt = Prompt(
            id=str(fields.get("id", f"{group}-{number:02}")),
            group=str(fields.get("category", group)),
            text=text,
            rules=check_rules(fields.get("rules", {}), where=where),
            reference=str(fields["reference"]) if "reference" in fields else None,
        )
        if prompt.id in items:
            raise DataError(
                f"{where} has the id {prompt.id!r}, as an earlier row has", hint="give every row its own id"
            )
        items[prompt.id] = prompt
    return list(items.values())
