"""export.json is read back as it was written, and a later version's is not guessed at."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from gemma_tune.errors import RunError
from gemma_tune.exporting.export_record import (
    RECORD_FILE,
    ExportRecord,
    add_verification,
    finish_record,
    has_failed,
    read_record,
    stored_result,
    take_verdict,
)
from gemma_tune.exporting.verify.parity import Distance
from gemma_tune.exporting.verify.prove import FormReport, ParityReport

NEAR = Distance(max_abs=0.25, top1_agreement=1.0, clear_top1=1.0, mean_kl=1e-5, rms=0.125)
RESULT = FormReport("gguf-q8_0", "base + adapter", "logits", "KL at most 0.001", True, "near", NEAR, 9.5, 60, 10)
REPORT = ParityReport("eval rows", 200, 60, 10, NEAR, 20.0, 9.4, (RESULT,), (), ("a note",))


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    begun = ExportRecord("gguf-q8_0", "f00d", {"name": "gemma-tiny"}, {"adapter_model.safetensors": "beef"})
    (tmp_path / RECORD_FILE).write_text(begun.to_json(), encoding="utf-8")
    (tmp_path / "model.gguf").write_bytes(b"1234")
    assert read_record(tmp_path) == begun
    finished = finish_record(tmp_path, begun, {"bits_per_weight": 8.5})
    assert read_record(tmp_path) == finished
    assert (finished.files, finished.passed, stored_result(finished)) == ({"model.gguf": 4}, None, None)
    add_verification(tmp_path, REPORT, RESULT)
    record = read_record(tmp_path)
    assert record.passed is True and stored_result(record) == RESULT
    assert record.verification is not None
    assert record.verification["effect"] == asdict(NEAR) and record.verification["notes"] == ["a note"]


def test_what_failed_stays_failed_until_it_is_checked_again(tmp_path: Path) -> None:
    failed, unchecked = replace(RESULT, passed=False), replace(RESULT, passed=None)
    (tmp_path / RECORD_FILE).write_text(ExportRecord("gguf-q8_0", "f00d", {}, {}).to_json(), encoding="utf-8")
    for result, stands in ((unchecked, unchecked), (failed, failed), (unchecked, failed), (RESULT, RESULT)):
        assert add_verification(tmp_path, REPORT, result) == stands == stored_result(read_record(tmp_path))
        assert has_failed(tmp_path) == (stands.passed is False)


def test_a_file_that_another_runs_has_its_verdict(tmp_path: Path) -> None:
    for name in ("gguf-q8_0", "ollama"):
        (tmp_path / name).mkdir()
        (tmp_path / name / RECORD_FILE).write_text(ExportRecord(name, "f00d", {}, {}).to_json(), encoding="utf-8")
    assert take_verdict(tmp_path / "ollama", tmp_path / "gguf-q8_0") is None
    add_verification(tmp_path / "gguf-q8_0", REPORT, RESULT)
    taken = take_verdict(tmp_path / "ollama", tmp_path / "gguf-q8_0")
    assert taken == replace(RESULT, name="ollama", reason="the file of gguf-q8_0: near")
    assert stored_result(read_record(tmp_path / "ollama")) == taken


def test_json_holds_no_nan(tmp_path: Path) -> None:
    distance = Distance(max_abs=math.inf, top1_agreement=1.0, clear_top1=math.nan, mean_kl=0.0, rms=0.5)
    finish_record(tmp_path, ExportRecord("adapter", "f00d", {}, {}), {"distance": asdict(distance), "list": [math.nan]})
    text = (tmp_path / RECORD_FILE).read_text(encoding="utf-8")
    facts = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))["facts"]
    assert facts == {"distance": {**asdict(distance), "max_abs": None, "clear_top1": None}, "list": [None]}


def test_a_record_of_a_later_version_is_refused(tmp_path: Path) -> None:
    record = ExportRecord("adapter", "f00d", {}, {})
    (tmp_path / RECORD_FILE).write_text(json.dumps({**asdict(record), "schema": 2}), encoding="utf-8")
    with pytest.raises(RunError, match="has schema 2, this version reads 1"):
        read_record(tmp_path)


def test_a_folder_of_the_users_in_an_export_is_no_part_of_it(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "notes").mkdir()
    record = finish_record(tmp_path, ExportRecord("adapter", "f", {}, {}), {})
    assert record.files == {"model.safetensors": 7} and list(record.sha256) == ["model.safetensors"]
