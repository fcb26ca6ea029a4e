"""README.md of an exported directory: written once, of the template's own example, with snippets that run."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from gemma_tune.data.rows.template import list_templates, load_template
from gemma_tune.disk import write_json
from gemma_tune.errors import ExportError
from gemma_tune.exporting.export_card import describe_prompt, write_model_card
from gemma_tune.exporting.export_record import ExportRecord
from gemma_tune.exporting.verify.parity import Distance
from gemma_tune.exporting.verify.prove import FormReport
from gemma_tune.models.fetch import fetch_model
from gemma_tune.models.tokenizer import load_tokenizer
from gemma_tune.paths import TINY_MODEL_DIR
from gemma_tune.recipe.load import dump_recipe
from gemma_tune.recipe.schema import Recipe
from gemma_tune.runs.layout import RunDir
from gemma_tune.runs.lock import Lock


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run of dolly rows on the embedded Gemma: what it recorded, and its tokenizer."""
    made = RunDir(tmp_path / "run")
    made.adapter.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TINY_MODEL_DIR / name, made.adapter / name)
    recipe = Recipe.model_validate({"data": {"source": "tiny-world", "max_seq_tokens": 64}})
    made.resolved_recipe.write_text(dump_recipe(recipe), encoding="utf-8")
    made.template.write_text(load_template("dolly").source_text, encoding="utf-8")
    lock = Lock(
        recipe="mine",
        overrides=[],
        base={"name": "gemma-tiny", "revision": None, "files": {}},
        data={"label": "tiny-world[train]", "sha256": "b" * 64, "template_sha256": "c" * 64},
        engine={"name": "transformers", "reason": ""},
        precision={"compute": "float32", "reason": ""},
        hardware={"name": "cpu"},
        seed=0,
    )
    write_json(made.lock, asdict(lock))
    sources = [{"label": "tiny-world[train]", "template": "dolly", "train_rows": 2}]
    data = {"sources": sources, "eval_label": None, "train_rows": 2, "eval_rows": 1, "sha256": "b" * 64}
    write_json(made.data_report, data)
    return made


def verification() -> dict[str, Any]:
    """What `gemma-tune verify` stores."""
    measured = {field.name: 0.0 for field in fields(Distance)}
    distance = Distance(**(measured | {"max_abs": 0.25, "top1_agreement": 0.995, "mean_kl": 0.00123}))
    result = FormReport(
        name="merged-4bit",
        against="base + adapter",
        method="logits",
        expected="",
        passed=True,
        reason="within <limits>",
        distance=distance,
        texts_equal=49,
        answers_equal=9,
    )
    shared = {"origin": "eval rows", "num_positions": 2000, "num_texts": 50, "num_prompts": 10}
    return {"date": "2026-01-01", "result": asdict(result), **shared}


def record(directory: Path, export_format: str, checked: dict[str, Any] | None = None) -> None:
    """export.json as `gemma-tune export` writes it."""
    made = ExportRecord(export_format, "f" * 64, {}, {}, files={}, verification=checked)
    (directory / "export.json").write_text(made.to_json(), encoding="utf-8")


def snippets(card: str) -> dict[str, str]:
    """The Python snippets by the library that they import first."""
    fences = [token for token in MarkdownIt().parse(ModelCard(card).text) if token.type == "fence"]
    return {token.content.split()[1]: token.content for token in fences if token.info == "python"}


def answer_of(snippet: str, **replaced: str) -> str:
    for old, new in replaced.items():
        snippet = snippet.replace(old.replace("_", "/"), new)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(snippet, "snippet", "exec"), {})
    return printed.getvalue().strip()


def greedy_answer(model: Any, prompt: str) -> str:
    tokenizer = load_tokenizer(TINY_MODEL_DIR)
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]])
    output = model.generate(input_ids=ids, max_new_tokens=128, do_sample=False)
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)).strip()


