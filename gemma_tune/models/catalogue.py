"""Every Gemma that can be asked for by name, and how a name or a path becomes something to load."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gemma_tune.disk import read_json_object
from gemma_tune.errors import ModelError
from gemma_tune.models.config import TextConfig, check_config, read_config
from gemma_tune.models.describe import count_params
from gemma_tune.models.untrusted import check_no_code
from gemma_tune.paths import TINY_MODEL_DIR
from gemma_tune.text import did_you_mean

Modality = Literal["text", "text+image", "text+image+audio"]

TINY = "gemma-tiny"
GEMMA_TERMS = ("Gemma Terms of Use", "https://ai.google.dev/gemma/terms")
APACHE = ("Apache-2.0", "https://ai.google.dev/gemma/docs/gemma_4_license")
OUR_LICENCE = ("CC0 1.0", "https://creativecommons.org/publicdomain/zero/1.0/")
# Name of a licence → its id on the hub, which model cards and GGUF metadata are written with.
LICENCE_IDS = {GEMMA_TERMS[0]: "gemma", APACHE[0]: "apache-2.0", OUR_LICENCE[0]: "cc0-1.0"}
LORA_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NOT_KNOWN = "not known"

_LIST_HINT = "`gemma-tune models list` shows every name; a directory or a hub id owner/name works, too."
# huggingface_hub's rule for a repository id: no part starts or ends with - or ., no -- or .., 96 characters in all.
_HUB_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_]|[.-](?![.-]))*(?<![.-])"
_HUB_ID = re.compile(rf"(?=.{{3,96}}\Z){_HUB_PART}/{_HUB_PART}", re.ASCII)
_CONFIG_FILES = ("tokenizer_config.json", "generation_config.json", "processor_config.json", "preprocessor_config.json")
_MAX_SAFETENSORS_HEADER_BYTES = 100_000_000

# Sizes, written as the hub's config.json says them: what is absent is the class default (see config.py).
# Sources: Gemma 1 google/gemma-2b and gemma-7b (the latter is transformers' GemmaConfig default); Gemma 2 2B
# transformers' Gemma2Config default; Gemma 2, 3, 3n, 4 the tables of transformers'
# src/transformers/models/*/convert_*_weights*.py, save the vocabulary of the multimodal Gemma 3 checkpoints, whose
# text_config leaves it at the default of 262,208; Gemma 4 12B the text_config of google/gemma-4-12B as cited in
# google/tunix pull request 1570 and tenstorrent/tt-xla issue 5255.
# The tests build each one as a transformers model and compare it module by module.
_GEMMA_3_TEXT = {
    "model_type": "gemma3_text",
    "vocab_size": 262_144,
    "sliding_window": 512,
    "max_position_embeddings": 32_768,
}
_GEMMA_3_LONG = {
    "model_type": "gemma3_text",
    "sliding_window": 1024,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}
_GEMMA_4_LARGE = {
    "model_type": "gemma4_text",
    "hidden_size_per_layer_input": 0,
    "attention_k_eq_v": True,
    "use_bidirectional_attention": "vision",
    "sliding_window": 1024,
    "final_logit_softcapping": 30.0,
    "max_position_embeddings": 262_144,
}
ARCHITECTURES: dict[str, Mapping[str, Any]] = {
    "gemma-2b": {
        "model_type": "gemma",
        "hidden_size": 2048,
        "intermediate_size": 16_384,
        "num_hidden_layers": 18,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
    },
    "gemma-7b": {"model_type": "gemma"},
    "gemma-2-2b": {"model_type": "gemma2"},
    "gemma-2-9b": {
        "model_type": "gemma2",
        "hidden_size": 3584,
        "intermediate_size": 14_336,
        "num_hidden_layers": 42,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
    },
    "gemma-2-27b": {
        "model_type": "gemma2",
        "hidden_size": 4608,
        "intermediate_size": 36_864,
        "num_hidden_layers": 46,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "query_pre_attn_scalar": 144,
    },
    "gemma-3-270m": {
        **_GEMMA_3_TEXT,
        "hidden_size": 640,
        "intermediate_size": 2048,
        "num_hidden_layers": 18,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
    },
    "gemma-3-1b": {
        **_GEMMA_3_TEXT,
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
    },
    "gemma-3-4b": {
        "model_type": "gemma3",
        "text_config": {**_GEMMA_3_LONG, "hidden_size": 2560, "intermediate_size": 10_240, "num_hidden_layers": 34},
    },
    "gemma-3-12b": {
        "model_type": "gemma3",
        "text_config": {
            **_GEMMA_3_LONG,
            "hidden_size": 3840,
            "intermediate_size": 15_360,
            "num_hidden_layers": 48,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
        },
    },
    "gemma-3-27b": {
        "model_type": "gemma3",
        "text_config": {
            **_GEMMA_3_LONG,
            "hidden_size": 5376,
            "intermediate_size": 21_504,
            "num_hidden_layers": 62,
            "num_attention_heads": 32,
            "num_key_value_heads": 16,
            "head_dim": 128,
            "query_pre_attn_scalar": 168,
        },
    },
    "gemma-3n-e2b": {
        "model_type": "gemma3n",
        "text_config": {
            "model_type": "gemma3n_text",
            "intermediate_size": 8192,
            "num_hidden_layers": 30,
            "num_kv_shared_layers": 10,
        },
    },
    "gemma-3n-e4b": {"model_type": "gemma3n", "text_config": {"model_type": "gemma3n_text"}},
    "gemma-4-e2b": {
        "model_type": "gemma4",
        "text_config": {
            "model_type": "gemma4_text",
            "hidden_size": 1536,
            "intermediate_size": 6144,
            "num_hidden_layers": 35,
            "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 7,
            "num_key_value_heads": 1,
            "num_kv_shared_layers": 20,
            "use_double_wide_mlp": True,
            "final_logit_softcapping": 30.0,
        },
    },
    "gemma-4-e4b": {
        "model_type": "gemma4",
        "text_config": {
            "model_type": "gemma4_text",
            "hidden_size": 2560,
            "intermediate_size": 10_240,
            "num_hidden_layers": 42,
            "num_key_value_heads": 2,
            "num_kv_shared_layers": 18,
            "final_logit_softcapping": 30.0,
        },
    },
    "gemma-4-12b": {
        "model_type": "gemma4_unified",
        "text_config": {
            "model_type": "gemma4_unified_text",
            "hidden_size": 3840,
            "intermediate_size": 15_360,
            "num_hidden_layers": 48,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "final_logit_softcapping": 30.0,
        },
    },
    "gemma-4-26b-a4b": {
        "model_type": "gemma4",
        "text_config": {
            **_GEMMA_4_LARGE,
            "hidden_size": 2816,
            "intermediate_size": 2112,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "num_global_key_value_heads": 2,
            "enable_moe_block": True,
            "num_experts": 128,
            "top_k_experts": 8,
            "moe_intermediate_size": 704,
        },
    },
    "gemma-4-31b": {
        "model_type": "gemma4",
        "text_config": {
            **_GEMMA_4_LARGE,
            "hidden_size": 5376,
            "intermediate_size": 21_504,
            "num_hidden_layers": 60,
            "num_attention_heads": 32,
            "num_key_value_heads": 16,
            "num_global_key_value_heads": 4,
        },
    },
}


@dataclass(frozen=True)
class GemmaModel:
    """One row of the registry. None means "not known", and for `gemma-tiny`, which is on no hub, "there is none".

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
    lora_targets: tuple[str, ...]
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


