from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from gemma_tune.data.encode.encode_rows import Datasets
from gemma_tune.data.encode.encoder import Encoder
from gemma_tune.data.inputs import open_inputs
from gemma_tune.data.open import build_datasets
from gemma_tune.data.rows.chat_template import ChatRenderer
from gemma_tune.data.rows.read import Examples, read_examples
from gemma_tune.data.sources import source as sources
from gemma_tune.errors import DataError
from gemma_tune.recipe.schema import DataSection

Row = dict[str, Any]


def numbered(count: int, **more: str) -> list[Row]:
    return [{"instruction": f"What is number {index}?", "response": f"It is {index}."} | more for index in range(count)]


def save(path: Path, rows: list[Row]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def section(source: str, **settings: Any) -> DataSection:
    return DataSection(**{"source": source, "template": "dolly", "max_seq_tokens": 512} | settings)


def examples_of(chosen: DataSection, *, chat: ChatRenderer | None = None) -> Examples:
    return read_examples(chosen, open_inputs(chosen, prefers_chat=chat is not None), chat=chat)


def read(tmp_path: Path, rows: list[Row], **settings: Any) -> Examples:
    return examples_of(section(save(tmp_path / "rows.jsonl", rows), **settings))


def encode(tokenizer: Any, tmp_path: Path, rows: list[Row], **settings: Any) -> Datasets:
    return build(tokenizer, section(save(tmp_path / "rows.jsonl", rows), **settings))


def build(tokenizer: Any, chosen: DataSection, *, chat: ChatRenderer | None = None) -> Datasets:
    return build_datasets(
        chosen.model_copy(update={"cache": False}),
        open_inputs(chosen, prefers_chat=chat is not None),
        Encoder(tokenizer),
        chat=chat,
        tokenizer_files={},
    )


def questions(examples: Any) -> set[str]:
    return {example.question for example in examples}


# --- split and order --------------------------------------------------------------------------------------------------


def test_split_is_fixed_by_rows_and_seed(tmp_path: Path) -> None:
    rows = numbered(200)
    first = read(tmp_path, rows, eval_fraction=0.2)
    again = read(tmp_path, rows, eval_fraction=0.2)
    assert list(first.train) == list(again.train) and list(first.eval) == list(again.eval)
    assert (first.report, first.sha256) == (again.report, again.sha256)
    assert 20 <= len(first.eval) <= 60
    assert questions(first.train) | questions(first.eval) == {row["instruction"] for row in rows}
    other = read(tmp_path, rows, eval_fraction=0.2, seed=1)
    assert questions(other.eval) != questions(first.eval)


def test_train_rows_are_shuffled_by_the_seed(tmp_path: Path) -> None:
    orders = [
        [example.where for example in read(tmp_path, numbered(50), eval_fraction=0.0, seed=seed).train]
        for seed in (0, 0, 1)
    ]
    in_file = [f"rows.jsonl:{line}" for line in range(1, 51)]
    assert orders[0] == orders[1]
    assert len({tuple(order) for order in (*orders, in_file)}) == 3
    assert {tuple(sorted(order)) for order in orders} == {tuple(sorted(in_file))}


def test_rows_keep_their_side_when_others_come_and_go(tmp_path: Path) -> None:
    before = read(tmp_path, numbered(200), eval_fraction=0.2)
    shuffled = read(tmp_path, numbered(200)[::-1], eval_fraction=0.2)
    after = read(tmp_path, numbered(300), eval_fraction=0.2)
    assert questions(shuffled.eval) == questions(before.eval)
    assert questions(before.eval) < questions(after.eval)
    assert questions(before.train) < questions(after.train)


def test_another_template_holds_out_the_same_rows(tmp_path: Path, tokenizer: Any) -> None:
    path = save(tmp_path / "rows.jsonl", numbered(100))
    plain = examples_of(section(path, eval_fraction=0.2))
    chat = ChatRenderer.from_tokenizer(tokenizer)
    turns = examples_of(section(path, eval_fraction=0.2, template="dolly-chat"), chat=chat)
    assert questions(plain.eval) == questions(turns.eval)


def test_equal_rows_never_stand_on_both_sides(tmp_path: Path) -> None:
    rows = numbered(40) * 3 + [row | {"response": row["response"] + " \n"} for row in numbered(40)]
    made = read(tmp_path, rows, eval_fraction=0.3)
    assert not questions(made.train) & questions(made.eval)
    assert len(made.eval) == len(questions(made.eval))  # once each
    assert len(made.train) == 4 * len(questions(made.train))  # all kept
    assert made.report.num_duplicates == 120


@pytest.mark.parametrize("count", [2, 3])
def test_few_rows_have_one_on_each_side(tmp_path: Path, count: int) -> None:
    for seed in range(8):
        made = read(tmp_path, numbered(count), eval_fraction=0.05, seed=seed)
        assert (len(made.train), len(made.eval)) == (count - 1, 1)


def test_one_row_cannot_be_divided_but_can_be_trained(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="only one distinct row") as caught:
        read(tmp_path, numbered(1) * 5)
    assert caught.value.hint is not None and "eval_fraction=0" in caught.value.hint
    made = read(tmp_path, numbered(1) * 5, eval_fraction=0.0)
    assert (len(made.train), len(made.eval)) == (5, 0)


def test_limits_on_rows(tmp_path: Path) -> None:
    whole = read(tmp_path, numbered(200), eval_fraction=0.2)
    made = read(tmp_path, numbered(200), eval_fraction=0.2, max_train_rows=10, max_eval_rows=5)
    assert made.train[:] == whole.train[:10]
    assert made.eval[:] == whole.eval[:5]
    assert made.report.num_unused == 200 - 15


def test_eval_rows_of_another_source_leave_train(tmp_path: Path) -> None:
    eval_source = save(tmp_path / "eval.jsonl", numbered(130)[90:] + numbered(130)[90:91])
    made = read(tmp_path, numbered(100), eval_source=eval_source)
    assert (len(made.train), len(made.eval)) == (90, 40)
    assert not questions(made.train) & questions(made.eval)
    assert (made.report.num_leaked, made.report.num_duplicates) == (10, 11)
    assert made.report.label == "rows.jsonl + eval.jsonl"


def test_train_rows_that_are_all_eval_rows_stop_the_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="every train row is also an eval row"):
        read(tmp_path, numbered(5), eval_source=save(tmp_path / "eval.jsonl", numbered(5)))


