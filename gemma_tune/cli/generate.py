"""`gemma-tune generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from gemma_tune.cli.arguments import AsJson
from gemma_tune.cli.console import Terminal, TerminalReporter
from gemma_tune.errors import DataError


def generate(
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET", help="A run, an adapter, a merged directory, or a model name.", show_default=False
        ),
    ],
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", help="A question; may be given several times.", show_default=False),
    ] = None,
    context: Annotated[str, typer.Option(help="Text the question is about, where the template has a context.")] = "",
    file: Annotated[
        Path | None,
        typer.Option(
            "--file", "-f", help="Rows with the template's fields (.jsonl, .json, .csv, .parquet).", show_default=False
        ),
    ] = None,
    template: Annotated[
        str | None, typer.Option(help="Data template; a run brings its own.", show_default=False)
    ] = None,
    base: Annotated[bool, typer.Option("--base", help="Ask the base model of a run, without its adapter.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions per forward pass.")] = 8,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy: always the likeliest token.")] = 0.0,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Sample among the k likeliest tokens.", show_default=False)
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Sample among the likeliest tokens of this mass.", show_default=False),
    ] = None,
    repetition_penalty: Annotated[float, typer.Option(min=0.1, help="Above 1 repeats less.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Ask a model, with the template it was trained with; one answer a line with --json."""
    from gemma_tune.engines.quiet import libraries_to
    from gemma_tune.inference.target import find_target

    terminal = Terminal()
    if bool(prompt) == (file is not None):
        raise DataError("give either --prompt or --file", hint='for example: --prompt "What does a baker make?"')
    with libraries_to(None):
        found = find_target(target, template=template, without_adapter=base)
        rows = _rows(found.template, prompt or (), context=context, file=file)

        from gemma_tune.data.render import render_prompt
        from gemma_tune.inference.generate import Sampling, generate_completions
        from gemma_tune.inference.load import load_target

        loaded = load_target(found)
        prompts = [loaded.encoder.encode_prompt(render_prompt(loaded.template, row, chat=loaded.chat)) for row in rows]
        with TerminalReporter(terminal) as reporter:
            completions = generate_completions(
                loaded.model,
                loaded.tokenizer,
                prompts,
                stop_token_ids=loaded.encoder.stop_token_ids,
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                sampling=Sampling(
                    temperature, top_k=top_k, top_p=top_p, repetition_penalty=repetition_penalty, seed=seed
                ),
                on_progress=lambda done, total: (
                    reporter.progress("questions answered", done, total) if total > 1 else None
                ),
            )
    for row, completion in zip(rows, completions, strict=True):
        if as_json:
            terminal.json_line(
                {**row, "answer": completion.text, "num_tokens": completion.num_tokens, "stopped": completion.stopped}
            )
        else:
            terminal.plain(completion.text)


def _rows(template: Any, prompts: Any, *, context: str, file: Path | None) -> list[dict[str, Any]]:
    """The template's fields for every question."""
    from gemma_tune.data.render import question_fields

    if file is not None:
        from gemma_tune.data.sources import open_source, read_whole

        return [dict(row.fields) for row in read_whole(open_source(str(file)))]
    rows = [question_fields(template, prompt) for prompt in prompts]
    if context:
        if "context" not in template.fields:
            raise DataError(
                f"the data template {template.name} has no context", hint=f"its fields: {', '.join(template.fields)}"
            )
        rows = [{**row, "context": context} for row in rows]
    return rows
