"""A PEFT adapter directory, read without PEFT: its base, weights and template, and what was trained by module."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from gemma_tune.disk import read_json_object
from gemma_tune.errors import ExportError, GemmaTuneError, RunError
from gemma_tune.identity import files_sha256
from gemma_tune.models.safetensors import StoredTensor, read_header
from gemma_tune.runs.layout import RunDir
from gemma_tune.runs.lock import read_lock
from gemma_tune.text import in_shell, listed

ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_WEIGHTS_FILE = "adapter_model.safetensors"
TEMPLATE_FILE = "template.yaml"
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")

_HINT = "give a finished run, one of its checkpoints, or a directory that PEFT saved"
KEY_PREFIX = "base_model.model."
_KEY_PATTERN = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector(?:\.weight)?|base_layer\.weight|original_module\.weight|modules_to_save\.weight)"
)
# What a value of the config is, where it is there and not null.
_KINDS: dict[str, type | tuple[type, ...]] = {
    "peft_type": str,
    "base_model_name_or_path": str,
    "revision": str,
    "r": int,
    "lora_alpha": (int, float),
    "target_modules": (list, str),
    "exclude_modules": (list, str),
    "layers_to_transform": (list, int),
    "modules_to_save": list,
    "rank_pattern": dict,
    "alpha_pattern": dict,
}
_EMBEDDING_MODULES = ("embed_tokens", "lm_head")

# Settings that describe the training or the adapter's reach, but not the arithmetic of the merge.
_HARMLESS_SETTINGS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "modules_to_save",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
    }
)
_MERGED_SETTINGS = frozenset({"alpha_pattern", "bias", "lora_alpha", "r", "rank_pattern", "use_dora", "use_rslora"})
# PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA train next to a base whose weights they changed first: added to the plain base,
# such an adapter gives another model than the one that was trained (peft docs, "Initialization").
_PLAIN_INITS: tuple[object, ...] = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class LoraFactors:
    """The low-rank change of one weight.

    For a linear layer a is (rank, in) and b is (out, rank), the change is `scaling * b @ a`. For an embedding a is
    (rank, rows), b is (width, rank) and the change is `scaling * (b @ a).T`. `magnitude` is DoRA's: (out,) for a linear
    layer, (width,) for an embedding.
    """

    module: str
    a: StoredTensor
    b: StoredTensor
    magnitude: StoredTensor | None
    scaling: float
    is_embedding: bool

    @property
    def weight_shape(self) -> tuple[int, int]:
        """The shape of the weight that this change fits."""
        if self.is_embedding:
            return self.a.shape[1], self.b.shape[0]
        return self.b.shape[0], self.a.shape[1]


@dataclass(frozen=True)
class LoraAdapter:
    """What an adapter trained; module and tensor names as in the model, without `base_model.model.`."""

    directory: Path
    base_name: str | None  # the base that it was trained on, as written in its config
    factors: Mapping[str, LoraFactors]  # module -> its low-rank change
    # tensor name -> tensor trained as a whole (modules_to_save, or embeddings saved next to the adapter)
    trained: Mapping[str, StoredTensor]
    # module -> the base's weight as the adapter file carries it (embeddings saved next to their change)
    base_copies: Mapping[str, StoredTensor]
    modules_to_save: tuple[str, ...]  # the names given as PEFT's modules_to_save
    ties_embeddings: bool  # whether lm_head was trained as one with the embedding (PEFT's ensure_weight_tying)
    config: Mapping[str, Any]  # its adapter_config.json

    def tensors(self) -> list[StoredTensor]:
        """Every tensor of the adapter file."""
        parts = [part for f in self.factors.values() for part in (f.a, f.b, f.magnitude) if part is not None]
        return parts + list(self.trained.values()) + list(self.base_copies.values())

    def saves_apart(self, tensor: StoredTensor) -> bool:
        """Whether a tensor trained as a whole belongs to a module that PEFT copied, apart from the base's parameter."""
        return _is_saved(tensor.name.rpartition(".")[0], self.modules_to_save)


