"""A Modelfile's template, filled as Ollama fills it and tokenized plainly, has the token ids of training.

Nothing of gemma_tune fills the template here: tests/exporting/go_template.py does, which is checked against real Go.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_tune.data.encode.encoder import Encoder
from gemma_tune.data.rows.chat_template import ChatRenderer
from gemma_tune.data.rows.render import render_prompt
from gemma_tune.data.rows.template import load_template, parse_template
from gemma_tune.errors import ExportError, GemmaTuneError
from gemma_tune.exporting.formats.ollama import GREEDY, create_command, format_modelfile, write_modelfile
from gemma_tune.exporting.ollama_template import PromptShape, describe_shape, translate_template
from gemma_tune.models.tokenizer import load_tokenizer
from gemma_tune.paths import TINY_MODEL_DIR
from gemma_tune.recipe.load import dump_recipe
from gemma_tune.recipe.schema import Recipe
from gemma_tune.runs.layout import RunDir
from tests.exporting import go_template as go


def tokenizer_with(chat_template: str) -> Any:
    """The embedded Gemma's tokenizer with the chat template of a Gemma generation, as TRL ships it."""
    spec = importlib.util.find_spec("trl")
    assert spec and spec.origin
    tokenizer = load_tokenizer(TINY_MODEL_DIR)
    path = Path(spec.origin).parent / "chat_templates" / f"{chat_template}.jinja"
    tokenizer.chat_template = path.read_text(encoding="utf-8")
    return tokenizer


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Any]:
    """By generation; 2 has the template of 1. `tiny` is the embedded Gemma's own."""
    made = {name: tokenizer_with(name) for name in ("gemma", "gemma3", "gemma4")}
    made["gemma4"].add_special_tokens({"additional_special_tokens": ["<|turn>", "<turn|>"]})
    return made | {"tiny": load_tokenizer(TINY_MODEL_DIR)}


def modelfile(shape: PromptShape, **changes: Any) -> dict[str, str]:
    """Format and parse back."""
    settings: dict[str, Any] = {"stops": ["<eos>"], "parameters": GREEDY} | changes
    return dict(go.parse_modelfile(format_modelfile("model.gguf", shape, **settings)))


def asked_through_ollama(shape: PromptShape, messages: list[dict[str, str]], tokenizer: Any) -> list[int]:
    """The ids that llama.cpp would make: its tokenizer adds the BOS and reads control tokens."""
    read = modelfile(shape)
    system = [{"role": "system", "content": read["SYSTEM"]}] if "SYSTEM" in read else []
    return list(tokenizer(go.render_for_ollama(read["TEMPLATE"], system + messages))["input_ids"])


def trained(template: Any, fields: dict[str, Any], tokenizer: Any) -> list[int]:
    chat = None if template.kind == "text" else ChatRenderer.from_tokenizer(tokenizer)
    return Encoder(tokenizer).encode_prompt(render_prompt(template, fields, chat=chat))


QUESTIONS = (
    "Who bakes in Applewick?",
    'Zwei "Zeilen"\n\n  für {{ .Prompt }} 日本 🦊',
    "```\n{x}\n```",
    "<b>1 < 2</b>\ttab",
)


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("generation", ["gemma", "gemma3", "gemma4", "tiny"])
@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("dolly", "instruction"),
        ("alpaca", "instruction"),
        ("completion", "prompt"),
        ("text", "prompt"),
        ("dolly-chat", "instruction"),
        ("alpaca-chat", "instruction"),
    ],
)
def test_a_question_has_the_ids_of_training(
    name: str, field: str, generation: str, question: str, tokenizers: dict[str, Any]
) -> None:
    template, tokenizer = load_template(name), tokenizers[generation]
    shape = translate_template(template, tokenizer=tokenizer)
    ids = asked_through_ollama(shape, [{"role": "user", "content": question}], tokenizer)
    assert ids == trained(template, {field: question}, tokenizer)
    assert ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize(
    ("name", "optional", "typed"),
    [
        ("dolly", "context", "Who?\n\n### Context:\nThe baker.\nThe smith."),
        ("alpaca", "input", "Who?\n\n### Input:\nThe baker.\nThe smith."),
        ("dolly-chat", "context", "Who?\n\nThe baker.\nThe smith."),
    ],
)
def test_a_context_is_given_as_the_note_says(name: str, optional: str, typed: str, tokenizers: dict[str, Any]) -> None:
    template, tokenizer = load_template(name), tokenizers["gemma3"]
    shape = translate_template(template, tokenizer=tokenizer)
    note = next(note for note in describe_shape(shape, template) if optional in note)
    told = typed.replace("Who?", "INSTRUCTION").replace("The baker.\nThe smith.", optional.upper())
    assert repr(told) in note
    ids = asked_through_ollama(shape, [{"role": "user", "content": typed}], tokenizer)
    assert ids == trained(template, {"instruction": "Who?", optional: "The baker.\nThe smith."}, tokenizer)


