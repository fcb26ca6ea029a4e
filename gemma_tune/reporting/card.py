"""README.md of an exported directory: a model card that the hub reads, made of what the run recorded.

What leaves the machine is an allow-list: settings and figures of the recipe, the data's public labels, hashes. Sources,
paths, overrides, output directories and the machine's name are never read into it, and what looks like a secret or a
path of a home folder is masked in the whole text (S5). Text of a user is escaped where it stands in Markdown.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PureWindowsPath
from typing import Any, Literal

from ruamel.yaml import YAML

from gemma_tune.models.catalogue import LICENCE_IDS
from gemma_tune.models.fetch import LocalModel
from gemma_tune.recipe.load import load_recipe
from gemma_tune.recipe.schema import Recipe
from gemma_tune.reporting.markdown import escaped, fenced, table
from gemma_tune.runs.layout import RunDir
from gemma_tune.runs.record import read_json
from gemma_tune.runs.summary import RunSummary, read_summary

ExportFormat = Literal["adapter", "merged-16bit", "merged-4bit", "gguf"]

CARD_FILE = "README.md"
# Stands for the repository's name, which is not known before it is pushed.
REPOSITORY = "OWNER/NAME"

_WHAT = {
    "adapter": "a LoRA adapter in PEFT's format, to be loaded on top of its base model",
    "merged-16bit": "the whole model: the adapter is merged into the base's 16-bit weights",
    "merged-4bit": "the whole model, merged in 16 bits and then quantized to bitsandbytes NF4",
    "gguf": "the whole model, merged in 16 bits and written as GGUF for llama.cpp, Ollama and LM Studio",
}
_LIBRARY = {"adapter": "peft", "merged-16bit": "transformers", "merged-4bit": "transformers"}
_TAGS: Mapping[str, tuple[str, ...]] = {"merged-4bit": ("bitsandbytes", "4-bit"), "gguf": ("gguf", "llama.cpp")}
# ISO 639-1, for rows whose language is on record.
_LANGUAGES = {"databricks/databricks-dolly-15k": "en", "tiny-world": "en"}
_HUB_DATASET = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)\[[^\]]*\]")
_SECTIONS = ("model", "lora", "data", "training", "evaluation")
# These hold names of files or hub ids as the user wrote them; the card has the labels of what was read instead.
_LEFT_OUT = {"model": {"name", "revision"}, "data": {"source", "mix", "eval_source", "template", "cache"}}

_SECRET_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_TOKEN", "WANDB_API_KEY", "KAGGLE_KEY")
_SECRET = re.compile(r"\b(?:hf_|api_org_|sk-|ghp_|github_pat_|xox[abprs]-)[A-Za-z0-9_-]{16,}|\bAKIA[A-Z0-9]{16}\b")
# Not behind a letter, where it is a part of a web address.
_HOMES = r"(?<![\w.-])(?:/home/|/Users/|/root/|[A-Za-z]:\\+Users\\+)"
_REST_OF_PATH = r"[^\s\"'`|<>()]*"


@dataclass(frozen=True)
class CardPrompt:
    """The form of a prompt.

    Attributes:
        template: the parts of the data template that decide it, as YAML.
        in_chat_turns: whether the model's own chat template is around these.
        example, response: a row of nobody's, such as the template's own example, as text; without BOS and stop token.
    """

    template: str
    in_chat_turns: bool
    example: str
    response: str


def build_model_card(
    run: RunDir,
    *,
    export_format: ExportFormat,
    base: LocalModel,
    prompt: CardPrompt,
    files: Sequence[str] = (),
    checks: Sequence[str] = (),
    quantized_from: str | None = None,
) -> str:
    """The text of README.md.

    Args:
        base: the base model that the run's lock names.
        files: names of the exported files; a GGUF's and a Modelfile's are needed for their commands.
        checks: what the export was compared with and came out, a sentence each.
        quantized_from: hub id of the same fine-tune in 16 bits. Without it a quantized export counts as a fine-tune of
            the base, because the hub would list it among the base's own quantizations.

    Raises:
        RunError: the run lacks its lock, data report or recipe.
    """
    facts = _Facts(
        export_format=export_format,
        base=base,
        lock=read_json(run.lock),
        data=read_json(run.data_report),
        recipe=load_recipe(run.resolved_recipe).recipe,
        summary=read_summary(run) if run.summary.is_file() else None,
        prompt=prompt,
        files=tuple(files),
        checks=tuple(checks),
    )
    body = "\n".join(
        [
            f"# {escaped(facts.title)}",
            "",
            f"This is {_WHAT[export_format]}: {escaped(facts.base_name)}, fine-tuned on "
            f"{escaped(', '.join(facts.labels))} with gemma-tune.",
            "",
            *_results(facts),
            *_usage(facts),
            *_prompt(facts),
            *_training(facts),
            *_limits(facts),
            *_licence(facts),
        ]
    )
    front = mask_private(_front_matter(facts, quantized_from=quantized_from))
    return f"---\n{front}---\n\n{mask_private(body)}\n"


def mask_private(text: str) -> str:
    """The text with secrets as `***` and paths below a home folder cut to their last name."""
    for name in _SECRET_VARIABLES:
        value = os.environ.get(name, "")
        if len(value) >= 8:
            text = text.replace(value, "***")
    text = _SECRET.sub("***", text)
    home = os.path.expanduser("~")
    starts = [_HOMES] if home in ("~", "/") else [_HOMES, re.escape(f"{home}/")]
    for start in starts:
        text = re.sub(start + _REST_OF_PATH, lambda found: _last_name(found[0]), text)
    return text


def _last_name(path: str) -> str:
    return PureWindowsPath(path).name  # knows both slashes


@dataclass(frozen=True)
class _Facts:
    export_format: ExportFormat
    base: LocalModel
    lock: Mapping[str, Any]
    data: Mapping[str, Any]
    recipe: Recipe
    summary: RunSummary | None
    prompt: CardPrompt
    files: tuple[str, ...]
    checks: tuple[str, ...]

    @property
    def base_hub_id(self) -> str | None:
        """None for a local directory, whose name says nothing to others, and for the embedded model."""
        if self.base.model is not None:
            return self.base.name if "/" in self.base.name else self.base.model.hub_id
        return self.base.name if self.base.revision else None

    @property
    def base_name(self) -> str:
        return self.base_hub_id or (self.base.model.name if self.base.model else self.base.directory.name)

    @property
    def title(self) -> str:
        """Of public parts only: a run's own name may be anybody's."""
        return f"{_last_name(self.base_name)}-{self.data['sources'][0]['template']}"

    @property
    def labels(self) -> list[str]:
        return list(dict.fromkeys(_public_label(source["label"]) for source in self.data["sources"]))

    @property
    def hub_datasets(self) -> list[str]:
        return [found["id"] for label in self.labels if (found := _HUB_DATASET.fullmatch(label))]

    @property
    def licence(self) -> str | None:
        """The hub's name of the base's licence; None where it is not on record."""
        return LICENCE_IDS[self.base.model.licence] if self.base.model else None


def _public_label(label: str) -> str:
    """Sources are labelled by the names of their files already; a path would lose its folders here."""
    return _last_name(label) if re.match(r"[/\\~.]|[A-Za-z]:", label) else label


# --- what the hub reads -----------------------------------------------------------------------------------------------


def _front_matter(facts: _Facts, *, quantized_from: str | None) -> str:
    from huggingface_hub import ModelCardData

    is_quantized = facts.export_format in ("gguf", "merged-4bit") and quantized_from is not None
    languages = {_LANGUAGES.get(name) for name in (*facts.hub_datasets, *(lb.partition("[")[0] for lb in facts.labels))}
    base_model = quantized_from if is_quantized else facts.base_hub_id
    relation = "adapter" if facts.export_format == "adapter" else "quantized" if is_quantized else "finetune"
    card = ModelCardData(
        base_model=base_model,
        base_model_relation=relation if base_model else None,
        datasets=facts.hub_datasets or None,
        eval_results=_eval_results(facts) or None,
        language=sorted(filter(None, languages)) or None,
        library_name=_LIBRARY.get(facts.export_format),
        license=facts.licence,
        model_name=facts.title,
        pipeline_tag="text-generation",
        tags=_tags(facts),
    )
    return card.to_yaml() + "\n"


def _tags(facts: _Facts) -> list[str]:
    quantized = facts.recipe.model.load_in_4bit
    return [
        "gemma",
        "gemma-tune",
        "qlora" if quantized else "lora",
        "trl",
        "sft",
        *(["unsloth"] if facts.lock["engine"]["name"] == "unsloth" else []),
        *(["conversational"] if facts.prompt.in_chat_turns else []),
        *_TAGS.get(facts.export_format, ()),
    ]


def _eval_results(facts: _Facts) -> list[Any]:
    from huggingface_hub import EvalResult

    if facts.summary is None:
        return []
    measured = {
        ("loss", f"loss of {facts.summary.eval_rows} held-out rows, nats a token"): facts.summary.eval_loss_after,
        ("exact_match", f"exact match of {facts.summary.exact_match_rows} held-out rows"): (
            facts.summary.exact_match_after
        ),
    }
    label = _public_label(facts.data["eval_label"] or facts.labels[0])
    hub = _HUB_DATASET.fullmatch(label)
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=hub["id"] if hub else label,
            dataset_name=label,
            metric_type=metric,
            metric_name=name,
            metric_value=value,
        )
        for (metric, name), value in measured.items()
        if value is not None
    ]


# --- what a person reads ----------------------------------------------------------------------------------------------


def _results(facts: _Facts) -> list[str]:
    lines = []
    if facts.summary is not None:
        summary = facts.summary
        rows = [
            (f"loss, {summary.eval_rows:,} rows", summary.eval_loss_before, summary.eval_loss_after, ".3f"),
            (
                f"exact match, {summary.exact_match_rows:,} rows",
                summary.exact_match_before,
                summary.exact_match_after,
                ".1%",
            ),
        ]
        measured = [
            (what, format(before, form) if before is not None else "—", format(after, form))
            for what, before, after, form in rows
            if after is not None
        ]
        if measured:
            lines += ["## Held-out rows, before and after", ""]
            lines += [*table(("", "base", "fine-tuned"), measured), ""]
    if facts.checks:
        lines += ["## Checked after the export", "", *(f"- {escaped(check)}" for check in facts.checks), ""]
    return lines


def _usage(facts: _Facts) -> list[str]:
    lines = ["## How to use it", ""]
    for title, language, code in _SNIPPETS[facts.export_format](facts):
        lines += [f"{title}:", "", *fenced(code, language), ""]
    return lines


def _prompt(facts: _Facts) -> list[str]:
    turns = (
        "A row becomes messages by this data template, and these become text by the model's own chat template:"
        if facts.prompt.in_chat_turns
        else "A row becomes a prompt and a response by this data template:"
    )
    return [
        "## The prompt it was trained on",
        "",
        turns,
        "",
        *fenced(facts.prompt.template, "yaml"),
        "",
        "Its example as the model is asked it (the tokenizer puts one `<bos>` before it):",
        "",
        *fenced(facts.prompt.example, "text"),
        "",
        "and as it is to be answered, followed by the stop token:",
        "",
        *fenced(facts.prompt.response, "text"),
        "",
    ]


def _training(facts: _Facts) -> list[str]:
    recipe, lock, data = facts.recipe, facts.lock, facts.data
    revision = f", revision {facts.base.revision}" if facts.base.revision else ""
    rows: list[tuple[str, str]] = [("base", f"{facts.base_name}{revision}")]
    rows += [
        (f"sha256 of the base's {name}", digest) for name, digest in lock["base"]["files"].items() if _is_weight(name)
    ]
    rows += [
        ("rows", f"{', '.join(facts.labels)}: {data['train_rows']:,} trained, {data['eval_rows']:,} held out"),
        ("sha256 of the rows", data["sha256"]),
        ("LoRA", f"rank {recipe.lora.rank}, alpha {recipe.lora.alpha:g} on {', '.join(recipe.lora.targets)}"),
        ("quantization while training", _quantization(recipe)),
        ("precision", lock["precision"]["compute"]),
        ("seed", str(lock["seed"])),
        ("hardware", lock["hardware"]["name"]),
        ("software", ", ".join(f"{name} {version}" for name, version in lock["packages"].items() if version)),
    ]
    if facts.summary is not None:
        tokens = f"{facts.summary.num_tokens:,} tokens in {facts.summary.training_seconds:,.0f} s"
        rows.append(("training", f"{facts.summary.steps:,} steps, {tokens}"))
    return [
        "## How it was made",
        "",
        *table(("", ""), rows),
        "",
        "Every setting of the recipe that changes the result, defaults included:",
        "",
        *fenced(_recipe_yaml(recipe), "yaml"),
        "",
    ]


def _limits(facts: _Facts) -> list[str]:
    limits = [
        "It knows what its base knows, with the same errors and biases; its safety was not tested.",
        f"It was trained on one form of prompt and on rows of at most {facts.recipe.data.max_seq_tokens:,} tokens.",
    ]
    if facts.summary is not None:
        limits.append("The figures above are of held-out rows of the same data, and of nothing else.")
    if facts.export_format != "adapter" and facts.recipe.model.load_in_4bit:
        limits.append(
            "The adapter was trained on the base in NF4 and is merged into its 16-bit weights, so answers can differ "
            "from those in training."
        )
    if facts.export_format in ("gguf", "merged-4bit"):
        limits.append("Quantized weights are rounded: answers can differ from the 16-bit model's.")
    return ["## Limits", "", *(f"- {limit}" for limit in limits), ""]


def _licence(facts: _Facts) -> list[str]:
    model = facts.base.model
    if facts.licence == "gemma":
        told = (
            "Gemma is provided under and subject to the Gemma Terms of Use found at "
            "[ai.google.dev/gemma/terms](https://ai.google.dev/gemma/terms). They bind this model, too, its use "
            "restrictions included: pass them on with it, and the file NOTICE."
        )
    elif model is not None and model.licence_url:
        told = f"The base is licensed under [{model.licence}]({model.licence_url}), which goes with this model."
    elif facts.licence:
        told = f"The base is given away under {facts.licence}."
    else:
        told = (
            "The licence of the base is not on record here. If it is a Gemma 1, 2 or 3, the "
            "[Gemma Terms of Use](https://ai.google.dev/gemma/terms) bind this model as well."
        )
    return ["## Licence", "", told, "", "The rows that it was trained on have a licence of their own."]


def _is_weight(name: str) -> bool:
    return name.endswith(".safetensors")


def _quantization(recipe: Recipe) -> str:
    return "NF4 (QLoRA)" if recipe.model.load_in_4bit else "LLM.int8()" if recipe.model.load_in_8bit else "none"


def _recipe_yaml(recipe: Recipe) -> str:
    values = recipe.model_dump(mode="json")
    public = {
        section: {key: value for key, value in values[section].items() if key not in _LEFT_OUT.get(section, ())}
        for section in _SECTIONS
    }
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.width = 1_000  # a folded line would be a new one for whoever searches it
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    out = io.StringIO()
    yaml.dump(public, out)
    return out.getvalue()


# --- snippets ---------------------------------------------------------------------------------------------------------


def _transformers_code(facts: _Facts, *, load: str) -> str:
    return f"""\
{load}
prompt = {facts.prompt.example!r}
inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
output = model.generate(**inputs, max_new_tokens=128, do_sample=False)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""


