"""The state of a training as files without code: tensors in safetensors, everything else in JSON (LEAF).

A tree of dicts, lists, tuples, tensors, numbers and strings comes back equal, key types and bits included. Reading it
can only build these: there is no pickle (S1).
"""

import json
import random
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file

from gemma_tune.errors import RunError


def write_state(folder: Path, name: str, state: dict[str, Any]) -> None:
    """Write `name.json` and `name.safetensors`.

    Raises:
        RunError: the state holds something that these formats have no place for.
    """
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(_to_plain(state, tensors, path=name), ensure_ascii=False)
    # A copy each, as safetensors refuses tensors that share memory.
    save_file(
        {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}, _tensors(folder, name)
    )
    _plain(folder, name).write_text(text + "\n", encoding="utf-8")


def read_state(folder: Path, name: str) -> dict[str, Any]:
    """What `write_state` wrote, with its tensors on the CPU.

    Raises:
        RunError: a file is missing or is not what `write_state` writes.
    """
    try:
        # Not load_file, which maps the file: an optimizer would go on to live in it.
        tensors = load(_tensors(folder, name).read_bytes())
        plain = json.loads(_plain(folder, name).read_text(encoding="utf-8"))
        return {**_from_plain(plain, tensors)}
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{folder}: the state {name!r} cannot be read: {type(error).__name__}: {error}") from None


def state_bytes(state: Any) -> int:
    """Bytes of the tensors in a tree."""
    tensors: dict[str, torch.Tensor] = {}
    _to_plain(state, tensors, path="")
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def random_state() -> dict[str, Any]:
    """The random states of this process: Python's, NumPy's, PyTorch's and that of every CUDA card."""
    algorithm, keys, *rest = cast(tuple[Any, ...], np.random.get_state())
    return {
        "python": random.getstate(),
        "numpy": (algorithm, keys.tolist(), *rest),
        "torch": torch.random.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Put back what `random_state` returned; a card that it does not know keeps its own state."""
    random.setstate(state["python"])
    algorithm, keys, *rest = state["numpy"]
    np.random.set_state((algorithm, np.array(keys, dtype=np.uint32), *rest))
    torch.random.set_rng_state(state["torch"])
    if torch.cuda.is_available():
        for device, cuda_state in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(cuda_state, device)


def _to_plain(value: Any, tensors: dict[str, torch.Tensor], *, path: str) -> Any:
    """JSON for a tree; its tensors are put into `tensors` under their path.

    A dict becomes `{"dict": [[key, value], ...]}`, as JSON would turn the optimizer's whole-number keys into text.
    """
    if isinstance(value, torch.Tensor):
        tensors[path] = value
        return {"tensor": path}
    if isinstance(value, dict):
        return {"dict": [[key, _to_plain(item, tensors, path=f"{path}.{key}")] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        items = [_to_plain(item, tensors, path=f"{path}.{index}") for index, item in enumerate(value)]
        return {"tuple": items} if isinstance(value, tuple) else items
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise RunError(f"a checkpoint has no place for {path}, a {type(value).__name__}", hint="report this: it is a bug")


def _from_plain(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_from_plain(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "tuple" in value:
        return tuple(_from_plain(item, tensors) for item in value["tuple"])
    return {key: _from_plain(item, tensors) for key, item in value["dict"]}


def _tensors(folder: Path, name: str) -> Path:
    return folder / f"{name}.safetensors"


def _plain(folder: Path, name: str) -> Path:
    return folder / f"{name}.json"