def test_tiny_world_brings_its_eval_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "train.jsonl", numbered(20))
    save(tmp_path / "eval.jsonl", numbered(30)[20:])
    monkeypatch.setattr(sources, "TINY_ROWS_DIR", tmp_path)
    made = examples_of(section("tiny-world"))
    assert (len(made.train), len(made.eval)) == (20, 10)
    made = examples_of(section("tiny-world", eval_fraction=0.0))
    assert (len(made.train), len(made.eval)) == (20, 0)


def test_a_split_of_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no split"):
        read(tmp_path, numbered(5), eval_split="test")


# --- checks -----------------------------------------------------------------------------------------------------------


def test_bad_rows_are_left_out_and_listed(tmp_path: Path, tokenizer: Any) -> None:
    good = [
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "Yes"}]} for i in range(30)
    ]
    bad = [
        {"messages": [{"role": "assistant", "content": "Yes"}, {"role": "user", "content": "No"}]} for _ in range(10)
    ]
    path = save(tmp_path / "rows.jsonl", good + bad)
    made = examples_of(section(path, template="chat", eval_fraction=0.0), chat=ChatRenderer.from_tokenizer(tokenizer))
    assert (len(made.train), made.report.rows_read, made.report.rows_bad) == (30, 40, 10)
    assert [sample.split(": ")[0] for sample in made.report.bad_samples] == [f"rows.jsonl:{n}" for n in range(31, 41)]
    assert made.report.bad_samples[0].startswith("rows.jsonl:31: the last message is from 'user'")


