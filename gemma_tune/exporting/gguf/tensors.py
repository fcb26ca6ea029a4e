"""Which tensor of a Gemma lands where in a GGUF file, decided from headers: names, types, places. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gemma_tune.errors import ExportError
from gemma_tune.exporting.gguf.architecture import GgufArchitecture
from gemma_tune.exporting.gguf.blocks import STORED_DTYPES, same_values
from gemma_tune.exporting.gguf.header import align
from gemma_tune.models.describe import summarize
from gemma_tune.models.families.known import canonical_name, tower_names
from gemma_tune.models.safetensors import StoredTensor, stored_tensors
from gemma_tune.text import listed

GgufDtype = Literal["f32", "f16", "bf16", "q8_0"]

_EMBEDDING = "model.embed_tokens.weight"
_HEAD = "lm_head.weight"


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file."""

    name: str
    source: StoredTensor
    type: str  # ggml's name of the type to write: the dtype asked for, F32 for a norm
    adds_one: bool  # Gemma's norms multiply by 1 + weight, llama.cpp's by the weight that is stored
    offset_bytes: int  # where it lies, counted from the start of the tensor data
    num_bytes: int


@dataclass(frozen=True)
class TensorPlan:
    """All tensors of a file; `num_bytes` is of the tensor data, padding included; `notes` say what was left out."""

    tensors: tuple[GgufTensor, ...]
    num_rows: int
    num_bytes: int
    notes: tuple[str, ...]


def plan_tensors(directory: Path, architecture: GgufArchitecture, dtype: GgufDtype) -> TensorPlan:
    """Place every tensor. ExportError names those that are missing, unknown, or of another shape than the config's."""
    import gguf

    found, notes = _text_tensors(directory)
    expected = _expected_shapes(architecture, found, directory)
    _refuse_differences(found, expected, directory)

    config = architecture.config
    arch = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.facts.architecture)
    names = gguf.get_tensor_name_map(arch, config.num_layers)
    tensors: list[GgufTensor] = []
    end = 0
    for canonical in expected:
        source = found[canonical]
        type_ = "F32" if len(source.shape) == 1 else dtype.upper()
        block_elements, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_]]
        if source.shape[-1] % block_elements:
            raise ExportError(
                f"{directory}: rows of {source.name} have {source.shape[-1]} values; {dtype} needs a multiple of "
                f"{block_elements}",
                hint="export bf16 or f16",
            )
        name = names.get_name(canonical, try_suffixes=(".weight",))
        assert name is not None, f"gguf has no name for {canonical} of {config.family}"
        adds_one = config.facts.norm_adds_one and canonical.endswith("norm.weight")
        num_bytes = source.num_elements // block_elements * block_bytes
        tensors.append(GgufTensor(name, source, type_, adds_one, align(end), num_bytes))
        end = align(end) + num_bytes
    return TensorPlan(tuple(tensors), found[_EMBEDDING].shape[0], align(end), tuple(notes))


def _text_tensors(directory: Path) -> tuple[dict[str, StoredTensor], list[str]]:
    """Canonical name -> tensor of the text model, and what was left out."""
    found: dict[str, StoredTensor] = {}
    num_left_out, towers = 0, tower_names()
    for name, tensor in stored_tensors(directory).items():
        canonical = canonical_name(name)
        if canonical.partition(".")[0] in towers:
            num_left_out += 1
        elif tensor.dtype not in STORED_DTYPES:
            raise ExportError(
                f"{tensor.file}: {name} is stored as {tensor.dtype}; GGUF is made from {', '.join(STORED_DTYPES)}",
                hint="merge with dtype bfloat16",
            )
        elif found.setdefault(canonical, tensor) is not tensor:
            raise ExportError(
                f"{directory}: {found[canonical].name} and {name} are one weight under two names", hint="merge it again"
            )
    notes = [f"the image part ({num_left_out} tensors) was left out: the file is for text"] if num_left_out else []
    return found, notes


def _expected_shapes(
    architecture: GgufArchitecture, found: dict[str, StoredTensor], directory: Path
) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of every tensor of the file. A head that is the embedding is taken out of `found`."""
    config = architecture.config
    expected = {f"{row.name}.weight": row.weight_shape for row in summarize(config)}
    embedding, head = found.get(_EMBEDDING), found.get(_HEAD)
    if head is None and config.has_tied_embeddings:
        del expected[_HEAD]
    elif head is not None and embedding is not None and same_values(embedding, head):
        del expected[_HEAD], found[_HEAD]
    elif head is not None and architecture.facts.ties_head:
        raise ExportError(
            f"{directory}: {head.name} differs from the embedding; llama.cpp's {config.family} ties the two, so the "
            "trained output would be lost",
            hint="export `merged-16bit` instead, or train without lm_head and embed_tokens",
        )
    return expected


def _refuse_differences(
    found: Mapping[str, StoredTensor], expected: Mapping[str, tuple[int, ...]], directory: Path
) -> None:
    missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or unknown:
        told = "lacks" if missing else "has the unknown tensors"
        names = missing or unknown
        raise ExportError(
            f"{directory}: the model {told} {listed(names)}",
            hint="give a merged model directory, as `gemma-tune merge` writes it",
        )
    for name, shape in expected.items():
        if found[name].shape != shape:
            raise ExportError(
                f"{directory}: {found[name].name} has shape {found[name].shape}, config.json says {shape}",
                hint="config.json and the weights do not belong together; merge it again",
            )