@dataclass(frozen=True)
class ModelSource:
    """A resolved model name.

    `location` is handed to `from_pretrained`. `config` is None for a hub id outside the registry: download its
    config.json and pass it to `config.check_config` before anything loads the model.
    """

    kind: Literal["registry", "directory", "hub"]
    location: str
    model: GemmaModel | None
    config: TextConfig | None


@functools.cache
def _architecture(name: str) -> TextConfig:
    return check_config(ARCHITECTURES[name], f"registry {name}")


def _row(
    name: str,
    architecture: str,
    *,
    hub_name: str | None = None,
    stop_tokens: tuple[str, ...] | None = None,
    modality: Modality = "text",
    licence: tuple[str, str] = GEMMA_TERMS,
    mirrors: str | None = None,
    keras: tuple[str, ...] = (),
    num_checkpoint_params: int | None = None,
    note: str | None = None,
) -> GemmaModel:
    """A row of Google's. `hub_name` is `name` unless given; `mirrors` is a key of _MIRROR_SUFFIXES."""
    hub_name = hub_name or name
    is_instruction_tuned = name.endswith("-it")
    suffixes = _MIRROR_SUFFIXES[mirrors] if mirrors else ()
    mirror = f"unsloth/{hub_name}"
    return GemmaModel(
        name=name,
        architecture=architecture,
        hub_id=f"google/{hub_name}",
        is_instruction_tuned=is_instruction_tuned,
        modality=modality,
        stop_tokens=stop_tokens or (_TURN if is_instruction_tuned else _EOS),
        licence=licence[0],
        licence_url=licence[1],
        is_gated=licence == GEMMA_TERMS,
        mirror_16bit=mirror if mirrors else None,
        mirror_4bit=mirror + suffixes[0] if suffixes else None,
        other_mirrors=tuple(mirror + suffix for suffix in suffixes[1:]),
        keras_presets=keras,
        num_checkpoint_params=num_checkpoint_params,
        lora_targets=LORA_PROJECTIONS,
        text_prefix="model" if modality == "text" else "model.language_model",
        note=note,
    )


