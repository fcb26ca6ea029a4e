"""From rows, a goal and a card to the recipe that `gemma-tune init` writes."""

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gemma_tune.data.look.glance import RenderedRows
from gemma_tune.data.look.recognise import GOALS, Goal, Reading
from gemma_tune.errors import EngineError, ModelError
from gemma_tune.machine.cards import CARDS, Card
from gemma_tune.models.catalogue import TINY
from gemma_tune.models.resolve import resolve_model
from gemma_tune.planning.propose import Proposal, RowFacts, choose_model, models_for, propose
from gemma_tune.text import format_seconds, in_shell

# A card that is free in notebooks, for who has none.
_FREE_CARD = "t4"


@dataclass(frozen=True)
class NewRecipe:
    """What is known before a model is chosen."""

    source: str
    reading: Reading
    rows: RenderedRows
    card: Card | None  # None for a processor
    given: Mapping[str, Any]  # settings of the data section that the user gave

    @functools.cached_property
    def propose(self) -> Callable[[str], Proposal | None]:
        """What proposes a recipe for a model; rows are measured once for each tokenizer that is here."""
        return functools.cache(lambda model: propose(model, self._facts(_tokenizer_of(model)), card=self.card))

    @functools.cached_property
    def _facts(self) -> Callable[[Path | None], RowFacts]:
        def measure(tokenizer: Path | None) -> RowFacts:
            lengths = self.rows.num_tokens(tokenizer)
            reading, num_rows = self.reading, self.rows.num_rows
            return RowFacts(self.source, reading.template, reading.columns, num_rows, lengths, self.given)

        return functools.cache(measure)

    def require(self, model: str) -> Proposal:
        """Return the recipe for this model; raises where it does not fit the goal or the card."""
        require_kind(model, goal=self.reading.goal)
        proposal = self.propose(model)
        if proposal is None:
            assert self.card is not None
            raise EngineError(
                f"{model} does not fit on {self.card.name}, not even one row at a time, unless most rows are left out",
                hint="a smaller one is proposed without --model",
            )
        return proposal

    def all(self) -> list[Proposal]:
        """Return a recipe for each model that fits, the largest first."""
        names = models_for(self.card, chat=self.reading.goal == "chat")
        proposals = [found for name in names if (found := self.propose(name)) is not None]
        if not proposals:
            assert self.card is not None
            raise EngineError(
                f"no Gemma fits on {self.card.name} with these rows",
                hint="--gpu none trains the embedded model on a processor",
            )
        return proposals

    def header(self, proposal: Proposal, *, output: Path) -> dict[str, str]:
        """The comments at the top, as shipped recipes have them."""
        plan = proposal.plan
        header = {"Goal": f"{GOALS[self.reading.goal].about}, on the rows of {self.source}."}
        if plan is None:
            header["Hardware"] = "a processor; nothing was planned for a card."
            expect = "nothing of use: gemma-tiny is a toy." if proposal.model == TINY else "not measured."
        else:
            assert plan.card is not None
            header["Hardware"] = (
                f"{plan.card.name}. Counted: {plan.need_bytes / 1e9:.1f} GB ± {plan.uncertainty_bytes / 1e9:.1f} of "
                f"the {plan.card.usable_bytes / 1e9:.1f} GB it can use."
            )
            seconds = plan.schedule.seconds
            expect = f"{plan.schedule.steps or 0:,} steps" if plan.schedule.steps else "as many steps as there are rows"
            expect += f", about {format_seconds(seconds)}, counted: half or twice that is possible." if seconds else "."
        header |= {"Command": f"gemma-tune train {in_shell(output)}", "Expect": expect}
        row = resolve_model(proposal.model).model
        if row is not None:
            header["Licence"] = f"{row.licence} for the model."
            if row.is_gated:
                header["Licence"] += f" Accept it at https://huggingface.co/{row.hub_id}, then `hf auth login`."
        return header

    def advise(self, proposal: Proposal, *, output: Path) -> tuple[str, str] | None:
        """What a recipe for the toy model is good for, and the command for a model that learns from the rows."""
        if proposal.model != TINY:
            return None
        card = CARDS[_FREE_CARD]
        on_card = replace(self, card=card)
        flags = [f"--column {in_shell(f'{field}={column}')}" for field, column in self.reading.columns.items()]
        told = ["gemma-tune init", in_shell(self.source), "--goal", self.reading.goal, *flags, "--gpu", _FREE_CARD]
        told += [in_shell(f"data.{name}={json.dumps(value)}") for name, value in self.given.items()]
        told += ["-o", in_shell(output.with_stem(f"{output.stem}-{_FREE_CARD}"))]
        about = (
            f"{TINY} is a toy to try the commands with: it learns nothing of use from your rows. On a {card.name}, as "
            f"Colab and Kaggle lend it (notebooks/gemma_tune_colab.ipynb), {choose_model(on_card.all()).model} can be "
            "trained on them:"
        )
        return about, " ".join(told)


def is_tuned(model: str | None) -> bool | None:
    """None: not known, or no matter, as the embedded model knows chat turns without having learned them."""
    row = None if model is None else resolve_model(model).model
    return None if row is None or row.name == TINY else row.is_instruction_tuned


def require_kind(model: str | None, *, goal: Goal) -> None:
    """Refuse a model that does not serve the goal."""
    tuned = is_tuned(model)
    if goal == "chat" and tuned is False:
        raise ModelError(
            f"{model} is a base model and has no chat turns", hint="name an -it model, or use --goal instruct"
        )
    if goal != "chat" and tuned:
        raise ModelError(
            f"{model} has learned chat turns, which --goal {goal} would undo", hint="use --goal chat, or a base model"
        )


def _tokenizer_of(model: str) -> Path | None:
    """Its tokenizer.json, where the model is a directory on this machine."""
    path = Path(resolve_model(model).location) / "tokenizer.json"
    return path if path.is_file() else None
