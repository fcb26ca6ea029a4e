"""`gemma-tune train`."""

import os
import sys
from typing import Annotated

import typer

from gemma_tune.cli.arguments import AsJson, Overrides, RecipePath
from gemma_tune.cli.report import print_files, print_results
from gemma_tune.machine.processes import Nodes, end_with_the_starter, run_processes
from gemma_tune.terminal import Terminal, TerminalReporter


def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue the interrupted run of this recipe from its last complete checkpoint."),
    ] = False,
    from_checkpoint: Annotated[
        int | None,
        typer.Option(
            metavar="STEP", min=0, help="As --resume, from the checkpoint of this step; newer ones are set aside."
        ),
    ] = None,
    nproc: Annotated[int, typer.Option(metavar="N", min=1, help="Processes on this machine, one a GPU.")] = 1,
    nnodes: Annotated[int, typer.Option(metavar="N", min=1, help="Machines, each with the same --nproc.")] = 1,
    node_rank: Annotated[int, typer.Option(metavar="R", min=0, help="Number of this machine, from 0.")] = 0,
    rendezvous: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Where the machines meet: machine 0.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a Gemma: check, load, answer, train, answer again, and say what came out."""
    from gemma_tune.flows import train as flow
    from gemma_tune.machine.world import world_of
    from gemma_tune.recipe.load import load_recipe
    from gemma_tune.runs.reporter import SilentReporter

    terminal = Terminal()
    loaded = load_recipe(recipe, overrides or ())
    world = world_of(os.environ)
    if world.size == 1 and nproc * nnodes > 1:
        nodes = Nodes(nnodes, node_rank, rendezvous)
        code = run_processes(sys.argv[1:], per_machine=nproc, nodes=nodes)
        raise typer.Exit(code)
    end_with_the_starter()
    if not world.is_main:
        flow.train_run(loaded, reporter=SilentReporter(), resume=resume, from_step=from_checkpoint, world=world)
        return
    with TerminalReporter(terminal) as reporter:
        run = flow.train_run(loaded, reporter=reporter, resume=resume, from_step=from_checkpoint, world=world)
    print_results(terminal, run, as_json=as_json)  # first: exports take their time, and may fail
    with TerminalReporter(terminal) as reporter:
        outcome = flow.conclude(run, loaded.recipe.export, reporter=reporter)
    if not as_json:
        print_files(terminal, run)
    outcome.require_exported()