# Unsloth's repositories as its models/mapper.py (2026.10.9) lists them: the 16-bit copy carries the hub's own name, the
# 4-bit ones these suffixes (the first is the one that Unsloth itself would take).
_MIRROR_SUFFIXES: dict[str, tuple[str, ...]] = {
    "plain": ("-bnb-4bit",),
    "dynamic": ("-unsloth-bnb-4bit",),
    "both": ("-unsloth-bnb-4bit", "-bnb-4bit"),
    "16bit": (),
}
_EOS = ("<eos>",)
_TURN = ("<eos>", "<end_of_turn>")
# Gemma 4's generation_config.json: end of text, end of turn, and the point where the caller has to answer a tool call.
_TURN_4 = ("<eos>", "<turn|>", "<|tool_response>")
# CodeGemma's model card: completion ends at the next file or at any other fill-in-the-middle token.
_CODE = ("<eos>", "<|file_separator|>", "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")

_NOTE_CODE = "Trained on code with fill-in-the-middle."
_NOTE_SHARED = (
    "The last layers take keys and values from earlier ones and have no k_proj and v_proj; "
    "a third to a half of the weights are per-layer embeddings, which are looked up, not multiplied."
)
_NOTE_KEYS = "Full-attention layers have no v_proj: their keys serve as values, too."
_NOTE_EXPERTS = f"{_NOTE_KEYS} The experts are 3-D parameters, which LoRA's seven projections do not reach."


def _tiny_row() -> GemmaModel:
    return GemmaModel(
        name=TINY,
        architecture=TINY,
        hub_id=None,
        is_instruction_tuned=False,
        modality="text",
        stop_tokens=_EOS,
        licence=OUR_LICENCE[0],
        licence_url=OUR_LICENCE[1],
        is_gated=False,
        mirror_16bit=None,
        mirror_4bit=None,
        other_mirrors=(),
        keras_presets=(),
        num_checkpoint_params=None,
        lora_targets=LORA_PROJECTIONS,
        text_prefix="model",
        note="Ships with gemma-tune; made from scratch, shares no weights with Google's models.",
    )


# Hub ids: Google's repositories on huggingface.co. Keras presets: keras_hub/src/models/{gemma,gemma3,gemma4}/
# *_presets.py; KerasHub lists none for Gemma 3n and Gemma 4 12B.
def _gemma_1_rows() -> Iterator[GemmaModel]:
    for size in ("2b", "7b"):
        base = f"gemma-{size}"
        yield _row(base, base, mirrors="plain", keras=(f"gemma_{size}_en",))
        yield _row(f"{base}-it", base, mirrors="plain", keras=(f"gemma_instruct_{size}_en",))
    for size in ("2b", "7b"):
        name = f"gemma-1.1-{size}-it"
        yield _row(name, f"gemma-{size}", mirrors="plain", keras=(f"gemma_1.1_instruct_{size}_en",))
    for size in ("2b", "7b"):
        yield _row(
            f"codegemma-{size}",
            f"gemma-{size}",
            stop_tokens=_CODE,
            mirrors="plain",
            keras=(f"code_gemma_{size}_en",),
            note=_NOTE_CODE,
        )
    yield _row("codegemma-7b-it", "gemma-7b", mirrors="plain", keras=("code_gemma_instruct_7b_en",))
    yield _row("codegemma-1.1-2b", "gemma-2b", stop_tokens=_CODE, keras=("code_gemma_1.1_2b_en",), note=_NOTE_CODE)
    yield _row("codegemma-1.1-7b-it", "gemma-7b", keras=("code_gemma_1.1_instruct_7b_en",))


