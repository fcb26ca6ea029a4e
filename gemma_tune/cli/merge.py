"""`gemma-tune merge`."""

from gemma_tune.cli.arguments import AsJson
from gemma_tune.cli.export import (
    BaseName,
    MaxShardGb,
    MergeDtypeOption,
    OutputDir,
    Positions,
    SourcePath,
    Verify,
    run_export,
)
from gemma_tune.exporting.export_settings import ExportSettings


def merge(
    source: SourcePath,
    output: OutputDir = None,
    dtype: MergeDtypeOption = "auto",
    max_shard_gb: MaxShardGb = 5.0,
    base: BaseName = None,
    verify: Verify = True,
    positions: Positions = None,
    as_json: AsJson = False,
) -> None:
    """Merge an adapter into its 16-bit base and prove it; short for `export --format merged-16bit`."""
    run_export(
        source,
        ["merged-16bit"],
        ExportSettings.of(dtype=dtype, max_shard_gb=max_shard_gb, verify=verify, num_positions=positions),
        output=output,
        base=base,
        as_json=as_json,
    )
