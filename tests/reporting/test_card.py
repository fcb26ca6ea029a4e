"""The model card: what the hub's own parser and a CommonMark parser read in it, and what must never be in it."""

from __future__ import annotations

import getpass
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from ruamel.yaml import YAML

from gemma_tune.disk import write_json
from gemma_tune.exporting.formats.registry import FORMATS
from gemma_tune.models.catalogue import find_model
from gemma_tune.models.config import read_config
from gemma_tune.models.fetch import LocalModel
from gemma_tune.paths import TINY_MODEL_DIR
from gemma_tune.recipe.load import dump_recipe
from gemma_tune.recipe.schema import Recipe
from gemma_tune.reporting.card import CardExport, CardPrompt, build_model_card
from gemma_tune.runs.layout import RunDir
from gemma_tune.secrets import mask_private
from tests.made_secrets import SECRETS, telling_part

PROMPT = CardPrompt(
    template="kind: text\nprompt: '{{ q }}'\n",
    in_chat_turns=False,
    example="### Question:\n```\n1 < 2\n```\n",
    response="Yes.",
)
DATASET = "databricks/databricks-dolly-15k"
LOCK: dict[str, Any] = {
    "recipe": "mine",
    "overrides": [],
    "base": {
        "name": "gemma-2b",
        "revision": "c" * 40,
        "files": {"model.safetensors": "a" * 64, "config.json": "f" * 64},
    },
    "data": {"label": "x", "sha256": "b" * 64, "template_sha256": "c" * 64},
    "engine": {"name": "unsloth", "reason": "it works"},
    "precision": {"compute": "bfloat16", "storage": "bfloat16", "autocast": None, "reason": "real bfloat16"},
    "hardware": {"kind": "cuda", "name": "NVIDIA L4", "memory_bytes": 1},
    "seed": 7,
    "python": "3.11.7",
    "platform": "Linux x86_64",
    "packages": {"torch": "2.13.0", "peft": "0.21.2", "unsloth": None},
}
DATA: dict[str, Any] = {
    "sources": [{"label": f"{DATASET}[train]", "template": "dolly", "train_rows": 1234}],
    "eval_label": None,
    "train_rows": 1234,
    "eval_rows": 56,
    "sha256": "b" * 64,
}
SUMMARY: dict[str, Any] = {
    "model": "gemma-2b",
    "engine": "unsloth",
    "quantization": "NF4",
    "precision": "bfloat16",
    "train_rows": 1234,
    "eval_rows": 56,
    "dropped_rows": 0,
    "num_trainable": 1,
    "steps": 77,
    "training_seconds": 12.0,
    "total_seconds": 15.0,
    "num_tokens": 9000,
    "peak_memory_bytes": 1,
    "train_loss": 1.5,
    "eval_loss_before": 2.25,
    "eval_loss_after": 1.125,
    "exact_match_before": 0.0,
    "exact_match_after": 0.5,
    "exact_match_rows": 40,
    "questions": [],
}

MakeRun = Callable[..., RunDir]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """The files of a run that a card is made of."""

    def make(
        *,
        lock: Mapping[str, Any] = {},
        data: Mapping[str, Any] = {},
        summary: Mapping[str, Any] | None = SUMMARY,
        recipe: Mapping[str, Any] = {},
    ) -> RunDir:
        run = RunDir(tmp_path / "run")
        run.path.mkdir()
        write_json(run.lock, {**LOCK, **lock})
        write_json(run.data_report, {**DATA, **data})
        if summary is not None:
            write_json(run.summary, summary)
        settings = {"data": {"source": DATASET, "max_seq_tokens": 2048}, **recipe}
        run.resolved_recipe.write_text(dump_recipe(Recipe.model_validate(settings)), encoding="utf-8")
        return run

    return make


def hub_base(name: str = "gemma-2b", revision: str | None = "c" * 40) -> LocalModel:
    model = find_model(name)
    return LocalModel(name, Path("/cache/snapshots/x"), revision, model.config, model)


