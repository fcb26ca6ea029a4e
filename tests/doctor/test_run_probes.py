"""A probe may crash, hang, fail or chatter; the process that started it goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gemma_tune.doctor.examine import PROBE_SECONDS
from gemma_tune.doctor.libraries import check_bitsandbytes, check_engine
from gemma_tune.doctor.run_probes import Probed, run_probe, run_probes
from gemma_tune.machine.child import run_command
from tests.doctor.conftest import Stub


def test_a_library_that_crashes(stub_module: Stub) -> None:
    stub_module("bitsandbytes", "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)")
    probe = run_probe("bitsandbytes", seconds=60)
    assert (probe.outcome, probe.step) == ("crashed", "importing bitsandbytes")
    finding = check_bitsandbytes(probe)
    assert finding.verdict == "fail" and finding.found == "crashed (SIGSEGV) while importing bitsandbytes"
    assert finding.fix == "pip install 'bitsandbytes==0.50.2'"


def test_a_library_that_hangs(stub_module: Stub) -> None:
    stub_module("torch", "import time\ntime.sleep(600)")
    start = time.monotonic()
    probe = run_probe("bitsandbytes", seconds=2)
    assert time.monotonic() - start < 6
    finding = check_bitsandbytes(probe)
    assert finding.verdict == "fail" and finding.found == "no answer within 2 s while importing torch"


def test_native_code_that_hangs_after_its_starter_is_gone(stub_module: Stub) -> None:
    """What blocks the signals that Python handles is still ended by the alarm."""
    stub_module("torch", "import time\ntime.sleep(600)")
    command = [sys.executable, "-m", "gemma_tune.machine.child", "gemma_tune.doctor.worker:probe_torch", "0.5"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as child:
        assert child.stdin is not None
        child.stdin.write(b"{}\n")
        child.stdin.flush()
        assert child.wait(30) == -signal.SIGALRM


def test_a_library_that_fails_or_ends_the_process(stub_module: Stub) -> None:
    stub_module("unsloth", "raise NotImplementedError('Unsloth needs a GPU\\nor so')")
    (finding,) = check_engine(run_probe("engine", seconds=60))
    assert finding.verdict == "fail"
    assert finding.found == "NotImplementedError: Unsloth needs a GPU while importing unsloth"
    assert finding.fix is not None
    assert finding.fix.startswith("pip install 'unsloth==") and finding.fix.endswith("or model.engine=transformers")
    stub_module("bitsandbytes", "import os\nprint('bye')\nos._exit(3)")
    probe = run_probe("bitsandbytes", seconds=60)
    assert (probe.outcome, probe.trouble) == ("failed", "ended with code 3 (bye) while importing bitsandbytes")


def test_a_library_that_prints_does_not_reach_the_answers(stub_module: Stub) -> None:
    stub_module("torch", "import os\nprint('{\"facts\": {\"version\": \"printed\"}}')\nos.system('echo echoed')\n"
                "raise RuntimeError('so')")  # fmt: skip
    probe = run_probe("torch", seconds=60)
    assert probe.facts == {} and probe.error == "RuntimeError: so"


def test_a_file_of_that_name_where_the_command_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "huggingface_hub.py").write_text("raise RuntimeError('mine')", encoding="ascii")
    monkeypatch.chdir(tmp_path)
    assert run_probe("places", seconds=60).outcome == "done"


def test_a_command_is_ended_with_what_it_started(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    start = time.monotonic()
    ended = run_command(["sh", "-c", f"sleep 600 & echo $! > {pid}; wait"], seconds=1)
    assert (ended.code, ended.signal) == (None, None) and time.monotonic() - start < 5
    child = int(pid.read_text())
    for _ in range(50):
        if not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2]:
            break
        time.sleep(0.05)
    else:
        os.kill(child, 9)
        pytest.fail("the child of the command outlived it")


def test_probes_run_at_the_same_time(stub_module: Stub) -> None:
    stub_module("torch", "import time\ntime.sleep(600)")
    told: list[tuple[str, int, int]] = []
    start = time.monotonic()
    probed = run_probes(
        {"torch": (2.0, {}), "bitsandbytes": (2.0, {})}, progress=lambda *progress: told.append(progress)
    )
    assert time.monotonic() - start < 3.9 and {probe.outcome for probe in probed.values()} == {"hung"}
    assert [(done, total) for _, done, total in told] == [(1, 2), (2, 2)]


def test_the_kernels_of_this_machine_are_right() -> None:
    probe = run_probe("bitsandbytes", seconds=PROBE_SECONDS)
    assert probe.outcome == "done", probe
    assert 0 < probe.facts["quantise_error"] <= probe.facts["allowed"] * 1.01
    assert check_bitsandbytes(probe).verdict == "ok"


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"quantise_error": 0.4}, "expanded weights are off by 0.400"),
        ({"forward_error": 0.5}, "the forward pass is off by 50.0%"),
        ({"backward_error": float("nan")}, "the backward pass is off by nan%"),
    ],
)
def test_kernels_that_compute_wrongly(changed: dict[str, float], told: str) -> None:
    facts = {"version": "0.50.2", "device": "cpu", "quantise_error": 0.15, "allowed": 0.1519, "forward_error": 0.0}
    probe = Probed("done", "", {**facts, "backward_error": 0.0, **changed}, "", 1.0)
    finding = check_bitsandbytes(probe)
    assert finding.verdict == "fail" and told in finding.found
