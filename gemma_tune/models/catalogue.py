"""Every Gemma that can be asked for by name; the rows are in catalogue.toml."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from gemma_tune.errors import ModelError
from gemma_tune.models.config import TextConfig, check_config, read_config
from gemma_tune.models.describe import count_params
from gemma_tune.paths import TINY_MODEL_DIR, read_table
from gemma_tune.text import did_you_mean

Modality = Literal["text", "text+image", "text+image+audio"]

TINY = "gemma-tiny"
LORA_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NOT_KNOWN = "not known"
LIST_HINT = "`gemma-tune models list` shows every name; a directory or a hub id owner/name works, too."

_TABLES: dict[str, dict[str, Any]] = read_table("models/catalogue.toml")
# Name → config.json, as the hub has it.
ARCHITECTURES: dict[str, Mapping[str, Any]] = _TABLES["architectures"]
# Name of a licence → its id on the hub, which model cards and GGUF metadata are written with.
LICENCE_IDS: dict[str, str] = {row["name"]: row["id"] for row in _TABLES["licences"].values()}
# Name of a licence → the sentence that it prescribes for what is made from a model.
LICENCE_NOTICES: dict[str, str] = {
    row["name"]: row["notice"] for row in _TABLES["licences"].values() if "notice" in row
}


@dataclass(frozen=True)
class GemmaModel:
    """One row of the catalogue. None means "not known", and for `gemma-tiny`, which is on no hub, "there is none".

    `architecture` is a key of ARCHITECTURES (`gemma-tiny` is read from its own files). `num_checkpoint_params` counts
    the whole checkpoint with the towers for images and audio; `num_params` is the text model alone. `mirror_16bit` and
    `mirror_4bit` (bitsandbytes NF4) are repositories that need no accepted licence to download; the licence holds
    there, too. `text_prefix` is the module path under which the text model's `layers` are: LoRA targets must be looked
    for there, because the towers of a multimodal checkpoint use the same module names.
    """

    name: str
    architecture: str
    hub_id: str | None
    is_instruction_tuned: bool
    modality: Modality
    stop_tokens: tuple[str, ...]
    licence: str
    licence_url: str | None
    is_gated: bool
    mirror_16bit: str | None
    mirror_4bit: str | None
    other_mirrors: tuple[str, ...]
    keras_presets: tuple[str, ...]
    num_checkpoint_params: int | None
    text_prefix: str
    note: str | None

    @property
    def config(self) -> TextConfig:
        """The architecture. Raises ModelError when the files of `gemma-tiny` are missing."""
        return read_config(TINY_MODEL_DIR) if self.name == TINY else _architecture(self.architecture)

    @property
    def family(self) -> str:
        return self.config.family

    @property
    def num_params(self) -> int:
        """Parameters of the text model, tied embedding counted once."""
        return count_params(self.config)

    @property
    def location(self) -> str:
        """What `from_pretrained` takes: a directory for `gemma-tiny`, else the hub id."""
        return str(TINY_MODEL_DIR) if self.hub_id is None else self.hub_id

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that `find_model` answers to."""
        ids = (self.hub_id, self.mirror_16bit, self.mirror_4bit, *self.other_mirrors)
        return (self.name, *(name for name in ids if name is not None), *self.keras_presets)


@functools.cache
def _architecture(name: str) -> TextConfig:
    return check_config(ARCHITECTURES[name], f"catalogue {name}")


def _read_row(name: str, entry: Mapping[str, Any]) -> GemmaModel:
    """Read a row; what it leaves out follows from its name."""
    hub_name = entry.get("hub", name)
    is_instruction_tuned = name.endswith("-it")
    modality: Modality = entry.get("modality", "text")
    licence = _TABLES["licences"][entry.get("licence", "gemma")]
    mirrors = [f"unsloth/{hub_name}{suffix}" for suffix in entry.get("mirrors", ())]
    return GemmaModel(
        name=name,
        architecture=entry.get("architecture", name.removesuffix("-it")),
        hub_id=f"google/{hub_name}" if hub_name else None,
        is_instruction_tuned=is_instruction_tuned,
        modality=modality,
        stop_tokens=tuple(_TABLES["stop_tokens"][entry.get("stops", "turn" if is_instruction_tuned else "base")]),
        licence=licence["name"],
        licence_url=licence["url"],
        is_gated=licence.get("is_gated", False),
        mirror_16bit=next(iter(mirrors), None),
        mirror_4bit=next(iter(mirrors[1:]), None),
        other_mirrors=tuple(mirrors[2:]),
        keras_presets=tuple(entry.get("keras", ())),
        num_checkpoint_params=entry.get("params"),
        text_prefix="model" if modality == "text" else "model.language_model",
        note=_TABLES["notes"][entry["note"]] if "note" in entry else None,
    )


MODELS: dict[str, GemmaModel] = {name: _read_row(name, entry) for name, entry in _TABLES["models"].items()}


@functools.cache
def _names() -> dict[str, tuple[GemmaModel, str | None]]:
    """Lower-case name → (row, repository where it is not the row's own). A mirror's name loads the mirror."""
    names: dict[str, tuple[GemmaModel, str | None]] = {}
    for model in MODELS.values():
        for name in model.names:
            names[name.lower()] = (model, name if "/" in name else None)
    # The hub's own name without its owner (gemma-3-1b-pt), where it is not a short name already.
    for model in MODELS.values():
        if model.hub_id is not None:
            names.setdefault(model.hub_id.split("/")[1].lower(), (model, None))
    return names