def _gemma_2_rows() -> Iterator[GemmaModel]:
    for size in ("2b", "9b", "27b"):
        base = f"gemma-2-{size}"
        yield _row(base, base, mirrors="plain", keras=(f"gemma2_{size}_en",))
        yield _row(f"{base}-it", base, mirrors="plain", keras=(f"gemma2_instruct_{size}_en",))


def _gemma_3_rows() -> Iterator[GemmaModel]:
    """Whole checkpoints of 4B and 27B: KerasHub's medgemma_4b and medgemma_instruct_27b, which have the same
    architecture and the hub's vocabulary of 262,208; 12B: transformers' model of the same facts, on the meta device."""
    sizes: tuple[tuple[str, str, Modality, int | None], ...] = (
        ("270m", "gemma-3-270m", "text", None),
        ("1b", "gemma-3-1b-pt", "text", None),
        ("4b", "gemma-3-4b-pt", "text+image", 4_300_079_472),
        ("12b", "gemma-3-12b-pt", "text+image", 12_187_325_040),
        ("27b", "gemma-3-27b-pt", "text+image", 27_432_406_640),
    )
    for size, base_hub_name, modality, num_checkpoint_params in sizes:
        base = f"gemma-3-{size}"
        for name, preset in ((base, f"gemma3_{size}"), (f"{base}-it", f"gemma3_instruct_{size}")):
            yield _row(
                name,
                base,
                hub_name=base_hub_name if name == base else None,
                modality=modality,
                mirrors="both",
                keras=(preset,) if modality == "text" else (preset, f"{preset}_text"),
                num_checkpoint_params=num_checkpoint_params,
            )


def _gemma_3n_rows() -> Iterator[GemmaModel]:
    for size in ("E2B", "E4B"):
        base = f"gemma-3n-{size.lower()}"
        for suffix in ("", "-it"):
            yield _row(
                base + suffix,
                base,
                hub_name=f"gemma-3n-{size}{suffix}",
                modality="text+image+audio",
                mirrors="dynamic",
                note=_NOTE_SHARED,
            )


def _gemma_4_rows() -> Iterator[GemmaModel]:
    """Whole checkpoints: transformers' models of the conversion script's facts, on the meta device; 12B's equals the
    published one (tenstorrent/tt-xla issue 5255). Google's repositories of Gemma 4 ask for no acceptance."""
    sizes: tuple[tuple[str, str | None, str | None, Modality, int, str], ...] = (
        ("E2B", "dynamic", "2b", "text+image+audio", 5_104_297_504, _NOTE_SHARED),
        ("E4B", "dynamic", "4b", "text+image+audio", 7_941_100_832, _NOTE_SHARED),
        ("12B", None, None, "text+image+audio", 11_959_730_176, _NOTE_KEYS),
        ("26B-A4B", "16bit", "26b_a4b", "text+image", 25_805_933_872, _NOTE_EXPERTS),
        ("31B", "dynamic", "31b", "text+image", 31_273_086_512, _NOTE_KEYS),
    )
    for size, mirrors, keras_size, modality, num_checkpoint_params, note in sizes:
        base = f"gemma-4-{size.lower()}"
        for suffix, preset in (("", f"gemma4_{keras_size}"), ("-it", f"gemma4_instruct_{keras_size}")):
            yield _row(
                base + suffix,
                base,
                hub_name=f"gemma-4-{size}{suffix}",
                stop_tokens=_TURN_4 if suffix else _EOS,
                modality=modality,
                licence=APACHE,
                mirrors=mirrors,
                keras=(preset,) if keras_size else (),
                num_checkpoint_params=num_checkpoint_params,
                note=note,
            )