@dataclass(frozen=True)
class AdapterDir:
    """The one reader of an adapter directory; a file is read when it is asked for."""

    path: Path  # the directory
    error: type[GemmaTuneError] = ExportError  # what is raised where a file is missing or damaged

    @property
    def exists(self) -> bool:
        """Whether an adapter is there, with or without its weights."""
        return self.config_file.is_file()

    @property
    def config_file(self) -> Path:
        return self.path / ADAPTER_CONFIG_FILE

    @property
    def weights_file(self) -> Path:
        return self.path / ADAPTER_WEIGHTS_FILE

    @property
    def template_file(self) -> Path:
        """The data template that it was trained with, where a run or an export put it."""
        return self.path / TEMPLATE_FILE

    @cached_property
    def config(self) -> dict[str, Any]:
        """adapter_config.json, whose values are of the kinds that PEFT writes."""
        config = read_json_object(self.config_file, error=self.error, hint=_HINT)
        for name, kinds in _KINDS.items():
            value = config.get(name)
            if value is not None and (not isinstance(value, kinds) or value in (math.inf, -math.inf) or value != value):
                raise self.error(f"{self.config_file} is damaged: {name} is {config[name]!r}", hint=_HINT)
        if "peft_type" not in config:
            raise self.error(
                f"{self.config_file} has no peft_type, so PEFT did not write it",
                hint=f"{_HINT}; an adapter of mlx-lm has another format",
            )
        return config

    @property
    def base_name(self) -> str | None:
        """The base that it says it was trained on."""
        return self.config.get("base_model_name_or_path") or None

    @property
    def base_revision(self) -> str | None:
        return self.config.get("revision")

    def require_base_name(self, *, hint: str) -> str:
        """Return the name of the base; an adapter that names none is refused with a hint."""
        if self.base_name is None:
            raise self.error(f"{self.path} does not name its base model", hint=hint)
        return self.base_name

    def require_weights(self) -> Path:
        """Return the weights' file; refuse a directory without one, and weights stored as pickle."""
        if self.weights_file.is_file():
            return self.weights_file
        told = f"{self.path} has no {ADAPTER_WEIGHTS_FILE}"
        pickles = sorted(self.path.glob("*.bin"))
        if pickles:
            raise self.error(
                f"{told}, and {pickles[0].name} is a pickle, which can run code when it is read",
                hint="save it again with save_pretrained(..., safe_serialization=True) where you trust its origin",
            )
        raise self.error(told, hint=_HINT)

    def read_header(self) -> dict[str, StoredTensor]:
        """Return every tensor of the weights by its key; ModelError when the file is damaged."""
        return read_header(self.require_weights())

    def hashes(self) -> dict[str, str]:
        """Return file name -> SHA-256 of config and weights."""
        return files_sha256([self.config_file, self.require_weights()])

    def choose_tokenizer(self, base_dir: Path) -> Path:
        """Return the directory of the tokenizer that it was trained with: its own, else the base's."""
        return self.path if (self.path / "tokenizer_config.json").is_file() else base_dir

    def read_lora(self) -> LoraAdapter:
        """Return what was trained, by module.

        Raises:
            ExportError: merging it is something else than the sums in `LoraFactors`, its tensors have no place, or
                their values are NaN, infinite or change nothing.
        """
        _refuse_unsupported(self.path, self.config)
        adapter = _group_tensors(self.path, self.config, self.read_header())
        _require_values(self.path, adapter.tensors())
        if not adapter.trained and not any(map(_changes_something, adapter.factors.values())):
            raise ExportError(
                f"{self.path}: the adapter changes nothing: every lora_B is zero", hint="was it trained at all?"
            )
        return adapter

    def require_sound(self) -> LoraAdapter | None:
        """Return what was trained; None for an adapter that PEFT can run and nobody can merge.

        Raises:
            GemmaTuneError: `error`, where anything of it is missing or damaged.
        """
        try:
            header, config = self.read_header(), self.config
            if config["peft_type"] == "LORA" and config.get("bias", "none") == "none" and not _unsupported(config):
                return self.read_lora() if config.get("init_lora_weights", True) in _PLAIN_INITS else None
            _require_values(self.path, [tensor for tensor in header.values() if tensor.dtype in FLOAT_DTYPES])
        except GemmaTuneError as cause:
            raise self.error(cause.message, hint=cause.hint) from None
        return None


