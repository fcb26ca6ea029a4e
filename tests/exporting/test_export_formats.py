"""Several formats at once: shared work once, finished work kept, every verdict written, wrong wishes refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gemma_tune.data.encode.encoder import Encoder
from gemma_tune.errors import CheckFailed, ExportError
from gemma_tune.exporting import export_formats as run
from gemma_tune.exporting.export_formats import ExportOutcome, export_formats, find_exports, verify_directories
from gemma_tune.exporting.export_record import read_record
from gemma_tune.exporting.export_settings import ExportSettings
from gemma_tune.exporting.export_source import ExportSource, open_source
from gemma_tune.exporting.formats import gguf
from gemma_tune.exporting.verify.forms import measure_here
from gemma_tune.exporting.verify.probe_texts import Probe, built_in_probe
from gemma_tune.models.tokenizer import load_tokenizer
from gemma_tune.paths import TINY_MODEL_DIR
from gemma_tune.runs.reporter import SilentReporter


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads cost more than they bring for a model of this size."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def source(make_adapter: Callable[..., Path]) -> ExportSource:
    return open_source(make_adapter(TINY_MODEL_DIR), base="gemma-tiny")


@pytest.fixture(scope="module")
def probe() -> Probe:
    return built_in_probe(Encoder(load_tokenizer(TINY_MODEL_DIR)), num_positions=60)


Exporter = Callable[..., ExportOutcome]


@pytest.fixture
def exporter(source: ExportSource, probe: Probe, tmp_path: Path) -> Exporter:
    """exporter(*formats, verify=..., **settings) -> outcome, in tmp_path/out."""

    def exported(*formats: str, verify: bool = True, **settings: Any) -> ExportOutcome:
        return export_formats(
            settings.pop("source", source),
            formats,
            output=tmp_path / "out",
            settings=ExportSettings(verify=verify, **settings),
            make_probe=lambda: probe,
            reporter=SilentReporter(),
            measure=measure_here,
        )

    return exported


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The formats that were really written, in order."""
    names: list[str] = []
    write = run._write

    def counted(step: Any, *args: Any, **options: Any) -> None:
        names.append(step.format.name)
        write(step, *args, **options)

    monkeypatch.setattr(run, "_write", counted)
    return names


def test_shared_work_is_done_once_and_every_format_is_proven(
    exporter: Exporter, written: list[str], tmp_path: Path
) -> None:
    outcome = exporter("adapter", "gguf-q8_0", "gguf-f16", "merged-4bit")
    assert written == ["adapter", "merged-16bit", "gguf-q8_0", "gguf-f16", "merged-4bit"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "adapter", "gguf-f16", "gguf-q8_0", "merged-4bit",
    ]  # fmt: skip
    assert not outcome.failed
    outcome.require_passed()
    for each in outcome.exports:
        record = json.loads((each.path / "export.json").read_text(encoding="utf-8"))
        assert record["schema"] == 1 and record["format"] == each.format
        assert record["base"]["name"] == "gemma-tiny" and len(record["base"]["files"]["model.safetensors"]) == 64
        assert len(record["adapter"]["adapter_model.safetensors"]) == 64
        assert record["verification"]["result"]["passed"] is True and record["packages"]["torch"]
        assert sum(record["files"].values()) + (each.path / "export.json").stat().st_size == each.num_bytes
        for file in each.path.glob("*.json"):
            assert str(Path.home()) not in file.read_text(encoding="utf-8")
            assert str(TINY_MODEL_DIR) not in file.read_text(encoding="utf-8")


def test_finished_work_is_kept(exporter: Exporter, written: list[str], tmp_path: Path) -> None:
    first = exporter("merged-16bit")
    stamp = (tmp_path / "out" / "merged-16bit" / "model.safetensors").stat().st_mtime_ns
    again = exporter("merged-16bit", "gguf-f16")
    assert written == ["merged-16bit", "gguf-f16"]
    assert [each.kept for each in again.exports] == [True, False]
    assert (tmp_path / "out" / "merged-16bit" / "model.safetensors").stat().st_mtime_ns == stamp
    assert again.exports[0].record == first.exports[0].record  # not measured again
    assert again.parity is not None and [each.name for each in again.parity.exports] == ["gguf-f16"]


