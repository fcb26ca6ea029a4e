"""Facts about a model directory on disk: its weight files, their tensors, hashes and size, from headers, without torch.

A safetensors file is an 8-byte little-endian header length, a JSON header (name -> dtype, shape, data_offsets) and the
raw bytes; https://github.com/huggingface/safetensors#format.
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_tune.disk import read_json_object
from gemma_tune.errors import ModelError
from gemma_tune.identity import files_sha256
from gemma_tune.models.hash_cache import cached_sha256

CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
CHAT_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
# All that goes with the weights of a model.
SMALL_FILES = (CONFIG_FILE, GENERATION_CONFIG_FILE, *TOKENIZER_FILES, *CHAT_TEMPLATE_FILES, *PROCESSOR_FILES)

BYTES_OF_DTYPE = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
# The reference reader refuses longer headers too (MAX_HEADER_SIZE in safetensors' tensor.rs).
_MAX_HEADER_BYTES = 100_000_000
# An entry like ../../x would make the loader read outside the model (transformers issue 47176).
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.safetensors", re.ASCII)


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file; `dtype` is the format's own name, such as `BF16`, and `offset_bytes` is
    counted from the start of the file."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset_bytes: int

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_elements * BYTES_OF_DTYPE[self.dtype]


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files that hold the weights: `model.safetensors`, or the shards that the index names, sorted.

    Raises ModelError when there are none, when one is missing, or when the index points outside the directory.
    """
    if not directory.is_dir():
        raise ModelError(f"{directory}: no such model directory", hint="give the directory that holds config.json")
    single, index = directory / WEIGHTS_FILE, directory / INDEX_FILE
    if single.is_file():
        return [single]
    if not index.is_file():
        pickled = sorted(path.name for path in directory.glob("*.bin"))
        if pickled:
            raise ModelError(
                f"{directory}: weights only as pickle ({pickled[0]}), which can run code when it is read",
                hint="use a copy of the model in safetensors format",
            )
        raise ModelError(
            f"{directory}: has no weights, neither {WEIGHTS_FILE} nor {INDEX_FILE}",
            hint="is the download complete? A model directory holds config.json and safetensors files",
        )
    names = sorted(set(_weight_map(index).values()))
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise ModelError(
            f"{directory}: {len(missing)} of {len(names)} weight files are missing: {', '.join(missing[:3])}",
            hint="download the model again; it is incomplete",
        )
    return [directory / name for name in names]


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name of an index, each a plain base name."""
    weight_map = read_json_object(index, error=ModelError, hint="download the file again").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index}: no weight_map", hint="download the index file again")
    for name in set(map(str, weight_map.values())):
        if not _PLAIN_NAME.fullmatch(name):
            raise ModelError(
                f"{index}: weight_map names {name!r}, which is not a plain *.safetensors file name",
                hint="do not use this model; a sound index holds plain file names only",
            )
    return {str(tensor): str(name) for tensor, name in weight_map.items()}


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, in the order of their bytes; ModelError when header and file do not fit."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start == b"version ":
            raise ModelError(f"{path}: is a Git LFS pointer", hint="run `git lfs pull`, or download the model again")
        header_bytes = int.from_bytes(start, "little")
        if size < 8 or header_bytes > min(size - 8, _MAX_HEADER_BYTES):
            raise _broken(path, "its header is longer than the file")
        try:
            header = json.loads(file.read(header_bytes).decode("utf-8"))
        except ValueError:
            raise _broken(path, "its header is not JSON") from None
    if not isinstance(header, dict):
        raise _broken(path, "its header is not a mapping")
    header.pop("__metadata__", None)
    data_start = 8 + header_bytes
    tensors = [_stored_tensor(path, str(name), entry, data_start, size) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: tensor.offset_bytes)
    return {tensor.name: tensor for tensor in tensors}


def _stored_tensor(path: Path, name: str, entry: Any, data_start: int, file_bytes: int) -> StoredTensor:
    try:
        dtype, shape = str(entry["dtype"]), tuple(int(length) for length in entry["shape"])
        begin, end = (int(offset) for offset in entry["data_offsets"])
    except (TypeError, KeyError, ValueError):
        raise _broken(path, f"the entry of {name} is malformed") from None
    if dtype not in BYTES_OF_DTYPE:
        raise _broken(path, f"{name} has the unknown dtype {dtype}")
    tensor = StoredTensor(name, path, dtype, shape, data_start + begin)
    fits = 0 <= begin <= end <= file_bytes - data_start and all(length >= 0 for length in shape)
    if not fits or end - begin != tensor.num_bytes:
        raise _broken(path, f"the bytes of {name} do not fit its shape, or end after the file")
    return tensor


def _broken(path: Path, reason: str) -> ModelError:
    return ModelError(f"{path}: cut off, or not a sound safetensors file: {reason}", hint="download or save it again")


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of a model directory, by name; ModelError when the index and the files disagree."""
    tensors: dict[str, StoredTensor] = {}
    for path in weight_files(directory):
        for name, tensor in read_header(path).items():
            if name in tensors:
                raise ModelError(
                    f"{directory}: {name} is in {tensors[name].file.name} and in {path.name}",
                    hint="remove the weight files that belong to another copy of the model",
                )
            tensors[name] = tensor
    if not (directory / WEIGHTS_FILE).is_file():
        for name, file_name in _weight_map(directory / INDEX_FILE).items():
            if name not in tensors or tensors[name].file.name != file_name:
                raise ModelError(
                    f"{directory}: the index says that {name} is in {file_name}, where it is not",
                    hint="download the model again; its index and its weight files do not belong together",
                )
    return tensors