def open_run_adapter(run: RunDir) -> AdapterDir:
    """Return the adapter of a run; RunError when it has none yet, or its lock is gone or damaged."""
    adapter = AdapterDir(run.adapter, RunError)
    if not adapter.exists:
        raise RunError(
            f"{run.path} has no adapter yet", hint=f"see how far it is: gemma-tune report {in_shell(run.path)}"
        )
    read_lock(run)
    return adapter


def trained_template(run: RunDir) -> Path:
    """Return the data template of a run: the one next to its adapter, whose bytes are recorded, else the run's own."""
    file = AdapterDir(run.adapter).template_file
    return file if file.is_file() else run.template


def _refuse_unsupported(directory: Path, config: Mapping[str, Any]) -> None:
    """Refuse every adapter whose merge is something else than the sums in `LoraFactors`."""
    where = directory / ADAPTER_CONFIG_FILE
    if config.get("peft_type") != "LORA":
        raise ExportError(
            f"{where}: peft_type is {config.get('peft_type')!r}",
            hint="only LoRA adapters (rsLoRA and DoRA among them) can be merged",
        )
    if config.get("bias", "none") != "none":
        raise ExportError(
            f"{where}: bias is {config['bias']!r}: the biases it trained cannot be merged", hint="train with bias: none"
        )
    if config.get("init_lora_weights", True) not in _PLAIN_INITS:
        raise ExportError(
            f"{where}: init_lora_weights is {config['init_lora_weights']!r}: it changed the base's weights before "
            "training, so the adapter does not belong to the plain base",
            hint="save it as a plain LoRA first: save_pretrained(..., path_initial_model_for_weight_conversion=...)",
        )
    unsupported = _unsupported(config)
    if unsupported:
        told = ", ".join(f"{name}={config[name]!r}"[:80] for name in unsupported)
        raise ExportError(f"{where}: cannot merge an adapter with {told}", hint="train without it, or use PEFT's merge")


def _unsupported(config: Mapping[str, Any]) -> list[str]:
    # megatron_core names a package and is written in every config; qalora_group_size counts only under use_qalora.
    return sorted(name for name, value in config.items() if value and name not in _HARMLESS_SETTINGS | _MERGED_SETTINGS)


def _require_values(directory: Path, tensors: Iterable[StoredTensor]) -> None:
    """Refuse NaN and infinity, whose bits of the exponent are all set."""
    bad = [
        tensor.name
        for tensor in tensors
        for bits, exponent in [_bits(tensor)]
        if bool(((bits & exponent) == exponent).any())
    ]
    if bad:
        raise ExportError(
            f"{directory / ADAPTER_WEIGHTS_FILE}: NaN or infinity in {len(bad)} adapter tensors: {listed(bad)}",
            hint="training diverged, or the file is damaged: take an earlier checkpoint, or copy it again",
        )


def _changes_something(factors: LoraFactors) -> bool:
    # A shift drops the sign of a zero.
    return factors.magnitude is not None or all(bool((_bits(each)[0] << 1).any()) for each in (factors.a, factors.b))


def _bits(tensor: StoredTensor) -> tuple[Any, Any]:
    """A tensor's values as unsigned integers, and the bits of the exponent."""
    import numpy as np

    kind, exponent = {
        "F64": (np.uint64, 0x7FF << 52),
        "F32": (np.uint32, 0xFF << 23),
        "F16": (np.uint16, 0x1F << 10),
        "BF16": (np.uint16, 0xFF << 7),
    }[tensor.dtype]
    bits = np.fromfile(tensor.file, dtype=kind, count=tensor.num_elements, offset=tensor.offset_bytes)
    return bits, kind(exponent)


