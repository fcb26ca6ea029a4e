"""Attention row by row over a packed sequence, on a CPU (LEAF).

transformers keeps packed rows apart with a dense mask over the whole sequence: right, but a pack of 1,024 tokens costs
as much attention as one row of 1,024. Here each row attends in a call of its own, causal and without a mask, so that a
pack costs what its rows cost. It is an attention function as transformers' `AttentionInterface` takes them, and stands
in for `sdpa` while a packed training runs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from gemma_tune.engines.base import LoadedModel

ROW_ATTENTION = "gemma_tune_rows"


@contextmanager
def attending_by_row(loaded: LoadedModel) -> Iterator[None]:
    """Within the block the model attends row by row, where that is known to be right and faster: `sdpa` on a CPU."""
    model = loaded.model.get_base_model()
    if model.device.type != "cpu" or model.config._attn_implementation != "sdpa":
        yield
        return
    AttentionInterface.register(ROW_ATTENTION, _row_attention)
    AttentionMaskInterface.register(ROW_ATTENTION, _mask)
    model.set_attn_implementation(ROW_ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa")


def _mask(*args: Any, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor | None:
    """sdpa's mask for padded batches; none for packed ones, whose rows `_row_attention` takes from the positions."""
    return None if attention_mask is None else sdpa_mask(*args, attention_mask=attention_mask, **kwargs)


def _row_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    position_ids: torch.Tensor | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each row.

    Args:
        query: [batch, heads, tokens, head size]; key and value have the same tokens and maybe fewer heads.
        attention_mask: of a padded batch, which sdpa then computes as ever.
        position_ids: [1, tokens]; a row starts wherever they do not go on by one.
        sliding_window: tokens that a token sees, itself included; None for all before it.

    Returns:
        [batch, tokens, heads, head size], and no weights.
    """
    if attention_mask is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    lengths = _row_lengths(position_ids, num_tokens=query.shape[2])
    rows = zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True)
    attended = []
    for length, states in zip(lengths, rows, strict=True):
        window = _window_mask(length, sliding_window, device=query.device)
        attended.append(sdpa_attention_forward(module, *states, window, **{**kwargs, "is_causal": window is None})[0])
    return torch.cat(attended, dim=1), None


def _row_lengths(position_ids: torch.Tensor | None, *, num_tokens: int) -> list[int]:
    """Tokens of each row of a sequence; one row where there are no positions.

    Raises:
        ValueError: a batch of several sequences, whose rows do not start at the same places.
    """
    if position_ids is None:
        return [num_tokens]
    if position_ids.shape[0] != 1:
        raise ValueError(f"packs are joined into one sequence here, found {position_ids.shape[0]}")
    starts = torch.nonzero(torch.diff(position_ids[0]) != 1).flatten() + 1
    borders = [0, *starts.tolist(), num_tokens]
    return [end - start for start, end in pairwise(borders)]


def _window_mask(length: int, window: int | None, *, device: torch.device) -> torch.Tensor | None:
    """Which token a token of a row sees, bool [1, 1, length, length]; None where plain causality says it."""
    if window is None or length <= window:
        return None
    at = torch.arange(length, device=device)
    distance = at[:, None] - at[None, :]
    return ((distance >= 0) & (distance < window))[None, None]
