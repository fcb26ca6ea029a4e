"""The graphics card, its driver, the PyTorch build next to it, and the precision that a run will use."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from gemma_tune.doctor.finding import Finding
from gemma_tune.doctor.run_probes import Probed
from gemma_tune.errors import EngineError
from gemma_tune.machine.cards import run_smi
from gemma_tune.machine.device import Device
from gemma_tune.machine.precision import decide_precision

_GET_TORCH = "https://pytorch.org/get-started/locally/"
# Unsloth and bitsandbytes have kernels from here on.
_MIN_CAPABILITY = (7, 0)


@dataclass(frozen=True)
class Driver:
    """What `nvidia-smi` says. `cuda` is the newest CUDA version that the driver runs; `cards` are name and memory."""

    version: str
    cuda: tuple[int, int] | None
    cards: tuple[str, ...]


def read_driver() -> Driver | str | None:
    """The NVIDIA driver; None where there is no nvidia-smi, a string where it does not work."""
    try:
        listed = run_smi("--query-gpu=driver_version,name,memory.total", "--format=csv,noheader")
        shown = run_smi()
        if listed is None or shown is None:
            return None
        if listed.code != 0:
            said = (listed.stdout.strip() or listed.stderr.strip() or "no answer").splitlines()[0]
            return f"nvidia-smi: {said}"
    except OSError as error:
        return f"nvidia-smi cannot be started: {error.strerror}"
    rows = [[cell.strip() for cell in line.split(",")] for line in listed.stdout.strip().splitlines()]
    cuda = re.search(r"CUDA[\w ]*Version\s*:\s*(\d+)\.(\d+)", shown.stdout)
    return Driver(
        version=rows[0][0] if rows else "",
        cuda=(int(cuda[1]), int(cuda[2])) if cuda else None,
        cards=tuple(f"{row[1]}, {row[2]}" for row in rows if len(row) == 3),
    )


def device_of(torch: Probed) -> Device | None:
    """The device that a run will use; None where PyTorch did not get so far."""
    facts = torch.facts.get("device")
    if facts is None:
        return None
    capability = facts["compute_capability"]
    return Device(**{**facts, "compute_capability": tuple(capability) if capability else None})


def check_card(driver: Driver | str | None) -> Finding:
    if isinstance(driver, str):
        return Finding("graphics card", "fail", driver, "start the machine again, or install the NVIDIA driver again")
    if driver is None or not driver.cards:
        return Finding(
            "graphics card",
            "warn",
            "no NVIDIA card: the processor trains, which is fine for gemma-tiny and takes days for Gemma 2B",
            "take a machine with a card of 12 GB or more for the larger ones; on Colab: Runtime > Change runtime type",
        )
    newest = f", up to CUDA {_dotted(driver.cuda)}" if driver.cuda else ""
    return Finding("graphics card", "ok", f"{'; '.join(driver.cards)}; driver {driver.version}{newest}")


def check_torch(torch: Probed, driver: Driver | str | None) -> Finding:
    """Whether the PyTorch build and the driver fit each other, and the build has code for the card."""
    facts, fail = torch.facts, partial(Finding, "PyTorch", "fail")
    if torch.outcome != "done" and "version" not in facts:
        return fail(torch.trouble, f"install it again: {_GET_TORCH}")
    built_for, device = facts.get("built_for"), device_of(torch)
    found = f"{facts['version']}, built " + (f"for CUDA {built_for}" if built_for else "without CUDA")
    if torch.outcome != "done":
        return fail(f"{found}: {torch.trouble}", "see the driver: nvidia-smi")
    if not isinstance(driver, Driver) or not driver.cards:
        return Finding("PyTorch", "ok", found)
    if built_for is None:
        newest = _dotted(driver.cuda) if driver.cuda else "12"
        return fail(f"{found}: it cannot use the card", f"install a build for CUDA {newest} or older: {_GET_TORCH}")
    if driver.cuda is not None and int(built_for.partition(".")[0]) > driver.cuda[0]:
        return fail(
            f"{found}, but driver {driver.version} runs CUDA {_dotted(driver.cuda)} at most",
            f"update the NVIDIA driver, or install a build for CUDA {driver.cuda[0]}: {_GET_TORCH}",
        )
    if device is None or device.kind != "cuda":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if visible is not None:
            return fail(f"{found}: CUDA_VISIBLE_DEVICES={visible!r} hides the card", "unset CUDA_VISIBLE_DEVICES")
        why = facts.get("cuda_error", "it finds no card")
        return fail(f"{found}: {why}", "start the machine again; in a container: docker run --gpus all")
    if not _has_code(facts["architectures"], device.compute_capability or (0, 0)):
        lacks = f"no code for compute capability {_dotted(device.compute_capability)} in it"
        return fail(f"{found}: {lacks}", f"install a build for this card: {_GET_TORCH}")
    return Finding("PyTorch", "ok", found)


def check_precision(torch: Probed, *, dtype: str = "auto") -> Finding | None:
    """What `model.dtype` becomes here; None where PyTorch does not start.

    The compute capability decides, not `torch.cuda.is_bf16_supported()`, which counts emulation.
    """
    device = device_of(torch)
    if device is None:
        return None
    try:
        precision = decide_precision(dtype, device=device)
    except EngineError as error:
        return Finding("precision", "fail", error.message, error.hint)
    if device.kind == "cuda" and (device.compute_capability or (0, 0)) < _MIN_CAPABILITY:
        found = f"{device.name} has compute capability {_dotted(device.compute_capability)}, 4-bit training needs 7.0"
        return Finding("precision", "fail", found, "take a T4 or newer")
    mixed = f" with {precision.autocast} autocast" if precision.autocast else ""
    found = f"{precision.compute}{mixed}: {precision.reason}"
    if precision.compute == "float16" and torch.facts.get("claims_bf16"):
        found += "; PyTorch says that the card has bfloat16, but counts emulation, which is slow"
    return Finding("precision", "ok", found)


def _has_code(architectures: Sequence[str], capability: tuple[int, int]) -> bool:
    """Machine code runs on cards of the same major version and a minor one at least as high; PTX on all newer cards."""
    for architecture in architectures:
        found = re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", architecture)
        if found is None:
            continue
        built = int(found[2]), int(found[3])
        if built <= capability and (found[1] == "compute" or built[0] == capability[0]):
            return True
    return False


def _dotted(version: tuple[int, int] | None) -> str:
    return ".".join(map(str, version or ()))
