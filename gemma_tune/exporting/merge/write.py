"""LEAF. Merges a LoRA adapter into its 16-bit base, block by block: the memory needed does not grow with the model.

No model is built. Each block of rows is read, changed in float32, rounded once to the output's dtype, checked and
written to its known place, several blocks at a time; so the time is about that of copying the files. The result is
written next to the output directory and renamed when it is complete: a directory of that name is finished.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from gemma_tune.disk import (
    finished_files,
    keep_file,
    output_directory,
    refuse_existing,
    require_free_disk,
    sync_file,
    write_json,
)
from gemma_tune.errors import ExportError
from gemma_tune.exporting.export_settings import DEFAULT_SETTINGS, ExportSettings
from gemma_tune.exporting.merge.merge_plan import MergePlan, PlannedTensor, plan_merge
from gemma_tune.exporting.merge.shards import format_header, set_length, shard_names, write_index
from gemma_tune.exporting.merge.tensor_io import (
    BLOCK_ELEMENTS,
    MAX_WORKERS,
    TORCH_DTYPE,
    is_finite,
    one_thread_an_operation,
    read_elements,
    read_into,
    read_tensor,
    same_values,
    write_into,
)
from gemma_tune.exporting.text_files import generation_files, licence_files, tokenizer_files, write_text_files
from gemma_tune.identity import fingerprint_of, installed_version
from gemma_tune.models.safetensors import BYTES_OF_DTYPE, CONFIG_FILE, StoredTensor, read_config, stored_tensors
from gemma_tune.models.token_ids import ids_beyond, read_added_tokens
from gemma_tune.runs.adapter_dir import AdapterDir, LoraAdapter, LoraFactors

# A block takes a quarter of a millisecond. Handed out one by one, the caller's thread would take a tenth of the cores.
_BLOCKS_A_TASK = 8
# The disk works while the cores do. A file of 5 GB that is flushed only at its end keeps them waiting for 0.6 s of 2.7.
_FLUSH_BYTES = 256 << 20


def merge_adapter(
    base_dir: Path,
    adapter_dir: Path,
    output_dir: Path,
    *,
    settings: ExportSettings = DEFAULT_SETTINGS,
    on_progress: Callable[[int, int], None] | None = None,
    more_texts: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Write base + adapter as a plain Hugging Face directory; returns what export.json tells of it.

    `on_progress` gets (bytes done, bytes in all) in the caller's thread. `more_texts` (name -> content) become files of
    the output. Needs about 0.3 GB of memory, torch included, next to the factors of two layers, and free disk for the
    output. A merge that was killed is resumed: the weight files that it finished are kept when all inputs are the same.

    Raises:
        ExportError, ModelError: then no output directory is left.
    """
    refuse_existing(output_dir)
    adapter = AdapterDir(adapter_dir).read_lora()
    base = stored_tensors(base_dir)
    plan = plan_merge(adapter, base=base, base_config=read_config(base_dir), settings=settings, same_values=same_values)
    texts = tokenizer_files(base_dir, adapter_dir) | generation_files(base_dir) | licence_files(base_dir)
    _check_vocabulary(texts, plan)
    needed_bytes = plan.num_bytes + sum(path.stat().st_size for path in texts.values())
    require_free_disk(output_dir, needed_bytes, what="the merged model")
    with output_directory(output_dir, fingerprint=_fingerprint(plan, adapter)) as partial_dir:
        write_text_files(partial_dir, copied=texts, given=more_texts)
        write_json(partial_dir / CONFIG_FILE, plan.config)
        _write_weights(plan, partial_dir, on_progress=on_progress or (lambda done, total: None))
        _prove(plan, partial_dir)
        write_index(partial_dir, shard_names(len(plan.shards)))
    changes = [tensor.change for shard in plan.shards for tensor in shard]
    return {
        "dtype": plan.dtype,
        "tensors": len(changes),
        "tensors_changed": len(changes) - changes.count("copied"),
        "weight_bytes": plan.num_bytes,
        "notes": list(plan.notes),
    }


# --- before anything is written ------------------------------------------------------------------------------------


def _check_vocabulary(texts: Mapping[str, Path], plan: MergePlan) -> None:
    """Refuse a tokenizer whose added tokens lie beyond the embedding: the model would fail on the first of them."""
    path = texts.get("tokenizer.json")
    text_config = plan.config.get("text_config", plan.config)
    rows = text_config.get("vocab_size") if isinstance(text_config, dict) else None
    if path is None or not isinstance(rows, int):
        return
    added = [(token["content"], token["id"]) for token in read_added_tokens(path)]
    for token, index in ids_beyond(added, num_rows=rows).items():
        raise ExportError(
            f"{path}: token {token!r} has id {index}, the embedding has {rows} rows",
            hint="the tokenizer was extended: save the resized embedding with the adapter (save_embedding_layers=True)",
        )


