"""A finished run keeps its summary and its report whatever becomes of its exports, which end alike everywhere."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

import gemma_tune
from gemma_tune.cli.app import main
from gemma_tune.errors import CheckFailed, ExportError
from gemma_tune.flows import train as flow
from gemma_tune.recipe.load import load_recipe
from gemma_tune.runs.layout import RunDir
from gemma_tune.runs.reporter import SilentReporter
from gemma_tune.runs.summary import read_summary

RECIPE = (
    "model.engine=transformers", "training.max_steps=2", "data.max_eval_rows=4", "data.max_train_rows=40",
    "evaluation.exact_match=false", "evaluation.num_questions=1", "run.name=t", "run.resume=auto",
)  # fmt: skip
EXPORT = "export.formats=[merged-16bit]"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a run was trained and exported, unchecked."""
    folder = tmp_path_factory.mktemp("exported")
    loaded = load_recipe(Path("quickstart"), [*RECIPE, EXPORT, "export.verify=false", f"run.output_dir={folder}/runs"])
    assert flow.train(loaded, reporter=SilentReporter()).exports is not None
    return folder


@pytest.fixture
def run(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """The same run, trained and without a report, where the same command makes the exports."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(exported / "runs", "runs")
    run = RunDir(Path("runs/t"))
    run.report_page.unlink()
    return run


def command(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["gemma-tune", "train", "quickstart", *RECIPE, EXPORT])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


def test_an_export_that_cannot_be_made_leaves_report_and_summary(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (run.exports / "merged-16bit" / "export.json").unlink()  # what is there now is nobody's export
    assert command(monkeypatch) == ExportError.exit_code
    told = capsys.readouterr()
    assert f"eval loss, {read_summary(run).eval_rows} rows" in told.out
    assert run.report_page.is_file()
    assert "is not the export of this adapter" in told.err
    assert "export it with: gemma-tune export runs/t --format merged-16bit" in " ".join(told.err.split())
    with pytest.raises(ExportError, match=r"is not the export of this adapter"):
        gemma_tune.train("quickstart", [*RECIPE, EXPORT], reporter=SilentReporter())


def test_an_export_that_fails_its_check_fails_the_command_and_python(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = run.exports / "merged-16bit" / "model.safetensors"
    stored = bytearray(weights.read_bytes())
    stored[-4000:] = bytes(4000)
    weights.write_bytes(stored)
    with pytest.raises(CheckFailed, match=r"merged-16bit"):
        gemma_tune.train("quickstart", [*RECIPE, EXPORT], reporter=SilentReporter())
    report = run.report_page.read_text(encoding="utf-8")
    assert command(monkeypatch) == CheckFailed.exit_code
    told = capsys.readouterr()
    assert f"eval loss, {read_summary(run).eval_rows} rows" in told.out
    assert "an export does not compare as it should" in told.err
    assert "FAILED" in told.out and report
