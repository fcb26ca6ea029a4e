"""A SLURM batch script that goes on by itself after its time limit, a preemption or a lost node."""

from __future__ import annotations

from pathlib import Path

from gemma_tune.errors import LaunchError
from gemma_tune.launching.job import (
    GRACE_SECONDS,
    RESTARTS,
    Job,
    JobFile,
    common_notes,
    local_paths,
    parse_time,
    require_word,
    shell_lines,
)

# What the script relies on; --nodes has an option of its own, the others have no sensible other value.
_FIXED = ("--nodes", "--ntasks-per-node", "--ntasks", "--signal", "--requeue", "--no-requeue", "--open-mode", "--array")

_ONE_NODE = """\
srun --ntasks=1{cpus} "${{train[@]}}" &
step=$!
"""

_SEVERAL_NODES = """\
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# A port of this job's own: two jobs may share a node.
train+=(--rendezvous "$head:$((20000 + SLURM_JOB_ID % 10000))")

# One task a node. A task that fails ends the others, which would wait for it. One that stopped in good order must not,
# as another may still be saving; so the first, which runs on the node of this script, says by a file that all is saved.
saved=$(mktemp)
# shellcheck disable=SC2016  # each node puts its own number in
srun --ntasks-per-node=1{cpus} --kill-on-bad-exit=1 bash -c '
  trap : TERM  # gemma-tune gets the signal, too; this shell waits for it
  saved=$1
  shift
  "$@" --node-rank "$SLURM_NODEID"
  code=$?
  if [ "$code" -eq 75 ]; then
    if [ "$SLURM_NODEID" -eq 0 ]; then echo yes >"$saved"; fi
    exit 0
  fi
  exit "$code"' node "$saved" "${{train[@]}}" &
step=$!
"""

_NODES_SAVED = """\
if [ -s "$saved" ]; then code=75; fi
rm -f "$saved"
"""

_SCRIPT = """\
#!/bin/bash
# Trains {title} on {machines}. Made by `gemma-tune launch`.
# No credential stands here: HF_TOKEN comes from the environment that calls sbatch, or from `hf auth login`.
{directives}
{before}
set -uo pipefail

train=(
{train}
)

# SLURM tells only this script that the time is nearly over. `kill` would make srun end its tasks at once; scancel
# gives them the signal, and gemma-tune finishes its step, saves and exits with 75.
signalled=0
trap 'signalled=1; scancel --signal=TERM "$SLURM_JOB_ID"' TERM

{start}
while :; do
  signalled=0
  wait "$step"
  code=$?
  [ "$signalled" -eq 1 ] || break  # the signal ended the wait, not the step
done
{end}
# 75: everything is saved, and the same command goes on. 143: the signal came before or after the training itself.
if [ "$code" -eq 75 ] || [ "$code" -eq 143 ]; then
  trap '' TERM
  # A cancelled job stays cancelled and a preempted one is requeued by SLURM: neither is RUNNING any more.
  case $(scontrol show job "$SLURM_JOB_ID") in
    *JobState=RUNNING*)
      if [ "${{SLURM_RESTART_COUNT:-0}}" -lt {restarts} ]; then
        echo "gemma-tune: interrupted, the job is requeued and goes on" >&2
        scontrol requeue "$SLURM_JOB_ID"
      else
        echo "gemma-tune: interrupted, and restarted {restarts} times already; sbatch this file again to go on" >&2
      fi
      ;;
  esac
fi
exit "$code"
"""


def render_slurm(
    job: Job,
    *,
    partition: str | None = None,
    account: str | None = None,
    sbatch: tuple[str, ...] = (),
    before: tuple[str, ...] = (),
    time: str | None = None,
    grace: int = GRACE_SECONDS,
    restarts: int = RESTARTS,
) -> JobFile:
    """Write the script.

    Args:
        sbatch: more options of sbatch, such as `--qos=high`; one that is set here already is replaced.
        before: shell lines that run first, such as `module load cuda`.
        time: limit of one attempt, such as `12h`.
        grace: seconds before the limit at which the training is told to save.
        restarts: how often the job is requeued at most.

    Raises:
        LaunchError: an option cannot be written, or the script relies on another value of it.
    """
    machines = job.machines
    directives = {"--job-name": job.run_name, "--output": "%x-%j.log", "--nodes": str(machines.nodes)}
    directives["--ntasks-per-node"] = "1"
    if machines.gpus:
        kind = f"{machines.gpu_type}:" if machines.gpu_type else ""
        directives["--gres"] = f"gpu:{kind}{machines.gpus}"
    if machines.cpus:
        directives["--cpus-per-task"] = str(machines.cpus)
    if machines.memory_gib:
        directives["--mem"] = f"{machines.memory_gib}G"
    if time is not None:
        directives["--time"] = _limit(parse_time(time), grace=grace)
    for name, value in (("--partition", partition), ("--account", account)):
        if value is not None:
            directives[name] = require_word(name, value)
    # B: the signal goes to this script, which passes it on. Append: a job that starts again keeps its log.
    directives |= {"--signal": f"B:TERM@{grace}", "--requeue": "", "--open-mode": "append"}
    for option in sbatch:
        name, value = _parse_option(option)
        directives[name] = value
    words = job.command(job.recipe_argument)
    # srun does not take over --cpus-per-task from sbatch (SLURM 22.05 and later).
    cpus = f" --cpus-per-task={machines.cpus}" if machines.cpus else ""
    start, end = (_SEVERAL_NODES, _NODES_SAVED) if machines.nodes > 1 else (_ONE_NODE, "")
    text = _SCRIPT.format(
        title=job.run_name,
        machines=f"{machines.nodes} × {machines.gpus} GPU",
        directives="\n".join(f"#SBATCH {name}{'=' if value else ''}{value}" for name, value in directives.items()),
        before="".join(f"\n{line}" for line in before) + ("\n" if before else ""),
        train="\n".join(f"  {line}" for line in shell_lines(words)),
        start=start.format(cpus=cpus),
        end=end,
        restarts=restarts,
    )
    return JobFile(
        run_name=job.run_name,
        name=f"{job.run_name}.sbatch",
        text=text,
        submit=("sbatch",),
        notes=(*common_notes(job.recipe), *_path_notes(job)),
    )


def _limit(seconds: int, *, grace: int) -> str:
    """Seconds as SLURM writes a limit, days-hours:minutes:seconds."""
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
        raise LaunchError(f"--sbatch {option!r} is no option of sbatch", hint="write it in full: --sbatch --qos=high")
    if name in _FIXED:
        raise LaunchError(
            f"--sbatch {name}: the script relies on its own",
            hint="use --nodes M" if name == "--nodes" else "leave it out, or change the file by hand",
        )
    return name, value


def _path_notes(job: Job) -> list[str]:
    paths = [("the recipe", job.recipe_argument), *((each.setting, each.path) for each in local_paths(job.recipe))]
    outside = [f"{what} ({path})" for what, path in paths if path.startswith(("/", "~", ".."))]
    notes = ["the job runs in the directory where sbatch is called, which every node has to see; call it here"]
    if outside:
        notes.append(f"outside of this directory, so make sure that every node sees it: {', '.join(outside)}")
    run = Path(job.recipe.run.output_dir) / job.run_name
    if run.exists():
        notes.append(f"{run} is there already: the job goes on with it, or ends at once if it has finished")
    return notes
