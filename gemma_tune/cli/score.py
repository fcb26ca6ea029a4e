"""`gemma-tune score`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

import typer

from gemma_tune.cli.answering import Base, TargetName, TemplateName, note_base
from gemma_tune.cli.arguments import AsJson
from gemma_tune.errors import DataError
from gemma_tune.terminal import Terminal, TerminalReporter

if TYPE_CHECKING:
    from gemma_tune.inference.score import TextScore

_COLUMNS = ("tokens", "log-likelihood", "perplexity")


def score(
    target: TargetName,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="A question.")] = None,
    response: Annotated[str | None, typer.Option("--response", "-r", help="An answer to it.")] = None,
    context: Annotated[str, typer.Option(help="Text the question is about, where the template has a context.")] = "",
    file: Annotated[
        str | None,
        typer.Option(
            "--file", "-f", help="Rows with questions and answers, as for training (.jsonl, .json, .csv, .parquet)."
        ),
    ] = None,
    template: TemplateName = None,
    base: Base = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per forward pass.")] = 8,
    as_json: AsJson = False,
) -> None:
    """Say how likely a model finds answers: log-likelihood and perplexity, a single one token by token."""
    from gemma_tune.data.sources.source import open_source, read_whole
    from gemma_tune.inference.questions import questions_of
    from gemma_tune.inference.target import find_target
    from gemma_tune.machine.quiet import libraries_to

    terminal = Terminal()
    if (file is None) == (prompt is None and response is None) or (prompt is None) != (response is None):
        raise DataError("give either --file, or --prompt with --response", hint='-p "2 + 2?" -r "4" for example')
    with libraries_to(None):
        found = find_target(target, template=template, without_adapter=base)
        note_base(terminal, found)
        rows = read_whole(open_source(file)) if file is not None else []

        from gemma_tune.inference.load_target import load_target
        from gemma_tune.inference.score import TextScore, row_of_example, row_of_response, score_rows

        loaded = load_target(found)
        if prompt is not None and response is not None:
            (question,) = questions_of(found.template, [prompt], context=context).rows
            encoded = [row_of_response(loaded, question, response)]
        else:
            encoded = [row_of_example(loaded, row) for row in rows]
        with TerminalReporter(terminal) as reporter:
            scores = score_rows(
                loaded,
                encoded,
                batch_size=batch_size,
                on_progress=lambda done, total: reporter.progress("rows scored", done, total) if total > 1 else None,
            )
    if file is None:
        _show_tokens(terminal, scores[0], as_json=as_json)
        return
    if as_json:
        for row, scored in zip(rows, scores, strict=True):
            terminal.json_line({"where": row.where, **scored.to_json()})
    else:
        lines = [*zip((row.where for row in rows), scores, strict=True), ("all", TextScore.joined(scores))]
        table = [(where, *_cells(scored)) for where, scored in lines]
        terminal.table(("row", *_COLUMNS), table, right=(1, 2, 3))


def _show_tokens(terminal: Terminal, scored: TextScore, *, as_json: bool) -> None:
    if as_json:
        tokens = [{"id": each.token_id, "text": each.text, "log_prob": each.log_prob} for each in scored.tokens]
        terminal.json({**scored.to_json(), "tokens": tokens})
        return
    rows = [(repr(each.text)[1:-1], f"{each.log_prob:.3f}", f"{math.exp(each.log_prob):.1%}") for each in scored.tokens]
    terminal.table(("token", "log-probability", "probability"), rows, right=(1, 2))
    count, log_likelihood, perplexity = _cells(scored)
    terminal.result(f"\nlog-likelihood {log_likelihood} nats over {count} tokens · perplexity {perplexity}")


def _cells(scored: TextScore) -> tuple[str, str, str]:
    return f"{len(scored.tokens):,}", f"{scored.log_likelihood:,.3f}", f"{scored.perplexity:,.3f}"