def local_base(name: str, directory: Path) -> LocalModel:
    return LocalModel(name, directory, None, read_config(TINY_MODEL_DIR), None)


def build(run: RunDir, *, export_format: str, **facts: Any) -> str:
    return build_model_card(run, CardExport(FORMATS[export_format].card, **facts))


def read(card: str) -> tuple[ModelCard, list[Any]]:
    """The card as the hub reads it, and its tokens as CommonMark with tables; a wrong front matter raises."""
    parsed = ModelCard(card)
    tokens = MarkdownIt("commonmark").enable("table").parse(parsed.text)
    return parsed, tokens


def inline(tokens: list[Any]) -> list[Any]:
    return [child for token in tokens for child in token.children or []]


def text_of(tokens: list[Any]) -> str:
    return "\n".join("".join(c.content for c in token.children or []) for token in tokens if token.type == "inline")


def test_the_hub_reads_base_data_licence_and_figures(make_run: MakeRun) -> None:
    card, tokens = read(build(make_run(), export_format="adapter", base=hub_base(), prompt=PROMPT))
    facts = card.data.to_dict()
    assert facts["base_model"] == "google/gemma-2b"
    assert facts["base_model_relation"] == "adapter"
    assert facts["license"] == "gemma"
    assert facts["library_name"] == "peft"
    assert facts["datasets"] == [DATASET]
    assert facts["language"] == ["en"]
    assert facts["pipeline_tag"] == "text-generation"
    assert {"gemma", "qlora", "unsloth"} <= set(facts["tags"])
    assert [(result.metric_type, result.metric_value, result.dataset_type) for result in card.data.eval_results] == [
        ("loss", 1.125, DATASET),
        ("exact_match", 0.5, DATASET),
    ]
    text = text_of(tokens)
    for told in (f"google/gemma-2b, revision {'c' * 40}", "a" * 64, "b" * 64, "1,234 trained, 56 held out"):
        assert told in text
    assert "rank 16, alpha 16 on q_proj, k_proj" in text
    assert "2.250" in text and "1.125" in text and "0.0%" in text and "50.0%" in text
    assert "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms" in text
    fences = [token.content for token in tokens if token.type == "fence"]
    assert PROMPT.template in fences and PROMPT.example in fences
    recipe = next(YAML(typ="safe").load(fence) for fence in fences if fence.startswith("model:"))
    assert recipe["training"]["learning_rate"] == 2e-4 and recipe["lora"]["rank"] == 16
    assert {token.attrs["href"] for token in inline(tokens) if token.type == "link_open"} == {
        "https://ai.google.dev/gemma/terms"
    }


@pytest.mark.parametrize(
    ("export_format", "relation", "library", "has", "has_not"),
    [
        ("adapter", "adapter", "peft", ("PeftModel", "vllm serve google/gemma-2b --enable-lora"), ("ollama",)),
        (
            "merged-16bit",
            "finetune",
            "transformers",
            ("vllm serve OWNER/NAME", "FastLanguageModel"),
            ("ollama", "Peft"),
        ),
        ("merged-4bit", "finetune", "transformers", ("AutoModelForCausalLM",), ("ollama", "PeftModel")),
        (
            "gguf-q8_0",
            "finetune",
            None,
            ("ollama create gemma-2b-dolly -f Modelfile", "Llama('m.gguf'"),
            ("vllm", "unsloth "),
        ),
    ],
)
def test_only_snippets_that_fit_the_format(
    make_run: MakeRun, export_format: Any, relation: str, library: str | None, has: tuple[str], has_not: tuple[str]
) -> None:
    text = build(make_run(), export_format=export_format, base=hub_base(), prompt=PROMPT, files=["Modelfile", "m.gguf"])
    card, tokens = read(text)
    assert card.data.to_dict()["base_model_relation"] == relation
    assert card.data.library_name == library
    code = "".join(token.content for token in tokens if token.type == "fence")
    assert all(part in code for part in has)
    assert not any(part in code for part in has_not)
    for token in tokens:
        if token.type == "fence" and token.info == "python":
            compile(token.content, "snippet", "exec")


