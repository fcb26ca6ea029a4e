"""What a merge will write, decided from headers alone: which tensor lands where, ties, dtypes, shards. No torch.

Names differ between an adapter, a checkpoint and the transformers release that wrote them (`model.layers`,
`model.language_model.layers`, `language_model.model.layers`); `canonical_name` brings them together. PEFT loads an
adapter whose names do not fit with one warning and no effect; here every adapter tensor has exactly one place, or
nothing is written.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from gemma_tune.errors import ExportError
from gemma_tune.exporting.export_settings import ExportSettings
from gemma_tune.exporting.merge.shards import fill_shards
from gemma_tune.models.families.known import canonical_name, find_family
from gemma_tune.models.safetensors import BYTES_OF_DTYPE, StoredTensor
from gemma_tune.runs.adapter_dir import FLOAT_DTYPES, LoraAdapter, LoraFactors
from gemma_tune.runs.adapter_fit import EMBEDDING, HEAD, refuse_missing, refuse_strangers

# (a, b, transposed) -> whether b holds a's values, or those of a.T
SameValues = Callable[[StoredTensor, StoredTensor, bool], bool]

STORED_DTYPE_OF = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}
_DTYPE_NAME_OF = {stored: name for name, stored in STORED_DTYPE_OF.items()}


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the output."""

    name: str
    source: StoredTensor  # where its values come from: the base, or the adapter when it was trained as a whole
    base: StoredTensor | None  # the base's tensor of the same name and shape
    factors: LoraFactors | None  # the low-rank change to add
    dtype: str  # the dtype to write, in the format's name

    @property
    def num_bytes(self) -> int:
        return self.source.num_elements * BYTES_OF_DTYPE[self.dtype]

    @property
    def change(self) -> Literal["merged", "replaced", "copied"]:
        if self.factors is not None:
            return "merged"
        return "copied" if self.base is self.source else "replaced"


@dataclass(frozen=True)
class MergePlan:
    """The tensors of each output file, and config.json. `dtype` is the floating dtype that most bytes have, as in
    config.json; `notes` are what a user should know about ties and resized vocabularies."""

    shards: tuple[tuple[PlannedTensor, ...], ...]
    config: Mapping[str, Any]
    dtype: str
    notes: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for shard in self.shards for tensor in shard)


def plan_merge(
    adapter: LoraAdapter,
    *,
    base: Mapping[str, StoredTensor],
    base_config: Mapping[str, Any],
    settings: ExportSettings,
    same_values: SameValues,
) -> MergePlan:
    """Decide every tensor of the output; ExportError names the adapter keys that have no place or do not fit."""
    _refuse_base(base, base_config, adapter)
    name_of = _base_names(base)
    planned = {name: PlannedTensor(name, tensor, tensor, None, tensor.dtype) for name, tensor in base.items()}
    factors, trained, copies = _by_canonical_name(adapter)
    refuse_strangers(adapter, base.keys())
    refuse_missing(adapter, base.keys(), base_config=base_config)

    for canonical, name in name_of.items():
        if canonical not in (EMBEDDING, HEAD):
            stored = base[name]
            source = trained.get(canonical) or _changed_copy(stored, copies.get(canonical), same_values)
            planned[name] = replace(planned[name], source=source, factors=factors.get(canonical))

    config = dict(base_config)
    notes: tuple[str, ...] = ()
    if EMBEDDING in name_of:
        embedding, head, notes = _plan_ends(
            adapter, base=base, name_of=name_of, base_config=base_config, same_values=same_values
        )
        planned.pop(name_of.get(HEAD, ""), None)
        planned |= {tensor.name: tensor for tensor in (embedding, head) if tensor is not None}
        rows_before = base[name_of[EMBEDDING]].shape[0]
        config = _with_ends(config, has_head=head is not None, rows=embedding.source.shape[0], rows_before=rows_before)
    for output in planned.values():
        _check_shapes(adapter, output)

    if settings.dtype != "auto":
        wanted = STORED_DTYPE_OF[settings.dtype]
        planned = {n: replace(t, dtype=wanted) if t.dtype in FLOAT_DTYPES else t for n, t in planned.items()}
    main_dtype = _main_dtype(planned.values())
    return MergePlan(
        shards=fill_shards(
            [[tensor] for tensor in planned.values()],
            settings.max_shard_bytes,
            key=lambda tensor: (-BYTES_OF_DTYPE[tensor.dtype], tensor.name),
        ),
        config={"dtype": main_dtype} | _with_dtype(config, main_dtype),
        dtype=main_dtype,
        notes=notes,
    )


