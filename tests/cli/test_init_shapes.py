"""`gemma-tune init` on shapes of rows: the recipe trains, or none is written and the sentence says why."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer

from gemma_tune.cli.init import init
from gemma_tune.cli.validate import validate
from gemma_tune.data.inputs import open_inputs
from gemma_tune.data.look.glance import gemma_turns
from gemma_tune.data.rows.read import read_examples
from gemma_tune.errors import DataError, RecipeError
from gemma_tune.flows import train as flow
from gemma_tune.recipe.load import load_recipe
from gemma_tune.runs.metrics_log import read_metrics
from gemma_tune.runs.reporter import SilentReporter

Rows = Sequence[Mapping[str, Any]]
NUM_ROWS = 30
PLACES = ("Oslo", "Lima", "Quito", "Cairo", "Hanoi", "Delhi")
# A word that stands in the texts of all made rows and in no column's name: a message never holds it.
SECRET = "Zanzibar"


def question(index: int) -> str:
    return f"How far is it from {PLACES[index % 6]} to {SECRET} by road number {index}?"


def answer(index: int) -> str:
    return f"It is about {index * 17 + 90} kilometres to {SECRET}, and it takes {index % 9 + 2} hours."


def rows(make: Callable[[int], Mapping[str, Any]], count: int = NUM_ROWS) -> Rows:
    return [make(index) for index in range(count)]


def jsonl(content: Rows) -> tuple[str, bytes]:
    return "rows.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content).encode()


def table(
    content: Rows, *, name: str = "rows.csv", delimiter: str = ",", header: Sequence[str] = ()
) -> tuple[str, bytes]:
    stream = io.StringIO()
    writer = csv.writer(stream, delimiter=delimiter)
    writer.writerow(list(content[0]))
    writer.writerows(row.values() for row in content)
    return name, stream.getvalue().encode()


def parquet(content: Rows) -> tuple[str, bytes]:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([dict(row) for row in content]), sink)
    return "rows.parquet", sink.getvalue()


def ticket(index: int) -> dict[str, Any]:
    return {
        "ticket_id": f"T-{1000 + index}",
        "created_at": f"2024-03-{index % 28 + 1:02} 10:{index % 60:02}",
        "subject": f"Road {index}",
        "body": f"Hello, I have to go to {SECRET} and my ticket {index} has not come. Please tell me what to do.",
        "agent_reply": f"Sorry about ticket {index}: it was sent to {SECRET} again this morning, and comes tomorrow.",
        "status": ("open", "closed", "pending")[index % 3],
        "url": f"https://help.example.com/t/{index}",
    }


def review(index: int) -> dict[str, Any]:
    text = f"The road to {SECRET} number {index} was {'fine' if index % 2 else 'full of holes'}."
    return {"review_id": index, "review": text, "stars": index % 5 + 1, "sentiment": ("bad", "good")[index % 2]}


def turns(index: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": question(index)}, {"role": "assistant", "content": answer(index)}]


def sharegpt(index: int) -> list[dict[str, str]]:
    return [{"from": "human", "value": question(index)}, {"from": "gpt", "value": answer(index)}]


def pair(index: int, first: str = "question", second: str = "answer") -> dict[str, Any]:
    return {first: question(index), second: answer(index)}


def dolly(index: int) -> dict[str, Any]:
    return {"instruction": question(index), "context": "", "response": answer(index), "category": "open_qa"}


def alpaca(index: int) -> dict[str, Any]:
    return {"instruction": "Answer the question.", "input": question(index), "output": answer(index)}


TICKET = {"instruction": "body", "response": "agent_reply"}
PAIR = {"instruction": "question", "response": "answer"}
# Name → file, its template and the columns of the recipe.
READ: dict[str, tuple[tuple[str, bytes], str, dict[str, str]]] = {
    "support tickets": (table(rows(ticket)), "dolly", TICKET),
    "reviews with labels": (table(rows(review)), "dolly", {"instruction": "review", "response": "sentiment"}),
    "text and label": (
        jsonl(rows(lambda i: {"text": question(i), "label": ("far", "near")[i % 2]})),
        "dolly",
        {"instruction": "text", "response": "label"},
    ),
    "FAQ": (
        table(rows(lambda i: pair(i) | {"url": f"https://example.com/{i}", "date": f"{i % 28 + 1}.3.2024"})),
        "dolly",
        PAIR,
    ),
    "other languages": (
        table(rows(lambda i: pair(i, "Frage", "Antwort"))),
        "dolly",
        {"instruction": "Frage", "response": "Antwort"},
    ),
    "answers are numbers": (table(rows(lambda i: {"question": question(i), "answer": i * 17})), "dolly", PAIR),
    "an answer by what is left": (
        jsonl(rows(lambda i: {"id": i, "q": question(i), "a": answer(i)})),
        "dolly",
        {"instruction": "q", "response": "a"},
    ),
    "a passage": (
        jsonl(rows(lambda i: pair(i) | {"passage": f"Road {i} goes past the lake to {SECRET} and on to the sea."})),
        "dolly",
        PAIR | {"context": "passage"},
    ),
    "summaries": (
        jsonl(rows(lambda i: {"article": question(i) * 5, "summary": answer(i)})),
        "dolly",
        {"instruction": "article", "response": "summary"},
    ),
    "dolly": (jsonl(rows(dolly)), "dolly", {}),
    "alpaca": (("rows.json", json.dumps(rows(alpaca)).encode()), "alpaca", {}),
    "LLaMA-Factory alpaca": (jsonl(rows(lambda i: alpaca(i) | {"system": "", "history": []})), "alpaca", {}),
    "LLaMA-Factory sharegpt": (
        jsonl(rows(lambda i: {"conversations": sharegpt(i), "system": "", "tools": ""})),
        "chat",
        {},
    ),
    "OpenAI messages": (jsonl(rows(lambda i: {"messages": turns(i)})), "chat", {}),
    "messages under another name": (
        parquet(rows(lambda i: {"id": i, "dialog": turns(i)})),
        "chat",
        {"messages": "dialog"},
    ),
    "numbers of JSON": (jsonl(rows(lambda i: {"question": question(i), "answer": i * 17})), "dolly", PAIR),
    "truth values": (jsonl(rows(lambda i: {"question": question(i), "answer": i % 2 == 0})), "dolly", PAIR),
    "a class as a number": (
        jsonl(rows(lambda i: {"text": question(i), "label": i % 2})),
        "dolly",
        {"instruction": "text", "response": "label"},
    ),
    "messages as JSON in a cell": (table(rows(lambda i: {"id": i, "messages": json.dumps(turns(i))})), "chat", {}),
    "TRL messages": (
        jsonl(rows(lambda i: {"prompt": turns(i)[:1], "completion": turns(i)[1:]})),
        "chat-completion",
        {},
    ),
    "a system turn": (
        jsonl(rows(lambda i: {"messages": [{"role": "system", "content": f"Be brief, {i}."}, *turns(i)]})),
        "chat",
        {},
    ),
    "earlier turns": (
        jsonl(rows(lambda i: alpaca(i) | {"system": "Be brief.", "history": [[question(i + 1), answer(i + 1)]]})),
        "alpaca-chat",
        {},
    ),
    "a system prompt": (
        jsonl(rows(lambda i: {"id": f"x.{i}", "system_prompt": "You are an AI.", **pair(i, "question", "response")})),
        "dolly",
        {"instruction": "question", "system": "system_prompt"},
    ),
    "Excel": (
        ("rows.csv", b"\xef\xbb\xbfsep=;\r\n" + table(rows(pair), delimiter=";")[1].replace(b"\r\n", b";;\r\n")),
        "dolly",
        PAIR,
    ),
    "pandas' index": (table(rows(lambda i: {"": i, **pair(i)})), "dolly", PAIR),
    "a list a column": (
        ("rows.json", json.dumps({name: [pair(i)[name] for i in range(NUM_ROWS)] for name in pair(0)}).encode()),
        "dolly",
        PAIR,
    ),
    "TRL prompt and completion": (
        jsonl(rows(lambda i: {"prompt": question(i), "completion": f" {answer(i)}"})),
        "completion",
        {},
    ),
    "tabs": (
        table(rows(ticket), name="rows.tsv", delimiter="\t"),
        "dolly",
        {"instruction": "body", "response": "agent_reply"},
    ),
    "parquet": (parquet(rows(pair)), "dolly", PAIR),
    "a corpus": (jsonl(rows(lambda i: {"text": f"{answer(i)} {question(i)}", "source": "web"})), "text", {}),
    "the question is named context": (
        jsonl(rows(lambda i: {"context": question(i), "response": answer(i)})),
        "alpaca",
        {"instruction": "context", "output": "response"},
    ),
    "code": (
        jsonl(rows(lambda i: {"task_id": i, "text": question(i), "code": f"def f{i}():\n    return {i}"})),
        "dolly",
        {"instruction": "text", "response": "code"},
    ),
    "a Kaggle export of tickets": (
        table(
            rows(
                lambda i: {
                    "Ticket ID": i,
                    "Customer Name": f"Ada L. {i}",
                    "Customer Email": f"a{i}@example.com",
                    "Ticket Subject": ("Setup", "Refund")[i % 2],
                    "Ticket Description": question(i),
                    "Resolution": answer(i) if i % 4 else "",
                    "image_url": f"https://example.com/{i}.png",
                }
            )
        ),
        "dolly",
        {"instruction": "Ticket Description", "response": "Resolution"},
    ),
    "half without an answer": (
        jsonl(rows(lambda i: pair(i) if i % 3 else {"question": question(i), "answer": ""})),
        "dolly",
        PAIR,
    ),
}


def undecided(*columns: str) -> str:
    return "no column is clearly the response\n" + "".join(rf"(.|\n)*{column}" for column in columns)


# Name → file, what the message says and what the hint says.
REFUSED: dict[str, tuple[tuple[str, bytes], str, str]] = {
    "translations": (
        jsonl(rows(lambda i: {"translation": {"en": question(i), "fr": answer(i)}})),
        r"no column is clearly the instruction or the response\n  translation  objects \(en, fr\)$",
        "each row needs a question and an answer as text",
    ),
    "translations side by side": (
        jsonl(rows(lambda i: {"en": answer(i), "fr": answer(i + 1)})),
        r"no column is clearly the instruction or the response\n  en  text of about \d+ words\n  fr  text",
        "--column instruction=en --column response=fr",
    ),
    "tickets without answers": (
        table([{key: value for key, value in row.items() if key != "agent_reply"} for row in rows(ticket)]),
        undecided("ticket_id +ids", "created_at +dates", "status +3 values", "url +web addresses"),
        "--column instruction=body --column response=COLUMN",
    ),
    "ids and dates": (
        table(rows(lambda i: {"order": f"A-{i}", "day": f"2024-01-{i % 28 + 1:02}", "price": i * 1.5})),
        r"order  ids\n  day +dates\n  price +numbers",
        "as text",
    ),
    "numbers": (table(rows(lambda i: {"a": i, "b": i * 2, "label": i % 2})), "no column is clearly", "as text"),
    "one column of questions": (
        table(rows(lambda i: {"question": question(i)})),
        undecided("question +text of about 12 words, questions"),
        "add a column of answers; or learn question whole, as text: gemma-tune init rows.csv --yes --goal complete",
    ),
    "nested": (jsonl(rows(lambda i: {"id": i, "qa": pair(i)})), r"qa  objects \(question, answer\)", "as text"),
    "pairs": (
        jsonl(rows(lambda i: {"prompt": question(i), "chosen": answer(i), "rejected": "No."})),
        "holds preference pairs",
        "--column instruction=prompt --column response=chosen",
    ),
    "pairs of messages": (
        jsonl(rows(lambda i: {"chosen": turns(i), "rejected": turns(i + 1)})),
        "holds preference pairs",
        "good answers alone",
    ),
    "KTO": (
        jsonl(rows(lambda i: {"prompt": question(i), "completion": answer(i), "label": i % 2 == 0})),
        "holds responses that are labelled good or bad, which cannot be trained by method sft",
        "--column instruction=prompt --column response=completion",
    ),
    "pictures": (
        parquet(rows(lambda i: pair(i) | {"image": {"bytes": b"\x89PNG", "path": f"{i}.png"}})),
        "the column image holds pictures or sound",
        "--column instruction=COLUMN",
    ),
    "files of pictures": (
        table(rows(lambda i: {"file": f"img/{i}.JPG", "caption": answer(i)})),
        "the column file holds pictures or sound",
        "--column instruction=COLUMN",
    ),
    "answers as objects": (
        jsonl(rows(lambda i: pair(i, "question", "context") | {"answers": {"text": ["5"], "start": [0]}})),
        undecided("question", "context", r"answers +objects \(text, start\)"),
        "--column instruction=question --column response=COLUMN",
    ),
    "a label of two sentences": (
        jsonl(rows(lambda i: {"sentence1": answer(i), "sentence2": answer(i + 1), "label": i % 3})),
        "no column is clearly the instruction\n",
        "--column instruction=COLUMN --column response=label",
    ),
    "choices": (
        table(rows(lambda i: pair(i) | {"A": "here", "B": "there", "C": "far", "D": "near"})),
        r"what is chosen from \(A, B, C and 1 more\)",
        "write the choices into the question",
    ),
    "a message a row": (
        jsonl(rows(lambda i: {"chat": i // 2, "role": ("user", "assistant")[i % 2], "text": answer(i)})),
        "a message a row, whose role says who speaks",
        '{"messages": [{"role": "user"',
    ),
    "calls of tools": (
        jsonl(rows(lambda i: {"messages": [turns(i)[0], turns(i)[1] | {"tool_calls": [{"name": "look"}]}]})),
        "tool_calls cannot be rendered",
        "'data.drop_fields=[tool_calls]' behind the command",
    ),
    "roles of their own": (
        jsonl(
            rows(lambda i: {"talk": [{"role": "guest", "content": question(i)}, {"role": "host", "content": "Go."}]})
        ),
        "unknown roles 'guest', 'host'",
        "'data.roles={guest: user, host: assistant}' behind the command",
    ),
    "300 columns": (
        jsonl(rows(lambda i: {f"c{column}": answer(i + column) for column in range(300)})),
        r"no column is clearly the instruction or the response\n  c0 (.|\n)*  c23  text .*\n  and 276 more$",
        "--column instruction=COLUMN --column response=COLUMN",
    ),
    "one question": (
        jsonl(rows(lambda i: {"question": question(1), "answer": answer(i)})),
        r"no column is clearly the instruction\n  question  the same in every row",
        "add a column of questions",
    ),
    "rows of nothing": (jsonl(rows(lambda i: {})), "no row has a column", ""),
    "an empty file": (("rows.csv", b""), "is empty", ""),
    "a header alone": (("rows.csv", b"question,answer\n"), "no row", ""),
    "all rows are equal": (jsonl(rows(lambda i: dolly(7))), "30 rows, and all of them are equal", "differ"),
    "no answer is there": (
        jsonl(rows(lambda i: {"instruction": question(i), "response": ""})),
        "30 of 30 rows .*cannot be used(.|\n)*the response is empty",
        "",
    ),
    "all answers of an export are empty": (
        table(rows(lambda i: {"question": question(i), "answer": ""})),
        undecided("question", "answer +empty"),
        "",
    ),
    "a spreadsheet": (("rows.csv", b"PK\x03\x04" + bytes(40)), "zip archive", "CSV"),
    "no file of rows": (("rows.xlsx", b"PK\x03\x04" + bytes(40)), "unknown kind of file", ""),
    "bytes": (("rows.jsonl", bytes(range(256)) * 4), "rows.jsonl", ""),
}


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., str]:
    """Run `init` in an empty folder without a card; returns what it says."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(init)

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["init", *arguments])
        with pytest.raises(SystemExit) as ended:
            app()
        assert not ended.value.code
        return capsys.readouterr().err

    return run


