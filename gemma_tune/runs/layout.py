"""The run directory: the name of every file of a run, and how a run is opened.

A run directory is the interface between the stages: every later command takes one and needs nothing else.
"""

from dataclasses import dataclass
from pathlib import Path

from gemma_tune.errors import RunError
from gemma_tune.models.resolve import refuse_other


@dataclass(frozen=True)
class RunDir:
    """The files of one run. Every property is a path below `path`; none has to exist yet."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def made(self) -> Path:
        """How many folders were made for the run: its first file, gone once it is ready to train."""
        return self.path / ".made.json"

    @property
    def recipe(self) -> Path:
        """The recipe file as it was given."""
        return self.path / "recipe.yaml"

    @property
    def resolved_recipe(self) -> Path:
        """The recipe with overrides applied and every default written out."""
        return self.path / "resolved.yaml"

    @property
    def template(self) -> Path:
        """The data template that was trained with."""
        return self.path / "template.yaml"

    @property
    def lock(self) -> Path:
        """What the run depends on: versions, hashes, hardware."""
        return self.path / "lock.json"

    @property
    def manifest(self) -> Path:
        """The state of the run: running, finished, stopped or failed."""
        return self.path / "manifest.json"

    @property
    def metrics(self) -> Path:
        """One JSON object a logged step or evaluation."""
        return self.path / "metrics.jsonl"

    @property
    def data_report(self) -> Path:
        return self.path / "data.json"

    @property
    def summary(self) -> Path:
        """What came out: losses, exact match, answers before and after, times."""
        return self.path / "summary.json"

    @property
    def answers(self) -> Path:
        """One JSON object an eval row: prompt, expected response, answer before, answer after."""
        return self.path / "answers.jsonl"

    @property
    def loss_curve(self) -> Path:
        return self.path / "loss.png"

    @property
    def library_log(self) -> Path:
        """Everything that the libraries printed or warned of."""
        return self.path / "library.log"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        """The trained adapter in PEFT's format, with the tokenizer and its chat template next to it."""
        return self.path / "adapter"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard's event files, where the recipe names it."""
        return self.path / "tensorboard"

    @property
    def plan(self) -> Path:
        """What was planned on the card, to be laid next to what was measured."""
        return self.path / "plan.json"

    @property
    def evaluation(self) -> Path:
        """What `gemma-tune evaluate` found."""
        return self.path / "evaluation.json"

    @property
    def evaluated_rows(self) -> Path:
        """One JSON object an evaluated row: question, expected response, and each model's answer with its figures."""
        return self.path / "evaluation-rows.jsonl"

    @property
    def benchmarks(self) -> Path:
        return self.path / "benchmarks.json"

    @property
    def report_page(self) -> Path:
        return self.path / "report.html"

    @property
    def report_text(self) -> Path:
        return self.path / "report.md"

    @property
    def exports(self) -> Path:
        """A directory a format that the adapter was exported in."""
        return self.path / "export"


def open_run(path: Path) -> RunDir:
    """Open the run directory at `path`.

    Raises:
        RunError: there is no run at that path.
    """
    run = RunDir(path)
    if run.manifest.is_file():
        return run
    refuse_other(path, "a run", error=RunError)
    if not path.is_dir():
        near = (
            sorted(str(found.parent) for found in path.parent.glob("*/manifest.json"))[-3:]
            if path.parent.is_dir()
            else []
        )
        raise RunError(f"no such run: {path}", hint=f"runs there: {', '.join(near)}" if near else None)
    raise RunError(
        f"{path} is not a run directory: it has no {run.manifest.name}",
        hint="give a directory that `gemma-tune train` made",
    )
