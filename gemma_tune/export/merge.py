"""LEAF. Merges a LoRA adapter into its 16-bit base, block by block: the memory needed does not grow with the model.

No model is built. Each block of rows is read, changed in float32, rounded once to the output's dtype, checked and
written to its known place, several blocks at a time; so the time is about that of copying the files. The result is
written beside the output directory and renamed when it is complete: a directory of that name is finished.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open

from gemma_tune.errors import ExportError
from gemma_tune.export.lora_adapter import LoraAdapter, LoraFactors, read_adapter
from gemma_tune.export.merge_plan import MergeDtype, MergePlan, PlannedTensor, plan_merge
from gemma_tune.models.files import (
    BYTES_OF_DTYPE,
    CHAT_TEMPLATE_FILES,
    CONFIG_FILE,
    GENERATION_CONFIG_FILE,
    INDEX_FILE,
    PROCESSOR_FILES,
    TOKENIZER_FILES,
    WEIGHTS_FILE,
    StoredTensor,
    file_hashes,
    read_config,
    stored_tensors,
)

_TORCH_DTYPE = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "BOOL": torch.bool,
}
# 1 MiB in float32. Reads and writes of up to 1 MiB ran at 4.4 GB/s, as fast as a copy inside the kernel; those of 4 MiB
# at 0.4 to 0.8 GB/s (1.5 GB, ext4, 2 cores). Smaller blocks pay for Python.
_BLOCK_ELEMENTS = 1 << 18
_MAX_WORKERS = 4
_FREE_SLACK_BYTES = 64 << 20
_DEFAULT_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class MergeReport:
    """What a merge wrote.

    Attributes:
        files: the output's files, sorted; weight_bytes counts the tensors among them.
        dtype: the floating dtype that most weights have.
        tensors_total: merged (low-rank change added) + replaced (trained as a whole) + copied (values as in the base).
        max_abs_delta: the largest change of any weight before rounding.
        notes: what changed besides values: ties, the vocabulary's size.
    """

    output_dir: Path
    files: tuple[str, ...]
    dtype: str
    tensors_total: int
    tensors_merged: int
    tensors_replaced: int
    tensors_copied: int
    weight_bytes: int
    seconds: float
    max_abs_delta: float
    notes: tuple[str, ...]


def merge_adapter(
    base_dir: Path,
    adapter_dir: Path,
    output_dir: Path,
    *,
    dtype: MergeDtype = "auto",
    max_shard_bytes: int = _DEFAULT_SHARD_BYTES,
    on_progress: Callable[[int, int], None] | None = None,
    expected_base: Mapping[str, str] | None = None,
) -> MergeReport:
    """Write base + adapter as a plain Hugging Face directory.

    dtype `auto` keeps the dtype of each base tensor. `on_progress` gets (bytes done, bytes in all) in the caller's
    thread. `expected_base` holds sha256 by file name, as `file_hashes` gives it: another base is refused. Needs about
    0.3 GB of memory, torch included, beside the factors of two layers, and free disk for the output. Raises ExportError
    or ModelError; then no output directory is left.
    """
    started = time.perf_counter()
    _refuse_output(output_dir)
    adapter = read_adapter(adapter_dir)
    base = stored_tensors(base_dir)
    plan = plan_merge(
        adapter,
        base=base,
        base_config=read_config(base_dir),
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        same_values=_same_values,
    )
    texts = _text_files(base_dir, adapter_dir)
    _check_vocabulary(texts, plan)
    _check_free_disk(output_dir, plan.num_bytes + sum(path.stat().st_size for path in texts.values()))
    _check_base_identity(base_dir, expected_base)
    _check_adapter_values(adapter)
    try:
        with _partial_directory(output_dir) as partial_dir:
            for name, path in texts.items():
                shutil.copyfile(path, partial_dir / name)
            _write_json(partial_dir / CONFIG_FILE, plan.config)
            max_abs_delta = _write_weights(plan, partial_dir, on_progress=on_progress or (lambda done, total: None))
            _prove(plan, partial_dir)
            files = tuple(sorted(path.name for path in partial_dir.iterdir()))
    except OSError as error:
        raise ExportError(
            f"cannot write {output_dir}: {error.strerror or error}",
            hint="nothing was kept; mend the cause and merge again",
        ) from error
    changes = [tensor.change for shard in plan.shards for tensor in shard]
    return MergeReport(
        output_dir=output_dir,
        files=files,
        dtype=plan.dtype,
        tensors_total=len(changes),
        tensors_merged=changes.count("merged"),
        tensors_replaced=changes.count("replaced"),
        tensors_copied=changes.count("copied"),
        weight_bytes=plan.num_bytes,
        seconds=time.perf_counter() - started,
        max_abs_delta=max_abs_delta,
        notes=plan.notes,
    )


# --- before anything is written ------------------------------------------------------------------------------------


def _refuse_output(output_dir: Path) -> None:
    if output_dir.is_dir() and not any(output_dir.iterdir()):
        return
    if output_dir.exists() or output_dir.is_symlink():
        raise ExportError(
            f"{output_dir} exists and is not an empty directory",
            hint="give another directory, or remove this one yourself; nothing is ever overwritten",
        )


def _text_files(base_dir: Path, adapter_dir: Path) -> dict[str, Path]:
    """The small files of the output: name -> where it is copied from.

    A tokenizer beside the adapter is the one that it was trained with, so it is taken whole and not mixed with the
    base's; only tokenizer.model comes from the base then, because transformers 5 no longer writes it and GGUF
    converters ask for it.
    """
    own = [directory for directory in (adapter_dir / "tokenizer", adapter_dir) if directory.is_dir()]
    with_tokenizer = [d for d in own if (d / "tokenizer.json").is_file() or (d / "tokenizer.model").is_file()]
    tokenizer_dir = with_tokenizer[0] if with_tokenizer else base_dir
    found = {name: tokenizer_dir / name for name in (*TOKENIZER_FILES, *CHAT_TEMPLATE_FILES)}
    if not found["tokenizer.model"].is_file():
        found["tokenizer.model"] = base_dir / "tokenizer.model"
    if tokenizer_dir is base_dir:
        for name in CHAT_TEMPLATE_FILES:
            trained_with = [d / name for d in own if (d / name).is_file()]
            if trained_with:
                found[name] = trained_with[0]
    found |= {name: base_dir / name for name in (GENERATION_CONFIG_FILE, *PROCESSOR_FILES)}
    return {name: path for name, path in found.items() if path.is_file()}


def _check_vocabulary(texts: Mapping[str, Path], plan: MergePlan) -> None:
    """Refuse a tokenizer whose added tokens lie beyond the embedding: the model would fail on the first of them."""
    path = texts.get("tokenizer.json")
    text_config = plan.config.get("text_config", plan.config)
    rows = text_config.get("vocab_size") if isinstance(text_config, dict) else None
    if path is None or not isinstance(rows, int):
        return
    text = path.read_text(encoding="utf-8")
    start = text.find('"added_tokens":')
    if start < 0:
        return
    # Only this list is decoded: the whole of Gemma's file (34 MB) would take 0.3 GB as Python objects.
    begin = text.index("[", start)
    added, _ = json.JSONDecoder().raw_decode(text, begin)
    beyond = [token for token in added if token["id"] >= rows]
    if beyond:
        raise ExportError(
            f"{path}: token {beyond[0]['content']!r} has id {beyond[0]['id']}, the embedding has {rows} rows",
            hint="the tokenizer was extended: save the resized embedding with the adapter (save_embedding_layers=True)",
        )


def _check_free_disk(output_dir: Path, needed_bytes: int) -> None:
    existing = next(parent for parent in output_dir.absolute().parents if parent.exists())
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < needed_bytes + _FREE_SLACK_BYTES:
        raise ExportError(
            f"{output_dir}: the merged model needs {needed_bytes / 1e9:.2f} GB, {free_bytes / 1e9:.2f} GB are free",
            hint="free some disk, or give an output directory on another one",
        )


def _check_base_identity(base_dir: Path, expected: Mapping[str, str] | None) -> None:
    if expected is None:
        return
    found = file_hashes(base_dir)
    differ = sorted(name for name, digest in expected.items() if found.get(name) != digest)
    if differ:
        told = ", ".join(name if name in found else f"{name} (missing)" for name in differ[:4])
        raise ExportError(
            f"{base_dir} is not the base that the adapter was trained on; these files differ: {told}",
            hint="merge into the base that the run's lock names",
        )


def _check_adapter_values(adapter: LoraAdapter) -> None:
    """Refuse NaN, infinity, and an adapter that changes nothing (training never moved it)."""
    largest = {tensor.name: _largest_abs(tensor) for tensor in adapter.tensors()}
    bad = [name for name, value in largest.items() if not value < float("inf")]
    if bad:
        raise ExportError(
            f"{adapter.directory}: NaN or infinity in {len(bad)} adapter tensors: {', '.join(bad[:4])}",
            hint="training diverged; take an earlier checkpoint",
        )
    moves = any((largest[f.a.name] and largest[f.b.name]) or f.magnitude is not None for f in adapter.factors.values())
    if not moves and not adapter.trained:
        raise ExportError(
            f"{adapter.directory}: the adapter changes nothing: every lora_B is zero", hint="was it trained at all?"
        )


def _largest_abs(tensor: StoredTensor) -> float:
    """The largest absolute value; NaN where there is one."""
    largest = torch.zeros(())
    for begin in range(0, tensor.num_elements, _BLOCK_ELEMENTS):
        block = _read(tensor, begin, min(begin + _BLOCK_ELEMENTS, tensor.num_elements))
        largest = torch.maximum(largest, _abs_max(block))
    return float(largest)


def _same_values(a: StoredTensor, b: StoredTensor, transposed: bool) -> bool:
    """Whether b holds a's values (those of a.T when transposed) after rounding a to b's dtype."""
    if transposed:
        return a.shape == b.shape[::-1] and torch.equal(_read_whole(a).T.to(_TORCH_DTYPE[b.dtype]), _read_whole(b))
    if a.shape != b.shape:
        return False
    for begin in range(0, a.num_elements, _BLOCK_ELEMENTS):
        end = min(begin + _BLOCK_ELEMENTS, a.num_elements)
        if not torch.equal(_read(a, begin, end).to(_TORCH_DTYPE[b.dtype]), _read(b, begin, end)):
            return False
    return True


# --- the directory that appears only when it is complete -----------------------------------------------------------


@contextmanager
def _partial_directory(output_dir: Path) -> Iterator[Path]:
    """A directory beside the output, renamed to it at the end and removed on any error.

    A merge that was killed leaves it behind; the next merge to the same output removes it.
    """
    parent = output_dir.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    partial_dir = parent / f".{output_dir.name}.merging"
    with _lock(parent / f".{output_dir.name}.merging.lock", output_dir):
        _refuse_output(output_dir)
        if partial_dir.exists():
            shutil.rmtree(partial_dir)
        partial_dir.mkdir()
        try:
            yield partial_dir
            _sync_directory(partial_dir)
            _refuse_output(output_dir)
            if output_dir.is_dir():
                output_dir.rmdir()
            partial_dir.rename(output_dir)
            _sync_directory(parent)
        except BaseException:
            shutil.rmtree(partial_dir, ignore_errors=True)
            raise


@contextmanager
def _lock(path: Path, output_dir: Path) -> Iterator[None]:
    """Keep two merges to one output apart. The system drops the lock with its process, however that ends."""
    with path.open("w", encoding="utf-8") as lock:
        # The second test: the file may be one that its last holder removed between our opening and locking it.
        if not _take_lock(lock) or not path.exists() or os.fstat(lock.fileno()).st_ino != path.stat().st_ino:
            raise ExportError(f"another merge is writing {output_dir}", hint="wait for it, or give another directory")
        try:
            yield
        finally:
            if sys.platform != "win32":
                path.unlink()
    if sys.platform == "win32":  # where an open file cannot be removed
        path.unlink(missing_ok=True)


def _take_lock(lock: IO[str]) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(lock.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _sync_directory(directory: Path) -> None:
    """Make the names in a directory durable. Windows has no such call and needs none."""
    if sys.platform == "win32":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")


# --- weights -------------------------------------------------------------------------------------------------------


def _write_weights(plan: MergePlan, directory: Path, *, on_progress: Callable[[int, int], None]) -> float:
    """Write every shard and the index; returns the largest change of any weight.

    Blocks are independent and have fixed places, so the result does not depend on the number of workers.
    """
    total_bytes, done_bytes = plan.num_bytes, 0
    max_abs_delta = 0.0
    waiting: deque[tuple[Future[float], int]] = deque()
    num_workers = min(_MAX_WORKERS, os.cpu_count() or 1)

    def collect(limit: int) -> None:
        nonlocal done_bytes, max_abs_delta
        while len(waiting) > limit:
            future, num_bytes = waiting.popleft()
            max_abs_delta = max(max_abs_delta, future.result())
            done_bytes += num_bytes
            on_progress(done_bytes, total_bytes)

    with (
        _one_thread_an_operation(),
        ThreadPoolExecutor(num_workers) as workers,
        ThreadPoolExecutor(1) as syncer,
    ):
        synced: list[Future[None]] = []
        try:
            for shard, path in zip(plan.shards, _shard_paths(plan, directory), strict=True):
                offsets = _write_header(shard, path)
                for tensor in shard:
                    for task, num_bytes in _block_tasks(tensor, path, offsets[tensor.name]):
                        waiting.append((workers.submit(task), num_bytes))
                        collect(2 * num_workers)
                collect(0)
                synced.append(syncer.submit(_sync_file, path))
            for future in synced:
                future.result()
        except BaseException:
            workers.shutdown(cancel_futures=True)
            raise
    if len(plan.shards) > 1:
        named_shards = zip(_shard_names(plan), plan.shards, strict=True)
        weight_map = {tensor.name: name for name, shard in named_shards for tensor in shard}
        index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(directory / INDEX_FILE, index)
    for path in directory.iterdir():
        if path.suffix != ".safetensors":
            _sync_file(path)
    return max_abs_delta


@contextmanager
def _one_thread_an_operation() -> Iterator[None]:
    """The workers are the parallelism: threads inside torch's operations on such small blocks would only wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _sync_file(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _shard_names(plan: MergePlan) -> list[str]:
    count = len(plan.shards)
    if count == 1:
        return [WEIGHTS_FILE]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _shard_paths(plan: MergePlan, directory: Path) -> list[Path]:
    return [directory / name for name in _shard_names(plan)]


