"""A GGUF with its Modelfile, so that Ollama asks it with exactly the prompt that the run was trained with."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from gemma_tune.data.encode.encoder import Encoder
from gemma_tune.data.rows.template import load_template
from gemma_tune.disk import output_file
from gemma_tune.errors import ExportError
from gemma_tune.exporting.export_settings import MergeDtype
from gemma_tune.exporting.export_source import ExportSource
from gemma_tune.exporting.formats import gguf
from gemma_tune.exporting.formats.format import ExportTask, Facts, Format
from gemma_tune.exporting.text_files import licence_notice
from gemma_tune.models.config import read_config
from gemma_tune.recipe.load import load_recipe
from gemma_tune.runs.adapter_dir import trained_template
from gemma_tune.runs.layout import RunDir

if TYPE_CHECKING:
    from gemma_tune.exporting.ollama_template import PromptShape

MODELFILE = "Modelfile"
# How `gemma-tune generate` and the evaluation of a run answer. Ollama's own default would be 0.8 with a penalty of 1.1.
GREEDY: Mapping[str, float] = {"temperature": 0, "repeat_penalty": 1}
# Made when no GGUF is asked for with it: needs no compiler and loses next to nothing.
_DEFAULT_GGUF = next(each for each in gguf.FORMATS if each.name == "gguf-q8_0")


def write_modelfile(
    run: RunDir,
    gguf_file: Path,
    *,
    max_tokens: int,
    licence: str | None = None,
    parameters: Mapping[str, float] = GREEDY,
) -> tuple[str, ...]:
    """Write the Modelfile of a run's GGUF file next to it, and return what a user must know to ask well.

    Args:
        max_tokens: of a context, which the model was made for.

    Raises:
        ExportError: the training template cannot be translated, a Modelfile is there already, or cannot be written.
        GemmaTuneError: the run has no adapter with its tokenizer, template or recipe.
    """
    from gemma_tune.exporting.ollama_template import describe_shape, translate_template
    from gemma_tune.models.tokenizer import load_tokenizer

    section = load_recipe(run.resolved_recipe).recipe.data
    template = load_template(trained_template(run))
    tokenizer = load_tokenizer(run.adapter)
    shape = translate_template(template, tokenizer=tokenizer)
    notes = describe_shape(shape, template)
    if section.control_tokens == "control":
        notes += ("the rows brought control tokens of their own (data.control_tokens: control); so must a prompt.",)
    text = format_modelfile(
        gguf_file.name,
        shape,
        stops=tokenizer.convert_ids_to_tokens(Encoder(tokenizer).stop_token_ids),
        parameters={"num_ctx": min(section.max_seq_tokens, max_tokens), **parameters},
        notes=notes,
        licence=licence,
    )
    path = gguf_file.parent / MODELFILE
    with output_file(path) as partial_file:
        partial_file.write_text(text, encoding="utf-8", newline="\n")
    return notes


def create_command(name: str) -> str:
    """Return `ollama create NAME -f Modelfile`, with a name that Ollama accepts."""
    allowed = re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-._") or "gemma-tuned"
    return f"ollama create {shlex.quote(allowed[:80])} -f {MODELFILE}"


def format_modelfile(
    gguf_name: str,
    shape: PromptShape,
    *,
    stops: Sequence[str],
    parameters: Mapping[str, float],
    notes: Sequence[str] = (),
    licence: str | None = None,
) -> str:
    """Return the text of a Modelfile for a GGUF file that lies next to it.

    Raises:
        ExportError: the file's name or the system text cannot be written in a Modelfile.
    """
    if not gguf_name.isprintable() or '"' in gguf_name or gguf_name != gguf_name.strip() or "/" in gguf_name:
        raise ExportError(
            f"the file name {gguf_name!r} cannot be written in a Modelfile", hint="take letters, digits, . _ and -"
        )
    from gemma_tune.exporting.ollama_template import plain_value

    lines = [f"# {note}" for note in notes]
    lines += [f"FROM ./{gguf_name}", f'TEMPLATE """{shape.to_go()}"""']
    if shape.system:
        lines.append(f'SYSTEM """{plain_value(shape.system, what="the system text of the training template")}"""')
    lines += [f'PARAMETER stop """{plain_value(stop, what="a stop token")}"""' for stop in stops]
    lines += [f"PARAMETER {key} {_number(value)}" for key, value in parameters.items()]
    if licence:
        lines.append(f'LICENSE """{plain_value(licence.strip(), what="the licence")}"""')
    return "\n".join(lines) + "\n"


def _number(value: float) -> str:
    """Return a number as Ollama reads it: strconv.ParseInt takes no exponent and no decimal point."""
    return str(int(value)) if float(value).is_integer() else repr(float(value))


# --- the member -------------------------------------------------------------------------------------------------------


def _parent(source: ExportSource, asked: Sequence[Format], dtype: MergeDtype) -> str:
    """The smallest GGUF that is asked for with it."""
    if source.run is None:
        raise ExportError(
            "ollama needs a run, whose data template becomes the Modelfile's", hint="export a GGUF of this adapter"
        )
    choices = [each for each in asked if each in gguf.FORMATS] or [_DEFAULT_GGUF]
    if len(choices) > 1:
        choices.sort(key=lambda each: each.estimate_bytes(source, dtype))
    return choices[0].name


def _write(task: ExportTask) -> Facts:
    """A Modelfile and its GGUF, which shares its bytes with the export that it comes from where the disk can."""
    run, base = task.source.run, task.source.base
    assert run is not None, "_parent refuses a source without a run"
    made_from = gguf.find_gguf(task.made_from)
    with task.directory() as directory:
        file = directory / made_from.name
        try:
            os.link(made_from, file)
        except OSError:
            shutil.copyfile(made_from, file)
        notes = write_modelfile(
            run, file, licence=licence_notice(base.model), max_tokens=read_config(base.directory).context_tokens
        )
    choices = [each.name for each in gguf.FORMATS if each.name in task.asked]
    took = f"made of {file.name}"
    if len(choices) > 1:
        took += f", the smallest of {', '.join(choices)}" + (" that passed" if task.settings.verify else "")
    return {"create_command": create_command(run.name), "notes": [took, *notes], "gguf": file.name}


FORMAT = Format(
    name="ollama",
    about="a GGUF with its Modelfile",
    card=gguf.CARD,
    check_base=gguf.check_base,
    files=(gguf.GGUF_FILE, re.compile(MODELFILE)),
    estimate_bytes=lambda source, dtype: 0,  # a link
    write=_write,
    runner=partial(gguf.run_directory, "ollama"),
    parent=_parent,
    runs_parent=True,
    packages=_DEFAULT_GGUF.packages,
)