@pytest.mark.parametrize("num_questions", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("generation", "system"),
    [("gemma", None), ("tiny", None), ("gemma3", None), ("gemma3", "Be brief."), ("gemma4", None), ("gemma4", "Be.")],
)
def test_a_conversation_has_the_ids_of_transformers(
    generation: str, system: str | None, num_questions: int, tokenizers: dict[str, Any]
) -> None:
    tokenizer = tokenizers[generation]
    messages = [] if system is None else [{"role": "system", "content": system}]
    for index, question in enumerate(QUESTIONS[:num_questions]):
        messages += [{"role": "assistant", "content": f"Answer {index}."}] if index else []
        messages.append({"role": "user", "content": question})
    template = load_template("chat")
    shape = translate_template(template, tokenizer=tokenizer)
    ids = asked_through_ollama(shape, messages, tokenizer)
    assert ids == list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
    assert ids == trained(template, {"messages": messages}, tokenizer)


def test_single_questions_stay_single(tokenizers: dict[str, Any]) -> None:
    """Plain templates know one question; a conversation would be a text that no row looked like."""
    template, tokenizer = load_template("dolly"), tokenizers["tiny"]
    shape = translate_template(template, tokenizer=tokenizer)
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "First?"},
        {"role": "assistant", "content": "1."},
        {"role": "user", "content": "Last?"},
    ]
    assert asked_through_ollama(shape, talk, tokenizer) == trained(template, {"instruction": "Last?"}, tokenizer)
    notes = " ".join(describe_shape(shape, template))
    assert "answered without those before it" in notes and "no place for a system text" in notes


BAKER = """
name: baker
kind: chat
question: q
optional: [note]
messages:
  - role: system
    content: "You bake.\\n\\nYou say \\"bread\\"."
  - role: user
    content: "Question: {{ q }}{% if note %} ({{ note }}){% endif %} ?"
  - role: assistant
    content: "{{ a }}"
"""


def test_a_template_of_ones_own_with_a_system_text(tokenizers: dict[str, Any]) -> None:
    template = parse_template(BAKER, label="baker.yaml")
    for generation in ("gemma3", "gemma4"):
        tokenizer = tokenizers[generation]
        shape = translate_template(template, tokenizer=tokenizer)
        assert modelfile(shape)["SYSTEM"] == 'You bake.\n\nYou say "bread".'
        ids = asked_through_ollama(shape, [{"role": "user", "content": "Who?"}], tokenizer)
        assert ids == trained(template, {"q": "Who?"}, tokenizer)
        ids = asked_through_ollama(shape, [{"role": "user", "content": "Who? (NB)"}], tokenizer)
        assert ids == trained(template, {"q": "Who?", "note": "NB"}, tokenizer)


TEXT = "name: mine\nkind: text\nresponse: '{{ a }}'\n"


@pytest.mark.parametrize(
    ("source", "told"),
    [
        (TEXT + "question: q\nprompt: '{{ q }} {{ topic }}'", r"no place for the required field topic"),
        (TEXT + "prompt: '{{ q }} {{ topic }}'", r"reads q, topic, and no `question:`"),
        (TEXT + "prompt: 'Tell me.'", r"reads no field at all"),
        (TEXT + "question: q\nprompt: '{{ q | upper }}'", r"does not print q once, unconditionally and unchanged"),
        (TEXT + "question: q\nprompt: '{{ q }} {{ q }}'", r"does not print q once"),
        (TEXT + "question: q\nprompt: '{% if q %}{{ q }}{% endif %}'", r"does not print q once"),
        (TEXT + "question: q\nprompt: '{% if q == \"x\" %}X{% endif %}{{ q }}'", r"does not print q once"),
        (TEXT + "question: q\nprompt: '<bos>{{ q }}'", r"writes <bos> itself"),
        (TEXT + "question: q\nprompt: '{{ \"<eos>\" }}{{ q }}'", r"does not have the token ids of training"),
        (BAKER.replace("role: system", "role: user", 1), r"its messages are user, user, assistant"),
        (BAKER.replace("You bake", "You bake {{ q }}"), r"its system message prints the question"),
        (BAKER.replace("You bake.", "{{ style }}"), r"no place for the required field style"),
    ],
)
def test_what_cannot_be_translated_is_refused_by_name(source: str, told: str, tokenizers: dict[str, Any]) -> None:
    template = parse_template(source, label="mine.yaml")
    with pytest.raises(ExportError, match=told) as refused:
        translate_template(template, tokenizer=tokenizers["gemma3"])
    assert template.name in refused.value.message
    assert refused.value.hint and "vLLM" in refused.value.hint


