"""The command line: one registration line a command. Heavy libraries are imported inside the commands."""

import sys
import traceback

import typer

from gemma_tune.cli.benchmark import benchmark
from gemma_tune.cli.chat import chat
from gemma_tune.cli.compare import compare
from gemma_tune.cli.data import data_app
from gemma_tune.cli.doctor import doctor
from gemma_tune.cli.evaluate import evaluate
from gemma_tune.cli.export import export
from gemma_tune.cli.generate import generate
from gemma_tune.cli.init import init
from gemma_tune.cli.launch import launch
from gemma_tune.cli.merge import merge
from gemma_tune.cli.models import models_app
from gemma_tune.cli.plan import plan
from gemma_tune.cli.push import push
from gemma_tune.cli.recipes import recipes_app
from gemma_tune.cli.report import report
from gemma_tune.cli.reproduce import reproduce
from gemma_tune.cli.score import score
from gemma_tune.cli.train import train
from gemma_tune.cli.validate import validate
from gemma_tune.cli.verify import verify
from gemma_tune.errors import GemmaTuneError
from gemma_tune.machine.processes import end_process, is_one_of_several
from gemma_tune.secrets import mask_secrets
from gemma_tune.terminal import Terminal, guard_output

app = typer.Typer(
    name="gemma-tune",
    help="QLoRA fine-tuning of Google's Gemma: from a recipe to a merged model that is proven to be what was trained.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
app.command("train")(train)
app.command("launch")(launch)
app.command("init")(init)
app.command("validate")(validate)
app.command("plan")(plan)
app.command("doctor")(doctor)
app.command("generate")(generate)
app.command("chat")(chat)
app.command("score")(score)
app.command("evaluate")(evaluate)
app.command("benchmark")(benchmark)
app.command("compare")(compare)
app.command("merge")(merge)
app.command("export")(export)
app.command("verify")(verify)
app.command("push")(push)
app.command("report")(report)
app.command("reproduce")(reproduce)
app.add_typer(data_app, name="data")
app.add_typer(recipes_app, name="recipes")
app.add_typer(models_app, name="models")


def main() -> None:
    """Run the command line; a user's mistake is reported in a sentence, with its exit code and without a traceback."""
    guard_output()
    code = _run()
    if is_one_of_several():
        end_process(code)
    sys.exit(code)


def _run() -> int:
    """Returns the exit code."""
    terminal = Terminal()
    try:
        app()
        return 0
    except SystemExit as end:  # how typer ends a command
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except GemmaTuneError as error:
        terminal.error(error)
        return error.exit_code
    except KeyboardInterrupt:
        terminal.note("interrupted")
        return 130
    except Exception:  # a bug: all of it is shown, except credentials
        sys.stderr.write(mask_secrets(traceback.format_exc()))
        return 1


if __name__ == "__main__":
    main()
