"""Eval rows answered by the model, before and after training (LEAF)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from gemma_tune.data.rows.render import Example
from gemma_tune.evaluation.answer_metrics import is_exact_match
from gemma_tune.inference.answer_settings import AnswerSettings
from gemma_tune.inference.generate import Completion, TransformersModel
from gemma_tune.recipe.schema import EvaluationSection
from gemma_tune.training.parts import TrainerParts


@dataclass(frozen=True)
class Answer:
    """One eval row with the answers of the base and of the tuned model."""

    where: str
    category: str | None
    question: str
    expected: str
    before: str
    after: str
    before_matches: bool
    after_matches: bool
    after_stopped: bool


def answer_rows(parts: TrainerParts, *, title: str, is_sharded: bool = False) -> list[Completion]:
    """Answer the last turn of the chosen eval rows greedily; a collective call. The model is left in generation mode.

    Args:
        title: of the stage that is reported.
        is_sharded: the model computes in all processes or in none, so that each answers every row.
    """
    recipe, encoder, world, reporter = parts.recipe, parts.encoder, parts.context.world, parts.context.reporter
    examples = choose_examples(parts.datasets.eval_examples, section=recipe.evaluation)
    if not examples:
        return []
    reporter.stage(title)
    times = 1 if is_sharded else world.size
    parts.engine.set_mode(parts.loaded, training=False)
    asked = examples if is_sharded else world.shard(examples)
    settings = AnswerSettings(
        max_new_tokens=recipe.evaluation.max_new_tokens,
        batch_size=recipe.evaluation.batch_size or recipe.training.batch_size,
    )
    answers = TransformersModel(parts.loaded.model, parts.tokenizer, encoder.stop_token_ids).complete(
        [encoder.encode_prompt(each.prompt_segments) for each in asked],
        settings,
        on_progress=lambda done, _: reporter.progress(
            "eval rows answered", min(done * times, len(examples)), len(examples)
        ),
    )
    return answers if is_sharded else world.gather_shards(answers)


def pair_answers(
    examples: Sequence[Example], before: Sequence[Completion], after: Sequence[Completion]
) -> list[Answer]:
    """Put the answers of both models next to the expected ones."""
    return [
        Answer(
            where=example.where,
            category=example.category,
            question=example.question,
            expected=example.response,
            before=old.text,
            after=new.text,
            before_matches=is_exact_match(old.text, example.response),
            after_matches=is_exact_match(new.text, example.response),
            after_stopped=new.stopped,
        )
        for example, old, new in zip(examples, before, after, strict=True)
    ]


def choose_examples(examples: Sequence[Example], *, section: EvaluationSection) -> Sequence[Example]:
    """The eval rows that are answered: for the exact match, or only those that are printed."""
    if section.exact_match:
        return examples[: section.max_exact_match_rows]
    return spread_over_categories(examples, count=section.num_questions)


class HasCategory(Protocol):
    @property
    def category(self) -> str | None: ...


Row = TypeVar("Row", bound=HasCategory)


def spread_over_categories(rows: Sequence[Row], *, count: int) -> list[Row]:
    """The first `count` rows that differ in category, then the first of the others, as many as there are."""
    first_of = {row.category: index for index, row in reversed(list(enumerate(rows)))}
    leading = sorted(first_of.values())
    others = (index for index in range(len(rows)) if index not in set(leading))
    return [rows[index] for index in [*leading, *others][:count]]