def _rows() -> Iterator[GemmaModel]:
    yield _tiny_row()
    yield from _gemma_1_rows()
    yield from _gemma_2_rows()
    yield from _gemma_3_rows()
    yield from _gemma_3n_rows()
    yield from _gemma_4_rows()


MODELS: dict[str, GemmaModel] = {row.name: row for row in _rows()}


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


def find_model(name: str) -> GemmaModel:
    """The row for a short name, hub id, mirror id or Keras preset, upper or lower case. Raises ModelError."""
    found = _names().get(name.strip().lower())
    if found is None:
        raise _unknown(name)
    return found[0]


def _unknown(name: str) -> ModelError:
    near = did_you_mean(name.lower(), _names())
    return ModelError(f"no Gemma is known by the name {name!r}", hint=f"{near} {_LIST_HINT}".lstrip())


def resolve_model(name: str) -> ModelSource:
    """Turn what a person wrote into something to load.

    A registry name wins, unless it is written owner/name and such a directory exists (from_pretrained would take the
    directory, too); then a directory, whose files are checked before anything opens them; then a hub id owner/name.
    Raises ModelError for everything else.
    """
    name = name.strip()
    try:
        found = _names().get(name.lower())
        path = Path(name).expanduser() if name else None
        is_directory = path is not None and path.is_dir()
        if found is not None and not ("/" in name and is_directory):
            model, repository = found
            return ModelSource("registry", repository or model.location, model, model.config)
        if path is not None and is_directory:
            path = path.resolve()
            return ModelSource("directory", str(path), None, check_directory(path))
        if path is not None and path.is_file():
            hint = "Give the directory that holds config.json, a tokenizer and *.safetensors files."
            if path.suffix == ".gguf":
                hint = f"A GGUF file is an export for inference and cannot be trained. {hint}"
            raise ModelError(f"{name}: is a file, a model directory is expected", hint=hint)
    except (OSError, RuntimeError) as error:
        # No permission, a name too long for the file system, or ~somebody who has no home.
        raise ModelError(f"{name}: cannot be read ({error})") from error
    if _looks_like_path(name):
        raise ModelError(f"{name}: no such directory", hint=_LIST_HINT)
    if not _HUB_ID.fullmatch(name):
        raise _unknown(name)
    return ModelSource("hub", name, None, None)


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.endswith("/") or "\\" in name or name.count("/") > 1


def check_directory(directory: Path) -> TextConfig:
    """Check a local model's files without loading it.

    Raises ModelError unless it is a whole Gemma: config.json of a supported type, safetensors weights as long as their
    own header says, shards named in the index and lying beside it, a tokenizer, no pickle and no model code.
    """
    _refuse_adapter(directory)
    config = read_config(directory)
    for file_name in _CONFIG_FILES:
        path = directory / file_name
        if path.is_file():
            check_no_code(read_json_object(path, error=ModelError), str(path))
    for path in _weight_files(directory):
        _check_safetensors(path)
    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise ModelError(
            f"{directory}: has no tokenizer",
            hint="Copy tokenizer.json and tokenizer_config.json of the base model beside it.",
        )
    return config


def _refuse_adapter(directory: Path) -> None:
    """transformers would follow adapter_config.json to its base model, whatever else lies in the directory."""
    is_run = (directory / "adapter" / "adapter_config.json").is_file()
    path = directory / ("adapter/adapter_config.json" if is_run else "adapter_config.json")
    if not path.is_file():
        return
    base = read_json_object(path, error=ModelError).get("base_model_name_or_path") or NOT_KNOWN
    what = "a run with a LoRA adapter" if is_run else "a LoRA adapter"
    raise ModelError(
        f"{directory}: is {what} for the base model {base!r}, not a model",
        hint="`gemma-tune generate RUN` answers with an adapter and `gemma-tune merge RUN` makes a model of it, "
        "where RUN is the run directory.",
    )


