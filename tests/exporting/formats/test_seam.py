"""An export format of one text file, added to the table and nowhere else, is reached from the command line."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from gemma_tune.cli.app import main
from gemma_tune.exporting.export_source import ExportSource
from gemma_tune.exporting.formats.format import ExportTask, Facts, Format
from gemma_tune.exporting.formats.registry import FORMATS
from gemma_tune.exporting.verify.parity import Limits
from gemma_tune.exporting.verify.runner import Runner
from gemma_tune.reporting.card import CardFormat

FILE = "adapter.txt"


def describe(source: ExportSource) -> str:
    config = json.loads((source.adapter / "adapter_config.json").read_text(encoding="utf-8"))
    return f"rank {config['r']} on {source.base_name}\n"


@dataclass(frozen=True)
class SameText:
    passed: bool
    against: str = "adapter_config.json"

    def told(self) -> str:
        return "the rank and the base are right" if self.passed else "the rank or the base is wrong"


def write(task: ExportTask) -> Facts:
    with task.directory() as directory:
        (directory / FILE).write_text(describe(task.source), encoding="utf-8")
    return {"notes": ["one line of text"]}


def run(directory: Path, source: ExportSource, siblings: Mapping[str, Path]) -> Runner:
    def check() -> SameText:
        return SameText((directory / FILE).read_text(encoding="utf-8") == describe(source))

    return Runner("toy", Limits("the adapter's rank and base"), check=check)


TOY = Format(
    name="toy",
    about="a line of text",
    card=CardFormat(about="a line about an adapter"),
    files=(re.compile(re.escape(FILE)),),
    estimate_bytes=lambda source, dtype: 100,
    write=write,
    runner=run,
)


@pytest.fixture(autouse=True)
def toy() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    FORMATS.add(TOY)
    yield
    FORMATS.remove(TOY.name)
    torch.set_num_threads(before)


@pytest.fixture
def arguments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    monkeypatch.chdir(tmp_path)
    return monkeypatch


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["gemma-tune", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_a_format_of_ones_own(arguments: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    settings = (
        "model.engine=transformers",
        "training.max_steps=2",
        "data.max_eval_rows=4",
        "evaluation.exact_match=false",
        "evaluation.num_questions=1",
        "evaluation.max_new_tokens=2",
        "run.name=mine",
    )
    assert command(arguments, "train", "quickstart", *settings, "export.formats=[toy]") == 0
    written = Path("runs/mine/export/toy")
    assert (written / FILE).read_text(encoding="utf-8") == "rank 16 on gemma-tiny\n"
    record = json.loads((written / "export.json").read_text(encoding="utf-8"))
    result = record["verification"]["result"]
    assert (result["method"], result["against"], result["passed"]) == ("files", "adapter_config.json", True)
    assert "the rank and the base are right" in result["reason"]
    assert "a line about an adapter" in (written / "README.md").read_text(encoding="utf-8")

    capsys.readouterr()
    assert command(arguments, "export", "runs/mine", "--format", "toy", "--output", "again") == 0
    out = capsys.readouterr().out
    assert "passed" in out and "one line of text" in out and "the adapter's rank and base" in out
    assert Path("again/toy", FILE).is_file()

    Path("again/toy", FILE).write_text("rank 15 on gemma-tiny\n", encoding="utf-8")
    assert command(arguments, "verify", "again/toy", "--of", "runs/mine") == 1
    assert "the rank or the base is wrong" in capsys.readouterr().out

    assert command(arguments, "export", "runs/mine", "--format", "toys") == 2
    assert "did you mean 'toy'?" in capsys.readouterr().err
    assert command(arguments, "train", "quickstart", *settings, "export.formats=[toys]") == 2
    assert "did you mean 'toy'?" in capsys.readouterr().err
