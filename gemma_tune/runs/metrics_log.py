"""The lines of metrics.jsonl: one JSON object a logged step or evaluation."""

import json
from typing import Any

from gemma_tune.disk import cannot_write, sync_file, to_json_lines, write_text
from gemma_tune.runs.layout import RunDir
from gemma_tune.secrets import mask_secrets


def append_metrics(run: RunDir, values: dict[str, Any]) -> None:
    """Append one line to metrics.jsonl; non-finite numbers are written as null, as JSON has none."""
    line = to_json_lines([values])
    try:
        with run.metrics.open("a", encoding="utf-8", newline="\n") as stream:
            stream.write(mask_secrets(line))
    except OSError as error:
        raise cannot_write(run.metrics, error) from None


def flush_metrics(run: RunDir) -> None:
    """Have every line on the disk, so that a checkpoint never knows a step that metrics.jsonl has lost."""
    if run.metrics.is_file():
        sync_file(run.metrics)


def keep_metrics_until(run: RunDir, step: int) -> None:
    """Leave out the lines after a step, and one that a crash has cut, before a run resumes from that step."""
    if run.metrics.is_file():
        rows = [row for row in read_metrics(run) if row["step"] <= step]
        write_text(run.metrics, to_json_lines(rows))


def read_metrics(run: RunDir) -> list[dict[str, Any]]:
    """Every line of metrics.jsonl; a last line cut by a crash is left out."""
    if not run.metrics.is_file():
        return []
    rows = []
    for line in run.metrics.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
