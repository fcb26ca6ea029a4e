"""Whether joined rows stay apart: the model itself is asked before a packed training starts (LEAF)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from gemma_tune.data.encode.arrays import IGNORED, EncodedRows
from gemma_tune.engines.base import LoadedModel
from gemma_tune.training.adapter_weights import trained_weights
from gemma_tune.training.layouts import JoinRows, PadRight, RowArrays, join_rows_for, pad_right_for

PROBE_TOKENS = 24  # of each row


def find_leak(loaded: LoadedModel, *, rows: EncodedRows, pad_token_id: int, batch_size: int) -> str | None:
    """Why rows that are joined into packs would not be trained as if each were alone, or None when they would.

    Which attention code runs depends on model, engine, versions and card, so the model itself is asked, in training
    mode and in the layout and precision of the training: behind one row and behind another, a row must have the same
    loss for every token, and about the one that it has alone. Dropout is off meanwhile. The model, its gradients and
    the random state are left as they were.

    Args:
        rows: give the tokens of the probe; any row of the model's tokens will do.
        batch_size: packs of a forward pass.
    """
    join, pad = (make(loaded, pad_token_id=pad_token_id) for make in (join_rows_for, pad_right_for))
    # Neighbours that differ in every token, and a row behind them, of which alone the losses are compared.
    tokens = np.unique(np.concatenate([rows.arrays(row)[0] for row in range(min(len(rows), 64))]))
    drawn = np.random.default_rng(0).integers(len(tokens), size=(2, PROBE_TOKENS))
    unwatched, watched = np.zeros(PROBE_TOKENS, dtype=np.bool_), np.ones(PROBE_TOKENS, dtype=np.bool_)
    first, other = ((tokens[(drawn[0] + shift) % len(tokens)], unwatched) for shift in (0, 1))
    row: RowArrays = (tokens[drawn[1]], watched)
    # A second pack of another length, so that padding is there as well.
    beside = [[row]] if batch_size > 1 else []
    try:
        with leaving_no_trace(loaded.model), _without_dropout(loaded.model):
            behind_first, behind_other, alone = (
                _token_losses(loaded, collate=collate, packs=packs)
                for collate, packs in ((join, [[first, row], *beside]), (join, [[other, row], *beside]), (pad, [[row]]))
            )
    except Exception as error:  # whatever a model or kernel raises here, it would raise in the first step
        return f"the model refuses joined rows ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
    in_half = loaded.precision.compute != "float32"
    # The masked part of an attention adds exact zeros, so that a neighbour changes nothing at all where rows are apart.
    change = float((behind_first - behind_other).abs().max())
    if not change <= (1e-3 if in_half else 1e-5):
        return f"a row's loss changes by {change:.2g} with its neighbour in the pack, so they see each other"
    # Another kernel, or another order of sums, may compute the row alone; single tokens differ by rounding.
    change = float((behind_first.reshape(-1, len(alone)) - alone).abs().mean())
    if not change <= (5e-2 if in_half else 1e-3):
        return f"a row's loss in a pack differs from its loss alone by {change:.2g}"
    return None


@contextmanager
def leaving_no_trace(model: Any) -> Iterator[None]:
    """The random state and the gradients afterwards are those of before."""
    weights = trained_weights(model).values()
    gradients = [weight.grad for weight in weights]
    for weight in weights:
        weight.grad = None  # a backward pass would add to it in place
    try:
        with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
            yield
    finally:
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient


@contextmanager
def _without_dropout(model: Any) -> Iterator[None]:
    """Training mode, but for dropout; afterwards all modes are as before."""
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    for module, _ in modes:
        if isinstance(module, torch.nn.Dropout):
            module.training = False
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _token_losses(loaded: LoadedModel, *, collate: JoinRows | PadRight, packs: list[list[RowArrays]]) -> torch.Tensor:
    """Cross-entropy of every supervised token of a batch in its order, float32 [tokens], in nats."""
    model = loaded.model
    torch.manual_seed(0)
    batch = {name: value.to(model.device) for name, value in collate(packs).items() if isinstance(value, torch.Tensor)}
    targets = batch.pop("labels")[:, 1:]
    autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(loaded.precision.autocast or "")
    with torch.autocast(model.device.type, dtype=autocast, enabled=autocast is not None):
        logits = model(**batch, use_cache=False).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(
        logits[targets != IGNORED].float(), targets[targets != IGNORED], reduction="none"
    )
    # Attention is chosen by whether gradients are wanted, and Unsloth's checkpoints count on a backward pass to follow.
    losses.sum().backward()
    return losses.detach()
