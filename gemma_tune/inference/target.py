"""What a name or path stands for when it is asked something: a run, an adapter, a merged directory, a GGUF or a model.

No heavy imports: a wrong path is reported at once.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_tune.data.rows.template import DataTemplate, load_template
from gemma_tune.errors import ModelError
from gemma_tune.identity import file_stamp, files_sha256
from gemma_tune.models.directory import require_recorded
from gemma_tune.models.fetch import LocalModel, fetch_model
from gemma_tune.models.resolve import resolve
from gemma_tune.recipe.load import load_recipe
from gemma_tune.recipe.schema import ModelSection
from gemma_tune.runs.adapter_base import find_base
from gemma_tune.runs.adapter_dir import TEMPLATE_FILE, AdapterDir, open_run_adapter, trained_template
from gemma_tune.runs.layout import RunDir, open_run


@dataclass(frozen=True)
class Target:
    """A model to ask."""

    base: LocalModel  # the base model's files
    adapter: Path | None  # directory of the adapter on top of it, or None
    tokenizer: Path  # directory of the tokenizer and its chat template
    template: DataTemplate  # the data template it was trained with, or that fits it
    section: ModelSection  # how the base is loaded
    note: str | None = None  # what of the base could not be compared with the adapter's training, in a sentence

    def identity(self) -> dict[str, Any]:
        """Return what decides its answers: adapter by hash, the base's by stamp (17 GB take a minute to hash)."""
        return {
            "template": self.template.sha256,
            "base": self.base.name,
            "revision": self.base.revision,
            "weights": {path.name: file_stamp(path) for path in sorted(self.base.directory.glob("*.safetensors"))},
            "load_in_4bit": self.section.load_in_4bit,
            "dtype": self.section.dtype,
            "adapter": files_sha256(sorted(self.adapter.glob("adapter_*"))) if self.adapter else {},
        }


@dataclass(frozen=True)
class GgufTarget:
    """A GGUF file, which llama.cpp runs."""

    path: Path
    # the one that was named, else the one that lies next to the file, where an export puts it, else `chat`
    template: DataTemplate
    note: None = None  # there is no adapter

    def identity(self) -> dict[str, Any]:
        """Return what decides its answers."""
        return {"template": self.template.sha256, "weights": {self.path.name: file_stamp(self.path)}}


def find_target(
    name: str, *, template: str | None = None, default_template: str | None = None, without_adapter: bool = False
) -> Target | GgufTarget:
    """Resolve what the user named.

    Args:
        template: data template to ask with instead of the target's own.
        default_template: the one for a model that does not say which; None refuses such a model.
        without_adapter: take the base of a run.

    Raises:
        GemmaTuneError: there is no such run or model, the run has no adapter yet, or no template is known.
    """
    named = resolve(name)
    if named.kind == "gguf-file":
        return _from_gguf(named.path, template=template, without_adapter=without_adapter)
    if named.kind == "run":
        return _from_run(open_run(named.path), template=template, without_adapter=without_adapter)
    if named.kind == "adapter":
        adapter = AdapterDir(named.path, ModelError)
        return _from_adapter(adapter, template=template, default=default_template, without_adapter=without_adapter)
    base = fetch_model(name)
    section = ModelSection(name=name, load_in_4bit=base.config.quantization is not None)
    chosen = _template(template, directory=base.directory, base=base, default=default_template)
    return Target(base, None, base.directory, chosen, section)


def _from_gguf(path: Path, *, template: str | None, without_adapter: bool) -> GgufTarget:
    if without_adapter:
        raise ModelError(f"{path} holds one merged model, whose base cannot be asked", hint="name the run instead")
    require_recorded(path.parent, only=(path.name, TEMPLATE_FILE))
    neighbor = path.with_name(TEMPLATE_FILE)
    return GgufTarget(path, load_template(template or (neighbor if neighbor.is_file() else "chat")))


def _from_run(run: RunDir, *, template: str | None, without_adapter: bool) -> Target:
    adapter = None if without_adapter else open_run_adapter(run).path
    recipe = load_recipe(run.resolved_recipe).recipe
    found = find_base(AdapterDir(run.adapter, ModelError), with_adapter=not without_adapter)
    return Target(
        base=found.model,
        adapter=adapter,
        tokenizer=adapter or found.model.directory,
        template=load_template(template or trained_template(run)),
        section=recipe.model,
        note=found.note,
    )


def _from_adapter(adapter: AdapterDir, *, template: str | None, default: str | None, without_adapter: bool) -> Target:
    hint = "set base_model_name_or_path in its adapter_config.json"
    found = find_base(adapter, with_adapter=not without_adapter, hint=hint)
    base = found.model
    return Target(
        base=base,
        adapter=None if without_adapter else adapter.path,
        tokenizer=base.directory if without_adapter else adapter.choose_tokenizer(base.directory),
        template=_template(template, directory=adapter.path, base=base, default=default),
        section=ModelSection(name=base.name, load_in_4bit=base.config.quantization is not None),
        note=found.note,
    )


def _template(name: str | None, *, directory: Path, base: LocalModel, default: str | None = None) -> DataTemplate:
    """The named template, else the one that lies next to the weights, else Gemma's turns for an `-it` model."""
    if name is not None:
        return load_template(name)
    if (directory / TEMPLATE_FILE).is_file():
        return load_template(directory / TEMPLATE_FILE)
    if base.model is not None and base.model.is_instruction_tuned:
        return load_template("chat")
    if default is not None:
        return load_template(default)
    raise ModelError(
        f"{base.name} does not say which data template it is asked with",
        hint="name one with --template: dolly for plain instructions, chat for the model's own turns, completion "
        "for bare text",
    )
