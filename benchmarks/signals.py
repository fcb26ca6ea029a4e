"""Signals at random moments of whole commands, with files of the user's all around: they stay, and the command ends.

    python benchmarks/signals.py [--trials 60] [--signals KILL TERM HUP] [--commands NAME...] [--seed 0]

Each trial sends one signal to one command at a random moment of the time that it takes, then gives the same command
again, until it ends. What has to hold: whatever the user had (names, bytes, targets of links, modes) is as it was after
each of them; what is new lies below the command's own output; the result equals that of a command which nothing
disturbed; nobody prints a traceback; and a training that was asked to stop once it trained ends with 75. Exits with 1
where one of these does not.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY)]

from benchmarks.chaos import fork_command, make_recipe_apart, run_to_end  # noqa: E402

HELD_SECONDS = 120


@dataclass(frozen=True)
class Command:
    """A command line, and what it may write: paths of the working directory, the first of which is its result."""

    arguments: str
    outputs: tuple[str, ...]
    varies: tuple[str, ...] = ()  # files of the result with times or paths in them
    refuses_twice: bool = False  # where its result is there already


_RUN_FILES = (
    "metrics.jsonl", "data.json", "library.log", "manifest.json", "summary.json", "report.html", "report.md",
    "loss.png", "lock.json", "complete.json", "training.json",
)  # fmt: skip
_TIMED = ("export.json", "README.md")
COMMANDS = {
    "train": Command("train recipe.yaml", ("runs/chaos",), _RUN_FILES),
    "train, numbered": Command(
        "train recipe.yaml run.name=null run.resume=never training.max_steps=4", ("runs",), ("*",)
    ),
    "merge": Command("merge done -o out --skip-verify", ("out/merged-16bit", "out/.parts"), _TIMED),
    "export": Command(
        "export done --format merged-4bit,gguf-q8_0 -o out --skip-verify",
        ("out/merged-4bit", "out/gguf-q8_0", "out/.parts"), _TIMED,
    ),
    "audit": Command("data audit recipe.yaml --html audit.html", ("audit.html",)),
    "report": Command("report done --html page.html --md page.md", ("page.html", "page.md")),
    "init": Command("init rows.jsonl --yes -o new.yaml", ("new.yaml",), refuses_twice=True),
    "generate": Command(
        "generate done --file asked.txt -o answers.jsonl --batch-size 1 --max-new-tokens 4",
        ("answers.jsonl", "answers.jsonl.partial", "answers.jsonl.partial.json"), refuses_twice=True,
    ),
    "compare": Command("compare done done@base --limit 4 --max-new-tokens 4 -o compared", ("compared",)),
}  # fmt: skip
# What the user has: names like ours in every folder that a command writes into, and next to it.
USERS = (
    "recipe.yaml.bak", ".recipe.yaml.tmp", "export.json", "report.html", ".lock", "notes.parts", "checkpoint-5/model",
    "adapter/adapter_model.safetensors", ".answers.jsonl.partial", "comparison.json", ".out.partial/notes",
    "elsewhere/recipe.yaml", "elsewhere/chaos-notes", "elsewhere/recipe-notes/manifest.json",
    "elsewhere/.chaos.partial/x", "elsewhere/adapter/adapter_config.json", "elsewhere/checkpoint-5/complete.json",
    "elsewhere/.made.json",
    "out/recipe.yaml", "out/export.json", "out/gguf/model.gguf", "out/.notes.tmp", "out/readme/README.md", "out/.lock",
)  # fmt: skip


def furnish(folder: Path, inputs: Path) -> None:
    """Make a working directory: inputs, a finished run, the user's files; `runs` links to a folder of theirs."""
    folder.mkdir()
    for path in inputs.iterdir():
        shutil.copytree(path, folder / path.name) if path.is_dir() else shutil.copy(path, folder)
    for number, name in enumerate(USERS):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"three hours of work {number}", encoding="utf-8")
        (folder / name).chmod(0o400 if number % 3 == 0 else 0o644)
    (folder / "runs").symlink_to("elsewhere")
    (folder / "elsewhere" / "latest").symlink_to("nowhere")


