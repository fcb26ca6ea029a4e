"""Programs of a cluster that write down how they are called."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

_CALLED = """\
#!{python} -S
import json, os, signal, sys, time
from pathlib import Path
folder = Path({folder!r})
def called(**more):
    names = ("SLURM_NODEID", "RENDERED", "HF_TOKEN")
    told = {{"program": Path(sys.argv[0]).name, "arguments": sys.argv[1:], **more}}
    told |= {{name: os.environ[name] for name in names if name in os.environ}}
    with (folder / "calls.jsonl").open("a") as file:
        file.write(json.dumps(told) + "\\n")
"""

# EXIT: the code of each node, `1@0.3` after 0.3 s. A node that is to `wait` stops when it is told to, and node 1 is
# 0.2 s slower at that.
_GEMMA_TUNE = """
called()
node = int(os.environ.get("SLURM_NODEID", os.environ.get("SKYPILOT_NODE_RANK", "0")))
code, _, delay = os.environ["EXIT"].split(",")[node].partition("@")
time.sleep(float(delay or 0))
if code == "wait":
    def stop(number, frame):
        time.sleep(0.2 * node)
        called(stopped=True)
        sys.exit(75)
    signal.signal(signal.SIGTERM, stop)
    (folder / f"ready-{node}").touch()
    time.sleep(30)
    sys.exit(9)
sys.exit(int(code))
"""

# As SLURM's: one process a node, the highest exit code, before that of a signal; one that fails ends the others.
_SRUN = """
import subprocess
called()
words = sys.argv[1:]
options = [word for word in words if word.startswith("--")][: next(n for n, w in enumerate(words) if w[:2] != "--")]
nodes = int(os.environ.get("SLURM_NNODES", "1"))
tasks = [
    subprocess.Popen(words[len(options):], env={**os.environ, "SLURM_NODEID": str(node)}, start_new_session=True)
    for node in range(nodes)
]
(folder / "tasks").write_text(" ".join(str(task.pid) for task in tasks))
codes = {}
while len(codes) < nodes:
    for node, task in enumerate(tasks):
        if node not in codes and task.poll() is not None:
            codes[node] = task.returncode
            if task.returncode and "--kill-on-bad-exit=1" in options:
                for other in tasks:
                    if other.poll() is None:
                        os.killpg(other.pid, signal.SIGKILL)
    time.sleep(0.01)
exits = [code for code in codes.values() if code >= 0]
sys.exit(max(exits) or max(128 - code if code < 0 else 0 for code in codes.values()) if exits else 137)
"""

_SCONTROL = """
called()
if sys.argv[1:3] == ["show", "hostnames"]:
    print("node-a\\nnode-b")
elif sys.argv[1:3] == ["show", "job"]:
    print("JobId=7 JobName=x\\n   JobState=" + os.environ.get("STATE", "RUNNING") + " Reason=None")
"""

# Every process of a step gets the signal, its shell, too.
_SCANCEL = """
called()
for task in (folder / "tasks").read_text().split():
    os.killpg(int(task), signal.SIGTERM)
"""

_OTHER = """
called()
print(os.environ.get("SAYS", ""))
sys.exit(int(os.environ.get("EXIT", "0")))
"""

_PROGRAMS = {"gemma-tune": _GEMMA_TUNE, "srun": _SRUN, "scontrol": _SCONTROL, "scancel": _SCANCEL}


@dataclass(frozen=True)
class Cluster:
    """A folder with the programs; what calls them runs in `folder`, and finds nothing else but the system's own."""

    folder: Path

    @property
    def path(self) -> str:
        return f"{self.folder / 'bin'}:/usr/bin:/bin"

    def add(self, *names: str) -> None:
        (self.folder / "bin").mkdir(exist_ok=True)
        for name in names:
            file = self.folder / "bin" / name
            file.write_text(
                _CALLED.format(python=sys.executable, folder=str(self.folder)) + _PROGRAMS.get(name, _OTHER)
            )
            file.chmod(0o755)

    def calls(self, program: str) -> list[dict[str, object]]:
        file = self.folder / "calls.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        return [told for line in lines if (told := json.loads(line))["program"] == program]

    def arguments(self, program: str) -> list[list[str]]:
        return [list(call["arguments"]) for call in self.calls(program)]  # type: ignore[call-overload]

    def run(
        self, script: str, environment: Mapping[str, str], *, meanwhile: Callable[[int], None] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a script with bash. `meanwhile` gets its process id."""
        file = self.folder / "script.sh"
        file.write_text(script)
        with subprocess.Popen(
            ["bash", str(file)],
            cwd=self.folder,
            env={"PATH": self.path, "HOME": str(self.folder), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            if meanwhile is not None:
                meanwhile(process.pid)
            out, err = process.communicate(timeout=30)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def wait_for(self, *names: str) -> None:
        """Wait until the programs have left their files."""
        for _ in range(1_000):
            if all((self.folder / name).exists() for name in names):
                return
            time.sleep(0.01)
        raise TimeoutError(f"{names} not in {os.listdir(self.folder)}")