def test_mostly_bad_rows_stop_everything(tmp_path: Path) -> None:
    rows = numbered(4) + [{"instruction": "x", "response": None}] * 5
    with pytest.raises(DataError) as caught:
        read(tmp_path, rows)
    assert caught.value.message.splitlines() == [
        "5 of 9 rows of rows.jsonl cannot be used with the template dolly",
        *(f"  rows.jsonl:{line}: response is missing" for line in range(5, 8)),
        "  and 2 more",
    ]
    assert caught.value.hint is not None and '"instruction"' in caught.value.hint
    assert read(tmp_path, numbered(5) + [{"instruction": "x", "response": None}] * 5).report.rows_bad == 5


@pytest.mark.parametrize(
    ("settings", "expected", "hint"),
    [
        ({"template": "alpaca"}, "has no column output", "these columns fit data.template=dolly"),
        ({"template": "completion"}, "has no column prompt, completion", "data.template=dolly"),
        ({"template": "chat"}, "has no column messages or conversations", "data.template=dolly"),
        ({"columns": {"instruct": "instruction"}}, "no field 'instruct'; did you mean 'instruction'", "its fields"),
        ({"columns": {"response": "respons"}}, "no column 'respons'; did you mean 'response'", "its columns"),
        ({"template": "doly"}, "did you mean 'dolly'", "alpaca"),
    ],
)
def test_a_template_that_does_not_fit_is_told(tmp_path: Path, settings: Row, expected: str, hint: str) -> None:
    with pytest.raises(DataError) as caught:
        read(tmp_path, numbered(5), **settings)
    assert expected in caught.value.message
    assert caught.value.hint is not None and hint in caught.value.hint


def test_columns_with_other_names(tmp_path: Path) -> None:
    rows = [{"q": row["instruction"], "a": row["response"]} for row in numbered(5)]
    with pytest.raises(DataError) as caught:
        read(tmp_path, rows)
    assert caught.value.hint == "map it: data.columns.instruction=COLUMN"
    made = read(tmp_path, rows, columns={"instruction": "q", "response": "a"})
    assert questions(made.train) | questions(made.eval) == {row["q"] for row in rows}


@pytest.mark.parametrize("marker", ["###eos_token###", "</s>", "<|im_end|>"])
def test_an_end_marker_of_another_tool_is_noted(tmp_path: Path, marker: str) -> None:
    rows = [row | {"response": f"{index} {row['response']}{marker}"} for index, row in enumerate(numbered(20))]
    notes = read(tmp_path, rows, eval_fraction=0.0).report.notes
    assert len(notes) == 1 and notes[0].startswith("20 of 20 responses looked at end in") and marker in notes[0]


@pytest.mark.parametrize("marker", ["###eos_token###", "\n</s>"])
def test_tails_are_stripped_and_counted(tmp_path: Path, marker: str) -> None:
    rows = [row | {"response": f"{index} {row['response']}"} for index, row in enumerate(numbered(20))]
    marked = [
        row | {"response": row["response"] + marker if index % 2 else row["response"]} for index, row in enumerate(rows)
    ]
    clean = {"strip_tails": [marker, "<|never|>"], "strip_heads": ["Never"]}
    stripped, plain = read(tmp_path, marked, clean=clean), read(tmp_path, rows)
    assert [row.response for row in stripped.train] == [row.response for row in plain.train]
    assert stripped.report.stripped == {marker.strip(): 10, "<|never|>": 0, "Never": 0}
    assert stripped.report.notes == (
        "data.clean.strip_heads: no row has 'Never' there", "data.clean.strip_tails: no row has '<|never|>' there",
    )  # fmt: skip


def test_an_answer_that_is_nothing_but_its_tail_cannot_be_used(tmp_path: Path) -> None:
    rows = [*numbered(20), numbered(1)[0] | {"response": "</s>"}]
    report = read(tmp_path, rows, clean={"strip_tails": ["</s>"]}).report
    assert report.rows_bad == 1 and "the response is empty" in report.bad_samples[0]


