"""Write a SLURM batch script that resumes by itself after its time limit, a preemption or a lost node."""

from dataclasses import dataclass
from pathlib import Path

from gemma_tune.errors import LaunchError
from gemma_tune.launching import job as jobs

# What the script relies on; --nodes has an option of its own, the others have no sensible other value.
_FIXED = ("--nodes", "--ntasks-per-node", "--ntasks", "--signal", "--requeue", "--no-requeue", "--open-mode", "--array")


@dataclass(frozen=True)
class SlurmOptions:
    """What a SLURM job has besides its resources."""

    partition: str | None = None
    account: str | None = None
    # more options of sbatch, such as `--qos=high`; one that is set here already is replaced
    sbatch: tuple[str, ...] = ()
    before: tuple[str, ...] = ()  # shell lines that run first, such as `module load cuda`
    time: str | None = None  # limit of one attempt, such as `12h`
    grace: int = jobs.GRACE_SECONDS  # seconds before the limit at which the training is told to save
    restarts: int = jobs.RESTARTS  # how often the job is requeued at most


def render_slurm(job: jobs.Job, options: SlurmOptions) -> jobs.JobFile:
    """Return the script.

    Raises:
        LaunchError: an option cannot be written, or the script relies on another value of it.
    """
    values = {
        "options": options,
        "directives": _directives(job, options),
        "command": jobs.shell_lines(job.command(job.recipe_argument)),
    }
    return jobs.fill_template("slurm.sh.j2", job, values, suffix="sbatch", submit=["sbatch"], notes=_path_notes(job))


SLURM = jobs.Scheduler("slurm", SlurmOptions, render_slurm)


def _directives(job: jobs.Job, options: SlurmOptions) -> dict[str, str]:
    """Return the options of sbatch; a value is empty where an option has none."""
    resources = job.resources
    directives = {"--job-name": job.run_name, "--output": "%x-%j.log", "--nodes": str(resources.nodes)}
    directives["--ntasks-per-node"] = "1"
    if resources.gpus:
        kind = f"{resources.gpu_type}:" if resources.gpu_type else ""
        directives["--gres"] = f"gpu:{kind}{resources.gpus}"
    if resources.cpus:
        directives["--cpus-per-task"] = str(resources.cpus)
    if resources.memory_gib:
        directives["--mem"] = f"{resources.memory_gib}G"
    if options.time is not None:
        directives["--time"] = _limit(jobs.parse_time(options.time), grace=options.grace)
    for name, value in (("--partition", options.partition), ("--account", options.account)):
        if value is not None:
            directives[name] = jobs.require_word(name, value)
    # B: the signal goes to this script, which passes it on. Append: a job that starts again keeps its log.
    directives |= {"--signal": f"B:TERM@{options.grace}", "--requeue": "", "--open-mode": "append"}
    return directives | dict(map(_parse_option, options.sbatch))


def _limit(seconds: int, *, grace: int) -> str:
    """Return seconds as SLURM writes a limit, days-hours:minutes:seconds."""
    if seconds <= grace:
        raise LaunchError(
            f"--time is {seconds} s, and the training is told to save {grace} s before it ends",
            hint="give more time, or a shorter --grace",
        )
    days, rest = divmod(seconds, 86_400)
    return f"{days}-{rest // 3600:02d}:{rest % 3600 // 60:02d}:{rest % 60:02d}"


def _parse_option(option: str) -> tuple[str, str]:
    name, _, value = option.partition("=")
    if not name.startswith("--") or "\n" in option or not name[2:]:
        raise LaunchError(
            f"--sbatch {option!r} is not an option of sbatch", hint="write it in full: --sbatch --qos=high"
        )
    if name in _FIXED:
        raise LaunchError(
            f"--sbatch {name}: the script relies on its own",
            hint="use --nodes M" if name == "--nodes" else "leave it out, or change the file by hand",
        )
    return name, value


def _path_notes(job: jobs.Job) -> list[str]:
    paths = [("the recipe", job.recipe_argument), *((each.setting, each.path) for each in jobs.local_paths(job.recipe))]
    outside = [f"{what} ({path})" for what, path in paths if path.startswith(("/", "~", ".."))]
    notes = ["the job runs in the directory where sbatch is called, which every node has to see; call it here"]
    if outside:
        notes.append(f"outside of this directory, so make sure that every node sees it: {', '.join(outside)}")
    run = Path(job.recipe.run.output_dir) / job.run_name
    if run.exists():
        notes.append(f"{run} is there already: the job resumes it, or ends at once if it has finished")
    return notes
