"""LEAF. A merged directory in 4 bits (bitsandbytes NF4, double quantisation), which loads without quantising again.

The arithmetic is bitsandbytes' own, block by block, so the memory needed does not grow with the model; the files hold
what transformers writes when it saves a model that it quantised while loading. Embedding, lm_head, norms and the towers
of a multimodal checkpoint keep 16 bits.
"""

import math
import os
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import QuantState, get_4bit_type, quantize_4bit, quantize_blockwise
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from gemma_tune.disk import finished_files, keep_file, output_directory, refuse_existing, require_free_disk, write_json
from gemma_tune.errors import ExportError
from gemma_tune.exporting.export_settings import ExportSettings
from gemma_tune.exporting.merge import tensor_io
from gemma_tune.exporting.merge.shards import fill_shards, format_header, shard_names, write_index
from gemma_tune.exporting.text_files import generation_files, licence_files, tokenizer_files, write_text_files
from gemma_tune.identity import fingerprint_of, installed_version
from gemma_tune.models.families.known import canonical_name, tower_names
from gemma_tune.models.safetensors import BYTES_OF_DTYPE, CONFIG_FILE, StoredTensor, read_config, stored_tensors
from gemma_tune.models.untrusted import check_no_code
from gemma_tune.runs.adapter_dir import FLOAT_DTYPES

# bitsandbytes' own: one absmax a block of 64 weights, and one float32 a group of 256 of those.
_BLOCK_WEIGHTS = 64
_GROUP_BLOCKS = 256
_STATE_SUFFIX = "quant_state.bitsandbytes__nf4"
# The state is a short JSON text whose length is known only when its weight has been quantised (it holds one mean).
_MAX_STATE_BYTES = 512