def test_common_words_are_not_noted(tmp_path: Path) -> None:
    rows = [
        row | {"response": "positive" if index % 2 else "It is not true."} for index, row in enumerate(numbered(20))
    ]
    assert read(tmp_path, rows).report.notes == ()


# --- encoding ---------------------------------------------------------------------------------------------------------


def test_report_counts_what_is_trained(tokenizer: Any, tmp_path: Path) -> None:
    made = encode(tokenizer, tmp_path, numbered(100), eval_fraction=0.2)
    report = made.report
    assert (report.train_rows, report.eval_rows) == (len(made.train), len(made.eval))
    assert report.train_tokens == sum(len(row.input_ids) for row in made.train)
    assert report.train_supervised_tokens == sum(label != -100 for row in made.train for label in row.labels)
    lengths = sorted(len(row.input_ids) for row in [*made.train, *made.eval])
    assert (report.length_p50, report.length_p90, report.length_max) == (lengths[49], lengths[89], lengths[99])
    whole = read(tmp_path, numbered(100), eval_fraction=0.2)
    assert list(made.train_places) == [example.where for example in whole.train]
    assert list(made.eval_examples) == list(whole.eval)
    assert json.loads(json.dumps(asdict(report)))["train_rows"] == report.train_rows
    assert (
        report.lines()[0]
        == f"rows.jsonl with template dolly: 100 rows → {len(made.train)} train, {len(made.eval)} eval"
    )
    assert len(report.lines()) == 2


def test_percentiles_are_lengths_that_occur(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"instruction": "?", "response": "日" * count} for count in range(1, 101)]  # 3 byte tokens each
    report = encode(tokenizer, tmp_path, rows, eval_fraction=0.0).report
    shortest = report.length_max - 3 * 99
    expected = tuple(shortest + 3 * (rank - 1) for rank in (50, 90, 99, 100))
    assert (report.length_p50, report.length_p90, report.length_p99, report.length_max) == expected


def long_and_short() -> list[Row]:
    return [*numbered(4), {"instruction": "Long?", "context": "word " * 300, "response": "A long row ends well."}]


def test_long_rows_are_dropped_and_told(tokenizer: Any, tmp_path: Path) -> None:
    made = encode(tokenizer, tmp_path, long_and_short(), eval_fraction=0.0, max_seq_tokens=128)
    assert len(made.train) == len(made.train_places) == 4
    assert "rows.jsonl:5" not in made.train_places
    assert made.report.dropped_too_long == 1
    assert made.report.longest_row == "rows.jsonl:5"
    assert any("1 row dropped, over max_seq_tokens 128: rows.jsonl:5 (" in line for line in made.report.lines())


def test_long_rows_are_refused_with_the_length_that_fits(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"1 of 5 rows are longer than data\.max_seq_tokens 128") as caught:
        encode(tokenizer, tmp_path, long_and_short(), eval_fraction=0.0, max_seq_tokens=128, too_long="refuse")
    longest = encode(tokenizer, tmp_path, long_and_short(), eval_fraction=0.0, max_seq_tokens=4096).report.length_max
    assert caught.value.hint is not None and f"data.max_seq_tokens={longest}" in caught.value.hint
    made = encode(tokenizer, tmp_path, long_and_short(), eval_fraction=0.0, max_seq_tokens=longest, too_long="refuse")
    assert len(made.train) == 5


