"""`gemma-tune launch`."""

import shlex
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.text import Text

from gemma_tune.cli.arguments import AsJson, Overrides, RecipePath
from gemma_tune.terminal import Terminal


def _option(panel: str, text: str, metavar: str | None = None, *, min: int | None = None) -> Any:
    """Declare an option that is nothing unless given, in a panel of `--help`."""
    return typer.Option(metavar=metavar, min=min, help=text, show_default=False, rich_help_panel=panel)


_ASKED, _STOPPED = "What to ask for", "When the job is stopped"
_SLURM, _KUBERNETES, _SKYPILOT = "slurm", "kubernetes", "skypilot"


def launch(
    recipe: RecipePath,
    on: Annotated[Literal["slurm", "kubernetes", "skypilot"], typer.Option("--on", help="What runs the job.")],
    overrides: Overrides = None,
    gpus: Annotated[int, _option(_ASKED, "GPUs of a machine, 1 unless given; 0 trains on its processor.", min=0)] = 1,
    nodes: Annotated[int, _option(_ASKED, "Machines, 1 unless given.", min=1)] = 1,
    gpu_type: Annotated[
        str | None,
        _option(
            _ASKED,
            "As the scheduler calls it: h100 (slurm), H100 (skypilot), NVIDIA-H100-80GB-HBM3 or LABEL=VALUE of its "
            "nodes (kubernetes).",
            "NAME",
        ),
    ] = None,
    cpus: Annotated[int | None, _option(_ASKED, "Processor cores of a machine.", min=1)] = None,
    memory: Annotated[int | None, _option(_ASKED, "Memory of a machine in GiB.", "GIB", min=1)] = None,
    time: Annotated[
        str | None,
        _option(
            _ASKED,
            "Limit: of one attempt, after which the job is requeued (slurm); of the whole job (kubernetes).",
            "1d12h30m",
        ),
    ] = None,
    before: Annotated[
        list[str] | None,
        _option(
            _ASKED,
            "A shell line that runs first, such as 'module load cuda' (slurm, skypilot); may be repeated.",
            "COMMAND",
        ),
    ] = None,
    grace: Annotated[
        int | None,
        _option(_STOPPED, "Time to save before the end, 180 unless given (slurm, kubernetes).", "SECONDS", min=30),
    ] = None,
    restarts: Annotated[
        int | None, _option(_STOPPED, "How often it starts again, 20 unless given (slurm, kubernetes).", min=0)
    ] = None,
    partition: Annotated[str | None, _option(_SLURM, "As of sbatch.", "NAME")] = None,
    account: Annotated[str | None, _option(_SLURM, "As of sbatch.", "NAME")] = None,
    sbatch: Annotated[
        list[str] | None, _option(_SLURM, "A further option of sbatch, such as --qos=high; may be repeated.", "OPTION")
    ] = None,
    image: Annotated[
        str | None, _option(_KUBERNETES, "A Docker image with gemma-tune in it (skypilot, too).", "NAME")
    ] = None,
    claim: Annotated[
        str | None, _option(_KUBERNETES, "The PersistentVolumeClaim for runs, caches and rows.", "NAME")
    ] = None,
    namespace: Annotated[str | None, _option(_KUBERNETES, "Unless given, that of kubectl.", "NAME")] = None,
    secret: Annotated[
        str | None, _option(_KUBERNETES, "The Secret with HF_TOKEN and WANDB_API_KEY, gemma-tune unless given.", "NAME")
    ] = None,
    bucket: Annotated[
        str | None, _option(_SKYPILOT, "Where the runs lie: s3://NAME, gs://NAME, or the name of a new one.", "BUCKET")
    ] = None,
    install: Annotated[
        str | None,
        _option(_SKYPILOT, "What pip installs there: a wheel of this machine, or a requirement.", "REQUIREMENT"),
    ] = None,
    cloud: Annotated[
        str | None, _option(_SKYPILOT, "aws, gcp/us-central1, k8s, …; unless given, the cheapest.", "NAME")
    ] = None,
    spot: Annotated[
        bool, typer.Option("--spot", help="Cheap machines that may be taken away.", rich_help_panel=_SKYPILOT)
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write the file; another one is never replaced.", show_default=False),
    ] = None,
    submit: Annotated[bool, typer.Option("--submit", help="Write the file and hand it to the scheduler.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write the file of a job that trains a recipe on a cluster, and say how it is submitted.

    The job calls `gemma-tune train` with a fixed run.name and run.resume=auto: stopped, it saves; started again, it
    resumes. Without -o and --submit the file is printed.
    """
    from gemma_tune.launching.job import Resources
    from gemma_tune.launching.launch import make_job_file, require_program, submit_job, write_job
    from gemma_tune.recipe.load import load_recipe

    terminal = Terminal()
    loaded = load_recipe(recipe, overrides or ())
    options = {
        "time": time, "grace": grace, "restarts": restarts, "before": tuple(before or ()), "partition": partition,
        "account": account, "sbatch": tuple(sbatch or ()), "image": image, "claim": claim, "namespace": namespace,
        "secret": secret, "bucket": bucket, "install": install, "cloud": cloud, "spot": spot,
    }  # fmt: skip
    job_file = make_job_file(loaded, on, Resources(nodes, gpus, gpu_type, cpus, memory), options)
    path = output or Path(job_file.name)
    command = shlex.join([*job_file.submit, str(path)])
    is_written = submit or output is not None
    if submit:
        require_program(job_file)
    if is_written:
        write_job(path, job_file.text)
        terminal.note(Text(f"✓ {path}", "green"))
    elif not as_json:
        terminal.plain(job_file.text, end="")
    for note in job_file.notes:
        terminal.note(Text(f"! {note}", "yellow"))
    if not submit:
        first = "" if is_written else f"write it with -o {shlex.quote(str(path))}, then "
        terminal.note(Text(f"{first}submit it: {command}"))
    reply = submit_job(path, job_file, capture=as_json) if submit else None
    if as_json:
        terminal.json(
            {
                "on": on,
                "run": job_file.run_name,
                "file": str(path) if is_written else None,
                "text": job_file.text,
                "submit": command,
                "reply": reply,
                "notes": list(job_file.notes),
            }
        )
