"""The formats that a trained model leaves in: what each is made from, which code writes it, what it may lose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gemma_tune.errors import ExportError
from gemma_tune.exporting.gguf.quantize import CONVERTED, QUANTIZATIONS, require_gguf_packages
from gemma_tune.text import did_you_mean

ADAPTER, MERGED, MERGED_4BIT, OLLAMA = "adapter", "merged-16bit", "merged-4bit", "ollama"
# Stands for the GGUF whose dtype is that of the merged weights: what llama.cpp quantises from.
GGUF_AS_MERGED = "gguf-as-merged"
# What Ollama gets when no GGUF is asked for beside it: needs no compiler and loses next to nothing.
DEFAULT_OLLAMA_GGUF = "gguf-q8_0"
_GGUF = "gguf-"


@dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        writer: `module:function`, called with a `writers.Job`.
        made_from: the format that it is made from; None for base and adapter.
        limits: key of `parity.LIMITS`; None where the dtype of the weights decides.
        quantization: of a GGUF.
        about: a phrase for the user.
    """

    name: str
    writer: str
    made_from: str | None
    limits: str | None
    about: str
    quantization: str | None = None


def _gguf_format(quantization: str) -> Format:
    if quantization in CONVERTED:
        about = "for llama.cpp and LM Studio" + (", 8 bits" if quantization == "q8_0" else "")
        return Format(
            _GGUF + quantization, "gemma_tune.exporting.formats.writers:write_gguf", MERGED, "gguf", about, quantization
        )
    return Format(
        _GGUF + quantization,
        "gemma_tune.exporting.formats.writers:write_quantized_gguf",
        GGUF_AS_MERGED,
        "4bits",
        "quantised by llama.cpp",
        quantization,
    )


_FORMATS = (
    Format(
        ADAPTER,
        "gemma_tune.exporting.formats.writers:write_adapter",
        None,
        "float32",
        "the LoRA adapter, for PEFT and vLLM",
    ),
    Format(
        MERGED,
        "gemma_tune.exporting.formats.writers:write_merged",
        None,
        None,
        "a Hugging Face directory, for transformers, vLLM and KerasHub",
    ),
    Format(
        MERGED_4BIT,
        "gemma_tune.exporting.formats.writers:write_merged_4bit",
        MERGED,
        "4bits",
        "the same in NF4 (bitsandbytes)",
    ),
    *(_gguf_format(name) for name in dict.fromkeys((*CONVERTED, *QUANTIZATIONS))),
    Format(
        OLLAMA,
        "gemma_tune.exporting.formats.writers:write_ollama",
        DEFAULT_OLLAMA_GGUF,
        None,
        "a GGUF with its Modelfile",
    ),
)
FORMATS = {each.name: each for each in _FORMATS}


def find_formats(names: Sequence[str]) -> tuple[Format, ...]:
    """The named formats, each once, in the order given; with their packages.

    Raises:
        ExportError: a name is unknown, or a package that it needs is not installed.
    """
    found = tuple(map(_find_format, dict.fromkeys(name.strip().lower() for name in names)))
    for each in found:
        if each.quantization is not None:
            require_gguf_packages(each.quantization)
        elif each.name == OLLAMA:
            require_gguf_packages(DEFAULT_OLLAMA_GGUF.removeprefix(_GGUF))
    return found


def _find_format(name: str) -> Format:
    if name in FORMATS:
        return FORMATS[name]
    quantization = name.removeprefix(_GGUF)
    if name.startswith(_GGUF) and quantization:
        require_gguf_packages(quantization)  # tells of a quantization that cannot be made
    raise ExportError(
        f"there is no export format {name!r}" + (f"; {hint}" if (hint := did_you_mean(name, FORMATS)) else ""),
        hint="formats: " + ", ".join(FORMATS),
    )


def gguf_for_ollama(asked: Sequence[Format]) -> str:
    """The first GGUF that is asked for beside it."""
    return next((each.name for each in asked if each.quantization is not None), DEFAULT_OLLAMA_GGUF)
