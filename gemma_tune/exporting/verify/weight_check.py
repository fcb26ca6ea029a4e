"""Compares the stored weights of an export with what they should be, in float64, on sampled rows of every tensor.

For machines that cannot run the model: it needs no more memory than a tensor's sampled rows. It shares no arithmetic
with the merge. What it cannot see is whether a loader reads the file as we do; only running it shows that.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gemma_tune.exporting.gguf.header import GgufHeader, read_gguf_header
from gemma_tune.models.families.known import canonical_name
from gemma_tune.models.safetensors import StoredTensor, stored_tensors
from gemma_tune.runs.adapter_dir import AdapterDir, LoraFactors
from gemma_tune.text import listed

Floats = npt.NDArray[np.float64]
_MAX_ROWS = 64
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_STORED = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}
# A unit in the last place: half of it is rounding, the rest for float32 sums that fall on the other side of a tie. For
# float32 itself the error of the sum counts, as large as 1e-5 where a value is a thousandth of the largest.
_RELATIVE_ERROR = {"F64": 2e-5, "F32": 2e-5, "F16": 2.0**-10, "BF16": 2.0**-7}


@dataclass(frozen=True)
class WeightCheck:
    """Tensors compared, those that could not be, and those that differ, with the relative error of the worst."""

    against: str
    num_tensors: int
    skipped: tuple[str, ...]
    wrong: tuple[str, ...]
    worst: float

    @property
    def passed(self) -> bool:
        return self.num_tensors > 0 and not self.wrong

    def told(self) -> str:
        """The result in words."""
        if self.wrong:
            return f"{len(self.wrong)} tensors hold other values than they should: {listed(self.wrong)}"
        left_out = f", {len(self.skipped)} not comparable" if self.skipped else ""
        return f"sampled rows of {self.num_tensors} tensors are right to {self.worst:.1e}{left_out}"


def check_merged_weights(base_dir: Path, adapter_dir: Path, merged_dir: Path) -> WeightCheck:
    """Sampled rows of every merged tensor against base + scaling × B × A."""
    adapter = AdapterDir(adapter_dir).read_lora()
    base = {canonical_name(name): tensor for name, tensor in stored_tensors(base_dir).items()}
    factors = {canonical_name(f"{module}.weight"): change for module, change in adapter.factors.items()}
    # What the adapter file carries stands for the base's: tensors trained as a whole, and embeddings saved next to it.
    carried = {canonical_name(f"{module}.weight"): tensor for module, tensor in adapter.base_copies.items()}
    carried |= {canonical_name(name): tensor for name, tensor in adapter.trained.items()}
    found = {canonical_name(name): tensor for name, tensor in stored_tensors(merged_dir).items()}
    wrong, skipped, compared, worst = [], [], 0, 0.0
    for name, tensor in found.items():
        expected = _expected(tensor, base | carried, factors.get(name), name=name)
        if expected is None:
            skipped.append(name)
            continue
        rows, values = expected
        error = _relative_error(values, read_rows(tensor, rows))
        compared += 1
        worst = max(worst, error)
        if not error <= _RELATIVE_ERROR[tensor.dtype]:
            wrong.append(name)
    missing = sorted(factors.keys() - found.keys())
    return WeightCheck("base + scaling × B × A", compared, tuple(skipped), (*wrong, *missing), worst)


def _expected(
    tensor: StoredTensor, sources: Mapping[str, StoredTensor], change: LoraFactors | None, *, name: str
) -> tuple[npt.NDArray[np.int64], Floats] | None:
    """Row numbers and their wanted values; None for what is not computed here."""
    # A head that is no longer tied began as the embedding.
    source = sources.get(name) or (sources.get(_EMBEDDING) if name == _HEAD else None)
    if source is None or source.shape != tensor.shape or tensor.dtype not in _STORED:
        return None
    rows = sample_rows(tensor)
    values = read_rows(source, rows)
    if change is None:
        return rows, values
    if change.is_embedding and change.magnitude is not None:
        return None  # DoRA's norms of an embedding run over all of its rows
    a, b = read_rows(change.a), read_rows(change.b)
    left, right = (a.T, b.T) if change.is_embedding else (b, a)
    values = values + change.scaling * (left[rows] @ right)
    if change.magnitude is not None:
        magnitude = read_rows(change.magnitude)[rows, 0]
        values *= (magnitude / np.linalg.norm(values, axis=1))[:, None]
    return rows, values


def sample_rows(tensor: StoredTensor) -> npt.NDArray[np.int64]:
    """At most 64 row numbers, evenly spread, the first and the last among them."""
    return np.unique(np.linspace(0, tensor.shape[0] - 1, _MAX_ROWS).astype(np.int64))


def read_rows(tensor: StoredTensor, rows: npt.NDArray[np.int64] | None = None) -> Floats:
    """Rows of a stored tensor in float64, (rows, width); a vector has width 1."""
    shape = (tensor.shape[0], tensor.num_elements // max(tensor.shape[0], 1))
    stored = np.memmap(tensor.file, dtype=_STORED[tensor.dtype], mode="r", offset=tensor.offset_bytes, shape=shape)
    values = stored if rows is None else stored[rows]
    if tensor.dtype == "BF16":
        values = (np.asarray(values).astype(np.uint32) << 16).view(np.float32)
    return np.asarray(values, dtype=np.float64)


def _relative_error(wanted: Floats, found: Floats) -> float:
    """The largest difference as a share of the value, or of a thousandth of the tensor's largest for values near 0."""
    floor = 1e-3 * float(np.abs(wanted).max(initial=0.0)) or 1.0
    return float((np.abs(wanted - found) / np.maximum(np.abs(wanted), floor)).max(initial=0.0))