def test_quantized_only_where_the_same_weights_are_on_the_hub(make_run: MakeRun) -> None:
    run = make_run()
    text = build(run, export_format="gguf-q8_0", base=hub_base(), prompt=PROMPT, quantized_from="me/gemma-2b-dolly")
    assert read(text)[0].data.base_model == "me/gemma-2b-dolly"
    assert read(text)[0].data.to_dict()["base_model_relation"] == "quantized"


def test_vllm_is_not_named_for_adapters_that_it_cannot_serve(make_run: MakeRun) -> None:
    run = make_run(recipe={"lora": {"use_dora": True}})
    assert "vllm" not in build(run, export_format="adapter", base=hub_base(), prompt=PROMPT)


def test_other_licences_and_an_unfinished_run(make_run: MakeRun) -> None:
    run = make_run(summary=None)
    card, tokens = read(build(run, export_format="adapter", base=hub_base("gemma-4-e4b-it"), prompt=PROMPT))
    assert card.data.license == "apache-2.0" and card.data.eval_results is None
    assert "Gemma Terms" not in text_of(tokens) and "Held-out rows" not in text_of(tokens)
    card, _ = read(build(run, export_format="adapter", base=hub_base("gemma-tiny", None), prompt=PROMPT))
    assert card.data.license == "cc0-1.0" and card.data.base_model is None
    base = local_base("models/mine", TINY_MODEL_DIR)
    card, tokens = read(build(run, export_format="merged-16bit", base=base, prompt=PROMPT))
    assert card.data.license is None and card.data.base_model is None
    assert "not on record here" in text_of(tokens)


TOKEN = "hf_" + "Ab3" * 11
WANDB = "0123456789abcdef" * 2 + "01234567"