def read_config(directory: Path) -> dict[str, Any]:
    """config.json as a mapping; ModelError when it is missing or not JSON."""
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise ModelError(
            f"{directory}: has no {CONFIG_FILE}",
            hint="A model directory holds config.json, a tokenizer and *.safetensors files.",
        )
    return read_json_object(path, error=ModelError, hint="download the file again")


def file_hashes(directory: Path) -> dict[str, str]:
    """File name -> sha256 (hex) of the weights, the index, the configs and the tokenizer: the model's identity."""
    others = (INDEX_FILE, CONFIG_FILE, GENERATION_CONFIG_FILE, *TOKENIZER_FILES, *CHAT_TEMPLATE_FILES)
    return cached_sha256(
        weight_files(directory) + [directory / name for name in others if (directory / name).is_file()]
    )


def tokenizer_hashes(directory: Path) -> dict[str, str]:
    """File name -> sha256 (hex) of what decides how text becomes tokens, and messages text."""
    names = (*TOKENIZER_FILES, *CHAT_TEMPLATE_FILES)
    return files_sha256([directory / name for name in names if (directory / name).is_file()])


def has_chat_template(directory: Path) -> bool:
    """Whether the tokenizer of a model directory brings a chat template, in a file of its own or in its config."""
    return chat_template_file(directory) is not None


def chat_template_file(directory: Path) -> Path | None:
    """The file that holds the chat template of a model directory, or None."""
    jinja, in_json = (directory / name for name in CHAT_TEMPLATE_FILES)
    config = directory / "tokenizer_config.json"
    if jinja.is_file():
        return jinja
    try:
        if json.loads(config.read_text(encoding="utf-8")).get("chat_template"):
            return config
    except (OSError, ValueError):
        pass
    return in_json if in_json.is_file() else None


def read_chat_template(directory: Path) -> str | None:
    """The default chat template, or None. Raises a ModelError where its file cannot be read."""
    file = chat_template_file(directory)
    if file is None:
        return None
    if file.suffix != ".json":
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ModelError(f"cannot read {file}: {error}", hint="copy it from the model again") from None
    template = read_json_object(file, error=ModelError).get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}
    if isinstance(template, dict):
        template = template.get("default")
    return template
