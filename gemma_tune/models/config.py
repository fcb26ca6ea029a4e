"""The facts of a Gemma's architecture, read from its config.json without importing transformers.

A hub config leaves out what equals the class default (google/gemma-3-4b-pt names neither heads nor vocabulary), so the
defaults of each configuration class are repeated in `families/`; the tests compare them with transformers' own.
"""

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gemma_tune.errors import ModelError
from gemma_tune.models import safetensors as files
from gemma_tune.models.families.family import Family
from gemma_tune.models.families.known import FAMILIES, find_family, supported_types
from gemma_tune.models.untrusted import check_no_code

Json = Mapping[str, Any]
Attention = Literal["full", "sliding"]
# own: has k_proj and v_proj; keys_as_values: has k_proj, whose output serves as values, too; shared: has neither and
# takes both from an earlier layer.
KeyValues = Literal["own", "keys_as_values", "shared"]

_LAYER_OVERRIDES = frozenset({"head_dim", "num_key_value_heads"})
_MAX_LAYERS = 1024
_MAX_SIZE = 1 << 31


@dataclass(frozen=True)
class LayerShape:
    """One decoder layer. Sizes are numbers of features."""

    attention: Attention
    head_dim: int
    num_kv_heads: int
    key_values: KeyValues
    intermediate_size: int


@dataclass(frozen=True)
class TextConfig:
    """The text model inside a Gemma checkpoint.

    `head_dim`, `num_kv_heads` and `intermediate_size` are the file's own values; Gemma 4 has layers that differ from
    them, so whoever counts goes by `layers`. `rope_theta` is that of full attention, `rope_local_theta` that of sliding
    attention (None where there is only one). A size of 0 means that the model has no such part.
    """

    model_type: str
    family: str
    is_multimodal: bool
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    context_tokens: int
    activation: str
    norm_eps: float
    rope_theta: float
    rope_local_theta: float | None
    rope_scaling: str | None
    sliding_window: int | None
    query_pre_attn_scalar: float | None
    attention_softcap: float | None
    final_softcap: float | None
    has_tied_embeddings: bool
    has_attention_bias: bool
    num_kv_shared_layers: int
    per_layer_vocab_size: int
    per_layer_hidden_size: int
    laurel_rank: int
    altup_num_inputs: int
    num_experts: int
    num_experts_per_token: int
    expert_intermediate_size: int
    quantization: str | None
    dtype: str | None
    layers: tuple[LayerShape, ...]

    @property
    def facts(self) -> Family:
        """What holds for every model of the family."""
        return FAMILIES[self.family]

    @property
    def norm(self) -> str:
        """Which norm, with what gain, and where it stands."""
        gain = "1 + weight" if self.facts.norm_adds_one else "weight"
        place = "before and after attention and MLP" if self.facts.has_post_norms else "before attention and MLP"
        return f"RMSNorm, gain {gain}, eps {self.norm_eps:g}, {place}"

    @property
    def num_sliding_layers(self) -> int:
        return sum(layer.attention == "sliding" for layer in self.layers)


def read_config(directory: Path) -> TextConfig:
    """Read `<directory>/config.json`. Raises ModelError when it is missing or not a Gemma's."""
    return check_config(files.read_config(directory), str(directory / files.CONFIG_FILE))


def check_config(content: Json, where: str) -> TextConfig:
    """Turn a parsed config.json into facts; `where` names the file in messages.

    Raises ModelError when the model is no Gemma that generates text, when a value makes no sense (a size that is no
    positive integer, a list of the wrong length), or when the config asks for code of its own.
    """
    check_no_code(content, where)
    model_type = content.get("model_type")
    family = find_family(model_type)
    if family is None:
        is_gemma = isinstance(model_type, str) and model_type.startswith("gemma")
        raise ModelError(
            f"{where}: model_type is {model_type!r}, which is "
            + ("a Gemma that gemma-tune cannot train" if is_gemma else "not a Gemma"),
            hint=f"Supported types: {', '.join(supported_types())}; `gemma-tune models list` shows their models.",
        )
    assert isinstance(model_type, str)
    text = content
    if family.is_multimodal(model_type):
        text = content.get("text_config") or {}
        if not isinstance(text, Mapping):
            raise ModelError(f"{where}: text_config is {text!r}, an object is expected")
        inner = text.get("model_type", f"{model_type}_text")
        if inner != f"{model_type}_text":
            raise ModelError(f"{where}: text_config.model_type is {inner!r}, {model_type + '_text'!r} is expected")
    return _Reader(family, model_type, content, text, where).read()