@pytest.mark.parametrize("name", READ)
def test_a_recipe_is_written_of_which_every_row_trains(
    command: Callable[..., str], capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (file, content), template, columns = READ[name]
    Path(file).write_bytes(content)
    said = command(file, "--yes")
    recipe = load_recipe(Path("recipe.yaml")).recipe
    assert (recipe.data.template, recipe.data.columns) == (template, columns)
    validate(Path("recipe.yaml"))
    capsys.readouterr()
    inputs = open_inputs(recipe.data, prefers_chat=False)
    examples = read_examples(recipe.data, inputs, chat=gemma_turns())
    assert examples.report.train_rows + examples.report.eval_rows >= 20
    assert examples.report.num_leaked == 0
    assert f"{NUM_ROWS - examples.report.rows_bad} rows can be used; {file}" in said
    assert SECRET in said  # the user's own row, on the user's own screen
    assert recipe.model.name == "gemma-tiny"
    assert "gemma-tiny is a toy" in said and "--gpu t4 -o recipe-t4.yaml" in said


@pytest.mark.parametrize("name", REFUSED)
def test_none_is_written_and_the_sentence_says_why(command: Callable[..., str], name: str) -> None:
    (file, content), message, hint = REFUSED[name]
    Path(file).write_bytes(content)
    with pytest.raises(DataError, match=message) as refused:
        command(file, "--yes")
    assert hint in (refused.value.hint or "")
    assert not Path("recipe.yaml").exists()
    assert SECRET not in f"{refused.value.message} {refused.value.hint}"
    assert all(len(line) <= 200 for line in refused.value.message.splitlines())


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["support tickets", "text and label", "messages under another name", "TRL prompt and completion"]
)
def test_what_it_writes_trains(command: Callable[..., str], name: str) -> None:
    (file, content), _, _ = READ[name]
    Path(file).write_bytes(content)
    command(file, "--yes")
    overrides = ["training.max_steps=2", "model.engine=transformers", "evaluation.num_questions=0"]
    run = flow.train_run(load_recipe(Path("recipe.yaml"), overrides), reporter=SilentReporter())
    assert [row["step"] for row in read_metrics(run) if "loss" in row] == [1, 2]