def quantize_merged(
    merged_dir: Path,
    output_dir: Path,
    *,
    max_shard_bytes: int = ExportSettings.max_shard_bytes,
    on_progress: Callable[[int, int], None] | None = None,
    more_texts: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Write the 16- or 32-bit model of `merged_dir` in 4 bits; returns what export.json tells of it.

    `on_progress` gets (bytes read, bytes in all). `more_texts` (name -> content) become files of the output. Raises
    ExportError or ModelError; then nothing is left. What a killed call finished is kept, as in a merge.
    """
    report_progress = on_progress or (lambda done, total: None)
    refuse_existing(output_dir)
    config = read_config(merged_dir)
    check_no_code(config, str(merged_dir / CONFIG_FILE))
    if config.get("quantization_config"):
        raise ExportError(f"{merged_dir}: is quantised already", hint="give the merged 16-bit directory")
    tensors = stored_tensors(merged_dir)
    skipped, linear = _modules(merged_dir)
    shards = fill_shards([_parts(tensor, linear) for tensor in tensors.values()], max_shard_bytes, key=_sort_key)
    texts = tokenizer_files(merged_dir, merged_dir) | generation_files(merged_dir) | licence_files(merged_dir)
    needed_bytes = sum(part.num_bytes for shard in shards for part in shard) + sum(
        path.stat().st_size for path in texts.values()
    )
    require_free_disk(output_dir, needed_bytes, what="the 4-bit model")
    with output_directory(output_dir, fingerprint=_fingerprint(shards)) as partial_dir:
        write_text_files(partial_dir, copied=texts, given=more_texts)
        write_json(partial_dir / CONFIG_FILE, config | {"quantization_config": _settings(config, skipped)})
        total_bytes = sum(tensor.num_bytes for tensor in tensors.values())
        _write_shards(shards, partial_dir, on_progress=lambda done: report_progress(done, total_bytes))
        weight_bytes = write_index(partial_dir, shard_names(len(shards)))
    num_weights = sum(tensor.num_elements for tensor in tensors.values())
    return {"bits_per_weight": 8 * weight_bytes / num_weights, "weight_bytes": weight_bytes}


# --- what is quantised ---------------------------------------------------------------------------------------------


def _modules(merged_dir: Path) -> tuple[list[str] | None, frozenset[str]]:
    """(modules that the config must name as skipped, weights to quantise by canonical name), as transformers decides.

    From the model's classes without its weights: a loader replaces every linear layer that is not skipped, and then
    expects its weight in 4 bits.
    """
    config = AutoConfig.from_pretrained(str(merged_dir), trust_remote_code=False, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    default = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    parts = {part for name, _ in model.named_modules() for part in name.split(".")}
    towers = [tower for tower in tower_names() if tower in parts]
    skipped = sorted(default) + [rf".*{tower}" for tower in towers]  # patterns of module names
    linear = frozenset(
        canonical_name(f"{name}.weight")
        for name, module in model.named_modules()
        if type(module) is torch.nn.Linear and should_convert_module(name, skipped)
    )
    # Without towers the loader finds the same modules by itself, and the config is what transformers would write.
    return (skipped if towers else None), linear


def _settings(config: Mapping[str, Any], skipped: list[str] | None) -> dict[str, Any]:
    """quantization_config of the output; its layers compute in the dtype of the model."""
    text_config = config.get("text_config")
    dtype = config.get("dtype") or (text_config or {}).get("dtype") or "bfloat16"
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
        llm_int8_skip_modules=skipped,
    )
    told: dict[str, Any] = settings.to_dict()
    return told


@dataclass(frozen=True)
class _Part:
    """One tensor of the output, made from `source`; of a quantised weight it has the given suffix ("" the weight)."""

    source: StoredTensor
    suffix: str
    dtype: str
    shape: tuple[int, ...]
    is_quantized: bool

    @property
    def name(self) -> str:
        return f"{self.source.name}.{self.suffix}" if self.suffix else self.source.name

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * BYTES_OF_DTYPE[self.dtype]


def _parts(tensor: StoredTensor, linear: frozenset[str]) -> list[_Part]:
    if canonical_name(tensor.name) not in linear:
        return [_Part(tensor, "", tensor.dtype, tensor.shape, False)]
    if tensor.dtype not in FLOAT_DTYPES:
        raise ExportError(
            f"{tensor.file}: {tensor.name} is {tensor.dtype}",
            hint="give the merged 16-bit directory, not a quantised one",
        )
    num_blocks = math.ceil(tensor.num_elements / _BLOCK_WEIGHTS)
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        "nested_absmax": ("F32", (math.ceil(num_blocks / _GROUP_BLOCKS),)),
        "nested_quant_map": ("F32", (256,)),
        "quant_map": ("F32", (16,)),
        "": ("U8", (math.ceil(tensor.num_elements / 2), 1)),
        "absmax": ("U8", (num_blocks,)),
        _STATE_SUFFIX: ("U8", (_MAX_STATE_BYTES,)),
    }
    return [_Part(tensor, suffix, dtype, shape, True) for suffix, (dtype, shape) in shapes.items()]


def _sort_key(part: _Part) -> tuple[bool, int, str]:
    """The wider dtypes first, and the states, whose lengths are not known yet, last."""
    return part.suffix == _STATE_SUFFIX, -BYTES_OF_DTYPE[part.dtype], part.name


def _fingerprint(shards: tuple[tuple[_Part, ...], ...]) -> str:
    """Everything that decides the weight files."""
    versions = [installed_version(package) for package in ("gemma-tune", "torch", "bitsandbytes")]
    return fingerprint_of([part.source.file for shard in shards for part in shard], versions, shards)


# --- files ---------------------------------------------------------------------------------------------------------


def _write_shards(
    shards: tuple[tuple[_Part, ...], ...], directory: Path, *, on_progress: Callable[[int], None]
) -> None:
    """Write every file that is not finished yet."""
    done_bytes = 0
    finished = finished_files(directory)
    num_workers = min(tensor_io.MAX_WORKERS, os.cpu_count() or 1)
    with tensor_io.one_thread_an_operation(), ThreadPoolExecutor(num_workers) as workers:
        for name, shard in zip(shard_names(len(shards)), shards, strict=True):
            if name in finished:
                done_bytes += sum({part.source.name: part.source.num_bytes for part in shard}.values())
                on_progress(done_bytes)
                continue
            for num_bytes in _write_shard(shard, directory / name, workers=workers):
                done_bytes += num_bytes
                on_progress(done_bytes)
            keep_file(directory, name)


def _write_shard(shard: tuple[_Part, ...], path: Path, *, workers: Executor) -> Iterator[int]:
    """Write one file; yields the number of source bytes that were done."""
    # The format allows spaces after the header's JSON, so room for the longest is left in front.
    room = -(-len(_header(shard, {})) // 8) * 8
    places: dict[str, int] = {}
    place = 8 + room
    for part in shard:
        if part.suffix != _STATE_SUFFIX:
            places[part.name] = place
            place += part.num_bytes
    states: dict[str, torch.Tensor] = {}
    path.touch()
    for source in {part.source.name: part.source for part in shard}.values():
        parts = [part for part in shard if part.source is source]
        if not parts[0].is_quantized:
            yield from _copy(source, path, offset_bytes=places[source.name])
            continue
        made = yield from _quantize(source, path, offset_bytes=places[source.name], workers=workers)
        states[f"{source.name}.{_STATE_SUFFIX}"] = made.pop(_STATE_SUFFIX)
        for part in parts:
            if part.suffix in made:
                _require_shape(part, made[part.suffix])
                tensor_io.write_elements(made[part.suffix], path, offset_bytes=places[part.name])
    for part in shard:
        if part.name in states:
            tensor_io.write_elements(states[part.name], path, offset_bytes=place)
            place += states[part.name].numel()
    header = _header(shard, {name: state.numel() for name, state in states.items()})
    with path.open("rb+") as file:
        file.write(room.to_bytes(8, "little") + header.ljust(room))


def _header(shard: tuple[_Part, ...], state_bytes: Mapping[str, int]) -> bytes:
    """A file's header; where a state's length is not given, as long as it can become."""
    lengths = [(part, state_bytes.get(part.name, part.num_bytes)) for part in shard]
    return format_header(
        (part.name, part.dtype, (length,) if part.suffix == _STATE_SUFFIX else part.shape, length)
        for part, length in lengths
    )


def _quantize(
    source: StoredTensor, path: Path, *, offset_bytes: int, workers: Executor
) -> Generator[int, None, dict[str, torch.Tensor]]:
    """Write the packed weight and return what belongs to it, by suffix; yields source bytes done.

    As quantize_4bit with compress_statistics does on the whole weight at once, which would take 20 bytes an element. A
    block here holds whole blocks of bitsandbytes.
    """

    def quantize_block(begin: int) -> tuple[int, torch.Tensor]:
        values = tensor_io.read_elements(source, begin, min(begin + tensor_io.BLOCK_ELEMENTS, source.num_elements))
        _require_finite(values, source)
        packed, state = quantize_4bit(values, blocksize=_BLOCK_WEIGHTS, compress_statistics=False, quant_type="nf4")
        tensor_io.write_elements(packed, path, offset_bytes=offset_bytes + begin // 2)
        return values.numel() * BYTES_OF_DTYPE[source.dtype], state.absmax

    absmaxes = []
    for num_bytes, absmax in workers.map(quantize_block, range(0, source.num_elements, tensor_io.BLOCK_ELEMENTS)):
        absmaxes.append(absmax)
        yield num_bytes
    absmax = torch.cat(absmaxes)
    offset = absmax.mean()
    compressed, nested = quantize_blockwise(absmax - offset, blocksize=_GROUP_BLOCKS)
    state = QuantState(
        absmax=compressed,
        shape=torch.Size(source.shape),
        dtype=tensor_io.TORCH_DTYPE[source.dtype],
        blocksize=_BLOCK_WEIGHTS,
        code=get_4bit_type("nf4", device="cpu"),
        quant_type="nf4",
        offset=offset,
        state2=nested,
    )
    tensors: dict[str, torch.Tensor] = state.as_dict(packed=True)
    return tensors


def _copy(source: StoredTensor, path: Path, *, offset_bytes: int) -> Iterator[int]:
    size = BYTES_OF_DTYPE[source.dtype]
    for begin in range(0, source.num_elements, tensor_io.BLOCK_ELEMENTS):
        values = tensor_io.read_elements(source, begin, min(begin + tensor_io.BLOCK_ELEMENTS, source.num_elements))
        if values.is_floating_point():
            _require_finite(values, source)
        tensor_io.write_elements(values, path, offset_bytes=offset_bytes + begin * size)
        yield values.numel() * size


def _require_finite(values: torch.Tensor, source: StoredTensor) -> None:
    if not tensor_io.is_finite(values):
        raise ExportError(f"{source.file}: NaN or infinity in {source.name}", hint="merge again; this one is damaged")


def _require_shape(part: _Part, values: torch.Tensor) -> None:
    if tuple(values.shape) != part.shape:
        raise ExportError(
            f"{part.name}: bitsandbytes {installed_version('bitsandbytes')} made a tensor of shape "
            f"{tuple(values.shape)}, expected {part.shape}",
            hint="install the bitsandbytes that pyproject.toml names",
        )
