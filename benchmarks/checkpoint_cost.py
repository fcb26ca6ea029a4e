"""What safety costs: seconds in checkpoints, guards and the rehearsal against seconds of training, in one run.

    python benchmarks/checkpoint_cost.py [--steps 300] [--every 100] [--engine auto] [RECIPE] [SECTION.FIELD=VALUE]...

Trains a recipe (quickstart by default) with a checkpoint every 100 steps and times the parts inside that run, so that
a busy machine slows both sides alike. The promise is that all of it takes at most 2 % of the step time.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

LIMIT = 0.02


class Stopwatch:
    """Seconds and calls of a function that it stands in for."""

    def __init__(self) -> None:
        self.seconds, self.calls = 0.0, 0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - began
                self.calls += 1

        return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="quickstart")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--every", type=int, default=100)
    parser.add_argument("--engine", default="auto")
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

    from gemma_tune.engines.choose import decide_engine, start_engine
    from gemma_tune.flows import train as flow
    from gemma_tune.machine.device import detect_device
    from gemma_tune.recipe.load import load_recipe
    from gemma_tune.runs.reporter import SilentReporter
    from gemma_tune.runs.summary import read_summary

    with tempfile.TemporaryDirectory() as folder:
        settings = (
            f"model.engine={arguments.engine}",
            f"training.max_steps={arguments.steps}",
            f"training.save_every_steps={arguments.every}",
            "evaluation.exact_match=false",
            "evaluation.num_questions=0",
            f"run.output_dir={folder}",
        )
        loaded = load_recipe(Path(arguments.recipe), [*settings, *arguments.overrides])
        recipe = loaded.recipe
        start_engine(decide_engine(recipe, device=detect_device()).choice.name)
        from gemma_tune.training import train_adapter as training_run
        from gemma_tune.training.guards import GuardCallback
        from gemma_tune.training.loop import Loop

        saves, guards, rehearsals = Stopwatch(), Stopwatch(), Stopwatch()
        places: tuple[tuple[Any, str, Stopwatch], ...] = (
            (Loop, "_save_checkpoint", saves),
            (GuardCallback, "on_pre_optimizer_step", guards),
            (training_run, "rehearse", rehearsals),
        )
        for owner, name, stopwatch in places:
            setattr(owner, name, stopwatch.around(getattr(owner, name)))
        summary = read_summary(flow.train_run(loaded, reporter=SilentReporter()))

    steps = summary.training_seconds - saves.seconds - guards.seconds
    table = Table(title=f"{summary.model} · {summary.engine} · {summary.steps} steps of {steps / summary.steps:.3f} s")
    for column in ("part", "times", "seconds each", "share of the step time"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for part, stopwatch in (("checkpoint", saves), ("guard", guards)):
        each = stopwatch.seconds / stopwatch.calls
        table.add_row(part, str(stopwatch.calls), f"{each:.4f}", f"{stopwatch.seconds / steps:.2%}")
    table.add_row("rehearsal, once", str(rehearsals.calls), f"{rehearsals.seconds:.2f}", "—")
    share = (saves.seconds + guards.seconds) / steps
    table.add_row("checkpoint + guard", "", "", f"{share:.2%}")
    Console().print(table)
    sys.exit(share > LIMIT)


if __name__ == "__main__":
    main()