def test_a_killed_export_is_gone_on_with(
    exporter: Exporter, written: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What an ended process leaves: finished parts, and an export whose record was not completed."""

    def interrupted(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(gguf, "convert_to_gguf", interrupted)
        with pytest.raises(KeyboardInterrupt):
            exporter("gguf-f16")
    assert [path.name.rpartition("-")[0] for path in (tmp_path / "out" / ".parts").glob("[!.]*")] == ["merged-16bit"]
    assert not (tmp_path / "out" / "gguf-f16").exists()
    exporter("gguf-f16", verify=False)
    assert written == ["merged-16bit", "gguf-f16", "gguf-f16"]
    path = tmp_path / "out" / "gguf-f16" / "export.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(record | {"files": None, "facts": {}}), encoding="utf-8")
    outcome = exporter("gguf-f16")
    assert written[3:] == [] and not outcome.failed
    assert read_record(path.parent).files == record["files"]
    assert sorted(entry.name for entry in (tmp_path / "out").iterdir()) == ["gguf-f16"]


def test_a_k_quant_is_made_from_the_gguf_of_the_merged_weights(
    exporter: Exporter, written: list[str], tmp_path: Path
) -> None:
    pytest.importorskip("llama_cpp")
    outcome = exporter("gguf-q4_k_m", "gguf-bf16")
    assert written == ["merged-16bit", "gguf-bf16", "gguf-q4_k_m"]
    assert not outcome.failed
    facts = outcome.exports[0].record.facts
    assert 4.5 < facts["bits_per_weight"] < 6


def test_an_export_of_something_else_is_not_overwritten(
    exporter: Exporter, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    exporter("merged-16bit", verify=False)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    other = open_source(make_adapter(TINY_MODEL_DIR, r=2), base="gemma-tiny")
    for settings in ({"source": other}, {"dtype": "float32"}):
        with pytest.raises(ExportError, match="is not the export of this adapter with these settings"):
            exporter("gguf-f16", "merged-16bit", **settings)
    with (tmp_path / "out" / "merged-16bit" / "model.safetensors").open("ab") as file:
        file.write(b"0")
    with pytest.raises(ExportError, match="is not the export of this adapter"):
        exporter("merged-16bit")
    assert {path for path in tmp_path.rglob("*")} == set(before)


def test_a_finished_export_whose_bytes_changed_is_not_called_finished(exporter: Exporter, tmp_path: Path) -> None:
    (written,) = exporter("merged-16bit").exports
    assert written.result is not None and written.result.passed
    weights = written.path / "model.safetensors"
    whole = bytearray(weights.read_bytes())
    whole[-4001] ^= 0x40
    for content in (whole, whole[:-1]):
        weights.write_bytes(content)
        for formats in (["merged-16bit"], ["gguf-f16"]):  # asked for, or taken for what is made from it
            with pytest.raises(ExportError, match=r"not as it was exported: model\.safetensors changed or missing"):
                exporter(*formats)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["merged-16bit"]


def test_a_foreign_directory_is_left_alone(exporter: Exporter, tmp_path: Path) -> None:
    (tmp_path / "out" / "merged-16bit").mkdir(parents=True)
    (tmp_path / "out" / "merged-16bit" / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ExportError, match="is not the export"):
        exporter("adapter", "merged-16bit")
    assert [path.name for path in (tmp_path / "out").rglob("*")] == ["merged-16bit", "mine.txt"]


def test_the_disk_is_checked_for_all_formats_before_anything_is_written(
    exporter: Exporter, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    usage = shutil.disk_usage(tmp_path)
    needed = sum(tensor.nbytes for tensor in load_file(TINY_MODEL_DIR / "model.safetensors").values())
    # Enough for the merged model and the slack, not for the GGUF beside it.
    free = needed + (64 << 20) + 400_000
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type(usage)(usage.total, usage.used, free))
    with pytest.raises(ExportError, match=r"merged-16bit, gguf-f32 needs \d\d\.\d MB, \d\d\.\d MB are free"):
        exporter("merged-16bit", "gguf-f32")
    assert not (tmp_path / "out").exists()
    exporter("merged-16bit", verify=False)


def test_ollama_needs_a_run(exporter: Exporter, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="ollama needs a run"):
        exporter("merged-16bit", "ollama")
    assert not (tmp_path / "out").exists()


def test_a_failed_verdict_keeps_the_files_and_says_so(
    source: ExportSource, probe: Probe, exporter: Exporter, tmp_path: Path
) -> None:
    (written,) = exporter("merged-16bit", verify=False).exports
    assert written.result is None
    weights = written.path / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.2.mlp.down_proj.weight"] *= 2
    save_file(tensors, weights, metadata={"format": "pt"})
    outcome = exporter("merged-16bit")
    with pytest.raises(CheckFailed) as caught:
        outcome.require_passed()
    assert caught.value.exit_code == 1
    assert str(written.path) in caught.value.message and "adapter's effect" in caught.value.message
    assert weights.is_file() and read_record(written.path).passed is False
    # Mended, it is measured again and passes.
    tensors["model.layers.2.mlp.down_proj.weight"] /= 2
    save_file(tensors, weights, metadata={"format": "pt"})
    report = verify_directories(source, [written.path], probe=probe, reporter=SilentReporter(), measure=measure_here)
    assert not report.failed and read_record(written.path).passed is True


def test_exports_are_found(source: ExportSource, exporter: Exporter, tmp_path: Path) -> None:
    exporter("adapter", verify=False)
    exporter("merged-16bit", verify=False)
    of = source.adapter
    _, found = find_exports(tmp_path / "out", of=of, base="gemma-tiny")
    assert [path.name for path in found] == ["adapter", "merged-16bit"]
    assert find_exports(tmp_path / "out" / "adapter", of=of, base="gemma-tiny")[1] == found[:1]
    with pytest.raises(ExportError, match="lies in no run"):
        find_exports(tmp_path / "out")
    with pytest.raises(ExportError, match="has no export yet"):
        find_exports(source.adapter, base="gemma-tiny")