def test_prompts_are_cut_on_the_left_and_answers_never(tokenizer: Any, tmp_path: Path) -> None:
    rows = [row | {"context": " ".join(f"w{n}é" for n in range(index * 40))} for index, row in enumerate(numbered(8))]
    whole = encode(tokenizer, tmp_path, rows, eval_fraction=0.0, max_seq_tokens=4096)
    made = encode(tokenizer, tmp_path, rows, eval_fraction=0.0, max_seq_tokens=150, too_long="truncate_prompt")
    assert made.report.dropped_too_long == 0 and made.report.truncated >= 4
    assert len(made.train) == 8
    for row, before, place in zip(made.train, whole.train, made.train_places, strict=True):
        assert len(row.input_ids) <= 150
        assert [label for label in row.labels if label != -100] == [label for label in before.labels if label != -100]
        assert row.input_ids[0] == 2 and row.input_ids[-1] == 1
        original = rows[int(place.rpartition(":")[2]) - 1]
        prompt_ids = [token_id for token_id, label in zip(row.input_ids, row.labels, strict=True) if label == -100]
        kept = tokenizer.decode(prompt_ids[1:])
        assert kept.startswith(f"### Instruction:\n{original['instruction']}\n\n")
        assert kept.endswith("\n\n### Response:\n")
        if len(before.input_ids) > 150:
            # Cut, but by no more than it takes: one more of the longest pieces would not fit.
            assert len(row.input_ids) > 150 - 12
            context = kept.split("### Context:\n")[1].removesuffix("\n\n### Response:\n")
            assert context and original["context"].endswith(context)


def test_an_answer_that_alone_is_too_long_drops_the_row(tokenizer: Any, tmp_path: Path) -> None:
    rows = [*numbered(4), {"instruction": "Long?", "response": "word " * 300}]
    made = encode(tokenizer, tmp_path, rows, eval_fraction=0.0, max_seq_tokens=128, too_long="truncate_prompt")
    assert (len(made.train), made.report.dropped_too_long, made.report.truncated) == (4, 1, 0)


def test_no_row_left_says_what_would_fit(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"all 20 train rows are longer than data\.max_seq_tokens 8") as caught:
        encode(tokenizer, tmp_path, numbered(20), eval_fraction=0.0, max_seq_tokens=8)
    fits = int(str(caught.value.hint).split("max_seq_tokens=")[1].split()[0])
    assert len(encode(tokenizer, tmp_path, numbered(20), eval_fraction=0.0, max_seq_tokens=fits).train) == 20


def test_eval_rows_that_are_all_too_long_are_noted(tokenizer: Any, tmp_path: Path) -> None:
    eval_source = save(tmp_path / "eval.jsonl", [{"instruction": "Long?", "response": "word " * 300}])
    made = encode(tokenizer, tmp_path, numbered(5), eval_source=eval_source, max_seq_tokens=128)
    assert len(made.eval) == 0 and "nothing is evaluated" in made.report.notes[-1]


def test_control_strings_are_counted_with_their_place(tokenizer: Any, tmp_path: Path) -> None:
    rows = [*numbered(3), {"instruction": "<end_of_turn>\n<start_of_turn>model", "response": "No."}]
    report = encode(tokenizer, tmp_path, rows, eval_fraction=0.0).report
    assert (report.control_strings, report.control_samples) == (2, ("rows.jsonl:4",))


def test_train_on_all(tokenizer: Any, tmp_path: Path) -> None:
    report = encode(tokenizer, tmp_path, numbered(5), eval_fraction=0.0, train_on="all").report
    assert report.train_supervised_tokens == report.train_tokens - 5


@pytest.mark.parametrize(
    "change",
    [
        {"max_seq_tokens": 511},
        {"train_on": "all"},
        {"seed": 1},
        {"too_long": "refuse"},
        {"eval_fraction": 0.1},
        {"max_train_rows": 3},
    ],
)
def test_the_hash_knows_every_setting(tokenizer: Any, tmp_path: Path, change: Row) -> None:
    first = encode(tokenizer, tmp_path, numbered(50))
    assert first.sha256 == encode(tokenizer, tmp_path, numbered(50)).sha256 == first.report.sha256
    assert first.sha256 != encode(tokenizer, tmp_path, numbered(50), **change).sha256
    assert first.sha256 != encode(tokenizer, tmp_path, numbered(51)).sha256


def test_the_hash_knows_the_template_and_not_the_place(tokenizer: Any, tmp_path: Path) -> None:
    first = encode(tokenizer, tmp_path, numbered(50)).sha256
    (tmp_path / "elsewhere").mkdir()
    assert encode(tokenizer, tmp_path / "elsewhere", numbered(50)).sha256 == first
    own = tmp_path / "dolly.yaml"
    from gemma_tune.data.rows.template import load_template

    own.write_text(load_template("dolly").source_text.replace("### Response", "### Answer"), encoding="utf-8")
    assert encode(tokenizer, tmp_path, numbered(50), template=str(own)).sha256 != first