def test_hints_work_as_typed(command: Callable[..., str]) -> None:
    (file, content), _, _ = REFUSED["translations side by side"]
    Path(file).write_bytes(content)
    with pytest.raises(DataError) as refused:
        command(file, "--yes", "-o", "it.yaml")
    typed = (refused.value.hint or "").partition("gemma-tune init ")[2]
    said = command(*typed.split())
    assert load_recipe(Path("it.yaml")).recipe.data.columns == {"instruction": "en", "response": "fr"}
    on_card = said.partition("gemma-tune init ")[2].splitlines()[0]
    command(*on_card.split())
    assert load_recipe(Path("it-t4.yaml")).recipe.model.name != "gemma-tiny"


def test_names_of_columns_write_nothing_but_text(command: Callable[..., str]) -> None:
    path = Path("rows.jsonl")
    path.write_bytes(jsonl(rows(lambda i: pair(i, "[bold]the question\x1b[2J", "answer = 'x'")))[1])
    said = command("rows.jsonl", "--yes", "-o", "rows.jsonl.yaml")
    assert "instruction is the column [bold]the question␛[2J (text of" in said
    recipe = load_recipe(Path("rows.jsonl.yaml")).recipe
    assert recipe.data.columns == {"instruction": "[bold]the question\x1b[2J", "response": "answer = 'x'"}