def _adapter_snippets(facts: _Facts) -> list[tuple[str, str, str]]:
    base = facts.base_hub_id or f"path/to/{facts.base_name}"
    revision = f", revision={facts.base.revision!r}" if facts.base.revision else ""
    load = f"""\
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

repository = "{REPOSITORY}"
tokenizer = AutoTokenizer.from_pretrained(repository)
base = AutoModelForCausalLM.from_pretrained({base!r}{revision}, dtype="auto", device_map="auto")
model = PeftModel.from_pretrained(base, repository)
"""
    snippets = [("PEFT", "python", _transformers_code(facts, load=load)), _unsloth_snippet(facts)]
    # vLLM serves plain LoRA only.
    if not facts.recipe.lora.use_dora and not facts.recipe.lora.modules_to_save:
        serve = f"vllm serve {base} --enable-lora --lora-modules tuned={REPOSITORY}"
        snippets.append(("vLLM", "sh", f"{serve} --max-lora-rank {facts.recipe.lora.rank}\n"))
    return snippets


def _whole_snippets(facts: _Facts) -> list[tuple[str, str, str]]:
    load = f"""\
from transformers import AutoModelForCausalLM, AutoTokenizer

repository = "{REPOSITORY}"
tokenizer = AutoTokenizer.from_pretrained(repository)
model = AutoModelForCausalLM.from_pretrained(repository, dtype="auto", device_map="auto")
"""
    return [
        ("transformers", "python", _transformers_code(facts, load=load)),
        _unsloth_snippet(facts),
        ("vLLM", "sh", f"vllm serve {REPOSITORY} --max-model-len {facts.recipe.data.max_seq_tokens}\n"),
    ]