def _fingerprint(plan: MergePlan, adapter: LoraAdapter) -> str:
    """Everything that decides the weight files."""
    sources = [tensor.source for shard in plan.shards for tensor in shard]
    files = {tensor.file for tensor in (*sources, *adapter.tensors())}
    versions = [installed_version(package) for package in ("gemma-tune", "torch")]
    return fingerprint_of(files, versions, BLOCK_ELEMENTS, plan.shards)


# --- weights -------------------------------------------------------------------------------------------------------


def _write_weights(plan: MergePlan, directory: Path, *, on_progress: Callable[[int, int], None]) -> None:
    """Write every shard that is not finished yet.

    Blocks are independent and have fixed places, so the result does not depend on the number of workers.
    """
    total_bytes, done_bytes = plan.num_bytes, 0
    waiting: deque[tuple[Future[None], int]] = deque()
    num_workers = min(MAX_WORKERS, os.cpu_count() or 1)
    finished = finished_files(directory)

    def advance(num_bytes: int) -> None:
        nonlocal done_bytes
        done_bytes += num_bytes
        on_progress(done_bytes, total_bytes)

    def collect(limit: int) -> None:
        while len(waiting) > limit:
            future, num_bytes = waiting.popleft()
            future.result()
            advance(num_bytes)

    with one_thread_an_operation(), ThreadPoolExecutor(num_workers) as workers, ThreadPoolExecutor(1) as flusher:
        flushes: list[Future[None]] = []
        try:
            for shard, path in zip(plan.shards, _shard_paths(plan, directory), strict=True):
                if path.name in finished:
                    advance(sum(tensor.num_bytes for tensor in shard))
                    continue
                offsets = _write_header(shard, path)
                unflushed_bytes = 0
                for tensor in shard:
                    for task, num_bytes in _tasks(tensor, path, offsets[tensor.name]):
                        waiting.append((workers.submit(task), num_bytes))
                        collect(2 * num_workers)
                        unflushed_bytes += num_bytes
                        if unflushed_bytes >= _FLUSH_BYTES:
                            flushes.append(flusher.submit(sync_file, path))
                            unflushed_bytes = 0
                collect(0)
                flushes.append(flusher.submit(keep_file, directory, path.name))
            for future in flushes:
                future.result()
        except BaseException:
            workers.shutdown(cancel_futures=True)
            raise


def _shard_paths(plan: MergePlan, directory: Path) -> list[Path]:
    return [directory / name for name in shard_names(len(plan.shards))]


def _write_header(shard: tuple[PlannedTensor, ...], path: Path) -> dict[str, int]:
    """Write a file's header and set its length; returns where each tensor's bytes begin."""
    header = format_header((tensor.name, tensor.dtype, tensor.source.shape, tensor.num_bytes) for tensor in shard)
    header += b" " * (-len(header) % 8)
    end = 8 + len(header)
    offsets = {}
    for tensor in shard:
        offsets[tensor.name] = end
        end += tensor.num_bytes
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        set_length(file, end)
    return offsets


