"""Write the model card into an exported directory: what the run and its data template say, handed to `reporting`."""

from pathlib import Path

from ruamel.yaml.scalarstring import LiteralScalarString

from gemma_tune.data.rows.chat_template import ChatRenderer
from gemma_tune.data.rows.render import Example, render_example
from gemma_tune.data.rows.segments import RowError
from gemma_tune.data.rows.template import DataTemplate, load_template
from gemma_tune.data.sources.items import SourceRow
from gemma_tune.disk import output_file
from gemma_tune.errors import ExportError
from gemma_tune.exporting.export_record import ExportRecord, read_record, stored_result
from gemma_tune.exporting.formats.registry import FORMATS
from gemma_tune.models.fetch import LocalModel
from gemma_tune.reporting.card import CARD_FILE, CardExport, CardPrompt, build_model_card
from gemma_tune.runs.adapter_dir import trained_template
from gemma_tune.runs.layout import RunDir
from gemma_tune.yaml_io import dump_yaml


def write_model_card(directory: Path, run: RunDir, *, base: LocalModel) -> Path:
    """Write README.md next to the files of a finished export of a run on `base`, with the verdict of its check, if any.

    Raises:
        ExportError: there is one already, or it cannot be written.
        GemmaTuneError: the export has no export.json, or the run lacks a file that the card reports.
    """
    record = read_record(directory)
    export = CardExport(
        format=FORMATS.find(record.format, error=ExportError).card,
        base=base,
        prompt=describe_prompt(run),
        files=sorted(path.name for path in directory.iterdir()),
        notes=record.facts.get("notes", ()),
        checks=_checks(record),
    )
    text = build_model_card(run, export)
    path = directory / CARD_FILE
    with output_file(path) as partial_file:
        partial_file.write_text(text, encoding="utf-8", newline="\n")
    return path


def _checks(record: ExportRecord) -> list[str]:
    result, shared = stored_result(record), record.verification
    if result is None or shared is None:
        return []
    lines = [f"{'passed' if result.passed else 'not passed'}, compared with {result.against}: {result.reason}"]
    if result.distance is not None:
        lines += [
            f"at {shared['num_positions']:,} positions of {shared['origin']} the most likely token is the same in "
            f"{result.distance.top1_agreement:.2%}; mean KL {result.distance.mean_kl:.2g} nats, largest difference of "
            f"a logit {result.distance.max_abs:.2g}",
            f"token ids are equal for {result.texts_equal} of {shared['num_texts']} strings, greedy answers for "
            f"{result.answers_equal} of {shared['num_prompts']} prompts",
        ]
    return lines


def describe_prompt(run: RunDir) -> CardPrompt:
    """Return the data template of a run, and its own example as the model sees it; never one of the run's rows."""
    from gemma_tune.models.tokenizer import load_tokenizer

    template = load_template(trained_template(run))
    chat = ChatRenderer.from_tokenizer(load_tokenizer(run.adapter)) if template.needs_chat else None
    example = _example(template, chat)
    return CardPrompt(
        template=_template_yaml(template),
        in_chat_turns=chat is not None,
        example=example.prompt_text,
        response=example.response,
    )


def _example(template: DataTemplate, chat: ChatRenderer | None) -> Example:
    """Render the template's own example; where its form is wrong, the names of its fields."""
    question, answer = {"role": "user", "content": "(question)"}, {"role": "assistant", "content": "(answer)"}
    named: dict[str, object] = {name: f"({name})" for name in template.fields}
    named |= {column: [question, answer] for column in template.conversation[:1]}
    if template.facts.answers:
        named |= {template.conversation[0]: [question], "chosen": "(answer)", "rejected": "(other answer)"}
    try:
        return render_example(template, SourceRow(dict(template.example), "the example"), chat=chat)
    except RowError:
        return render_example(template, SourceRow(named, "the fields"), chat=chat)


def _template_yaml(template: DataTemplate) -> str:
    """Return what decides the prompt: neither the comments of the file nor its example, which may be anybody's."""
    values: dict[str, object] = {"kind": template.kind}
    if not template.needs_chat:
        values |= {"prompt": _block(template.prompt), "response": _block(template.response)}
    elif template.conversation:
        values["conversation"] = list(template.conversation)
    else:
        values["messages"] = [{"role": m.role, "content": _block(m.content)} for m in template.messages]
    return dump_yaml(values, styled=True)


def _block(text: str) -> str:
    return LiteralScalarString(text) if "\n" in text else text
