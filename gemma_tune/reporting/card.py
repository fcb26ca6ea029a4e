"""Build README.md of an exported directory: a model card that the hub reads, made of what the run recorded.

What leaves the machine is an allow-list: settings and figures of the recipe, the data's public labels, hashes. Sources,
paths, overrides, output directories and the machine's name are never read into it, and what looks like a secret or a
path of a home folder is masked in the whole text (S5). The template escapes text of a user.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PureWindowsPath
from typing import Any

from gemma_tune.disk import read_json
from gemma_tune.engines.engine_facts import ENGINES
from gemma_tune.models.catalogue import LICENCE_IDS
from gemma_tune.models.fetch import LocalModel
from gemma_tune.recipe.load import load_recipe
from gemma_tune.recipe.schema import Recipe
from gemma_tune.reporting.markdown import MARKDOWN_FILTERS
from gemma_tune.reporting.pages import TEMPLATES_DIR
from gemma_tune.runs.layout import RunDir
from gemma_tune.runs.lock import read_lock
from gemma_tune.runs.summary import RunSummary, read_summary
from gemma_tune.secrets import mask_private
from gemma_tune.templates import render_template
from gemma_tune.yaml_io import dump_yaml

CARD_FILE = "README.md"
# Stands for the repository's name, which is not known before it is pushed.
REPOSITORY = "OWNER/NAME"

# ISO 639-1, for rows whose language is on record.
_LANGUAGES = {"databricks/databricks-dolly-15k": "en", "tiny-world": "en"}
_HUB_DATASET = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)\[[^\]]*\]")
_SECTIONS = ("model", "lora", "data", "training", "evaluation")
# These hold names of files or hub ids as the user wrote them; the card has the labels of what was read instead.
_LEFT_OUT = {"model": {"name", "revision"}, "data": {"source", "mix", "eval_source", "template", "cache"}}


@dataclass(frozen=True)
class CardFormat:
    """What a card says of an export format."""

    about: str  # what the files are, a phrase behind "This is"
    usage: str | None = None  # template of the commands and code that use it; None: the card has none
    library: str | None = None  # as the hub calls it; None where it knows none
    tags: tuple[str, ...] = ()  # of the hub, besides those of every card
    is_adapter: bool = False  # it is loaded on top of its base
    is_quantized: bool = False  # its weights are rounded


@dataclass(frozen=True)
class CardPrompt:
    """The form of a prompt."""

    template: str  # the parts of the data template that decide it, as YAML
    in_chat_turns: bool  # whether the model's own chat template is around these
    # example, response: a row of nobody's, such as the template's own example, as text; without BOS and stop token
    example: str
    response: str


@dataclass(frozen=True)
class CardExport:
    """The export that a card is for."""

    format: CardFormat
    base: LocalModel  # the base model that the run's lock names
    prompt: CardPrompt
    files: Sequence[str] = ()  # names of the exported files; a GGUF's and a Modelfile's are needed for their commands
    notes: Sequence[str] = ()  # what a user must know to run them, a sentence each
    checks: Sequence[str] = ()  # what the export was compared with and came out, a sentence each
    # hub id of the same fine-tune in 16 bits. Without it a quantized export counts as a fine-tune of the base, because
    # the hub would list it among the base's own quantizations.
    quantized_from: str | None = None


def build_model_card(run: RunDir, export: CardExport) -> str:
    """Return the text of README.md.

    Raises:
        RunError: the run lacks its lock, data report or recipe.
    """
    facts = _Facts(
        export=export,
        lock=read_lock(run),
        data=read_json(run.data_report),
        recipe=load_recipe(run.resolved_recipe).recipe,
        summary=read_summary(run) if run.summary.is_file() else None,
    )
    values = {
        "facts": facts,
        "repository": REPOSITORY,
        "front_matter": _front_matter(facts),
        "recipe_yaml": _recipe_yaml(facts.recipe),
    }
    return mask_private(
        render_template(TEMPLATES_DIR / "card.md.j2", values, filters={**MARKDOWN_FILTERS, "repr": repr})
    )


@dataclass(frozen=True)
class _Facts:
    export: CardExport
    lock: Mapping[str, Any]
    data: Mapping[str, Any]
    recipe: Recipe
    summary: RunSummary | None

    @property
    def base(self) -> LocalModel:
        return self.export.base

    @property
    def base_hub_id(self) -> str | None:
        """None for a local directory, whose name means nothing to others, and for the embedded model."""
        if self.base.model is not None:
            return self.base.name if "/" in self.base.name else self.base.model.hub_id
        return self.base.name if self.base.revision else None

    @property
    def base_name(self) -> str:
        return self.base_hub_id or (self.base.model.name if self.base.model else self.base.directory.name)

    @property
    def title(self) -> str:
        """Of public parts only: a run's own name may be anybody's."""
        return f"{PureWindowsPath(self.base_name).name}-{self.data['sources'][0]['template']}"

    @property
    def local_name(self) -> str:
        """The title in the characters of a name of Ollama's."""
        return re.sub(r"[^a-z0-9._-]+", "-", self.title.lower())

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
    """Cut a path to its last name; sources are labelled by the names of their files already."""
    return PureWindowsPath(label).name if re.match(r"[/\\~.]|[A-Za-z]:", label) else label


def _front_matter(facts: _Facts) -> str:
    from huggingface_hub import ModelCardData

    export = facts.export
    quantized_from = export.quantized_from if export.format.is_quantized else None
    base_model = quantized_from or facts.base_hub_id
    relation = "adapter" if export.format.is_adapter else "quantized" if quantized_from else "finetune"
    languages = {_LANGUAGES.get(name) for name in (*facts.hub_datasets, *(lb.partition("[")[0] for lb in facts.labels))}
    card = ModelCardData(
        base_model=base_model,
        base_model_relation=relation if base_model else None,
        datasets=facts.hub_datasets or None,
        eval_results=_eval_results(facts) or None,
        language=sorted(filter(None, languages)) or None,
        library_name=export.format.library,
        license=facts.licence,
        model_name=facts.title,
        pipeline_tag="text-generation",
        tags=[
            *("gemma", "gemma-tune", "qlora" if facts.recipe.model.load_in_4bit else "lora", "trl", "sft"),
            *(engine.tags if (engine := ENGINES.get(facts.lock["engine"]["name"])) else ()),
            *(["conversational"] if export.prompt.in_chat_turns else []),
            *export.format.tags,
        ],
    )
    return card.to_yaml()


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


def _recipe_yaml(recipe: Recipe) -> str:
    values = recipe.model_dump(mode="json")
    public = {
        section: {key: value for key, value in values[section].items() if key not in _LEFT_OUT.get(section, ())}
        for section in _SECTIONS
    }
    return dump_yaml(public)
