"""An interrupted run goes on by the same command, from where it was; anything else than the same run is refused."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.chaos import MAX_STEPS, make_recipe, outcome
from gemma_tune.disk import read_json, write_json
from gemma_tune.errors import RunError, TrainingInterrupted
from gemma_tune.flows import train as flow
from gemma_tune.flows.reproduce import reproduce_run
from gemma_tune.paths import DATA_TEMPLATES_DIR
from gemma_tune.recipe.load import load_recipe
from gemma_tune.runs.index import hold_run
from gemma_tune.runs.layout import RunDir
from gemma_tune.runs.manifest import read_manifest
from gemma_tune.runs.metrics_log import read_metrics
from gemma_tune.runs.reporter import SilentReporter, StepProgress

AT_ONCE = "training.max_minutes=1e-9"  # stops after one step


class Told(SilentReporter):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.details: list[str] = []
        self.warnings: list[str] = []

    def detail(self, text: str) -> None:
        self.details.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def recipe_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chaos") / "recipe"
    make_recipe(folder, engine="transformers")
    return folder


@pytest.fixture
def recipe(recipe_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe in a folder of its own, whose base and rows may be changed; runs go there as well."""
    folder = tmp_path / "recipe"
    shutil.copytree(recipe_folder, folder)
    path = folder / "recipe.yaml"
    path.write_text(path.read_text(encoding="utf-8").replace(str(recipe_folder), str(folder)), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return path


@pytest.fixture(scope="module")
def whole(recipe_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the run was made without a break."""
    folder = tmp_path_factory.mktemp("whole")
    loaded = load_recipe(recipe_folder / "recipe.yaml", [f"run.output_dir={folder / 'runs'}"])
    flow.train(loaded, reporter=SilentReporter())
    return folder


def train(recipe: Path, *overrides: str, resume: bool = False, from_step: int | None = None) -> tuple[RunDir, Told]:
    told = Told()
    loaded = load_recipe(recipe, overrides)
    return flow.train(loaded, reporter=told, resume=resume, from_step=from_step).run, told


def interrupt(recipe: Path, *overrides: str) -> RunDir:
    with pytest.raises(TrainingInterrupted, match=r"stopped by training\.max_minutes=1e-09 after step") as caught:
        train(recipe, AT_ONCE, *overrides)
    assert "--resume" in (caught.value.hint or "")
    return RunDir(Path("runs/chaos"))


def test_the_same_command_goes_on_to_the_same_run(recipe: Path, whole: Path) -> None:
    """Stopped at each of the first steps; every figure that was logged is that of the run without a break."""
    for step in (1, 2, 3):
        run = interrupt(recipe)
        assert (read_manifest(run).status, read_manifest(run).step) == ("stopped", step)
    run, told = train(recipe)
    assert "changed: training.max_minutes: 1e-09 → None" in told.details
    assert "resuming from checkpoint-3" in told.details
    assert outcome(Path()) == outcome(whole)
    manifest = read_manifest(run)
    assert (manifest.status, manifest.step, [each["step"] for each in manifest.resumes]) == ("finished", 20, [1, 2, 3])
    before, after = (json.loads((folder / "runs/chaos/summary.json").read_text()) for folder in (whole, Path()))
    for figure in ("steps", "num_tokens", "train_loss", "eval_loss_before", "eval_loss_after"):
        assert after[figure] == before[figure]


def test_a_run_that_died_before_its_first_checkpoint_starts_again(recipe: Path, whole: Path) -> None:
    run = interrupt(recipe)
    run.checkpoints.rename(run.adapter)  # the user's own, under our name
    _, told = train(recipe)
    assert (run.path / "set-aside" / "adapter" / "checkpoint-1").is_dir()
    assert any("ended before its first checkpoint" in line for line in told.warnings)
    assert outcome(Path()) == outcome(whole)


def test_a_named_checkpoint_and_what_came_after_it_is_kept(recipe: Path, whole: Path) -> None:
    """Run, base and rows are in other places than when it was begun, which changes nothing."""
    shutil.copytree(whole / "runs", "runs")
    run, told = train(recipe, from_step=MAX_STEPS - 2)
    assert "checkpoint-20 is set aside" in told.details
    assert (run.checkpoints / "set-aside" / "checkpoint-20").is_dir()
    assert outcome(Path()) == outcome(whole)
    with pytest.raises(RunError, match=r"checkpoint-7: there is no such checkpoint") as caught:
        train(recipe, from_step=7)
    assert caught.value.hint == "complete ones: 18, 20"


def test_without_resume_the_interrupted_run_is_told(recipe: Path) -> None:
    interrupt(recipe)
    with pytest.raises(RunError, match=r"chaos was interrupted; its newest checkpoint is of step 1 of 20") as caught:
        train(recipe, "run.resume=never")
    assert "resume it with: gemma-tune train" in (caught.value.hint or "")
    numbered = ("run.name=null", "run.resume=never", "training.max_steps=2")
    with pytest.raises(TrainingInterrupted):
        train(recipe, *numbered, AT_ONCE)
    run, told = train(recipe, *numbered)
    assert run.name == "recipe-002"
    assert any("recipe-001 was interrupted" in line and "--resume" in line for line in told.warnings)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("lora.rank=8", r"lora\.rank: 4 → 8"),
        ("training.learning_rate=2e-2", r"training\.learning_rate: 0\.01 → 0\.02"),
        ("data.template=mine.yaml", r"data\.template: 'completion' → 'mine\.yaml'"),
        ("data.seed=1", r"data\.seed: 0 → 1"),
        ("model.load_in_4bit=false", r"model\.load_in_4bit: True → False"),
    ],
)
def test_another_recipe_is_refused_with_the_difference(recipe: Path, override: str, line: str) -> None:
    shutil.copy(DATA_TEMPLATES_DIR / "completion.yaml", "mine.yaml")
    run = interrupt(recipe)
    before = sorted((path.name, path.stat().st_size) for path in run.checkpoints.rglob("*"))
    with pytest.raises(RunError, match=line):
        train(recipe, override)
    assert sorted((path.name, path.stat().st_size) for path in run.checkpoints.rglob("*")) == before


def test_other_rows_another_base_and_another_adapter_are_refused(recipe: Path) -> None:
    interrupt(recipe)
    rows = recipe.parent / "rows.jsonl"
    kept = rows.read_text(encoding="utf-8")
    rows.write_text(kept.replace("plum", "pear"), encoding="utf-8")
    with pytest.raises(RunError, match=r"data\.sha256: '?[0-9a-f]{12}… → '?[0-9a-f]{12}…"):
        train(recipe)
    rows.write_text(kept, encoding="utf-8")
    base = recipe.parent / "base" / "model.safetensors"
    tensors = load_file(base)
    name = next(name for name in tensors if "q_proj" in name)
    tensors[name] = tensors[name] + 1
    save_file(tensors, base, metadata={"format": "pt"})
    with pytest.raises(RunError, match=r"base\.files\.model\.safetensors: "):
        train(recipe)


def test_another_version_is_told_and_recorded(recipe: Path) -> None:
    run = interrupt(recipe)
    lock = read_json(run.lock)
    lock["packages"]["torch"] = "2.0.0"
    write_json(run.lock, lock)
    _, told = train(recipe, "training.max_steps=3")
    assert any(line.startswith("changed: packages.torch: '2.0.0' → ") for line in told.warnings)
    changed = read_manifest(run).resumes[0]["changed"]
    assert any(line.startswith("training.max_steps: 20 → 3") for line in changed)
    assert any(line.startswith("packages.torch") for line in changed)


def test_a_run_starts_from_an_adapter(recipe: Path, whole: Path) -> None:
    """Its first loss goes on where the adapter's training ended; a changed adapter is another run."""
    shutil.copytree(whole / "runs" / "chaos", "first")
    start = ("run.name=second", "model.adapter=first", "training.schedule=constant", "training.max_steps=3")
    with pytest.raises(TrainingInterrupted):
        train(recipe, *start, AT_ONCE)
    run, told = train(recipe, *start)
    assert "starting from the adapter first" in told.details
    before = read_json(Path("first") / "summary.json")["eval_loss_after"]
    assert read_json(run.summary)["eval_loss_before"] == pytest.approx(before, abs=1e-6)
    with pytest.raises(RunError, match=r"lora\.rank is 8, the adapter has 4; lora\.alpha"):
        train(recipe, "run.name=third", "model.adapter=first", "lora.rank=8", "lora.alpha=8")
    weights = Path("first") / "adapter" / "adapter_model.safetensors"
    weights.rename(weights.with_name("adapter_model.bin"))
    with pytest.raises(RunError, match=r"adapter_model\.bin is a pickle"):
        train(recipe, "run.name=third", "model.adapter=first")
    shutil.copytree(whole / "runs" / "chaos" / "checkpoints" / "checkpoint-18", "other")
    with pytest.raises(RunError, match=r"adapter\.sha256: "):
        train(recipe, *start[:1], "model.adapter=other", *start[2:], resume=True)


def test_a_run_in_use_is_left_alone(recipe: Path) -> None:
    run = interrupt(recipe)
    with hold_run(run), pytest.raises(RunError, match=r"is being trained by another process"):
        train(recipe, resume=True)


def test_a_finished_run_is_trained_on_with_more_steps(recipe: Path, whole: Path) -> None:
    """With a schedule that knows no end, so that the first steps are the same."""
    constant = "training.schedule=constant"
    train(recipe, constant, "training.max_steps=3")
    train(recipe, constant, "training.max_steps=5", resume=True)
    found = outcome(Path())
    shutil.rmtree("runs")
    train(recipe, constant, "training.max_steps=5")
    longer = outcome(Path())
    assert found[0] == longer[0]
    # The shorter run evaluated at its end as well, and logged the steps that it had by then.
    assert found[1][-1] == longer[1][-1]


def test_the_same_command_after_the_end_trains_nothing(recipe: Path, whole: Path) -> None:
    """As a job does that its scheduler starts again; what was not exported yet is."""
    shutil.copytree(whole / "runs", "runs")
    before = outcome(Path())
    run, told = train(recipe, "export.formats=[adapter]", "export.verify=false")
    assert told.details[0].endswith("has finished: there is nothing left to train")
    assert outcome(Path()) == before and (run.exports / "adapter").is_dir()
    for override in ("training.max_steps=30", "lora.rank=2", "run.resume=never"):
        with pytest.raises(RunError, match=r"exists already, and a run is never overwritten"):
            train(recipe, override)


def test_the_clock_saves_as_well(recipe: Path) -> None:
    run, _ = train(recipe, "training.max_steps=3", "training.save_every_steps=50", "training.save_every_minutes=1e-9")
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["checkpoint-2", "checkpoint-3"]


def test_a_second_signal_leaves_at_once_and_loses_nothing(recipe: Path, whole: Path) -> None:
    """Two signals behind one another, while a run saves after every step; then the same command."""
    command = [sys.executable, "-m", "gemma_tune.cli.app", "train", str(recipe), "training.save_every_steps=1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    run, deadline = RunDir(Path("runs/chaos")), time.monotonic() + 240
    while len(read_metrics(run)) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.02)
    _, err = process.communicate(timeout=120)
    # Between the two it may have saved and ended in order.
    assert process.returncode in (-signal.SIGTERM, TrainingInterrupted.exit_code)
    assert "Traceback" not in err
    train(recipe)
    assert outcome(Path()) == outcome(whole)


class HangUp(SilentReporter):
    """Closes the terminal at a moment."""

    def __init__(self, moment: str) -> None:
        self.moment = moment

    def step(self, progress: StepProgress) -> None:
        self._hang_up(f"step {progress.step}")

    def evaluated(self, *, step: int, loss: float) -> None:
        self._hang_up(f"evaluation at {step}")

    def _hang_up(self, moment: str) -> None:
        if moment == self.moment:
            for _ in range(3):  # the kernel and the shell both tell
                signal.raise_signal(signal.SIGHUP)


def test_a_closed_terminal_loses_nothing(recipe: Path, whole: Path) -> None:
    for moment in ("step 3", "evaluation at 5", "step 12"):
        with pytest.raises(TrainingInterrupted, match="stopped by SIGHUP after step"):
            flow.train(load_recipe(recipe), reporter=HangUp(moment))
    train(recipe)
    assert outcome(Path()) == outcome(whole)


class Crash(SilentReporter):
    def __init__(self, at: str) -> None:
        self.at = at

    def stage(self, title: str) -> None:
        if title == self.at:
            raise ValueError("a fault of ours")


def test_a_crash_before_the_first_step_does_not_block_the_command(recipe: Path) -> None:
    settings = ["run.resume=never", "training.max_steps=2", "evaluation.num_questions=1"]
    for stage, is_kept in (("model", False), ("before training", True)):
        with pytest.raises(ValueError, match="of ours"):
            flow.train(load_recipe(recipe, settings), reporter=Crash(stage))
        assert Path("runs/chaos").exists() == is_kept
    assert read_manifest(RunDir(Path("runs/chaos"))).status == "failed"
    other = load_recipe(recipe, [*settings, "training.seed=7"])
    assert read_manifest(flow.train(other, reporter=SilentReporter()).run).status == "finished"


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_a_run_without_its_lock_is_not_resumed(recipe: Path, content: str | None) -> None:
    run = interrupt(recipe)
    run.lock.unlink() if content is None else run.lock.write_text(content, encoding="utf-8")
    with pytest.raises(RunError, match=r"lock\.json") as told:
        train(recipe)
    assert "start a new run" in (told.value.hint or "")


def test_a_run_is_made_again_and_compared(recipe: Path) -> None:
    train(recipe, "training.max_steps=3")
    run = RunDir(Path("runs/chaos"))
    assert reproduce_run(run, reporter=SilentReporter(), check_only=True).differences == []
    again = reproduce_run(run, reporter=SilentReporter(), check_only=False)
    assert again.is_equal and again.run is not None and again.run.name == "chaos-again-001"
    lock = read_json(run.lock)
    lock["packages"]["peft"] = "0.0.1"
    write_json(run.lock, lock)
    weights = run.adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, weights)
    other = reproduce_run(run, reporter=SilentReporter(), check_only=False)
    assert not other.is_equal
    assert any(line.startswith("packages.peft: '0.0.1' → ") for line in other.differences)
    with pytest.raises(RunError, match=r"cannot be made again:\n  base\.files\.model\.safetensors"):
        base = recipe.parent / "base" / "model.safetensors"
        save_file({name: tensor * 2 for name, tensor in load_file(base).items()}, base, metadata={"format": "pt"})
        reproduce_run(run, reporter=SilentReporter(), check_only=False)
