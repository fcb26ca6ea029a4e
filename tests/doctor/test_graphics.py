"""Card, driver, PyTorch build and precision, on machines made of stand-ins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from gemma_tune.doctor.graphics import (
    Driver,
    _has_code,
    check_card,
    check_precision,
    check_torch,
    device_of,
    read_driver,
)
from gemma_tune.doctor.run_probes import Probed, run_probe
from tests.doctor.conftest import Stub, torch_source

DRIVER_124 = Driver("550.54.15", (12, 4), ("Tesla T4, 15360 MiB",))


def _torch(**options: Any) -> Probed:
    return run_probe("torch", seconds=60, **options)


def test_a_t4_is_told_float16_although_torch_says_bfloat16(t4: None) -> None:
    driver = read_driver()
    assert driver == DRIVER_124
    probe = _torch()
    assert probe.outcome == "done" and probe.facts["claims_bf16"] is True
    device = device_of(probe)
    assert device is not None and device.compute_capability == (7, 5)
    card, torch = check_card(driver), check_torch(probe, driver)
    assert (card.verdict, torch.verdict) == ("ok", "ok")
    assert "Tesla T4" in card.found and "up to CUDA 12.4" in card.found
    precision = check_precision(probe)
    assert precision is not None and precision.verdict == "ok"
    assert precision.found.startswith("float16 with fp16 autocast") and "7.5" in precision.found
    assert "stay in float32" in precision.found and "emulation" in precision.found
    asked = check_precision(probe, dtype="bfloat16")
    assert asked is not None and asked.verdict == "fail" and asked.fix == "use model.dtype=auto"


def test_a_newer_card_computes_in_bfloat16(stub_module: Stub) -> None:
    stub_module("torch", torch_source("2.13.0+cu128", built_for="12.8", name="NVIDIA L4", capability=(8, 9)))
    precision = check_precision(_torch())
    assert precision is not None and precision.found.startswith("bfloat16 with bf16 autocast")


def test_a_card_before_volta_cannot_train_in_4_bits(stub_module: Stub) -> None:
    stub_module("torch", torch_source("2.13.0+cu126", built_for="12.6", name="Tesla P100", capability=(6, 0)))
    precision = check_precision(_torch())
    assert precision is not None and precision.verdict == "fail" and precision.fix == "take a T4 or newer"


def test_no_card() -> None:
    card = check_card(None)
    assert card.verdict == "warn" and card.fix is not None and "Change runtime type" in card.fix


@pytest.mark.parametrize(
    ("torch", "found", "fix"),
    [
        (
            {"version": "2.13.0+cpu", "built_for": None},
            "built without CUDA: it cannot use the card",
            "CUDA 12.4 or older",
        ),
        (
            {"version": "2.13.0+cu130", "built_for": "13.0"},
            "but driver 550.54.15 runs CUDA 12.4 at most",
            "update the NVIDIA driver, or install a build for CUDA 12",
        ),
        (
            {"version": "2.13.0+cu128", "built_for": "12.8", "error": "No CUDA GPUs are available"},
            "RuntimeError: No CUDA GPUs are available",
            "docker run --gpus all",
        ),
        (
            {
                "version": "2.13.0+cu128",
                "built_for": "12.8",
                "name": "Tesla T4",
                "capability": (7, 5),
                "architectures": ("sm_80", "compute_90"),
            },
            "no code for compute capability 7.5",
            "install a build for this card",
        ),
    ],
)
def test_builds_that_cannot_use_the_card(stub_module: Stub, torch: dict[str, Any], found: str, fix: str) -> None:
    version = torch.pop("version")
    stub_module("torch", torch_source(version, **torch))
    finding = check_torch(_torch(), DRIVER_124)
    assert finding.verdict == "fail"
    assert found in finding.found and fix in (finding.fix or "")


def test_a_card_that_the_environment_hides(stub_module: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    stub_module("torch", torch_source("2.13.0+cu128", built_for="12.8"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    finding = check_torch(_torch(), DRIVER_124)
    assert finding.verdict == "fail" and finding.fix == "unset CUDA_VISIBLE_DEVICES"


def test_a_driver_that_lost_its_card(nvidia_smi: Callable[..., None]) -> None:
    nvidia_smi(listed="No devices were found", shown="", code=6)
    driver = read_driver()
    assert driver == "nvidia-smi: No devices were found"
    assert check_card(driver).verdict == "fail"


def test_torch_that_does_not_start(stub_module: Stub) -> None:
    stub_module("torch", "raise ImportError('libcudart.so.13: cannot open shared object file')")
    probe = _torch()
    finding = check_torch(probe, None)
    assert finding.verdict == "fail" and "libcudart.so.13" in finding.found and "importing torch" in finding.found
    assert check_precision(probe) is None


@pytest.mark.parametrize(
    ("architectures", "capability", "expected"),
    [
        (["sm_75", "sm_80"], (7, 5), True),
        (["sm_80"], (8, 9), True),
        (["sm_86"], (8, 0), False),
        (["sm_80"], (9, 0), False),
        (["sm_80", "compute_80"], (9, 0), True),
        (["compute_90"], (8, 0), False),
        (["sm_90a", "sm_100", "sm_120"], (12, 0), True),
    ],
)
def test_which_code_runs_on_which_card(architectures: list[str], capability: tuple[int, int], expected: bool) -> None:
    """CUDA C++ Programming Guide, sections on binary and PTX compatibility."""
    assert _has_code(architectures, capability) is expected
