"""`gemma-tune generate`."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from gemma_tune.cli.answering import Base, OutputFile, TargetName, TemplateName, note_base, with_answer_settings
from gemma_tune.cli.arguments import AsJson
from gemma_tune.errors import DataError
from gemma_tune.inference.answer_settings import AnswerSettings
from gemma_tune.terminal import Terminal, TerminalReporter

if TYPE_CHECKING:
    from gemma_tune.inference.ask import Answered


@with_answer_settings()
def generate(
    target: TargetName,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt",
            "-p",
            help="A question; may be given several times. Without it and without --file, stdin is the question.",
        ),
    ] = None,
    context: Annotated[str, typer.Option(help="Text the question is about, where the template has a context.")] = "",
    file: Annotated[
        str | None,
        typer.Option(
            "--file",
            "-f",
            help="Questions: rows with the template's fields or a column prompt (.jsonl, .json, .csv, .parquet), a .txt"
            " with one a line, or - for stdin.",
        ),
    ] = None,
    output: OutputFile = None,
    template: TemplateName = None,
    base: Base = False,
    *,
    settings: AnswerSettings,
    as_json: AsJson = False,
) -> None:
    """Ask a model, with the template it was trained with. A single answer appears as it is written."""
    from gemma_tune.inference.ask import Listener, answer_questions, open_answer_file
    from gemma_tune.inference.questions import questions_of, read_questions, read_stdin_question
    from gemma_tune.inference.target import find_target
    from gemma_tune.machine.quiet import libraries_to

    terminal = Terminal()
    if prompt and file is not None:
        raise DataError("give either --prompt or --file", hint='for example: --prompt "What does a baker make?"')
    with libraries_to(None):
        found = find_target(target, template=template, without_adapter=base)
        note_base(terminal, found)
        if file is not None:
            questions = read_questions(found.template, file)
        else:
            questions = questions_of(found.template, prompt or [read_stdin_question()], context=context)
        is_single = len(questions.rows) == 1
        streams = is_single and settings.sampling.num_beams == 1 and not as_json and output is None

        def show(answers: list[Answered]) -> None:
            if output is None:
                terminal.require_reader()
            for answer in answers:
                if as_json:
                    terminal.json_line(answer.to_json())
                elif output is None:
                    terminal.plain("" if streams else answer.completion.text)

        def show_progress(done: int, total: int) -> None:
            if not is_single:
                reporter.progress("questions answered", done, total)

        with TerminalReporter(terminal) as reporter, contextlib.ExitStack() as stack:
            answer_file = None
            if output is not None:
                answer_file = open_answer_file(output, found, questions, settings=settings)
                stack.enter_context(answer_file)
                if answer_file.num_found:
                    reporter.detail(f"{answer_file.num_found:,} answers were made before; resuming after them")
            speed = answer_questions(
                found,
                questions,
                settings=settings,
                file=answer_file,
                listener=Listener(
                    on_answers=show,
                    on_progress=show_progress,
                    on_text=(lambda text: terminal.plain(text, end="")) if streams else None,
                ),
            )
    if output is not None:
        terminal.note(f"{escape(str(output))}: {len(questions.rows):,} answers")
    terminal.note(str(speed))
