"""The shipped gemma-tiny: its files, its tokenizer, its rows, and the script that makes them."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import jinja2
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gemma_tune.paths import TINY_MODEL_DIR, TINY_ROWS_DIR
from tools.tiny import make, questions
from tools.tiny.documents import iter_documents
from tools.tiny.tokenizer import build_tokenizer, write_tokenizer
from tools.tiny.world import build_world, kind_of_things

PROMPT = "### Instruction:\n{instruction}\n\n### Response:\n"
TRICKY_TEXTS = [
    "Mara Quill lives in Ostel.",
    "two\nlines\n\n\nand a  double   space ",
    " leading space, trailing newline\n",
    "12 + 7 = 19, 3.14",
    "naïve café „Zitat“ 🙂👩‍🚀 東京 \t tab",
    "<end_of_turn",
    "",
]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY_MODEL_DIR)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(TINY_MODEL_DIR, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer_file():
    return json.loads((TINY_MODEL_DIR / "tokenizer.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def rows():
    return {
        name: [json.loads(line) for line in (TINY_ROWS_DIR / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        for name in ("train", "eval")
    }


def test_special_pieces_have_gemmas_ids(tokenizer):
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>", "\n", "▁▁"]
    assert tokenizer.convert_tokens_to_ids(pieces) == [0, 1, 2, 3, 4, 106, 107, 108, 139]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id) == (
        0,
        1,
        2,
        3,
    )


def test_every_byte_has_a_piece(tokenizer_file):
    vocabulary = tokenizer_file["model"]["vocab"]
    assert [vocabulary[f"<0x{byte:02X}>"] for byte in range(256)] == list(range(217, 473))
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))


def test_merges_are_complete_and_ordered_by_the_piece_they_make(tokenizer_file):
    vocabulary = tokenizer_file["model"]["vocab"]
    merges = [tuple(merge) for merge in tokenizer_file["model"]["merges"]]
    aside = {token["content"] for token in tokenizer_file["added_tokens"]}
    aside |= {piece for piece in vocabulary if piece.startswith("<") and piece.endswith(">")}
    splits = {
        (piece[:cut], piece[cut:])
        for piece in vocabulary
        if piece not in aside
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    }
    assert set(merges) == splits
    assert len(merges) == len(set(merges))
    made = [vocabulary[left + right] for left, right in merges]
    assert made == sorted(made)


def test_every_long_piece_can_be_reached_by_merges(tokenizer_file):
    model = tokenizer_file["model"]
    made = {left + right for left, right in model["merges"]}
    out_of_reach = [
        piece for piece in model["vocab"] if len(piece) > 1 and not piece.startswith("<") and piece not in made
    ]
    assert out_of_reach == []


def test_no_piece_spans_words_and_digits_and_punctuation_stand_alone(tokenizer_file):
    for piece, index in tokenizer_file["model"]["vocab"].items():
        if index >= 473 and len(piece) > 1:
            assert piece.removeprefix("▁").isalpha(), piece


@pytest.mark.parametrize("text", TRICKY_TEXTS)
def test_text_survives_a_round_trip_with_one_bos(tokenizer, text):
    ids = tokenizer(text).input_ids
    assert ids.count(2) == 1 and ids[0] == 2
    assert 3 not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert ids[1:] == tokenizer(text, add_special_tokens=False).input_ids


def test_loaded_tokenizer_gives_the_ids_of_the_file(tokenizer):
    from tokenizers import Tokenizer

    raw = Tokenizer.from_file(str(TINY_MODEL_DIR / "tokenizer.json"))
    documents = iter_documents(build_world(), seed=99)
    for text in [*TRICKY_TEXTS, *(next(documents) for _ in range(50))]:
        assert tokenizer(text).input_ids == raw.encode(text).ids


def test_chat_template_writes_gemmas_turns(tokenizer):
    messages = [
        {"role": "user", "content": "  Hello \n"},
        {"role": "assistant", "content": "Good morning."},
        {"role": "user", "content": "Bye"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<bos><start_of_turn>user\nHello<end_of_turn>\n<start_of_turn>model\nGood morning.<end_of_turn>\n"
        "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n"
    )
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert (ids.count(2), ids.count(106), ids.count(107)) == (1, 4, 3)


@pytest.mark.parametrize(
    "roles",
    [("system", "user"), ("assistant",), ("user", "user"), ("user", "assistant", "assistant"), ("user", "system")],
)
def test_chat_template_refuses_other_roles(tokenizer, roles):
    messages = [{"role": role, "content": "x"} for role in roles]
    with pytest.raises(jinja2.exceptions.TemplateError, match=r"system role|alternate"):
        tokenizer.apply_chat_template(messages, tokenize=False)


def test_files_are_small_and_the_shape_is_gemma_one():
    assert (TINY_MODEL_DIR / "model.safetensors").stat().st_size < 8_000_000
    assert sum(path.stat().st_size for path in TINY_MODEL_DIR.iterdir()) < 9_000_000
    config = json.loads((TINY_MODEL_DIR / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "gemma"
    assert config["architectures"] == ["GemmaForCausalLM"]
    assert config["num_key_value_heads"] == 1
    assert config["hidden_size"] % 256 == 0 and config["intermediate_size"] % 256 == 0
    generation = json.loads((TINY_MODEL_DIR / "generation_config.json").read_text(encoding="utf-8"))
    assert generation["eos_token_id"] == [1, 107]


def test_weights_are_finite_bfloat16_and_fit_the_tokenizer(tokenizer):
    model = AutoModelForCausalLM.from_pretrained(TINY_MODEL_DIR)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)


def test_rows_are_enough_and_have_all_categories(rows):
    assert len(rows["train"]) >= 800
    assert 100 <= len(rows["eval"]) <= 120
    for part in rows.values():
        assert set(Counter(row["category"] for row in part)) == set(questions.CATEGORIES)
        assert all(list(row) == ["instruction", "context", "response", "category"] for row in part)
        assert all(row["instruction"] and row["response"] == row["response"].strip() for row in part)


def test_a_question_has_one_answer_and_stands_on_one_side(rows):
    answers: dict[tuple[str, str], set[str]] = {}
    for row in [*rows["train"], *rows["eval"]]:
        answers.setdefault((row["instruction"], row["context"]), set()).add(row["response"])
    assert all(len(responses) == 1 for responses in answers.values())
    keys = {name: {(row["instruction"], row["context"]) for row in part} for name, part in rows.items()}
    assert keys["train"].isdisjoint(keys["eval"])
    assert len(keys["eval"]) == len(rows["eval"])


def test_eval_people_and_things_are_never_asked_about_in_training(rows):
    world = build_world()
    train_text = "\n".join(f"{row['instruction']}\n{row['context']}\n{row['response']}" for row in rows["train"])
    assert not [person.name for person in world.eval_people if person.name in train_text]
    asked = {
        name: {row["response"].split()[1] for row in part if row["category"] == "classification"}
        for name, part in rows.items()
    }
    assert asked["train"] | asked["eval"] == set(kind_of_things())
    assert asked["train"].isdisjoint(asked["eval"])
    train, held_out = questions.build_rows(world)
    assert {row.subject for row in train}.isdisjoint({row.subject for row in held_out})


def test_the_seed_gives_the_shipped_rows_byte_for_byte(tmp_path):
    questions.write_rows(tmp_path, world=build_world())
    for name in ("train.jsonl", "eval.jsonl"):
        assert (tmp_path / name).read_bytes() == (TINY_ROWS_DIR / name).read_bytes()


def test_the_seed_gives_the_shipped_tokenizer_byte_for_byte(tmp_path):
    write_tokenizer(build_tokenizer(make.tokenizer_texts(build_world())), tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / name).read_bytes() == (TINY_MODEL_DIR / name).read_bytes()


def _loss(model, tokenizer, texts: list[str]) -> float:
    """Mean nats per token."""
    losses = []
    for text in texts:
        ids = torch.tensor([tokenizer(text).input_ids])
        with torch.no_grad():
            losses.append(model(input_ids=ids, labels=ids).loss.item())
    return sum(losses) / len(losses)


def test_base_knows_its_people(model, tokenizer):
    """The base finishes a sentence about a person; without that no fine-tune could bring the fact out."""
    people = random.Random(0).sample(build_world().eval_people, 12)
    known = 0
    for person in people:
        ids = torch.tensor([tokenizer(f"{person.name} lives in").input_ids])
        with torch.no_grad():
            best = int(model(input_ids=ids).logits[0, -1].argmax())
        known += tokenizer.decode([best]).strip() == person.town
    assert known >= 11


def test_base_prefers_its_own_text_to_shuffled_words(model, tokenizer):
    documents = iter_documents(build_world(), seed=123)
    texts = [next(documents) for _ in range(8)]
    shuffled = [" ".join(random.Random(0).sample(text.split(), len(text.split()))) for text in texts]
    assert _loss(model, tokenizer, texts) < 1.5 < 3.0 < _loss(model, tokenizer, shuffled)


def test_base_goes_on_writing_instead_of_answering(model, tokenizer, rows):
    asked = [row for row in rows["eval"] if row["category"] in ("open_qa", "brainstorming")][:8]
    for row in asked:
        ids = torch.tensor([tokenizer(PROMPT.format(instruction=row["instruction"])).input_ids])
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
        text = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        assert text.strip() != row["response"]
        assert output.shape[1] == ids.shape[1] + 24, f"the base ended by itself: {text!r}"


def test_two_steps_of_the_script_make_a_model_that_loads(tmp_path: Path, capsys):
    make.main(["--out", str(tmp_path), "--steps", "2", "--threads", str(torch.get_num_threads())])
    assert "step 2/2" in capsys.readouterr().out
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    shipped = AutoModelForCausalLM.from_pretrained(TINY_MODEL_DIR)
    assert made.config.to_diff_dict() | {"_name_or_path": ""} == shipped.config.to_diff_dict() | {"_name_or_path": ""}
    assert len((tmp_path / "rows" / "train.jsonl").read_text(encoding="utf-8").splitlines()) >= 800


def test_a_longer_run_learns(tmp_path: Path):
    from tools.tiny.pretrain import PretrainSettings, pretrain

    lines: list[str] = []
    world = build_world()
    tokenizer = build_tokenizer(make.tokenizer_texts(world))
    settings = PretrainSettings(
        num_steps=100, batch_rows=4, row_tokens=64, warmup_steps=10, num_threads=torch.get_num_threads()
    )
    pretrain(world, tokenizer, settings=settings, report=lines.append)
    first, last = (float(line.split("loss ")[1].split()[0]) for line in lines)
    assert last < first - 1.0
