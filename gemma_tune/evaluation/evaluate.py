"""Is the tuned model better than its base, and did it forget? Loss, answers and format of both on the same rows."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from gemma_tune.data.encode.arrays import EncodedRows
from gemma_tune.disk import to_json_lines, write_text
from gemma_tune.errors import DataError
from gemma_tune.evaluation.figures import RowAnswer, RowResult, groups_of, measure_answer
from gemma_tune.evaluation.general import GeneralSet, encode_general, general_set
from gemma_tune.evaluation.rows import EvalRows, FoundRows, held_out_rows, rows_of_source
from gemma_tune.identity import files_sha256, installed_version
from gemma_tune.inference.answer_settings import AnswerSettings
from gemma_tune.inference.target import Target, find_target
from gemma_tune.recipe.load import load_recipe
from gemma_tune.runs.evaluation import SIDES, Evaluation, Side, read_evaluation, write_evaluation
from gemma_tune.runs.layout import RunDir
from gemma_tune.runs.lock import read_lock
from gemma_tune.runs.reporter import Reporter
from gemma_tune.text import suggestion, utc_now

if TYPE_CHECKING:
    from gemma_tune.inference.load_target import LoadedTarget


@dataclass(frozen=True)
class EvaluateSettings:
    """What is measured."""

    sides: tuple[Side, ...] = SIDES  # which models: `base`, `tuned` or both
    source: str | None = None  # rows of a file instead of the held-out ones
    num_rows: int | None = None  # the first N rows; None takes all
    max_new_tokens: int | None = None  # max_new_tokens, batch_size: None takes the recipe's
    batch_size: int | None = None
    expects_json: bool = False  # whether an answer has to be JSON


def parse_sides(text: str) -> tuple[Side, ...]:
    """`base,tuned` in any order.

    Raises:
        DataError: another name, or none.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in SIDES:
            raise DataError(f"cannot evaluate {name!r}{suggestion(name, SIDES)}", hint="give base, tuned or both")
    if not names:
        raise DataError("nothing to evaluate", hint="give base, tuned or both")
    return tuple(side for side in SIDES if side in names)


def evaluate_run(
    run: RunDir, *, settings: EvaluateSettings, reporter: Reporter, again: bool = False
) -> tuple[Evaluation, bool]:
    """Evaluate a finished run and keep the figures in it.

    Returns:
        The evaluation, and whether it was made now: an earlier one counts while nothing that decides it has changed,
        unless `again`.

    Raises:
        GemmaTuneError: the run has no adapter, or its base or rows are gone or changed.
    """
    recipe = load_recipe(run.resolved_recipe).recipe
    target = find_target(str(run.path))
    assert isinstance(target, Target)  # a run directory
    if settings.source is not None:
        rows = rows_of_source(settings.source, template=target.template, section=recipe.data)
    else:
        rows = held_out_rows(recipe.data, base=target.base, trained_sha256=read_lock(run)["data"]["sha256"])
    general = general_set(target.base)
    max_new_tokens = settings.max_new_tokens or recipe.evaluation.max_new_tokens
    key = _key(run, target, rows=rows, general=general, settings=settings) | {"max_new_tokens": max_new_tokens}
    found = None if again else read_evaluation(run)
    if found is not None and found.key == key:
        return found, False

    from gemma_tune.inference.load_target import load_target

    reporter.stage("model")
    loaded = load_target(target)
    eval_rows = rows.load(loaded.tokenizer, loaded.encoder).first(settings.num_rows)
    reporter.detail(f"{len(eval_rows.examples):,} rows of {rows.label}")
    texts = encode_general(general.texts, loaded.encoder)
    batch_size = settings.batch_size or recipe.evaluation.batch_size or recipe.training.batch_size
    results, general_results = {}, {}
    for side in settings.sides:
        reporter.stage(side)
        with loaded.model.disable_adapter() if side == "base" else contextlib.nullcontext():
            losses = _losses(loaded, eval_rows.encoded, batch_size=batch_size, what="rows", reporter=reporter)
            answers = _answers(
                loaded,
                eval_rows,
                AnswerSettings(max_new_tokens=max_new_tokens, batch_size=batch_size),
                expects_json=settings.expects_json,
                reporter=reporter,
            )
            general_losses = _losses(loaded, texts, batch_size=batch_size, what="texts", reporter=reporter)
        results[side] = [RowResult(*loss, answer) for loss, answer in zip(losses, answers, strict=True)]
        general_results[side] = [RowResult(*loss, None) for loss in general_losses]
    evaluation = Evaluation(
        made=utc_now(),
        key=key,
        rows_label=rows.label,
        rows=groups_of(results, [example.category for example in eval_rows.examples]),
        general=groups_of(general_results, general.kinds),
        general_label=general.label,
    )
    _write_rows(run, eval_rows, results)
    write_evaluation(run, evaluation)
    return evaluation, True


def _key(
    run: RunDir, target: Target, *, rows: FoundRows, general: GeneralSet, settings: EvaluateSettings
) -> dict[str, Any]:
    """Everything that decides the figures. The batch size is not among it: it moves a loss in its last digits."""
    return {
        "adapter": files_sha256(sorted(run.adapter.glob("adapter_*"))),
        "base": read_lock(run)["base"],
        "template": target.template.sha256,
        "rows": rows.key,
        "general": general.sha256,
        "sides": list(settings.sides),
        "num_rows": settings.num_rows,
        "expects_json": settings.expects_json,
        "packages": {name: installed_version(name) for name in ("gemma-tune", "torch", "transformers")},
    }


def _losses(
    loaded: LoadedTarget, rows: EncodedRows, *, batch_size: int, what: str, reporter: Reporter
) -> list[tuple[float, int]]:
    """Return the summed loss in nats and the supervised tokens of each row."""
    from gemma_tune.inference.score import ScoredRow, score_rows

    scored = score_rows(
        loaded,
        [ScoredRow(*(array.tolist() for array in rows.arrays(index))) for index in range(len(rows))],
        batch_size=batch_size,
        on_progress=lambda done, total: reporter.progress(f"{what} scored", done, total),
    )
    return [(-score.log_likelihood, len(score.tokens)) for score in scored]


def _answers(
    loaded: LoadedTarget, rows: EvalRows, settings: AnswerSettings, *, expects_json: bool, reporter: Reporter
) -> list[RowAnswer]:
    """The last turn of every row answered greedily, and compared with the expected answer."""
    completions = loaded.complete(
        [loaded.encoder.encode_prompt(example.prompt_segments) for example in rows.examples],
        settings,
        on_progress=lambda done, total: reporter.progress("rows answered", done, total),
    )
    return [
        measure_answer(
            example.question,
            completion.text,
            example.response,
            num_tokens=completion.num_tokens,
            stopped=completion.stopped,
            expects_json=expects_json,
        )
        for example, completion in zip(rows.examples, completions, strict=True)
    ]


def _write_rows(run: RunDir, rows: EvalRows, results: Mapping[Side, list[RowResult]]) -> None:
    """Row by row what the figures are made of."""
    lines = []
    for index, example in enumerate(rows.examples):
        row: dict[str, Any] = {
            "where": example.where,
            "category": example.category,
            "question": example.question,
            "expected": example.response,
        }
        for side, of_side in results.items():
            result = of_side[index]
            assert result.answer is not None  # only texts of the forgetting check have none
            row[side] = {**asdict(result.answer), "loss_nats": result.nats, "loss_tokens": result.tokens}
        lines.append(row)
    write_text(run.evaluated_rows, to_json_lines(lines))