def _refuse_base(base: Mapping[str, StoredTensor], config: Mapping[str, Any], adapter: LoraAdapter) -> None:
    """Refuse a base that is quantised (merging would round every weight again) or whose config brings code."""
    where = next(iter(base.values())).file.parent if base else adapter.directory
    quantised = [t.name for t in base.values() if t.dtype not in (*FLOAT_DTYPES, "I64", "I32", "I16", "BOOL")]
    if config.get("quantization_config") or quantised:
        found = f"{quantised[0]} is {base[quantised[0]].dtype}" if quantised else "quantization_config in config.json"
        named = re.sub(r"(-unsloth)?-(bnb-4bit|bnb-8bit|4bit|8bit)$", "", adapter.base_name or "")
        raise ExportError(
            f"{where}: the base is quantised ({found}); merging into it would round away part of what was trained",
            hint="merge into the 16-bit base"
            + (f": {named}" if named != (adapter.base_name or "") else ": --base DIR"),
        )
    if find_family(config.get("model_type")) is None:
        raise ExportError(
            f"{where}: model_type {config.get('model_type')!r} is not a Gemma",
            hint="give the base that the adapter was trained on",
        )
    code = [key for key in config if key == "auto_map" or key.startswith("_attn_implementation")]
    if code:
        raise ExportError(
            f"{where}: config.json has {code[0]}, which makes loaders run code from elsewhere",
            hint="use the model as its maker published it",
        )


def _base_names(base: Mapping[str, StoredTensor]) -> dict[str, str]:
    """Canonical name -> name in the base."""
    name_of: dict[str, str] = {}
    for name in base:
        other = name_of.setdefault(canonical_name(name), name)
        if other != name:
            raise ExportError(
                f"the base holds both {other} and {name}, which are one weight under two names",
                hint="use the base as its maker published it",
            )
    return name_of


def _by_canonical_name(
    adapter: LoraAdapter,
) -> tuple[dict[str, LoraFactors], dict[str, StoredTensor], dict[str, StoredTensor]]:
    """The adapter's factors, whole tensors and base copies by the canonical name of the weight that they change."""
    factors = {canonical_name(module + ".weight"): change for module, change in adapter.factors.items()}
    trained = {canonical_name(name): tensor for name, tensor in adapter.trained.items()}
    copies = {canonical_name(module + ".weight"): tensor for module, tensor in adapter.base_copies.items()}
    counts = (len(factors), len(trained), len(copies))
    both = sorted(factors.keys() & trained.keys())
    if counts != (len(adapter.factors), len(adapter.trained), len(adapter.base_copies)) or both:
        raise ExportError(
            f"{adapter.directory}: two sets of adapter tensors are for one weight" + (f": {both[0]}" if both else ""),
            hint="the adapter file is damaged, or was put together from two",
        )
    return factors, trained, copies