DOLLY_PROMPT = (
    "### Instruction:\nWhich of these are noble gases?\n\n### Context:\nhelium, sodium, neon\n\n### Response:\n"
)


def test_the_snippets_run_and_answer(run: RunDir, tmp_path: Path) -> None:
    base = fetch_model("gemma-tiny")
    model = AutoModelForCausalLM.from_pretrained(TINY_MODEL_DIR)
    merged = tmp_path / "merged"
    shutil.copytree(TINY_MODEL_DIR, merged, ignore=shutil.ignore_patterns("README.md"))
    record(merged, "merged-16bit")
    card = write_model_card(merged, run, base=base).read_text(encoding="utf-8")
    answer = answer_of(snippets(card)["transformers"], OWNER_NAME=str(merged))
    assert answer == greedy_answer(model, DOLLY_PROMPT) != ""

    torch.manual_seed(3)
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False))
    tuned.save_pretrained(run.adapter)
    (run.adapter / "README.md").unlink()
    record(run.adapter, "adapter")
    card = write_model_card(run.adapter, run, base=base).read_text(encoding="utf-8")
    places = {"path_to_gemma-tiny": str(TINY_MODEL_DIR), "OWNER_NAME": str(run.adapter)}
    assert answer_of(snippets(card)["peft"], **places) == greedy_answer(tuned, DOLLY_PROMPT) != answer


@pytest.mark.parametrize("export_format", ["gguf-q8_0", "ollama"])
def test_a_card_is_never_overwritten_and_holds_no_path(export_format: str, run: RunDir, tmp_path: Path) -> None:
    folder = tmp_path / "gguf"
    folder.mkdir()
    record(folder, export_format)
    for name in ("tiny.Q8_0.gguf", "Modelfile"):
        (folder / name).touch()
    path = write_model_card(folder, run, base=fetch_model("gemma-tiny"))
    text = path.read_text(encoding="utf-8")
    assert path == folder / "README.md" and str(tmp_path) not in text and "Checked" not in text
    assert "ollama create" in text and "tiny.Q8_0.gguf" in text
    before = sorted(folder.iterdir())
    with pytest.raises(ExportError, match=r"README\.md exists"):
        write_model_card(folder, run, base=fetch_model("gemma-tiny"))
    assert sorted(folder.iterdir()) == before


def test_the_verdict_is_told(run: RunDir, tmp_path: Path) -> None:
    record(tmp_path, "merged-4bit", verification())
    text = write_model_card(tmp_path, run, base=fetch_model("gemma-tiny")).read_text(encoding="utf-8")
    assert "- passed, compared with base + adapter: within &lt;limits" in text
    assert "- at 2,000 positions of eval rows the most likely token is the same in 99.50%; mean KL 0.0012 nats" in text
    assert "- token ids are equal for 49 of 50 strings, greedy answers for 9 of 10 prompts" in text
    assert "bitsandbytes" in ModelCard(text).data.tags


@pytest.mark.parametrize("name", list_templates())
def test_the_prompt_of_every_shipped_template(name: str, run: RunDir) -> None:
    run.template.write_text(load_template(name).source_text, encoding="utf-8")
    prompt = describe_prompt(run)
    assert prompt.in_chat_turns == (load_template(name).kind != "text")
    assert "example" not in prompt.template and "#" not in prompt.template.replace("###", "")
    if prompt.in_chat_turns:
        assert prompt.example.startswith("<start_of_turn>user\n") and prompt.example.endswith("<start_of_turn>model\n")
    assert json.dumps(prompt.response)


def test_a_template_whose_example_has_not_its_fields(run: RunDir) -> None:
    source = "name: mine\nkind: text\nprompt: '{{ q }}:'\nresponse: '{{ a }}'\nexample: {other: x}  # by alice\n"
    run.template.write_text(source, encoding="utf-8")
    prompt = describe_prompt(run)
    assert (prompt.example, prompt.response) == ("(q):", "(a)")
    assert "alice" not in prompt.template and "other" not in prompt.template