def look_up(name: str) -> tuple[GemmaModel, str] | None:
    """Return the row of a short name, hub id, mirror id or Keras preset, in any case, and where its files are."""
    found = _names().get(name.strip().lower())
    return found and (found[0], found[1] or found[0].location)


def find_model(name: str) -> GemmaModel:
    """Return the row as `look_up` finds it. Raises ModelError."""
    found = look_up(name)
    if found is None:
        raise unknown_name(name)
    return found[0]


def unknown_name(name: str) -> ModelError:
    """Return the error that names the nearest known name."""
    near = did_you_mean(name.lower(), _names())
    return ModelError(f"no Gemma is known by the name {name!r}", hint=f"{near} {LIST_HINT}".lstrip())


def describe_config(config: TextConfig) -> list[tuple[str, str]]:
    """Return the architecture as (label, text) pairs to print."""
    first = config.layers[0]
    full = next(layer for layer in reversed(config.layers) if layer.attention == "full" or layer is first)
    is_mixed = (full.head_dim, full.num_kv_heads) != (config.head_dim, config.num_kv_heads)
    kind = {1: "multi-query", config.num_heads: "multi-head"}.get(config.num_kv_heads, "grouped-query")
    heads = f"{config.num_heads} heads, {config.num_kv_heads} for keys and values ({kind})"
    facts = [
        ("Family", f"{config.family} (model_type {config.model_type})"),
        ("Layers", str(config.num_layers)),
        ("Attention", heads),
        ("Head size", f"{config.head_dim}"),
        ("Width", str(config.hidden_size)),
        ("FFN width", str(config.intermediate_size)),
        ("Activation", f"{config.activation}, gated (GeGLU)"),
        ("Norm", config.norm),
        ("RoPE base", f"{config.rope_theta:,.0f}" + (f" ({config.rope_scaling})" if config.rope_scaling else "")),
        ("Context", f"{config.context_tokens:,} tokens"),
        ("Vocabulary", f"{config.vocab_size:,}"),
        ("Embeddings", "tied with the head" if config.has_tied_embeddings else "apart from the head"),
    ]
    # What only some Gemmas have: label, a value that is None or 0 without it, text.
    full_shape = f"head size {full.head_dim}, {full.num_kv_heads} heads for keys and values"
    sliding = f"{config.num_sliding_layers} of {config.num_layers} layers, {config.sliding_window} tokens"
    experts = f"{config.num_experts} of width {config.expert_intermediate_size}, {config.num_experts_per_token} a token"
    optional: tuple[tuple[str, object, str], ...] = (
        ("Full attention", is_mixed, full_shape),
        ("Sliding window", config.sliding_window, sliding),
        ("RoPE base, sliding", config.rope_local_theta, "{:,.0f}"),
        ("Query scale", config.query_pre_attn_scalar, "{:g} ** -0.5"),
        ("Soft-cap, attention", config.attention_softcap, "{:g}"),
        ("Soft-cap, logits", config.final_softcap, "{:g}"),
        ("Per-layer embeddings", config.per_layer_hidden_size, f"{config.per_layer_vocab_size} × {{}} a layer"),
        ("Shared keys and values", config.num_kv_shared_layers, "last {} layers"),
        ("Experts", config.num_experts, experts),
        ("Quantized", config.quantization, "{}"),
    )
    facts += [(label, text.format(value)) for label, value, text in optional if value]
    facts.append(("Parameters, text model", f"{count_params(config):,}"))
    return facts


def describe_model(model: GemmaModel) -> list[tuple[str, str]]:
    """Return a row as (label, text) pairs to print; what is not known says so."""

    def text(value: str | None) -> str:
        return NOT_KNOWN if value is None else value

    facts = [
        ("Name", model.name),
        ("Hub id", "ships with gemma-tune" if model.name == TINY else text(model.hub_id)),
        ("Tuning", "instruction-tuned" if model.is_instruction_tuned else "base"),
        ("Modality", model.modality),
        *describe_config(model.config),
    ]
    if model.modality != "text":
        count = model.num_checkpoint_params
        facts.append(("Parameters, checkpoint", NOT_KNOWN if count is None else f"{count:,}"))
    if model.name != TINY:
        facts += [
            ("Ungated mirror, 16-bit", text(model.mirror_16bit)),
            ("Ungated mirror, 4-bit", ", ".join(filter(None, (model.mirror_4bit, *model.other_mirrors))) or NOT_KNOWN),
            ("Keras presets", ", ".join(model.keras_presets) or NOT_KNOWN),
            ("Gated", "yes, accept the licence on the model's page and log in" if model.is_gated else "no"),
        ]
    facts += [
        ("Licence", model.licence if model.licence_url is None else f"{model.licence}, {model.licence_url}"),
        ("Stop tokens", " ".join(model.stop_tokens)),
        ("LoRA targets", ", ".join(LORA_PROJECTIONS)),
        ("LoRA scope", f"{model.text_prefix}.layers"),
    ]
    if model.note:
        facts.append(("Note", model.note))
    return facts
