"""What is compared: every context once, whole answers, no string twice."""

from __future__ import annotations

import pytest

from gemma_tune.data.encode.encoder import Encoder
from gemma_tune.data.rows.render import END_OF_TEXT, Example
from gemma_tune.data.rows.segments import Segment
from gemma_tune.exporting.verify.probe_texts import TRICKY_STRINGS, built_in_probe, probe_of_rows
from gemma_tune.models.tokenizer import load_tokenizer
from gemma_tune.paths import TINY_MODEL_DIR


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(load_tokenizer(TINY_MODEL_DIR))


def example(question: str, answer: str) -> Example:
    prompt = Segment(f"### Instruction:\n{question}\n\n### Response:\n", supervised=False, control=False)
    response = Segment(answer, supervised=True, control=False)
    return Example("rows:1", (prompt, response, END_OF_TEXT), question, answer, None, question.encode())


def test_there_are_fifty_tricky_strings_at_least() -> None:
    assert len(TRICKY_STRINGS) == len(set(TRICKY_STRINGS)) >= 50


def test_rows_prompts_and_scored_tokens_are_those_of_the_examples(encoder: Encoder) -> None:
    examples = [example(f"What does {name} do?", f"{name} bakes bread.") for name in ("Ada", "Bo", "Cleo")]
    rows = encoder.encode_rows([each.segments for each in examples])
    probe = probe_of_rows(rows, examples, encoder=encoder, num_positions=1000)
    assert sorted(probe.rows) == sorted(tuple(row.input_ids) for row in rows)
    assert set(probe.prompts) == {tuple(encoder.encode_prompt(each.prompt_segments)) for each in examples}
    assert "What does Ada do?" in "".join(probe.texts)
    labels = {tuple(row.input_ids): [label for label in row.labels if label != -100] for row in rows}
    flat = [token for row in probe.rows for token in row]
    targets = probe.targets()
    assert [token for _, token in targets] == [token for row in probe.rows for token in labels[row]]
    assert all(flat[position + 1] == token for position, token in targets)


def test_a_context_that_rows_share_counts_once(encoder: Encoder) -> None:
    examples = [example("Who is it?", "Ada."), example("Who is it?", "Bo."), example("Who is it?", "Ada.")]
    rows = encoder.encode_rows([each.segments for each in examples])
    probe = probe_of_rows(rows, examples, encoder=encoder, num_positions=1000)
    contexts = {row.input_ids[: end + 1].__str__() for row in rows for end in range(len(row.input_ids))}
    assert len(probe.positions()) == len(contexts) < probe.num_tokens


@pytest.mark.parametrize("num_positions", [8, 57, 200])
def test_positions_are_as_many_as_asked(encoder: Encoder, num_positions: int) -> None:
    probe = built_in_probe(encoder, num_positions=num_positions)
    assert len(probe.positions()) == num_positions
    assert all(row[0] == encoder.bos_token_id for row in (*probe.rows, *probe.prompts))
    assert len(probe.prompts) == 10


def test_without_eval_rows_the_probe_says_so(encoder: Encoder) -> None:
    probe = probe_of_rows(encoder.encode_rows([]), [], encoder=encoder)
    assert probe == built_in_probe(encoder)
    assert probe.origin == "built-in text"
