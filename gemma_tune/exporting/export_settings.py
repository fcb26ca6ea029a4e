"""What a user chooses about exports, in one value that the recipe, the command line and Python make alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MergeDtype = Literal["auto", "bfloat16", "float16", "float32"]


@dataclass(frozen=True)
class ExportSettings:
    """Settings of an export, whichever its formats."""

    dtype: MergeDtype = "auto"  # of merged weights; auto keeps the dtype of each base tensor
    max_shard_bytes: int = 5_000_000_000  # the largest safetensors file
    verify: bool = True  # run every export and compare it with base + adapter
    num_positions: int = 200  # tokens of eval rows to compare logits at

    @classmethod
    def of(
        cls, *, dtype: MergeDtype, max_shard_gb: float, verify: bool, num_positions: int | None = None
    ) -> ExportSettings:
        """Convert what a user writes; `max_shard_gb` is in 10^9 bytes."""
        return cls(dtype, int(max_shard_gb * 1e9), verify, num_positions or cls.num_positions)


DEFAULT_SETTINGS = ExportSettings()