def _write_header(shard: tuple[PlannedTensor, ...], path: Path) -> dict[str, int]:
    """Write a file's header and set its length; returns where each tensor's bytes begin."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in shard:
        begin, end = end, end + tensor.num_bytes
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.source.shape), "data_offsets": [begin, end]}
    header = json.dumps(entries, separators=(",", ":")).encode("utf-8")
    header += b" " * (-len(header) % 8)
    data_start = 8 + len(header)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(data_start + end)
    return {tensor.name: data_start + entries[tensor.name]["data_offsets"][0] for tensor in shard}


def _block_tasks(tensor: PlannedTensor, path: Path, offset_bytes: int) -> Iterator[tuple[Callable[[], float], int]]:
    """The work on one tensor in blocks of whole rows, each with its number of output bytes."""
    num_elements = tensor.source.num_elements
    width = tensor.source.shape[-1] if tensor.factors is not None else 1
    block_elements = max(width, _BLOCK_ELEMENTS // width * width)
    change = _Change.of(tensor.factors, tensor.source) if tensor.factors is not None else None
    for begin in range(0, num_elements, block_elements):
        end = min(begin + block_elements, num_elements)
        num_bytes = (end - begin) * BYTES_OF_DTYPE[tensor.dtype]
        place = offset_bytes + begin * BYTES_OF_DTYPE[tensor.dtype]
        yield partial(_write_block, tensor, change, path, begin=begin, end=end, offset_bytes=place), num_bytes


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
        a, b = _read_whole(factors.a).float(), _read_whole(factors.b).float()
        left, right = (a.T, b.T) if factors.is_embedding else (b, a)
        right = right * factors.scaling
        magnitude = None if factors.magnitude is None else _read_whole(factors.magnitude).float()
        if magnitude is None or not factors.is_embedding:
            return _Change(left, right, magnitude, None)
        return _Change(left, right, None, magnitude / _column_norms(source, left, right))

    def apply(self, weight: torch.Tensor, begin_row: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The merged rows and their change, from the base's rows in float32."""
        end_row = begin_row + weight.shape[0]
        delta = torch.mm(self.left[begin_row:end_row], self.right)
        if self.row_magnitude is None and self.column_scale is None:
            return weight.add_(delta), delta
        merged = weight + delta
        if self.row_magnitude is not None:
            norms = torch.linalg.vector_norm(merged, dim=1)
            merged *= (self.row_magnitude[begin_row:end_row] / norms)[:, None]
        if self.column_scale is not None:
            merged *= self.column_scale
        return merged, merged - weight