def test_the_hash_knows_the_models_chat_template(tokenizer: Any, gemma3_tokenizer: Any, tmp_path: Path) -> None:
    chosen = section(save(tmp_path / "rows.jsonl", numbered(9)), template="dolly-chat")
    first, second = (
        build(made, chosen, chat=ChatRenderer.from_tokenizer(made)) for made in (tokenizer, gemma3_tokenizer)
    )
    assert [row.input_ids for row in first.train] == [row.input_ids for row in second.train]
    assert first.sha256 != second.sha256


# --- length, cleaning, control tokens ---------------------------------------------------------------------------------


def test_truncate_cuts_the_answer_last_and_keeps_the_stop_token(tokenizer: Any, tmp_path: Path) -> None:
    rows = [
        *numbered(3),
        {"instruction": "Prompt?", "context": "word " * 300, "response": "Kept whole."},
        {"instruction": "Answer?", "response": "word " * 300},
    ]
    settings = {"eval_fraction": 0.0, "max_seq_tokens": 128, "too_long": "truncate"}
    made = encode(tokenizer, tmp_path, rows, **settings)
    assert (made.report.truncated, made.report.truncated_answers, made.report.dropped_too_long) == (2, 1, 0)
    answers = {}
    for row, place in zip(made.train, made.train_places, strict=True):
        supervised = [label for label in row.labels if label != -100]
        assert len(row.input_ids) <= 128 and supervised[-1] == row.input_ids[-1] == 1
        answers[place] = tokenizer.decode(supervised[:-1])
    assert answers["rows.jsonl:4"] == "Kept whole."
    assert len(answers["rows.jsonl:5"]) > 100 and rows[4]["response"].startswith(answers["rows.jsonl:5"])
    assert any("1 answer cut as well" in line for line in made.report.lines())


def test_exact_duplicates_are_dropped_when_asked(tmp_path: Path) -> None:
    rows = numbered(20) * 3
    made = read(tmp_path, rows, eval_fraction=0.2, clean={"drop_duplicates": "exact"})
    assert len(made.train) == len(questions(made.train))
    assert made.report.left_out == {"exact duplicate": 2 * len(made.train)}


def test_near_duplicates_of_train_and_eval_rows_are_dropped(tmp_path: Path) -> None:
    def words(index: int) -> list[str]:
        return [f"w{index}x{n}" for n in range(50)]

    rows = []
    for index in range(20):
        changed = words(index)
        changed[25] = "other"
        rows += [{"instruction": f"Q{index}", "response": " ".join(text)} for text in (words(index), changed)]
    made = read(tmp_path, rows, eval_fraction=0.3, clean={"drop_duplicates": "near"})
    assert made.eval
    assert len(questions(made.train)) == len(made.train)
    assert not questions(made.train) & questions(made.eval)
    plain = read(tmp_path, rows, eval_fraction=0.3)
    assert questions(plain.train) & questions(plain.eval)  # what it is for


def test_text_is_cleaned_before_it_is_templated(tmp_path: Path) -> None:
    rows = [
        *numbered(5),
        {
            "instruction": "Mail?",
            "context": "It bakes.[1] Ask ann@example.org.",
            "response": "It is ann@example.org [citation needed].",
        },
        {"instruction": "Ã¼ber?", "response": "SchÃ¶n."},
    ]
    clean = {"pii": "mask", "strip_citations": True, "fix_encoding": True}
    made = read(tmp_path, rows, eval_fraction=0.0, clean=clean)
    by_place = {example.where: example for example in made.train}
    assert by_place["rows.jsonl:6"].response == "It is [EMAIL]."
    assert "It bakes. Ask [EMAIL]." in by_place["rows.jsonl:6"].prompt_text
    assert (by_place["rows.jsonl:7"].question, by_place["rows.jsonl:7"].response) == ("über?", "Schön.")
    dropped = read(tmp_path, rows, eval_fraction=0.0, clean={"pii": "drop"})
    assert (len(dropped.train), dropped.report.left_out) == (6, {"personal data or a secret": 1})


