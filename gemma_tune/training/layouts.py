"""How rows become tensors: padded one by one, or joined into packs (LEAF)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from gemma_tune.data.encode.arrays import IGNORED, EncodedRows
from gemma_tune.engines.base import LoadedModel
from gemma_tune.engines.engine_facts import ENGINES
from gemma_tune.training.row_attention import ROW_ATTENTION
from gemma_tune.training.sampler import Group

RowArrays = tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]  # token ids and supervised flags of one row


class RowGroups(torch.utils.data.Dataset[list[RowArrays]]):
    """The rows of a group, as views of the flat arrays."""

    def __init__(self, rows: EncodedRows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, group: Group) -> list[RowArrays]:
        return [self.rows.arrays(row) for row in group]


@dataclass(frozen=True)
class PadRight:
    """Collate groups of one row into right-padded tensors.

    Returns `input_ids`, `attention_mask` and `labels`, each [batch, longest row], and `num_tokens`, the count of tokens
    that are not padding. Padding is masked by the attention mask and has label -100 whatever its id is, so a pad token
    that equals the stop token masks nothing else (F14). Without rows the batch is one token that nothing is learned
    from.
    """

    pad_token_id: int
    pad_to_multiple_of: int = 1

    def __call__(self, groups: Sequence[Sequence[RowArrays]]) -> dict[str, Any]:
        rows = [row for group in groups for row in group]
        width = _round_up(max((len(ids) for ids, _ in rows), default=1), self.pad_to_multiple_of)
        input_ids = np.full((max(len(rows), 1), width), self.pad_token_id, dtype=np.int64)
        labels = np.full_like(input_ids, IGNORED)
        attention_mask = np.zeros_like(input_ids)
        attention_mask[:, 0] = 1  # a row that attends to nothing has no numbers
        for index, (ids, supervised) in enumerate(rows):
            input_ids[index, : len(ids)] = ids
            labels[index, : len(ids)] = np.where(supervised, ids, IGNORED)
            attention_mask[index, : len(ids)] = 1
        return {
            "input_ids": torch.from_numpy(input_ids),
            "attention_mask": torch.from_numpy(attention_mask),
            "labels": torch.from_numpy(labels),
            "num_tokens": sum(len(ids) for ids, _ in rows),
        }


@dataclass(frozen=True)
class JoinRows:
    """Collate packs into sequences in which each row sees only itself.

    Returns `input_ids`, `labels` and `position_ids`, each [packs, longest pack], and `num_tokens`, the count of tokens
    that are not padding. Positions restart at 0 with every row, and every padding token has
    position 0. There is no attention mask: from restarting positions without one the attention code finds the borders
    of the rows, and a mask of ones silently switches that off. The first token of a row has label -100, because what
    predicts it is the last token of another row.
    """

    pad_token_id: int  # fills what a shorter pack leaves of the batch; its label is -100
    pad_to_multiple_of: int = 1  # the length of the batch is a multiple of this
    in_one_sequence: bool = False  # put all packs of a batch behind one another, [1, tokens of the batch]
    # add `packed_seq_lengths`, the tokens of each row in order, int32 [rows]; only with `in_one_sequence`
    with_row_lengths: bool = False
    # add `logits_to_keep`, the positions that predict a supervised token, and `head_targets`, those tokens, both int64
    # [supervised tokens]; only with `in_one_sequence`
    with_head_targets: bool = False

    def __call__(self, packs: Sequence[Sequence[RowArrays]]) -> dict[str, Any]:
        sequences = [[row for pack in packs for row in pack]] if self.in_one_sequence else packs
        num_tokens = [sum(len(ids) for ids, _ in sequence) for sequence in sequences]
        width = _round_up(max(*num_tokens, 1), self.pad_to_multiple_of)
        input_ids = np.full((len(sequences), width), self.pad_token_id, dtype=np.int64)
        labels = np.full_like(input_ids, IGNORED)
        position_ids = np.zeros_like(input_ids)
        for index, sequence in enumerate(sequences):
            start = 0
            for ids, supervised in sequence:
                stop = start + len(ids)
                input_ids[index, start:stop] = ids
                labels[index, start + 1 : stop] = np.where(supervised, ids, IGNORED)[1:]
                position_ids[index, start:stop] = np.arange(len(ids))
                start = stop
        batch: dict[str, Any] = {
            "input_ids": torch.from_numpy(input_ids),
            "labels": torch.from_numpy(labels),
            "position_ids": torch.from_numpy(position_ids),
            "num_tokens": sum(num_tokens),
        }
        if self.with_row_lengths:
            lengths = [len(ids) for sequence in sequences for ids, _ in sequence]
            batch["packed_seq_lengths"] = torch.tensor(lengths, dtype=torch.int32)
        if self.with_head_targets:
            targets = np.flatnonzero(labels[0] != IGNORED)
            batch["logits_to_keep"] = torch.from_numpy(targets - 1)
            batch["head_targets"] = torch.from_numpy(labels[0, targets])
        return batch


def join_rows_for(loaded: LoadedModel, *, pad_token_id: int) -> JoinRows:
    """The layout in which a model's attention keeps joined rows apart.

    transformers' SDPA masks find the borders in each sequence of a batch, and cost less there than in one long
    sequence. `row_attention` finds them in one sequence, which costs no more than its rows. transformers' flash
    attention, and Unsloth's own forward pass on CUDA, look for them in a batch of one sequence only and would let rows
    see each other in a larger one. Unsloth also takes the row lengths, which saves it reading positions back from the
    card, and lets the sequence be longer than the `max_seq_length` of the load.
    """
    on_cuda = loaded.model.device.type == "cuda"
    own_forward = on_cuda and ENGINES[loaded.engine].has_own_forward
    attention = getattr(loaded.model.config, "_attn_implementation", None) or ""
    return JoinRows(
        pad_token_id,
        pad_to_multiple_of=_pad_multiple(on_cuda=on_cuda),
        in_one_sequence=own_forward or "flash" in attention or attention == ROW_ATTENTION,
        with_row_lengths=own_forward,
    )


def pad_right_for(loaded: LoadedModel, *, pad_token_id: int) -> PadRight:
    """Padding to the length that a model's device is fast with."""
    return PadRight(pad_token_id, pad_to_multiple_of=_pad_multiple(on_cuda=loaded.model.device.type == "cuda"))


def _pad_multiple(*, on_cuda: bool) -> int:
    return 8 if on_cuda else 1  # the tensor cores' tiles


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


Layout = PadRight | JoinRows