def test_settings_of_the_rows_are_taken_and_stand_in_the_recipe(command: Callable[..., str]) -> None:
    (file, content), _, _ = REFUSED["roles of their own"]
    Path(file).write_bytes(content)
    said = command(file, "--yes", "data.roles={guest: user, host: assistant}")
    assert load_recipe(Path("recipe.yaml")).recipe.data.roles == {"guest": "user", "host": "assistant"}
    assert """'data.roles={"guest": "user", "host": "assistant"}' -o recipe-t4.yaml""" in said
    assert "every row has the same response" in said
    with pytest.raises(RecipeError, match=r"training.epochs=2: only settings of data"):
        command(file, "--yes", "-o", "other.yaml", "training.epochs=2")
    with pytest.raises(RecipeError, match=r"data.seed"):
        command(file, "--yes", "-o", "other.yaml", "data.seed=much")


def test_the_split_that_is_named_is_looked_at(command: Callable[..., str]) -> None:
    said = command("tiny-world", "--yes", "data.split=eval")
    assert "115 rows can be used; eval.jsonl:1" in said
    assert load_recipe(Path("recipe.yaml")).recipe.data.split == "eval"


def test_system_turns_are_folded_or_dropped(command: Callable[..., str]) -> None:
    (file, content), _, _ = READ["a system turn"]
    Path(file).write_bytes(content)
    assert "before the first user message (in 30 rows)" in command(file, "--yes", "--model", "gemma-2b-it")
    said = command(file, "--yes", "--model", "gemma-2b-it", "-o", "other.yaml", "data.drop_fields=[system]")
    assert "system is left out of 30 rows" in said


def test_a_choice_is_named_with_the_way_to_change_it(command: Callable[..., str]) -> None:
    content = jsonl(rows(lambda i: {"question": question(i), "answer": answer(i), "reply": answer(i + 1)}))[1]
    Path("rows.jsonl").write_bytes(content)
    said = command("rows.jsonl", "--yes")
    assert "response is the column answer (text of about" in said
    assert "reply would do about as well: --column response=reply" in said