def test_responses_of_a_wrong_length_are_left_out(tmp_path: Path) -> None:
    rows = [*numbered(3), {"instruction": "One?", "response": "Yes."}, {"instruction": "Long?", "response": "so " * 9}]
    made = read(tmp_path, rows, eval_fraction=0.0, clean={"min_response_words": 2, "max_response_words": 5})
    assert len(made.train) == 3
    assert made.report.left_out == {"response under 2 words": 1, "response over 5 words": 1}


@pytest.mark.parametrize("policy", ["text", "control", "refuse"])
def test_control_tokens_in_row_text(policy: str, tokenizer: Any, tmp_path: Path) -> None:
    turns = "<bos><start_of_turn>user\nWho?<end_of_turn>\n<start_of_turn>model\nAnn.<end_of_turn>\n<eos>"
    rows = [{"text": turns}, {"text": "plain words"}]
    path = save(tmp_path / "rows.jsonl", rows)
    chosen = section(path, template="text", eval_fraction=0.0, control_tokens=policy)
    made = build(tokenizer, chosen)
    row = dict(zip(made.train_places, made.train, strict=True)).get("rows.jsonl:1")
    if policy == "refuse":
        assert row is None and made.report.left_out == {"control tokens in row text": 1}
        return
    assert row is not None and row.input_ids.count(2) == row.input_ids.count(1) == 1
    start = tokenizer.convert_tokens_to_ids("<start_of_turn>")
    assert row.input_ids.count(start) == (2 if policy == "control" else 0)
    assert made.report.control_strings == 6 and made.report.control_as == policy
    if policy == "control":
        assert tokenizer.decode(row.input_ids) == turns


# --- preference pairs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Who?", "chosen": "Ann.", "rejected": "Bob."},
        {
            "conversations": [{"from": "human", "value": "Who?"}],
            "chosen": {"from": "gpt", "value": "Ann."},
            "rejected": {"from": "gpt", "value": "Bob."},
        },
        {
            "chosen": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ann."}],
            "rejected": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Bob."}],
        },
    ],
)
def test_preference_pairs_are_read_in_their_three_forms(row: Row, tokenizer: Any, tmp_path: Path) -> None:
    path = save(tmp_path / "rows.jsonl", [row])
    chat = ChatRenderer.from_tokenizer(tokenizer)
    made = examples_of(section(path, template="preference", eval_fraction=0.0), chat=chat)
    assert (made.train[0].question, made.train[0].response) == ("Who?", "Ann.")


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": "Who?", "chosen": "Ann.", "rejected": "Ann."}, "chosen and rejected are the same"),
        ({"prompt": "Who?", "chosen": "Ann.", "rejected": " "}, "the assistant's answer is empty"),
        ({"chosen": "Ann.", "rejected": "Bob."}, "chosen holds no question"),
        ({"prompt": "Who?", "chosen": "Ann.", "rejected": None}, "rejected is NoneType"),
    ],
)
def test_faults_of_a_preference_pair_are_told(row: Row, problem: str, tokenizer: Any, tmp_path: Path) -> None:
    good = {"prompt": "Who?", "chosen": "Ann.", "rejected": "Bob."}
    path = save(tmp_path / "rows.jsonl", [good, row])
    made = examples_of(
        section(path, template="preference", eval_fraction=0.0), chat=ChatRenderer.from_tokenizer(tokenizer)
    )
    assert len(made.train) == 1 and problem in made.report.bad_samples[0]


def test_unwanted_answers_of_a_kto_file_are_noted(tmp_path: Path) -> None:
    rows = [row | {"label": index % 2 == 0} for index, row in enumerate(numbered(6))]
    (note,) = read(tmp_path, rows, eval_fraction=0.0).report.notes
    assert note.startswith("3 rows of rows.jsonl have label false")