# --- GGUF -----------------------------------------------------------------------------------------------------------

# Root mean square of the error over that of the weights. On normal weights: q8_0 0.005, q5_0 0.043, q4_0 0.086.
_MAX_GGUF_ERROR = {"F32": 1e-6, "F16": 2.0**-10, "BF16": 2.0**-8, "Q8_0": 0.02}
_MAX_COARSE_GGUF_ERROR = 0.35
_GGUF_HEAD = "output.weight"


def check_gguf_weights(merged_dir: Path, gguf_file: Path) -> WeightCheck:
    """Sampled rows of every tensor of a GGUF against the weights that it was made of, norms with their +1."""
    import gguf

    header = read_gguf_header(gguf_file)
    written = {tensor.name: tensor for tensor in header.tensors}
    sources = dict(_gguf_names(header, merged_dir))
    if _GGUF_HEAD not in written:
        sources.pop(_GGUF_HEAD, None)  # one that equals the embedding is left out
    wrong, compared, worst = sorted(written.keys() ^ sources.keys()), 0, 0.0
    for name in sources.keys() & written.keys():
        source, stored = sources[name], written[name]
        compared += 1
        if stored.shape != source.shape:
            wrong.append(name)
            continue
        rows = sample_rows(source)
        bytes_a_row = stored.num_bytes // source.shape[0]
        shape = (source.shape[0], bytes_a_row)
        raw = np.memmap(gguf_file, dtype=np.uint8, mode="r", offset=stored.offset_bytes, shape=shape)[rows]
        found = gguf.dequantize(np.ascontiguousarray(raw), gguf.GGMLQuantizationType[stored.type]).astype(np.float64)
        wanted = read_rows(source, rows) + (1.0 if name.endswith("norm.weight") else 0.0)
        scale = float(np.sqrt(np.square(wanted).mean())) or 1.0
        error = float(np.sqrt(np.square(found - wanted).mean())) / scale
        worst = max(worst, error)
        if not error <= _MAX_GGUF_ERROR.get(stored.type, _MAX_COARSE_GGUF_ERROR):
            wrong.append(name)
    return WeightCheck("the merged weights", compared, (), tuple(sorted(wrong)), worst)


def _gguf_names(header: GgufHeader, merged_dir: Path) -> Iterator[tuple[str, StoredTensor]]:
    """The name in the GGUF of each tensor of the merged model's text tower."""
    import gguf

    architecture = header.metadata["general.architecture"]
    model = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    mapping = gguf.get_tensor_name_map(model, header.metadata[f"{architecture}.block_count"])
    for name, tensor in stored_tensors(merged_dir).items():
        found = mapping.get_name(canonical_name(name), try_suffixes=(".weight", ".bias"))
        if found is not None:
            yield found, tensor