def _tasks(tensor: PlannedTensor, path: Path, offset_bytes: int) -> Iterator[tuple[Callable[[], None], int]]:
    """The work on one tensor, each part with its number of output bytes. A block is some whole rows."""
    num_elements = tensor.source.num_elements
    width = tensor.source.shape[-1] if tensor.factors is not None else 1
    block_elements = max(width, BLOCK_ELEMENTS // width * width)
    task_elements = _BLOCKS_A_TASK * block_elements
    change = _Change.of(tensor.factors, tensor.source) if tensor.factors is not None else None
    for begin in range(0, num_elements, task_elements):
        blocks = range(begin, min(begin + task_elements, num_elements), block_elements)
        num_bytes = (blocks.stop - begin) * BYTES_OF_DTYPE[tensor.dtype]
        yield partial(_write_blocks, tensor, change, path, offset_bytes=offset_bytes, blocks=blocks), num_bytes


@dataclass(frozen=True)
class _Change:
    """The low-rank change of one weight (O, I) in float32: left (O, rank) @ right (rank, I), scaling included in right.

    DoRA scales the sum by magnitude / norm: `row_magnitude` (O,) for a linear layer, whose norms are those of the rows;
    `column_scale` (I,) for an embedding, whose norms run over all rows and are therefore measured beforehand.
    """

    left: torch.Tensor
    right: torch.Tensor
    row_magnitude: torch.Tensor | None
    column_scale: torch.Tensor | None

    @staticmethod
    def of(factors: LoraFactors, source: StoredTensor) -> _Change:
        a, b = read_tensor(factors.a).float(), read_tensor(factors.b).float()
        left, right = (a.T, b.T) if factors.is_embedding else (b, a)
        right = right * factors.scaling
        magnitude = None if factors.magnitude is None else read_tensor(factors.magnitude).float()
        if magnitude is None or not factors.is_embedding:
            return _Change(left, right, magnitude, None)
        return _Change(left, right, None, magnitude / _column_norms(source, left, right))

    def apply(self, weight: torch.Tensor, begin_row: int) -> None:
        """Turn the base's rows in float32 into the merged ones."""
        end_row = begin_row + weight.shape[0]
        weight.addmm_(self.left[begin_row:end_row], self.right)
        if self.row_magnitude is not None:
            norms = torch.linalg.vector_norm(weight, dim=1)
            weight *= (self.row_magnitude[begin_row:end_row] / norms)[:, None]
        if self.column_scale is not None:
            weight *= self.column_scale


_buffers = threading.local()


def _scratch(role: str, dtype: torch.dtype, num_elements: int) -> torch.Tensor:
    """A flat tensor of this thread's own, overwritten by the next block.

    Fresh memory for every block would come from the system and go back to it: half a million page faults and a third
    of the time of a 5 GB merge.
    """
    buffer: torch.Tensor | None = getattr(_buffers, role, None)
    if buffer is None or buffer.dtype != dtype or buffer.numel() < num_elements:
        buffer = torch.empty(num_elements, dtype=dtype)
        setattr(_buffers, role, buffer)
    return buffer[:num_elements]


def _column_norms(source: StoredTensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The norm of each column of source + left @ right, over all rows, summed in float64."""
    rows, width = source.shape
    squares = torch.zeros(width, dtype=torch.float64)
    step = max(1, BLOCK_ELEMENTS // width)
    for row in range(0, rows, step):
        weight = read_elements(source, row * width, min(row + step, rows) * width).float().view(-1, width)
        squares += weight.add_(left[row : row + step] @ right).square_().sum(dim=0, dtype=torch.float64)
    return squares.sqrt().float()


def _write_blocks(
    tensor: PlannedTensor, change: _Change | None, path: Path, *, offset_bytes: int, blocks: range
) -> None:
    """Read, change, check and write blocks of elements. In the output file the tensor begins at offset_bytes."""
    source = tensor.source
    # Tensors that only move go this way too: reading, checking and writing a block take 100 us, os.copy_file_range 136.
    with FileIO(source.file) as source_file, FileIO(path, "r+") as output_file:
        for begin in blocks:
            end = min(begin + blocks.step, blocks.stop)
            values = _scratch("read", TORCH_DTYPE[source.dtype], end - begin)
            read_into(source_file, values, offset_bytes=source.offset_bytes + begin * BYTES_OF_DTYPE[source.dtype])
            if change is not None:
                values = _scratch("weight", torch.float32, end - begin).copy_(values)
                width = source.shape[-1]
                change.apply(values.view(-1, width), begin // width)
            if values.dtype != TORCH_DTYPE[tensor.dtype]:
                values = _scratch("output", TORCH_DTYPE[tensor.dtype], end - begin).copy_(values)
            if values.is_floating_point() and not is_finite(values):
                raise _not_finite(tensor, begin, end)
            write_into(output_file, values, offset_bytes=offset_bytes + begin * BYTES_OF_DTYPE[tensor.dtype])


def _not_finite(tensor: PlannedTensor, begin: int, end: int) -> ExportError:
    """Name the cause: the base's own values, or a sum beyond the range of the output's dtype."""
    if not is_finite(read_elements(tensor.source, begin, end)):
        return ExportError(
            f"{tensor.source.file}: NaN or infinity in {tensor.source.name}",
            hint="the base is damaged; download it again",
        )
    return ExportError(
        f"{tensor.name}: merged values are NaN or beyond the range of {tensor.dtype}",
        hint="merge with dtype bfloat16 or float32" if tensor.dtype == "F16" else "take an earlier checkpoint",
    )


# --- proof ---------------------------------------------------------------------------------------------------------


def _prove(plan: MergePlan, directory: Path) -> None:
    """Open every file with the reference reader: the names, shapes and dtypes must be the planned ones."""
    for shard, path in zip(plan.shards, _shard_paths(plan, directory), strict=True):
        planned = {tensor.name: (tensor.dtype, list(tensor.source.shape)) for tensor in shard}
        try:
            with safe_open(str(path), framework="pt") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (safe_open is not a mapping)
                written = {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
        except SafetensorError as error:
            raise ExportError(f"{path.name} cannot be read back: {error}", hint="is the disk sound?") from error
        if written != planned:
            raise ExportError(f"{path.name} does not hold what was planned", hint="is the disk sound?")