def _column_norms(source: StoredTensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The norm of each column of source + left @ right, over all rows, summed in float64."""
    rows, width = source.shape
    squares = torch.zeros(width, dtype=torch.float64)
    step = max(1, _BLOCK_ELEMENTS // width)
    for row in range(0, rows, step):
        weight = _read(source, row * width, min(row + step, rows) * width).float().view(-1, width)
        squares += weight.add_(left[row : row + step] @ right).square_().sum(dim=0, dtype=torch.float64)
    return squares.sqrt().float()


def _write_block(
    tensor: PlannedTensor, change: _Change | None, path: Path, *, begin: int, end: int, offset_bytes: int
) -> float:
    """Read elements [begin, end), change them, check them, write them at offset_bytes; returns the largest change."""
    source = tensor.source
    values = _read(source, begin, end)
    largest_change = 0.0
    if change is not None:
        width = source.shape[-1]
        values, delta = change.apply(values.float().view(-1, width), begin // width)
        largest_change = float(_abs_max(delta))
    elif tensor.change == "replaced" and tensor.base is not None:
        largest_change = float(_abs_max(values.float() - _read(tensor.base, begin, end).float()))
    output = values.to(_TORCH_DTYPE[tensor.dtype]) if source.dtype != tensor.dtype or change is not None else values
    if output.is_floating_point() and not float(_abs_max(output)) < float("inf"):
        raise _not_finite(tensor, begin, end)
    with path.open("rb+", buffering=0) as file:
        file.seek(offset_bytes)
        view = memoryview(output.view(-1).view(torch.uint8).numpy())
        while view:
            view = view[file.write(view) :]
    return largest_change


def _not_finite(tensor: PlannedTensor, begin: int, end: int) -> ExportError:
    """Name the cause: the base's own values, or a sum beyond the range of the output's dtype."""
    if not float(_abs_max(_read(tensor.source, begin, end))) < float("inf"):
        return ExportError(
            f"{tensor.source.file}: NaN or infinity in {tensor.source.name}",
            hint="the base is damaged; download it again",
        )
    return ExportError(
        f"{tensor.name}: merged values are NaN or beyond the range of {tensor.dtype}",
        hint="merge with dtype bfloat16 or float32" if tensor.dtype == "F16" else "take an earlier checkpoint",
    )


def _abs_max(values: torch.Tensor) -> torch.Tensor:
    """The largest absolute value, NaN where there is one. aminmax takes a 20th of the time of isfinite().all()."""
    if values.numel() == 0:
        return torch.zeros(())
    low, high = torch.aminmax(values)
    return torch.maximum(low.float().abs(), high.float().abs())


def _read(tensor: StoredTensor, begin: int, end: int) -> torch.Tensor:
    """Elements [begin, end) of a stored tensor, flat, by plain reads: mapped pages would count as resident memory."""
    size = BYTES_OF_DTYPE[tensor.dtype]
    values = torch.empty(end - begin, dtype=_TORCH_DTYPE[tensor.dtype])
    view = memoryview(values.view(torch.uint8).numpy())
    with tensor.file.open("rb", buffering=0) as file:
        file.seek(tensor.offset_bytes + begin * size)
        while view:
            count = file.readinto(view)
            if not count:
                raise ExportError(f"{tensor.file} ended while it was read", hint="is another program writing it?")
            view = view[count:]
    return values


def _read_whole(tensor: StoredTensor) -> torch.Tensor:
    return _read(tensor, 0, tensor.num_elements).view(tensor.shape)


# --- proof ---------------------------------------------------------------------------------------------------------


def _prove(plan: MergePlan, directory: Path) -> None:
    """Open every file with the reference reader: the names, shapes and dtypes must be the planned ones."""
    for shard, path in zip(plan.shards, _shard_paths(plan, directory), strict=True):
        planned = {tensor.name: (tensor.dtype, list(tensor.source.shape)) for tensor in shard}
        try:
            with safe_open(str(path), framework="pt") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
                written = {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
        except SafetensorError as error:
            raise ExportError(f"{path.name} cannot be read back: {error}", hint="is the disk sound?") from error
        if written != planned:
            raise ExportError(f"{path.name} does not hold what was planned", hint="is the disk sound?")