def test_no_secret_no_path_no_name_of_the_user_or_the_machine(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    user, host = "u5er-alice", "h0st-build-7"
    monkeypatch.setattr(getpass, "getuser", lambda: user)
    monkeypatch.setattr(socket, "gethostname", lambda: host)
    monkeypatch.setenv("WANDB_API_KEY", WANDB)
    home = f"/home/{user}"
    monkeypatch.setenv("HOME", f"/data/{user}")
    planted = f"{home}/{host}/{TOKEN}"
    run = make_run(
        lock={
            "recipe": f"{user}",
            "overrides": [f"data.source={planted}/rows.jsonl", f"run.output_dir={planted}"],
            "base": {**LOCK["base"], "name": f"{home}/models/my-gemma"},
            "data": {"label": planted, "sha256": "b" * 64},
            "engine": {"name": "unsloth", "reason": planted},
            "precision": {"compute": "bfloat16", "reason": planted},
            "platform": f"Linux {host}",
        },
        data={
            "sources": [{"label": f"{planted}/rows.jsonl", "template": "dolly", "train_rows": 9}],
            "eval_label": f"/data/{user}/eval.jsonl",
            "bad_samples": [planted],
            "longest_row": f"{planted}/rows.jsonl:3",
            "notes": [planted],
        },
        summary={
            **SUMMARY,
            "model": f"{home}/models/my-gemma",
            "questions": [{"question": "PRIVATE", "expected": "PRIVATE", "before": "PRIVATE", "after": "PRIVATE"}],
        },
        recipe={
            "model": {"name": f"{home}/models/my-gemma"},
            "data": {
                "mix": [{"source": f"{planted}/rows.jsonl", "weight": 1}],
                "eval_source": f"/data/{user}/eval.jsonl",
                "template": f"{home}/my.yaml",
                "columns": {
                    "instruction": f"key {TOKEN} {WANDB}",
                    "response": " ".join(SECRETS.values()),
                    "context": f"C:\\Users\\{user}\\rows.csv",
                },
                "max_seq_tokens": 64,
            },
            "run": {"name": user, "output_dir": planted},
        },
    )
    prompt = CardPrompt(f"prompt: '# {home}/notes.txt {TOKEN}'\n", True, f"see /data/{user}/notes.txt", WANDB)
    base = local_base(f"{home}/models/my-gemma", Path(f"{home}/models/my-gemma"))
    checks = [f"compared with {home}/merged"]
    for export_format in ("adapter", "merged-16bit", "merged-4bit", "gguf-q8_0"):
        card = build(
            run, export_format=export_format, base=base, prompt=prompt, files=["m.gguf", "Modelfile"], checks=checks
        )
        parsed, _ = read(card)
        for secret in (
            *map(telling_part, SECRETS.values()),
            user,
            host,
            TOKEN,
            WANDB,
            "/home/",
            "/data/",
            "PRIVATE",
            str(tmp_path),
        ):
            assert secret not in card
        assert "my-gemma" in card and "rows.jsonl" in card and "key *** ***" in card and "rows.csv" in card
        assert parsed.data.eval_results[0].dataset_name == "eval.jsonl"


HOSTILE = (
    "a|b <script>x</script> [l](http://evil) `c` **b** _i_ ![i](x) https://evil.example www.evil.example # h\n- l @me"
)


def test_text_of_others_means_nothing_in_markdown(make_run: MakeRun) -> None:
    run = make_run(data={"sources": [{"label": HOSTILE, "template": "d", "train_rows": 1}], "eval_label": HOSTILE})
    prompt = CardPrompt("kind: text\n```\n# no heading\n", False, "````\n<b>\n````", "```")
    text = build(
        run,
        export_format="gguf-q8_0",
        base=hub_base(),
        prompt=prompt,
        checks=[f"1. {HOSTILE}", "- no list", "# no heading"],
    )
    parsed, tokens = read(text)
    assert " ".join(HOSTILE.split()) in text_of(tokens)
    assert parsed.data.eval_results[0].dataset_name == HOSTILE
    kinds = {token.type for token in [*tokens, *inline(tokens)]}
    assert not kinds & {
        "html_block",
        "html_inline",
        "image",
        "em_open",
        "strong_open",
        "code_block",
        "ordered_list_open",
    }
    assert [token.attrs["href"] for token in inline(tokens) if token.type == "link_open"] == [
        "https://ai.google.dev/gemma/terms"
    ]
    headings = [tokens[index + 1].content for index, token in enumerate(tokens) if token.type == "heading_open"]
    assert len(headings) == 8 and not any("no heading" in heading for heading in headings)
    assert {len(row) for row in table_rows(tokens)} == {2, 3}
    # GitHub's flavour makes links of bare addresses and mentions as well; no parser of it is installed here.
    body = parsed.text.replace("https://ai.google.dev", "")
    assert not any(start in body for start in ("http:", "https:", "www.", " @me")) and r"\@me" in body
    fences = [token.content for token in tokens if token.type == "fence"]
    assert {prompt.template, prompt.example + "\n", prompt.response + "\n"} <= set(fences)


def table_rows(tokens: list[Any]) -> list[list[str]]:
    rows: list[list[str]] = []
    for index, token in enumerate(tokens):
        if token.type == "tr_open":
            rows.append([])
        if token.type in ("td_open", "th_open"):
            rows[-1].append(tokens[index + 1].content)
    return rows


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        (f"token={TOKEN}.", "token=***."),
        ("at /home/alice/a b/c", "at a b/c"),
        ("'/Users/al/x/rows.jsonl'", "'rows.jsonl'"),
        ("C:\\Users\\al\\rows.jsonl", "rows.jsonl"),
        (
            "/root" + "/.cache/x and https://huggingface.co/google/gemma-2b",
            "x and https://huggingface.co/google/gemma-2b",
        ),
        ("hf_hub_download of sk-learn", "hf_hub_download of sk-learn"),
        ("https://example.com/home/x and file:///home/alice/x.txt", "https://example.com/home/x and file://x.txt"),
    ],
)
def test_masking(text: str, masked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for home in ("/home/alice", "/", "/srv/alice"):
        monkeypatch.setenv("HOME", home)
        assert mask_private(text) == masked
        assert mask_private(masked) == masked
    assert mask_private("in /srv/alice/models/x") == "in x"
