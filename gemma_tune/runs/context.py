"""What every step of a run is handed."""

from __future__ import annotations

from dataclasses import dataclass

from gemma_tune.machine.world import World
from gemma_tune.runs.layout import RunDir
from gemma_tune.runs.reporter import Reporter


@dataclass(frozen=True)
class RunContext:
    """A run that is being trained.

    Attributes:
        run: the run directory of process 0; every other process has a folder of its own, which nobody keeps.
        reporter: receives what happens.
        world: the processes that train together, each of which does every step.
    """

    run: RunDir
    reporter: Reporter
    world: World