@pytest.mark.parametrize(
    ("chat_template", "told"),
    [
        # Later questions are opened in another way than the first.
        (
            "{{ bos_token }}{% for m in messages %}{{ '#1 ' if loop.first else '#n ' }}{{ m.content }}\n{% endfor %}",
            r"opens a later question with '\\n#n ' and the first with '#1 '",
        ),
        # The number of the turn is in the prompt, which no sample of one length would show.
        (
            "{{ bos_token }}{% for m in messages %}{{ 'late ' if loop.index > 4 }}[{{ m.content }}]{% endfor %}",
            r"does not have the token ids of training",
        ),
    ],
)
def test_a_chat_template_that_is_not_made_of_turns_is_refused(
    chat_template: str, told: str, tokenizers: dict[str, Any]
) -> None:
    tokenizer = load_tokenizer(TINY_MODEL_DIR)
    tokenizer.chat_template = chat_template
    for name in ("chat", "dolly-chat"):
        with pytest.raises(ExportError, match=told):
            translate_template(load_template(name), tokenizer=tokenizer)


@given(st.text(max_size=12) | st.text('{} "\n\r\t\\`\u00a0\u200b<#', max_size=8), st.text('{}"\n %a', max_size=6))
def test_any_text_survives_both_quotations(before: str, after: str) -> None:
    """Go's braces and strings, and the Modelfile's quotes, whose parser drops what does not print."""
    turns = PromptShape(False, before, after, after_answer=after + before, around_system=(after, before))
    single = PromptShape(True, before, after)
    for system in ("", "S"):
        talk = [{"role": "system", "content": system}] if system else []
        talk += [{"role": "user", "content": "q{{ 1 }}"}, {"role": "assistant", "content": "a"}]
        talk.append({"role": "user", "content": "r"})
        for shape in (turns, single):
            made = go.render_for_ollama(modelfile(shape)["TEMPLATE"], talk)
            assert made == shape.render(["q{{ 1 }}", "r"], ["a"], system=system)


def test_values_that_no_modelfile_can_hold_are_refused() -> None:
    for system in ('three """ quotes', "no\u00a0break"):
        with pytest.raises(ExportError, match=r"which no Modelfile can hold"):
            modelfile(PromptShape(False, "", "", around_system=("", ""), system=system))
    with pytest.raises(ExportError, match="a stop token holds three quotes"):
        modelfile(PromptShape(True, "", ""), stops=['a"""b'])
    for name in ('a".gguf', "../a.gguf", " a.gguf", "a\n.gguf"):
        with pytest.raises(ExportError, match=r"the file name .* cannot be written in a Modelfile"):
            format_modelfile(name, PromptShape(True, "", ""), stops=[], parameters={})


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """The files of a finished run that a Modelfile is made of."""
    made = RunDir(tmp_path / "runs" / "Mine 01")
    made.adapter.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TINY_MODEL_DIR / name, made.adapter / name)
    recipe = Recipe.model_validate({"data": {"source": "tiny-world", "max_seq_tokens": 1536}})
    made.resolved_recipe.write_text(dump_recipe(recipe), encoding="utf-8")
    made.template.write_text(load_template("dolly-chat").source_text, encoding="utf-8")
    return made


