"""Bytes of the tensors of a step, measured: what the planner is checked against, on a processor or on a card."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def parameter_bytes(model: torch.nn.Module, *, trained: bool | None = None) -> int:
    """Bytes of the parameters, quantisation constants included; `trained` picks those with or without a gradient."""
    chosen = [weight for weight in model.parameters() if trained is None or weight.requires_grad == trained]
    total = sum(weight.untyped_storage().nbytes() for weight in {id(weight): weight for weight in chosen}.values())
    for weight in chosen:
        state = getattr(weight, "quant_state", None)
        if state is not None:
            nested = (state.state2.absmax, state.state2.code, state.offset) if state.nested else ()
            total += sum(tensor.untyped_storage().nbytes() for tensor in (state.absmax, state.code, *nested))
    return total


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the optimizer's state; a table that several weights share counts once, and a step count not at all."""
    storages = {}
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and name != "step":
                storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    return sum(storages.values())


def saved_bytes(model: torch.nn.Module, forward: Callable[[], Any]) -> int:
    """Bytes that a forward pass keeps for the backward pass; storages count once, parameters and buffers not at all."""
    known = {tensor.untyped_storage().data_ptr() for tensor in _own_tensors(model)}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()  # kept until the sum is taken: a freed storage could be counted again under its address
    total = sum(saved.values())
    del result
    return total


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that are alive and were made inside the block; `peak` is what an allocator would have seen.

    Scratch space inside one operation is not seen.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.current = 0
        self.peak = 0
        self._live = {tensor.untyped_storage()._cdata: 0 for tensor in _own_tensors(model)}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: Any) -> None:
        key = storage._cdata
        if key not in self._live:
            self._live[key] = storage.nbytes()
            self.current += self._live[key]
            self.peak = max(self.peak, self.current)
            weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.current -= self._live.pop(key, 0)


@contextmanager
def peak_bytes(model: torch.nn.Module) -> Iterator[list[int]]:
    """The peak of a block in bytes, appended to the list at its end.

    On a card it is PyTorch's own count, above what was allocated at the start; elsewhere that of `LiveBytes`.
    """
    peaks: list[int] = []
    if next(model.parameters()).device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield peaks
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        return
    with LiveBytes(model) as live:
        yield peaks
    peaks.append(live.peak)


def _own_tensors(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Parameters, buffers and quantisation constants."""
    yield from model.buffers()
    for weight in model.parameters():
        yield weight
        if weight.grad is not None:
            yield weight.grad
        state = getattr(weight, "quant_state", None)
        if state is not None:
            yield from (state.absmax, state.code, *((state.state2.absmax, state.state2.code, state.offset)))
