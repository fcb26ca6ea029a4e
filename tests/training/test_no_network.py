"""Where base and rows are local, training, checkpoints, resumption and a merge open no socket.

But for one of urllib3's: when it is imported it binds, and closes, a socket on [::1] to see whether there is IPv6.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Python imports this at its start; whatever a library does later goes through these two names.
LOGGER = """
import os, socket, traceback

def log(what):
    if any(frame.name == "_has_ipv6" for frame in traceback.extract_stack()):
        return
    with open(os.environ["SOCKET_LOG"], "a") as file:
        file.write(what + "\\n" + "".join(traceback.format_stack()[-6:-2]) + "\\n")

class Logged(socket.socket):
    def __init__(self, *args, **kwargs):
        log(f"socket {args} {kwargs}")
        super().__init__(*args, **kwargs)

lookup = socket.getaddrinfo
def logged_lookup(*args, **kwargs):
    log(f"getaddrinfo {args}")
    return lookup(*args, **kwargs)

socket.socket = Logged
socket.getaddrinfo = logged_lookup
"""


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["transformers", "unsloth"])
def test_no_socket_is_opened(tmp_path: Path, engine: str) -> None:
    (tmp_path / "sitecustomize.py").write_text(LOGGER, encoding="utf-8")
    log = tmp_path / "sockets.log"
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
        "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}",
        "SOCKET_LOG": str(log),
        "OMP_NUM_THREADS": "1",
    }

    def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *program.split(), *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400)

    assert run("-c", "import socket; socket.socket().close()").returncode == 0
    assert "socket ()" in log.read_text(encoding="utf-8"), "the logger does not work"
    log.unlink()
    quick = ["quickstart", f"model.engine={engine}", "training.max_steps=2", "evaluation.exact_match=false"]
    quick += ["data.max_eval_rows=4", "evaluation.num_questions=0", "training.save_every_steps=1", "run.name=local"]
    for arguments in (["train", *quick], ["train", *quick, "--from-checkpoint", "1"], ["merge", "runs/local"]):
        done = run("-m gemma_tune.cli.app", *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
    assert not log.exists(), log.read_text(encoding="utf-8")