def _unsloth_snippet(facts: _Facts) -> tuple[str, str, str]:
    code = f"""\
from unsloth import FastLanguageModel

model, tokenizer = FastLanguageModel.from_pretrained(
    "{REPOSITORY}", max_seq_length={facts.recipe.data.max_seq_tokens}, load_in_4bit=True
)
FastLanguageModel.for_inference(model)
"""
    return ("Unsloth, in 4 bits", "python", code)


def _gguf_snippets(facts: _Facts) -> list[tuple[str, str, str]]:
    snippets = []
    if "Modelfile" in facts.files:
        name = re.sub(r"[^a-z0-9._-]+", "-", facts.title.lower())
        snippets.append(
            ("Ollama, in the directory of these files", "sh", f"ollama create {name} -f Modelfile\nollama run {name}\n")
        )
    for file in facts.files:
        if file.endswith(".gguf"):
            code = f"""\
from llama_cpp import Llama

model = Llama({file!r}, n_ctx={facts.recipe.data.max_seq_tokens})
prompt = {facts.prompt.example!r}
print(model(prompt, max_tokens=128, temperature=0)["choices"][0]["text"])
"""
            snippets.append(("llama-cpp-python", "python", code))
    return snippets


_SNIPPETS: Mapping[str, Callable[[_Facts], list[tuple[str, str, str]]]] = {
    "adapter": _adapter_snippets,
    "merged-16bit": _whole_snippets,
    "merged-4bit": _whole_snippets,
    "gguf": _gguf_snippets,
}