def _plan_ends(
    adapter: LoraAdapter,
    *,
    base: Mapping[str, StoredTensor],
    name_of: Mapping[str, str],
    base_config: Mapping[str, Any],
    same_values: SameValues,
) -> tuple[PlannedTensor, PlannedTensor | None, tuple[str, ...]]:
    """Plan embedding and head, which is None when the output ties the two, and say what a user should know of them.

    It follows PEFT's forward pass, not its merge, which adds a change trained on one end to both (peft issue 2777).
    In a tied base both ends are one parameter. modules_to_save trains a copy of its own, so the other end stays what it
    was; an embedding that is merely saved with the adapter is loaded into the one parameter, so both ends are it. LoRA
    on one end changes that end alone, unless ensure_weight_tying made them one.
    """
    factors, trained, copies = _by_canonical_name(adapter)
    stored = base[name_of[EMBEDDING]]
    stored_head = base[name_of[HEAD]] if HEAD in name_of else None
    says_tied = _says_tied(base_config)
    if stored_head is None and not says_tied:
        raise ExportError(
            f"{stored.file.parent}: config.json says that lm_head is not tied, but there is no lm_head.weight",
            hint="the base is incomplete; download it again",
        )
    # transformers ties only where the file holds no head, or an equal one (tie_weights in modeling_utils.py, 5.x).
    was_tied = stored_head is None or (says_tied and same_values(stored, stored_head, False))

    whole_in, whole_out = trained.get(EMBEDDING), trained.get(HEAD)
    copy_in, copy_out = copies.get(EMBEDDING), copies.get(HEAD)
    if was_tied:
        wholes, both_copies = (whole_in, whole_out), (copy_in, copy_out)
        shared = _shared_end(adapter, stored, wholes=wholes, copies=both_copies, same_values=same_values)
        source_in, source_out = whole_in or shared, whole_out or shared
    else:
        assert stored_head is not None
        source_in = whole_in or _changed_copy(stored, copy_in, same_values)
        source_out = whole_out or _changed_copy(stored_head, copy_out, same_values)
    for end in (source_in, source_out):
        if len(end.shape) != 2 or end.shape[1] != stored.shape[1]:
            raise ExportError(
                f"{adapter.directory}: {end.name} has shape {end.shape}, the base's embedding {stored.shape}",
                hint=f"was it trained on another size? The adapter names {adapter.base_name or 'no base'}",
            )
    if source_in.shape[0] != source_out.shape[0]:
        raise ExportError(
            f"{adapter.directory}: the embedding has {source_in.shape[0]} rows and lm_head {source_out.shape[0]}",
            hint="save both after resizing the vocabulary (save_embedding_layers=True)",
        )

    embedding = _planned_end(name_of[EMBEDDING], source_in, stored, factors.get(EMBEDDING))
    head_name = name_of.get(HEAD) or ("language_model." if stored.name.startswith("language_model.") else "") + HEAD
    head = _planned_end(head_name, source_out, stored_head or stored, factors.get(HEAD))
    stays_tied = was_tied and _is_one(adapter, embedding, head, same_values)
    notes = []
    if was_tied and not stays_tied:
        notes.append("lm_head and the embedding were trained apart: the output stores both and is no longer tied")
    if source_in.shape[0] != stored.shape[0]:
        notes.append(f"the vocabulary was resized from {stored.shape[0]} to {source_in.shape[0]} rows")
    return embedding, None if stays_tied else head, tuple(notes)


def _says_tied(config: Mapping[str, Any]) -> bool:
    """tie_word_embeddings, which every Gemma config leaves out when it is true (older writers omit defaults)."""
    text_config = config.get("text_config")
    nested = text_config.get("tie_word_embeddings") if isinstance(text_config, dict) else None
    return bool(config.get("tie_word_embeddings", True if nested is None else nested))


def _changed_copy(stored: StoredTensor, copy: StoredTensor | None, same_values: SameValues) -> StoredTensor:
    """Start from the adapter's copy of the base weight only where it differs (a vocabulary that was resized)."""
    if copy is None or (copy.shape == stored.shape and same_values(stored, copy, False)):
        return stored
    return copy