def _weight_files(directory: Path) -> list[Path]:
    """The safetensors files that from_pretrained would open. Raises ModelError when there is none or one is missing."""
    single = directory / "model.safetensors"
    index = directory / "model.safetensors.index.json"
    files = [single] if single.is_file() else []
    if index.is_file():
        weight_map = read_json_object(index, error=ModelError).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelError(f"{index}: has no weight_map")
        for entry in sorted(set(map(str, weight_map.values()))):
            # An entry like ../../x would make the loader read outside the model (transformers issue 47176).
            if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.safetensors", entry, re.ASCII):
                raise ModelError(f"{index}: names {entry!r}, which is not a plain *.safetensors file name")
            if not (directory / entry).is_file():
                raise ModelError(
                    f"{directory}: {entry} is missing, the index names it", hint="Download the model again."
                )
            files.append(directory / entry)
    if files:
        return files
    if any(directory.glob("pytorch_model*.bin")):
        raise ModelError(
            f"{directory}: the weights are pickle files (*.bin), which can run code when they are opened",
            hint="Convert them to safetensors where you trust them: from_pretrained(...) and save_pretrained(...).",
        )
    raise ModelError(
        f"{directory}: has no weights", hint="model.safetensors or model.safetensors.index.json is expected."
    )


def _check_safetensors(path: Path) -> None:
    """Compare the file's length with what its header says: finds Git LFS pointers and broken downloads at once."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        header_bytes = int.from_bytes(start, "little")
        if len(start) == 8 and 2 <= header_bytes <= min(size - 8, _MAX_SAFETENSORS_HEADER_BYTES):
            try:
                header = json.loads(file.read(header_bytes))
                data_bytes = max((t["data_offsets"][1] for k, t in header.items() if k != "__metadata__"), default=0)
            except (ValueError, TypeError, KeyError, AttributeError, IndexError):
                data_bytes = -1
            if data_bytes == size - 8 - header_bytes:
                return
    what = "is a Git LFS pointer" if start == b"version " else "is cut off or no safetensors file"
    raise ModelError(f"{path}: {what} ({size} bytes)", hint="Download the model again (`git lfs pull` in a git clone).")


def describe_config(config: TextConfig) -> list[tuple[str, str]]:
    """The architecture as (label, text) pairs to print."""
    first = config.layers[0]
    full = next(layer for layer in reversed(config.layers) if layer.attention == "full" or layer is first)
    is_mixed = (full.head_dim, full.num_kv_heads) != (config.head_dim, config.num_kv_heads)
    kind = {1: "multi-query", config.num_heads: "multi-head"}.get(config.num_kv_heads, "grouped-query")
    heads = f"{config.num_heads} heads, {config.num_kv_heads} for keys and values ({kind})"
    sliding = f"{config.num_sliding_layers} of {config.num_layers} layers, {config.sliding_window} tokens"
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
    if is_mixed:
        facts.append(("Full attention", f"head size {full.head_dim}, {full.num_kv_heads} heads for keys and values"))
    if config.sliding_window is not None:
        facts.append(("Sliding window", sliding))
    if config.rope_local_theta is not None:
        facts.append(("RoPE base, sliding", f"{config.rope_local_theta:,.0f}"))
    if config.query_pre_attn_scalar is not None:
        facts.append(("Query scale", f"{config.query_pre_attn_scalar:g} ** -0.5"))
    if config.attention_softcap is not None:
        facts.append(("Soft-cap, attention", f"{config.attention_softcap:g}"))
    if config.final_softcap is not None:
        facts.append(("Soft-cap, logits", f"{config.final_softcap:g}"))
    if config.per_layer_hidden_size:
        facts.append(
            ("Per-layer embeddings", f"{config.per_layer_vocab_size} × {config.per_layer_hidden_size} a layer")
        )
    if config.num_kv_shared_layers:
        facts.append(("Shared keys and values", f"last {config.num_kv_shared_layers} layers"))
    if config.num_experts:
        experts = (
            f"{config.num_experts} of width {config.expert_intermediate_size}, {config.num_experts_per_token} a token"
        )
        facts.append(("Experts", experts))
    if config.quantization is not None:
        facts.append(("Quantized", config.quantization))
    facts.append(("Parameters, text model", f"{count_params(config):,}"))
    return facts


def describe_model(model: GemmaModel) -> list[tuple[str, str]]:
    """A registry row as (label, text) pairs to print; what is not known says so."""

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
        ("LoRA targets", ", ".join(model.lora_targets)),
        ("LoRA scope", f"{model.text_prefix}.layers"),
    ]
    if model.note:
        facts.append(("Note", model.note))
    return facts
