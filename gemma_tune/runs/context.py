"""What every step of a run is handed."""

from dataclasses import dataclass

from gemma_tune.machine.world import World
from gemma_tune.runs.layout import RunDir
from gemma_tune.runs.reporter import Reporter


@dataclass(frozen=True)
class RunContext:
    """A run that is being trained."""

    run: RunDir  # the run directory of process 0; every other process has a folder of its own, which nobody keeps
    reporter: Reporter  # receives what happens
    world: World  # the processes that train together, each of which does every step