def _shared_end(
    adapter: LoraAdapter,
    stored: StoredTensor,
    *,
    wholes: tuple[StoredTensor | None, StoredTensor | None],
    copies: tuple[StoredTensor | None, StoredTensor | None],
    same_values: SameValues,
) -> StoredTensor:
    """The one parameter behind both ends of a tied base, after PEFT has loaded the adapter; (embedding, head) pairs."""
    whole_in, whole_out = wholes
    if whole_in is not None and not adapter.saves_apart(whole_in):
        return whole_in
    if whole_out is not None and not adapter.saves_apart(whole_out):
        return whole_out
    changed = [copy for copy in (_changed_copy(stored, c, same_values) for c in copies) if copy is not stored]
    if len(changed) == 2 and not same_values(changed[0], changed[1], False):
        raise ExportError(
            f"{adapter.directory}: the base is tied, but the adapter carries different copies of it for the two ends",
            hint="the adapter file is damaged, or was put together from two",
        )
    return changed[0] if changed else stored


def _planned_end(name: str, source: StoredTensor, stored: StoredTensor, factors: LoraFactors | None) -> PlannedTensor:
    return PlannedTensor(name, source, stored if stored.shape == source.shape else None, factors, stored.dtype)


def _is_one(adapter: LoraAdapter, embedding: PlannedTensor, head: PlannedTensor, same: SameValues) -> bool:
    """Whether both ends come out as the same values."""
    if embedding.source is not head.source and not same(embedding.source, head.source, False):
        return False
    at_in, at_out = embedding.factors, head.factors
    if at_in is None or at_out is None:
        return at_in is at_out
    # (b @ a).T of the embedding is b' @ a' of the head when b' = a.T and a' = b.T.
    if not adapter.ties_embeddings or at_in.scaling != at_out.scaling or at_in.magnitude or at_out.magnitude:
        return False
    return same(at_in.a, at_out.b, True) and same(at_in.b, at_out.a, True)


def _with_ends(config: dict[str, Any], *, has_head: bool, rows: int, rows_before: int) -> dict[str, Any]:
    """The output's config: untied where the ends differ, and with the new number of rows."""
    changes: dict[str, Any] = {"tie_word_embeddings": False} if has_head and _says_tied(config) else {}
    text_config = config.get("text_config")
    if rows != rows_before:
        changes["vocab_size"] = rows
    if isinstance(text_config, dict):
        config = config | {"text_config": text_config | changes}
        changes.pop("vocab_size", None)
    return config | changes


def _check_shapes(adapter: LoraAdapter, tensor: PlannedTensor) -> None:
    """The change must have the weight's shape; a tensor trained as a whole the base's, vocabulary rows apart."""
    wanted = tensor.source.shape
    if tensor.factors is not None and tensor.factors.weight_shape != wanted:
        raise ExportError(
            f"{adapter.directory}: {tensor.factors.module}: the adapter fits a weight of shape "
            f"{tensor.factors.weight_shape}, the base has {wanted}",
            hint=f"was it trained on another size? The adapter names {adapter.base_name or 'no base'}",
        )
    if tensor.base is not None and tensor.base.shape != wanted:
        raise ExportError(
            f"{adapter.directory}: {tensor.name} has shape {wanted} in the adapter and {tensor.base.shape} in the base",
            hint=f"was it trained on another size? The adapter names {adapter.base_name or 'no base'}",
        )


def _main_dtype(tensors: Iterable[PlannedTensor]) -> str:
    """The floating dtype that most bytes have, as config.json names it."""
    bytes_of: Counter[str] = Counter()
    for tensor in tensors:
        if tensor.dtype in FLOAT_DTYPES:
            bytes_of[tensor.dtype] += tensor.num_bytes
    return _DTYPE_NAME_OF[max(bytes_of, key=bytes_of.__getitem__)]


def _with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """config.json with the output's dtype at every level, no quantization_config, and no path of the machine."""

    def output(key: str, value: Any) -> Any:
        if key in ("dtype", "torch_dtype"):
            return dtype
        return _with_dtype(value, dtype) if key.endswith("_config") and isinstance(value, dict) else value

    return {k: output(k, value) for k, value in config.items() if k not in ("quantization_config", "_name_or_path")}