def _group_tensors(directory: Path, config: Mapping[str, Any], header: Mapping[str, StoredTensor]) -> LoraAdapter:
    modules_to_save = tuple(config.get("modules_to_save") or ())
    parts: dict[str, dict[str, StoredTensor]] = {}
    trained: dict[str, StoredTensor] = {}
    copies: dict[str, StoredTensor] = {}
    strangers: list[str] = []
    for key, tensor in header.items():
        name = key.removeprefix(KEY_PREFIX)
        match = _KEY_PATTERN.fullmatch(name)
        if tensor.dtype not in FLOAT_DTYPES or name == key:
            strangers.append(key)
        elif match is None:
            module = name.rpartition(".")[0]
            is_embedding = module.rpartition(".")[2] in _EMBEDDING_MODULES
            if (is_embedding or _is_saved(module, modules_to_save)) and ".lora_" not in name:
                trained[name] = tensor
            else:
                strangers.append(key)
        elif match["part"] in ("base_layer.weight", "original_module.weight"):
            copies[match["module"]] = tensor
        elif match["part"] == "modules_to_save.weight":
            # With save_embedding_layers PEFT writes a module trained as a whole a second time, under this name.
            if f"{KEY_PREFIX}{match['module']}.weight" not in header:
                strangers.append(key)
        else:
            parts.setdefault(match["module"], {})[match["part"].removesuffix(".weight")] = tensor
    if strangers:
        raise _key_error(directory, "cannot tell what these adapter tensors are", strangers)
    factors = {module: _factors(directory, config, module, found) for module, found in parts.items()}
    if not factors and not trained:
        raise ExportError(f"{directory}: the adapter holds no tensor", hint="was the run finished?")
    return LoraAdapter(
        directory=directory,
        base_name=config.get("base_model_name_or_path") or None,
        factors=factors,
        trained=trained,
        base_copies=copies,
        modules_to_save=modules_to_save,
        ties_embeddings=bool(config.get("ensure_weight_tying")),
        config=config,
    )


def _is_saved(module: str, names: tuple[str, ...]) -> bool:
    """Whether modules_to_save means the module, or one that holds it: PEFT compares plain endings of the path."""
    parts = module.split(".")
    return any(".".join(parts[:length]).endswith(names) for length in range(1, len(parts) + 1))


def _factors(directory: Path, config: Mapping[str, Any], module: str, found: Mapping[str, StoredTensor]) -> LoraFactors:
    is_embedding = "lora_embedding_A" in found or "lora_embedding_B" in found
    a, b = ("lora_embedding_A", "lora_embedding_B") if is_embedding else ("lora_A", "lora_B")
    uses_dora = bool(config.get("use_dora"))
    needed = {a, b} | ({"lora_magnitude_vector"} if uses_dora else set())
    if set(found) != needed:
        raise _key_error(directory, f"{module} needs {', '.join(sorted(needed))}, found", sorted(found))
    rank = int(_pattern_value(config.get("rank_pattern") or {}, module, config.get("r", 8)))
    alpha = float(_pattern_value(config.get("alpha_pattern") or {}, module, config.get("lora_alpha", 8)))
    shapes = {name: tensor.shape for name, tensor in found.items() if name in (a, b)}
    has_matrices = rank > 0 and all(len(shape) == 2 for shape in shapes.values())
    if not has_matrices or found[a].shape[0] != rank or found[b].shape[1] != rank:
        raise ExportError(
            f"{directory}: {module}: shapes {shapes} do not fit the rank {rank} in {ADAPTER_CONFIG_FILE}",
            hint="the adapter's config and weights do not belong together",
        )
    scaling = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    factors = LoraFactors(module, found[a], found[b], found.get("lora_magnitude_vector"), scaling, is_embedding)
    if factors.magnitude is not None and factors.magnitude.shape != (factors.b.shape[0],):
        raise ExportError(
            f"{directory}: {module}: DoRA magnitude of shape {factors.magnitude.shape}, needed {(factors.b.shape[0],)}",
            hint="the adapter file is damaged",
        )
    return factors


def _pattern_value(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of the module path, as PEFT's get_pattern_key does."""
    return next((value for end, value in patterns.items() if re.match(rf"(.*\.)?({end})$", module)), default)


def _key_error(directory: Path, reason: str, keys: list[str]) -> ExportError:
    more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
    return ExportError(
        f"{directory}: {reason}: {', '.join(keys[:4])}{more}",
        hint="every tensor of an adapter must have its place; nothing was written",
    )
