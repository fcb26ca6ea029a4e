"""SIGKILL at random moments of a training that saves often, then the same command again, until it ends.

    python benchmarks/chaos.py [--kills 100] [--seed 0] [--engine transformers] [--set SECTION.FIELD=VALUE]... [--spawn]

A run of a very small random Gemma (20 steps with dropout, accumulation and evaluations, over epoch borders, a save
every 2 steps) is made once without a break. Then each trial kills the same command at a random moment, one in three
also kills the command that resumes, and runs it once more to its end. Adapter and losses have to be those of the
unbroken run, bit for bit, and no step may be in metrics.jsonl twice.

The command runs in a fork of one process that has imported the libraries, so that the moments fall into the run and not
into 10 seconds of imports; `--spawn` starts a new interpreter each time instead. Exits with 1 when a trial differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

MAX_STEPS = 20
HANGS_AFTER_SECONDS = 300
RECIPE = f"""\
model: {{name: BASE, load_in_4bit: true, engine: ENGINE}}
lora: {{rank: 4, dropout: 0.1}}
data: {{source: ROWS, template: completion, max_seq_tokens: 64, eval_fraction: 0.2}}
training:
  max_steps: {MAX_STEPS}
  batch_size: 2
  gradient_accumulation: 2
  learning_rate: 1e-2
  gradient_checkpointing: "off"
  save_every_steps: 2
evaluation: {{every_steps: 5, exact_match: false, num_questions: 0}}
logging: {{every_steps: 3}}
run: {{name: chaos, output_dir: runs, resume: auto}}
"""
Start = Callable[[Path], int]  # starts the command in a folder and returns its process id


def make_recipe(folder: Path, *, engine: str) -> Path:
    """A random Gemma of 0.3 million parameters, 26 rows, and the recipe that trains on them."""
    import torch
    from transformers import GemmaConfig, GemmaForCausalLM

    from gemma_tune.paths import TINY_MODEL_DIR

    base = folder / "base"
    base.mkdir(parents=True)
    for file in TINY_MODEL_DIR.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            shutil.copy(file, base)
    torch.manual_seed(0)
    config = GemmaConfig.from_pretrained(
        TINY_MODEL_DIR, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=1
    )
    GemmaForCausalLM(config).save_pretrained(base)
    draw = random.Random(0)
    rows = [
        {"prompt": f"Row {number}:", "completion": " ".join(draw.choices(("plum", "oak", "river", "stone"), k=number))}
        for number in range(2, 28)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = folder / "recipe.yaml"
    text = RECIPE.replace("BASE", str(base)).replace("ROWS", str(folder / "rows.jsonl")).replace("ENGINE", engine)
    recipe.write_text(text, encoding="utf-8")
    return recipe


def fork_command(arguments: Sequence[str]) -> Start:
    """Start the command line in a fork of this process, which imports what it needs first."""
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401
    import torch

    import gemma_tune.flows.train
    import gemma_tune.training.train_adapter  # noqa: F401
    from gemma_tune.cli.app import main

    def start(folder: Path) -> int:
        child = os.fork()
        if child:
            return child
        code = 70
        try:
            os.chdir(folder)
            log = os.open("command.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            torch.set_num_threads(1)
            sys.argv = ["gemma-tune", *arguments]
            main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    return start


def spawn_command(arguments: Sequence[str]) -> Start:
    """Start the command line in an interpreter of its own."""

    def start(folder: Path) -> int:
        with (folder / "command.log").open("a", encoding="utf-8") as log:
            command = [sys.executable, "-m", "gemma_tune.cli.app", *arguments]
            return subprocess.Popen(command, cwd=folder, stdout=log, stderr=log).pid

    return start


def make_recipe_apart(folder: Path, *, engine: str) -> Path:
    """In a process of its own: tqdm's lock is shared with forks, and one that is killed may hold it for ever."""
    child = os.fork()
    if not child:
        try:
            make_recipe(folder, engine=engine)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    return folder / "recipe.yaml"


def run_to_end(start: Start, folder: Path) -> float:
    """Seconds of a run that nothing disturbs."""
    began, child = time.monotonic(), start(folder)
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        if time.monotonic() - began > HANGS_AFTER_SECONDS:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.02)
    if status:
        log = (folder / "command.log").read_text(encoding="utf-8")
        raise SystemExit(f"the command ended with status {status} in {folder}:\n{log[-4000:]}")
    return time.monotonic() - began


def run_and_kill(start: Start, folder: Path, *, after_seconds: float) -> bool:
    """Whether the kill came before the command had ended."""
    child = start(folder)
    deadline = time.monotonic() + after_seconds
    while time.monotonic() < deadline:
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def outcome(folder: Path) -> tuple[str, list[tuple[object, ...]]]:
    """The adapter's hash, and every loss with its step as metrics.jsonl has them."""
    run = folder / "runs" / "chaos"
    adapter = hashlib.sha256((run / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    names = ("step", "loss", "grad_norm", "learning_rate", "num_tokens", "eval_loss")
    return adapter, [tuple(line.get(name) for name in names) for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", default="transformers")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE")
    parser.add_argument("--spawn", action="store_true")
    arguments = parser.parse_args()
    console = Console()
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    draw = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        os.environ["GEMMA_TUNE_CACHE"] = str(root / "cache")
        recipe = make_recipe_apart(root / "recipe", engine=arguments.engine)
        command = ["train", str(recipe), *arguments.set]
        start = spawn_command(command) if arguments.spawn else fork_command(command)
        whole = root / "whole"
        whole.mkdir()
        seconds = run_to_end(start, whole)
        expected = outcome(whole)
        console.print(f"unbroken: {seconds:.1f} s, adapter {expected[0][:12]}, {len(expected[1])} lines of metrics")
        kills = trials = equal = resumed_kills = 0
        began = time.monotonic()
        while kills < arguments.kills:
            trials += 1
            folder = root / f"trial-{trials}"
            folder.mkdir()
            moments = [draw.uniform(0, seconds)] + ([draw.uniform(0, seconds)] if draw.random() < 1 / 3 else [])
            hits = [run_and_kill(start, folder, after_seconds=moment) for moment in moments]
            kills += sum(hits)
            resumed_kills += len(hits) == 2 and all(hits)
            # One that ended before its kill is a finished run, which the command would refuse to make again.
            finished = (folder / "runs/chaos/manifest.json").is_file() and '"finished"' in (
                folder / "runs/chaos/manifest.json"
            ).read_text(encoding="utf-8")
            if not finished:
                run_to_end(start, folder)
            is_equal = outcome(folder) == expected
            equal += is_equal
            if not is_equal:
                console.print(f"trial {trials} differs, killed after {moments} s")
            if trials % 10 == 0 or not is_equal:
                console.print(f"{kills} kills in {trials} trials, {equal} equal, {time.monotonic() - began:.0f} s")
            shutil.rmtree(folder)
    console.print(
        f"{kills} kills in {trials} trials ({resumed_kills} trials with a kill of the resumed command as well): "
        f"{equal} of {trials} equal to the unbroken run bit for bit"
    )
    sys.exit(equal != trials)


if __name__ == "__main__":
    main()