def test_the_modelfile_of_a_run(run: RunDir, tmp_path: Path) -> None:
    folder = tmp_path / "gguf"
    folder.mkdir()
    write_modelfile(
        run,
        folder / "model.Q8_0.gguf",
        max_tokens=8192,
        licence="Gemma Terms of Use\nhttps://ai.google.dev/gemma/terms",
    )
    written = (folder / "Modelfile").read_text(encoding="utf-8")
    commands = go.parse_modelfile(written)
    assert commands[0] == ("FROM", "./model.Q8_0.gguf")
    assert commands[2:] == [
        ("PARAMETER stop", "<eos>"),
        ("PARAMETER stop", "<end_of_turn>"),
        ("PARAMETER num_ctx", "1536"),
        ("PARAMETER temperature", "0"),
        ("PARAMETER repeat_penalty", "1"),
        ("LICENSE", "Gemma Terms of Use\nhttps://ai.google.dev/gemma/terms"),
    ]
    tokenizer = load_tokenizer(TINY_MODEL_DIR)
    filled = go.render_for_ollama(commands[1][1], [{"role": "user", "content": "Who?"}])
    assert tokenizer(filled)["input_ids"] == trained(load_template("dolly-chat"), {"instruction": "Who?"}, tokenizer)
    assert str(tmp_path) not in written
    with pytest.raises(ExportError, match=r"Modelfile exists"):
        write_modelfile(run, folder / "model.Q8_0.gguf", max_tokens=8192)


def test_numbers_of_a_modelfile_are_written_out() -> None:
    """Ollama reads a whole number with strconv.ParseInt, which takes neither an exponent nor a decimal point."""
    shape = PromptShape(single=True, before_question="", after_question="")
    parameters = {
        "num_ctx": 1_048_576,
        "num_predict": 10.0,
        "seed": 2**31 - 1,
        "temperature": 0.1,
        "min_p": 0.00001234567,
    }
    lines = format_modelfile("x.gguf", shape, stops=[], parameters=parameters).splitlines()
    written = dict(line.split()[1:] for line in lines if line.startswith("PARAMETER"))
    assert [written[name] for name in ("num_ctx", "num_predict", "seed")] == ["1048576", "10", "2147483647"]
    assert [float(written[name]) for name in ("temperature", "min_p")] == [0.1, 0.00001234567]


@pytest.mark.parametrize("name", ["dolly", "dolly-chat"])
def test_llama_cpp_reads_the_ids_of_training(name: str, make_gguf_source: Callable[..., Path], tmp_path: Path) -> None:
    """The engine under Ollama: it adds the BOS itself, as the file tells it to."""
    llama_cpp = pytest.importorskip("llama_cpp")
    from gemma_tune.exporting.gguf.convert import GgufProvenance, convert_to_gguf

    gguf = tmp_path / "model.gguf"
    convert_to_gguf(make_gguf_source("gemma"), gguf, dtype="bf16", provenance=GgufProvenance(name="x"))
    llama = llama_cpp.Llama(str(gguf), vocab_only=True, verbose=False)
    template, tokenizer = load_template(name), load_tokenizer(TINY_MODEL_DIR)
    shape = translate_template(template, tokenizer=tokenizer)
    for question in QUESTIONS:
        text = go.render_for_ollama(modelfile(shape)["TEMPLATE"], [{"role": "user", "content": question}])
        ids = llama.tokenize(text.encode("utf-8"), add_bos=True, special=True)
        assert ids == trained(template, {"instruction": question}, tokenizer)
    llama.close()


def test_rows_with_control_tokens_of_their_own_are_told(run: RunDir, tmp_path: Path) -> None:
    recipe = {"data": {"source": "x", "max_seq_tokens": 64, "control_tokens": "control"}}
    run.resolved_recipe.write_text(json.dumps(recipe), encoding="utf-8")
    notes = write_modelfile(run, tmp_path / "m.gguf", max_tokens=32, parameters={"temperature": 0.7, "top_k": 64})
    assert any("data.control_tokens" in note for note in notes)
    commands = dict(go.parse_modelfile((tmp_path / "Modelfile").read_text(encoding="utf-8")))
    assert (commands["PARAMETER temperature"], commands["PARAMETER top_k"]) == ("0.7", "64")
    assert commands["PARAMETER num_ctx"] == "32"  # of data.max_seq_tokens 64 the model takes no more


def test_a_run_without_its_tokenizer_leaves_nothing(run: RunDir, tmp_path: Path) -> None:
    shutil.rmtree(run.adapter)
    with pytest.raises(GemmaTuneError):
        write_modelfile(run, tmp_path / "m.gguf", max_tokens=32)
    assert not (tmp_path / "Modelfile").exists()


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("quickstart-001", "quickstart-001"),
        ("Mine 01", "mine-01"),
        ("Ünï $(x)", "n-x"),
        ("../..", "gemma-tuned"),
        ("x" * 200, "x" * 80),
    ],
)
def test_names_for_ollama(name: str, command: str) -> None:
    assert create_command(name) == f"ollama create {command} -f Modelfile"