def tree(folder: Path) -> dict[str, str]:
    """Path -> kind, mode, target or hash of everything below a folder; links are not followed."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_symlink():
            what = f"-> {path.readlink()}"
        else:
            what = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
            what += f" {path.stat().st_mode:o}"
        found[path.relative_to(folder).as_posix()] = what
    return found


def result_of(folder: Path, command: Command) -> dict[str, str]:
    """What a command made, without what names its time."""
    found: dict[str, str] = {}
    users = {(folder / name).resolve() for name in USERS}
    for output in command.outputs:
        place = (folder / output).resolve()
        entries = {output: place} if place.is_file() else {}
        entries |= {f"{output}/{name}": place / name for name in tree(place)} if place.is_dir() else {}
        found |= {
            name: hashlib.sha256(path.read_bytes()).hexdigest()
            for name, path in entries.items()
            # Which checkpoints are kept depends on where a run was resumed; its adapter does not.
            if path.is_file()
            and "checkpoints" not in path.parts
            and path not in users
            and not any(path.match(pattern) for pattern in command.varies)
        }
    return found


class Watch:
    """Holds a working directory against what it was."""

    def __init__(self, folder: Path, command: Command) -> None:
        self.folder, self.before = folder, tree(folder)
        self.outputs = [
            (folder / output).resolve().relative_to(folder.resolve()).as_posix() for output in command.outputs
        ]

    def faults(self) -> list[str]:
        now = tree(self.folder)
        changed = [name for name, what in self.before.items() if now.get(name) != what]
        own = tuple(f"{output}/" for output in self.outputs)
        strays = [
            name
            for name in now.keys() - self.before.keys() - {"command.log"}
            if name not in self.outputs and not name.startswith(own) and not self._is_partial(name)
        ]
        file = self.folder / "command.log"
        log = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
        return (
            [f"changed: {changed}"] * bool(changed)
            + [f"new: {strays}"] * bool(strays)
            + ["traceback"] * ("Traceback" in log)
        )

    def _is_partial(self, name: str) -> bool:
        """Whether a killed command may have left it: `.NAME.partial` or `.NAME.PID.tmp` of an output of its own."""
        places = [Path(output) for output in self.outputs]
        return any(name.startswith(f"{place.parent}/.{place.name}.".removeprefix("./")) for place in places)


def interrupt(command: Command, folder: Path, *, number: signal.Signals, after_seconds: float) -> int | None:
    """Start a command and signal it; returns its exit code, negative for a signal, None where it had ended before."""
    child = fork_command(command.arguments.split())(folder)
    deadline = time.monotonic() + after_seconds
    while time.monotonic() < deadline:
        if os.waitpid(child, os.WNOHANG)[0]:
            return None
        time.sleep(0.002)
    os.kill(child, number)
    deadline = time.monotonic() + HELD_SECONDS
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    return os.waitstatus_to_exitcode(ended[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--signals", nargs="+", choices=["KILL", "TERM", "HUP"], default=["KILL", "TERM", "HUP"])
    parser.add_argument("--commands", nargs="+", choices=list(COMMANDS), default=list(COMMANDS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workdir", type=Path, default=None, help="where the files are made (a temporary directory)")
    arguments = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup and some runners of jobs leave it ignored
    draw, console = random.Random(arguments.seed), Console()
    with tempfile.TemporaryDirectory(dir=arguments.workdir, prefix="signals-") as name:
        root = Path(name)
        os.environ["GEMMA_TUNE_CACHE"] = str(root / "cache")
        inputs = root / "inputs"
        recipe = make_recipe_apart(inputs, engine="transformers")
        recipe.write_text(recipe.read_text(encoding="utf-8").replace(f"{inputs}/", ""), encoding="utf-8")
        (inputs / "asked.txt").write_text("Row 3:\n" * 24, encoding="utf-8")
        run_to_end(
            fork_command(["train", "recipe.yaml", "run.name=done", "training.max_steps=4", "run.output_dir=."]), inputs
        )
        (inputs / "command.log").unlink()
        expected, seconds = {}, {}
        for label in arguments.commands:
            folder = root / "whole"
            furnish(folder, inputs)
            seconds[label] = run_to_end(fork_command(COMMANDS[label].arguments.split()), folder)
            expected[label] = result_of(folder, COMMANDS[label])
            shutil.rmtree(folder)
        counts = {
            label: dict.fromkeys(("signals", "too late", "code 75", "went on", "faults"), 0) for label in expected
        }
        for trial in itertools.count():
            if sum(count["signals"] for count in counts.values()) == arguments.trials:
                break
            label = arguments.commands[trial % len(arguments.commands)]
            command, count, folder = COMMANDS[label], counts[label], root / f"trial-{trial}"
            number = signal.Signals[
                f"SIG{arguments.signals[trial // len(arguments.commands) % len(arguments.signals)]}"
            ]
            furnish(folder, inputs)
            watch = Watch(folder, command)
            moment = draw.uniform(0, 0.9 * seconds[label])
            code = interrupt(command, folder, number=number, after_seconds=moment)
            count["signals" if code else "too late"] += 1  # one that came when all was done is none
            count["code 75"] += code == 75
            faults = watch.faults()
            if code not in (None, 0, 75, -number):
                faults.append(f"exit code {code}")
            if code:
                # A signal may come after the output has its name; then it is complete, and never overwritten.
                if command.refuses_twice and result_of(folder, command) == expected[label]:
                    continue
                run_to_end(fork_command(command.arguments.split()), folder)
                faults += watch.faults()
                found = result_of(folder, command)
                faults += [
                    name for name in expected[label].keys() | found if expected[label].get(name) != found.get(name)
                ]
                count["went on"] += not faults
            if faults:
                count["faults"] += 1
                console.print(f"{label}, {number.name} after {moment:.2f} s: {faults[:6]}")
            shutil.rmtree(folder)
    table = Table(title=f"{arguments.trials} signals, seed {arguments.seed}")
    for column in ("command", "seconds", *next(iter(counts.values()))):
        table.add_column(column, justify="left" if column == "command" else "right")
    for label, count in counts.items():
        table.add_row(label, f"{seconds[label]:.1f}", *map(str, count.values()))
    console.print(table)
    sys.exit(any(count["faults"] for count in counts.values()))


if __name__ == "__main__":
    main()
