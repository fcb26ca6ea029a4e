"""`gemma-tune report`: one run, several, unfinished ones, and the files it writes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from gemma_tune.cli.report import report
from gemma_tune.runs.index import hold_run
from gemma_tune.runs.manifest import update_manifest
from tests.reporting.made_runs import make_run_in


def test_one_run_is_printed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run_in(tmp_path)
    report([run.path])
    out = re.sub(r" +", " ", capsys.readouterr().out)
    for told in (
        "exact match, 8 rows 0.0% 75.0%",
        "Who bakes?",
        "8 rows of open_qa rows",
        f"report {run.path}/report.html",
    ):
        assert told in out
    assert "gemma-tune evaluate" not in out  # it was
    assert "Who bakes?" in (run.path / "report.html").read_text(encoding="utf-8")
    assert "Who bakes?" in (run.path / "report.md").read_text(encoding="utf-8")


def test_other_files_can_be_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run_in(tmp_path, evaluated=False)
    report([run.path], html=tmp_path / "page.html")
    printed = capsys.readouterr()
    assert f"written: {tmp_path / 'page.html'}" in printed.err
    assert f"gemma-tune evaluate {run.path}" in printed.out
    assert (tmp_path / "page.html").is_file() and not (run.path / "report.html").exists()


def test_several_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [make_run_in(tmp_path, "slow").path, make_run_in(tmp_path, "fast", learning_rate=1e-3).path]
    report(runs)
    printed = capsys.readouterr()
    out = re.sub(r" +", " ", printed.out)
    assert "slow fast" in out and "training.learning_rate 0.0002 0.001" in out
    assert "--html FILE" in printed.err
    report([runs[0], runs[0]])
    assert "all have the same recipe" in capsys.readouterr().out
    report(runs, html=tmp_path / "both.html", md=tmp_path / "both.md")
    assert "training.learning_rate" in (tmp_path / "both.html").read_text(encoding="utf-8")
    assert "training.learning" in (tmp_path / "both.md").read_text(encoding="utf-8")


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run_in(tmp_path)
    report([run.path], as_json=True)
    one = json.loads(capsys.readouterr().out)
    assert (one["exact_match_after"], one["run"]) == (0.75, str(run.path))
    assert not (run.path / "report.html").exists()
    report([run.path, run.path], as_json=True)
    assert json.loads(capsys.readouterr().out) == [one, one]


def test_a_run_without_a_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run_in(tmp_path)
    run.summary.unlink()
    update_manifest(run, status="stopped", step=5, error=None)
    report([run.path])
    assert f"{run.path}: stopped at step 5 of 20" in capsys.readouterr().out
    assert (run.path / "report.html").is_file()


@pytest.mark.parametrize("has_summary", [False, True])
def test_a_run_whose_process_is_gone_is_never_running(
    has_summary: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In no command, page or file: killed before its end, or while it was trained on after one."""
    run, other = make_run_in(tmp_path), make_run_in(tmp_path, "other")
    update_manifest(run, status="running")
    if not has_summary:
        run.summary.unlink()
    texts = []
    for runs in ([run.path], [run.path, other.path]):
        for as_json in (False, True):
            report(runs, as_json=as_json)
            texts.append("".join(capsys.readouterr()))
        report(runs, html=tmp_path / "page.html", md=tmp_path / "page.md")
        texts += [(tmp_path / name).read_text(encoding="utf-8") for name in ("page.html", "page.md")]
    for text in texts:
        assert "running" not in text
    for number in (0, 1, 2, 3):
        assert "stopped" in texts[number]
    capsys.readouterr()
    with hold_run(run):
        report([run.path], as_json=True)
        assert json.loads(capsys.readouterr().out)["status"] == "running"
