"""Whatever becomes of stdout and stderr: the work ends as the work ends, and the exit code is that of the work."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gemma_tune.cli.app import main

ENCODINGS = ["ascii", "latin-1", "cp1252", "cp437", "cp932", "utf-16", "utf-8", "koi8-r"]
ROWS = [
    {"prompt": f"Größe {number} 火 🦉:", "completion": completion}
    for number, completion in enumerate(["“Ja” ✓ – 🦉", "東京 …", "Привет €", "ﷺ \u202e x", "é\u0301 \x07"] * 4)
]
RECIPE = """\
data: {source: rows.jsonl, template: completion, max_seq_tokens: 64, eval_fraction: 0.2}
training: {max_steps: 2, batch_size: 2, gradient_checkpointing: "off"}
evaluation: {num_questions: 1}
model: {engine: transformers}
run: {name: groesse, resume: auto}
"""
# What needs no training; the last one is refused.
COMMANDS = {
    "--help": 0, "train --help": 0, "validate r.yaml": 0, "validate r.yaml --json": 0, "models list": 0,
    "models show gemma-tiny": 0, "plan r.yaml": 0, "recipes show quickstart": 0, "data preview r.yaml": 0,
    "data preview r.yaml --json": 0, "data audit r.yaml": 0, "data audit r.yaml --json": 0,
    "init rows.jsonl --yes -o new.yaml": 0, "validate größe-火.yaml": 2, "train r.yaml lora.rank=火": 2,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    Path("r.yaml").write_text(RECIPE, encoding="utf-8")
    yield tmp_path
    Path("new.yaml").unlink(missing_ok=True)


def start(command: str, **options: object) -> subprocess.Popen[bytes]:
    program = [sys.executable, "-m", "gemma_tune.cli.app", *command.split()]
    return subprocess.Popen(program, **options)  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_command_prints_in_every_encoding(folder: Path, encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for command, code in COMMANDS.items():
        Path("new.yaml").unlink(missing_ok=True)
        with Path("out").open("w", encoding=encoding) as out, Path("err").open("w", encoding=encoding) as err:
            monkeypatch.setattr(sys, "argv", ["gemma-tune", *command.split()])
            monkeypatch.setattr(sys, "stdout", out)
            monkeypatch.setattr(sys, "stderr", err)
            with pytest.raises(SystemExit) as ended:
                main()
            sys.stdout.flush()
            sys.stderr.flush()
            monkeypatch.undo()
            monkeypatch.chdir(folder)
            monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        written = Path("out").read_bytes().decode(encoding)
        told = Path("err").read_bytes().decode(encoding)
        assert (ended.value.code or 0) == code, told
        assert "Traceback" not in told
        if command.endswith("--json"):
            value = json.loads(written)
            assert "preview" not in command or "🦉" in json.dumps(value, ensure_ascii=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment", [{"PYTHONIOENCODING": "cp437"}, {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0"}]
)
def test_a_whole_run_in_a_pipe_that_is_not_utf8(folder: Path, environment: dict[str, str]) -> None:
    run = "runs/groesse"
    for command in (
        "train r.yaml", f"report {run}", f"generate {run} --prompt x", f"evaluate {run}", "doctor r.yaml",
        f"compare {run} {run}@base --limit 1 -o c --max-new-tokens 4",
    ):  # fmt: skip
        process = start(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONUTF8": "0", **environment},
        )
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0 or command.startswith("doctor"), err
        assert b"Traceback" not in out + err


@pytest.mark.parametrize("command", ["--help", "validate r.yaml", "validate none.yaml"])
def test_a_full_disk_a_closed_pipe_and_no_streams_at_all(folder: Path, command: str) -> None:
    code = 2 if "none" in command else 0
    reader, writer = os.pipe()
    os.close(reader)
    with Path("/dev/full").open("wb") as full:
        for out, err in ((full, subprocess.PIPE), (full, full), (writer, subprocess.PIPE), (writer, writer)):
            process = start(command, stdout=out, stderr=err)
            told = (process.communicate()[1] or b"").decode()
            assert process.returncode == code and "Traceback" not in told
            if out is full and err is subprocess.PIPE and not code:
                assert told.startswith("! stdout: no space left on device")
    os.close(writer)
    shell = f"exec {sys.executable} -m gemma_tune.cli.app {command} <&- >&- 2>&-"
    assert subprocess.run(shell, shell=True, check=False).returncode == code


@pytest.mark.slow
def test_answers_that_nobody_reads_are_not_made(folder: Path) -> None:
    """The first window finds the pipe closed, the second is not begun; on a full disk as well."""
    Path("asked.txt").write_text("x\n" * 64, encoding="utf-8")
    reader, writer = os.pipe()
    os.close(reader)
    command = "generate gemma-tiny --file asked.txt --max-new-tokens 2 --batch-size 1 --template completion"
    with Path("/dev/full").open("wb") as full:
        for out, code in ((writer, 141), (full, 2)):
            process = start(command, stdout=out, stderr=subprocess.PIPE)
            err = process.communicate()[1].decode()
            assert process.returncode == code and "Traceback" not in err and "tokens/s" not in err, err
    os.close(writer)


@pytest.mark.slow
def test_a_terminal_that_is_gone_does_not_end_the_training(folder: Path) -> None:
    """Its master is closed while the run is on its way: every write gives EIO. SIGHUP is ignored, as under nohup."""
    ours, theirs = pty.openpty()
    process = start(
        "train r.yaml training.max_steps=6", stdin=theirs, stdout=theirs, stderr=theirs,
        env={**os.environ, "TERM": "xterm"}, preexec_fn=lambda: __import__("signal").signal(1, 1),
    )  # fmt: skip
    os.close(theirs)
    seen = b""
    while b"model" not in seen:
        seen += os.read(ours, 1000)
    os.close(ours)
    assert process.wait(timeout=300) == 0
    manifest = json.loads(Path("runs/groesse/manifest.json").read_text(encoding="utf-8"))
    assert (manifest["status"], manifest["step"]) == ("finished", 6)
    assert (Path("runs/groesse") / "report.html").is_file()


@pytest.mark.slow
def test_questions_that_are_not_utf8_are_refused_in_a_sentence(folder: Path) -> None:
    """From the command line and from stdin, in a locale of UTF-8 and in one without."""
    ask = "generate gemma-tiny --template completion --max-new-tokens 2"
    for text, environment in ((b"a\xff", {}), ("火".encode(), {"LC_ALL": "POSIX", "PYTHONUTF8": "0"})):
        program = [sys.executable, "-m", "gemma_tune.cli.app", *ask.split(), "--prompt"]
        given = subprocess.run(
            [*map(os.fsencode, program), text], capture_output=True, env={**os.environ, **environment}, check=False
        )
        assert given.returncode == 2 and b"is not UTF-8 (byte 0x" in given.stderr, given.stderr
    process = start(f"{ask} --file -", stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    err = process.communicate(b"what?\na\xff\n")[1]
    assert process.returncode == 2 and b"question 2" in err and b"Traceback" not in err
    shell = f"exec {sys.executable} -m gemma_tune.cli.app {ask} <&-"
    assert subprocess.run(shell, shell=True, check=False, capture_output=True).returncode == 2