class _Reader:
    """Reads one text config; holds what every message and every default needs."""

    def __init__(self, family: Family, model_type: str, outer: Json, text: Json, where: str) -> None:
        self.family = family
        self.model_type = model_type
        self.outer = outer
        self.text = text
        self.where = where
        self.defaults = family.defaults_for(model_type)

    def value(self, key: str) -> Any:
        return self.text.get(key, self.defaults.get(key))

    def wrong(self, key: str, value: Any, expected: str) -> ModelError:
        return ModelError(f"{self.where}: {key} is {reprlib.repr(value)}, {expected} is expected")

    def size(self, key: str, *, maximum: int = _MAX_SIZE) -> int:
        value = self.value(key)
        if type(value) is not int or not 1 <= value <= maximum:
            raise self.wrong(key, value, f"an integer from 1 to {maximum}")
        return value

    def count(self, key: str) -> int:
        """A size that may be 0 or absent."""
        return self.size(key) if self.value(key) else 0

    def number(self, key: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self.wrong(key, value, "a positive number")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        value = self.value(key)
        return None if value is None else self.number(key, value)

    def flag(self, key: str) -> bool:
        value = self.value(key)
        if not isinstance(value, bool | None):
            raise self.wrong(key, value, "true or false")
        return bool(value)

    def read(self) -> TextConfig:
        self.refuse_encoder()
        num_layers = self.size("num_hidden_layers", maximum=_MAX_LAYERS)
        attention = self.attention_kinds(num_layers)
        num_shared = self.count("num_kv_shared_layers")
        if num_shared >= num_layers:
            raise self.wrong("num_kv_shared_layers", num_shared, f"fewer than the {num_layers} layers")
        rope_theta, rope_local_theta, rope_scaling = self.rope()
        per_layer_hidden_size = self.count("hidden_size_per_layer_input")
        has_experts = self.flag("enable_moe_block")
        activation = self.text.get("hidden_activation") or self.text.get("hidden_act")
        return TextConfig(
            model_type=self.model_type,
            family=self.family.name,
            is_multimodal=self.family.is_multimodal(self.model_type),
            vocab_size=self.size("vocab_size"),
            hidden_size=self.size("hidden_size"),
            num_layers=num_layers,
            num_heads=self.size("num_attention_heads"),
            num_kv_heads=self.size("num_key_value_heads"),
            head_dim=self.size("head_dim"),
            intermediate_size=self.intermediate_sizes(num_layers)[0],
            context_tokens=self.size("max_position_embeddings"),
            activation=str(activation or self.defaults["hidden_activation"]),
            norm_eps=self.number("rms_norm_eps", self.value("rms_norm_eps")),
            rope_theta=rope_theta,
            rope_local_theta=rope_local_theta,
            rope_scaling=rope_scaling,
            sliding_window=self.size("sliding_window") if "sliding" in attention else None,
            query_pre_attn_scalar=self.optional_number("query_pre_attn_scalar"),
            attention_softcap=self.optional_number("attn_logit_softcapping"),
            final_softcap=self.optional_number("final_logit_softcapping"),
            has_tied_embeddings=self.has_tied_embeddings(),
            has_attention_bias=self.flag("attention_bias"),
            num_kv_shared_layers=num_shared,
            per_layer_vocab_size=self.count("vocab_size_per_layer_input") if per_layer_hidden_size else 0,
            per_layer_hidden_size=per_layer_hidden_size,
            laurel_rank=self.count("laurel_rank"),
            altup_num_inputs=self.count("altup_num_inputs"),
            num_experts=self.size("num_experts") if has_experts else 0,
            num_experts_per_token=self.size("top_k_experts") if has_experts else 0,
            expert_intermediate_size=self.size("moe_intermediate_size") if has_experts else 0,
            quantization=self.quantization(),
            dtype=self.dtype(),
            layers=self.layers(attention, num_shared),
        )

    def refuse_encoder(self) -> None:
        """Gemma 4's "vision" lets image tokens see each other; text stays causal. True and "all" make an encoder."""
        if self.text.get("use_bidirectional_attention") in (True, "all"):
            raise ModelError(
                f"{self.where}: use_bidirectional_attention is set: this Gemma is an encoder and generates no text",
                hint="gemma-tune trains models that generate text; `gemma-tune models list` shows them.",
            )

    def has_tied_embeddings(self) -> bool:
        """The outer value counts for a multimodal checkpoint: there the head belongs to the outer model."""
        value = self.outer.get("tie_word_embeddings", self.text.get("tie_word_embeddings", True))
        if not isinstance(value, bool):
            raise self.wrong("tie_word_embeddings", value, "true or false")
        return value

    def attention_kinds(self, num_layers: int) -> list[Attention]:
        every = self.family.full_attention_every
        names = self.text.get("layer_types") if every > 1 else None
        if names is None:
            if self.family.reads_window_pattern:
                given = self.text.get("sliding_window_pattern", self.text.get("_sliding_window_pattern"))
                every = every if given is None else given
            if type(every) is not int or every < 1:
                raise self.wrong("sliding_window_pattern", every, "a positive integer")
            kinds: list[Attention] = ["sliding" if (i + 1) % every else "full" for i in range(num_layers)]
        else:
            known: dict[str, Attention] = {"sliding_attention": "sliding", "full_attention": "full"}
            if not isinstance(names, list) or len(names) != num_layers or any(name not in known for name in names):
                raise self.wrong("layer_types", names, f"a list of {num_layers} of {', '.join(known)}")
            kinds = [known[name] for name in names]
        if self.family.ends_with_full_attention:
            kinds[-1] = "full"
        return kinds

    def intermediate_sizes(self, num_layers: int) -> list[int]:
        """Return the MLP width of every layer."""
        value = self.value("intermediate_size")
        if not self.family.mlp_widths_differ or not isinstance(value, list):
            return [self.size("intermediate_size")] * num_layers
        if len(value) != num_layers or any(type(size) is not int or not 1 <= size <= _MAX_SIZE for size in value):
            raise self.wrong("intermediate_size", value, f"an integer or a list of {num_layers} integers")
        return list(value)

    def layers(self, attention: list[Attention], num_shared: int) -> tuple[LayerShape, ...]:
        num_layers = len(attention)
        num_own = num_layers - num_shared
        if not set(attention[num_own:]) <= set(attention[:num_own]):
            raise self.wrong("num_kv_shared_layers", num_shared, "an earlier layer of the same kind to share with")
        overrides = self.layer_overrides(attention)
        keys_as_values = self.flag("attention_k_eq_v")
        # Layers without keys of their own get twice the MLP width in Gemma 4 E2B.
        shared_factor = 2 if self.flag("use_double_wide_mlp") else 1
        shapes = []
        for index, (kind, width) in enumerate(zip(attention, self.intermediate_sizes(num_layers), strict=True)):
            is_shared = index >= num_own
            key_values: KeyValues = "shared" if is_shared else "own"
            if keys_as_values and kind == "full" and not is_shared:
                key_values = "keys_as_values"
            head_dim, num_kv_heads = overrides[index]
            shapes.append(
                LayerShape(kind, head_dim, num_kv_heads, key_values, width * (shared_factor if is_shared else 1))
            )
        return tuple(shapes)

    def layer_overrides(self, attention: list[Attention]) -> list[tuple[int, int]]:
        """(head_dim, num_kv_heads) of each layer.

        Gemma 4 files up to transformers 5.16 say `global_head_dim` and `num_global_key_value_heads`; 5.17 writes the
        same as `per_layer_config: {"5": {"head_dim": 512}}`.
        """
        shapes = [(self.size("head_dim"), self.size("num_key_value_heads"))] * len(attention)
        if not self.family.full_layers_differ:
            return shapes
        given = self.text.get("per_layer_config")
        if given is None:
            num_kv_heads = self.size("num_key_value_heads")
            if self.flag("attention_k_eq_v") and self.text.get("num_global_key_value_heads") is not None:
                num_kv_heads = self.size("num_global_key_value_heads")
            full = (self.size("global_head_dim"), num_kv_heads)
            return [full if kind == "full" else shape for kind, shape in zip(attention, shapes, strict=True)]
        if not isinstance(given, Mapping):
            raise self.wrong("per_layer_config", given, "an object")
        for name, override in given.items():
            is_index = str(name).isdecimal() and int(name) < len(attention)
            if not is_index or not isinstance(override, Mapping) or not set(override) <= _LAYER_OVERRIDES:
                expected = f"a layer's number with {' and '.join(sorted(_LAYER_OVERRIDES))}"
                raise self.wrong(f"per_layer_config.{name}", override, expected)
            if any(type(size) is not int or not 1 <= size <= _MAX_SIZE for size in override.values()):
                raise self.wrong(f"per_layer_config.{name}", override, "positive integers")
            head_dim, num_kv_heads = shapes[int(name)]
            shapes[int(name)] = (override.get("head_dim", head_dim), override.get("num_key_value_heads", num_kv_heads))
        return shapes

    def rope(self) -> tuple[float, float | None, str | None]:
        """(theta, theta of sliding layers or None, scaling in words or None)."""
        given = self.text.get("rope_parameters") or {}
        if not isinstance(given, Mapping):
            raise self.wrong("rope_parameters", given, "an object")
        has_two = self.family.has_local_rope
        full = given.get("full_attention", {} if has_two else given)
        sliding = given.get("sliding_attention", {})
        if not isinstance(full, Mapping) or not isinstance(sliding, Mapping):
            raise self.wrong("rope_parameters", given, "an object of objects")
        scaling = self.text.get("rope_scaling") or {}
        if not isinstance(scaling, Mapping):
            raise self.wrong("rope_scaling", scaling, "an object")
        full = {**scaling, **full}
        if not given:
            full = {**self.family.default_rope, **full}
        theta = full.get("rope_theta", self.text.get("rope_theta", 1_000_000.0 if has_two else 10_000.0))
        theta = self.number("rope_theta", theta)
        if not has_two:
            return theta, None, _describe_rope(full)
        local = sliding.get("rope_theta", self.text.get("rope_local_base_freq", 10_000.0))
        return theta, self.number("rope_local_base_freq", local), _describe_rope(full)

    def quantization(self) -> str | None:
        """`bitsandbytes 4-bit` or `bitsandbytes 8-bit`, or None for plain weights; other methods are refused."""
        given = self.outer.get("quantization_config", self.text.get("quantization_config"))
        if not given:
            return None
        if not isinstance(given, Mapping):
            raise self.wrong("quantization_config", given, "an object")
        method = str(given.get("quant_method", "bitsandbytes"))
        if method != "bitsandbytes":
            raise ModelError(
                f"{self.where}: quantization_config: the weights are quantised by {method}, and only those of "
                "bitsandbytes can be read",
                hint="give the model in 16 bits that they were made of; model.load_in_4bit quantises it when it loads",
            )
        for key, bits in (("load_in_4bit", " 4-bit"), ("load_in_8bit", " 8-bit")):
            if given.get(key):
                method += bits
        return method

    def dtype(self) -> str | None:
        for source in (self.text, self.outer):
            value = source.get("dtype", source.get("torch_dtype"))
            if isinstance(value, str):
                return value
        return None


def _describe_rope(parameters: Json) -> str | None:
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return None
    for key, text in (("factor", "factor"), ("partial_rotary_factor", "share of the head")):
        if key in parameters:
            return f"{kind}, {text} {parameters[key]}"
    return str(kind)
