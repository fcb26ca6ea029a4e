"""Every check of this machine, and of a recipe on it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gemma_tune.doctor import machine
from gemma_tune.doctor.finding import Finding
from gemma_tune.doctor.graphics import check_card, check_precision, check_torch, device_of, read_driver
from gemma_tune.doctor.libraries import check_bitsandbytes, check_data, check_engine, check_hub, check_model
from gemma_tune.doctor.packages import check_gguf, check_packages
from gemma_tune.doctor.run_probes import Probed, run_probes
from gemma_tune.engines.choose import decide_engine
from gemma_tune.errors import EngineError, GemmaTuneError
from gemma_tune.machine.cards import detect_card
from gemma_tune.machine.device import Device
from gemma_tune.planning.plan import plan_recipe
from gemma_tune.planning.verdict import Plan
from gemma_tune.recipe.schema import Recipe

# Long for a library on a slow disk; a name look-up without a network may take as long as it likes.
PROBE_SECONDS = 90.0
_HUB_SECONDS = 8.0
_MODEL_SECONDS = 15.0


def examine(
    recipe: Recipe | None, *, output_dir: str, seconds: float, progress: Callable[[str, int, int], None]
) -> list[Finding]:
    """All findings, in the order of the table.

    Args:
        recipe: also look whether its model and rows can be had, and whether it fits.
        output_dir: where runs go when there is no recipe.
        seconds: the longest that one library may take to import.
        progress: called when a probe is done, with its name, how many are, and of how many.
    """
    probed = run_probes(_wanted(recipe, seconds), progress=progress)
    driver = read_driver()
    device = device_of(probed["torch"])
    dtype = recipe.model.dtype if recipe else "auto"
    plan, plan_finding = _plan(recipe, device) if recipe else (None, None)
    findings = [
        machine.check_python(),
        check_card(driver),
        check_torch(probed["torch"], driver),
        check_precision(probed["torch"], dtype=dtype),
        *check_packages(device.kind if device else None),
        check_bitsandbytes(probed["bitsandbytes"]),
        *check_engine(probed["engine"]),
        check_gguf(),
        machine.check_memory(needed=sum(part.bytes for part in plan.host) if plan else 0),
        *_disks(recipe.run.output_dir if recipe else output_dir, probed=probed, plan=plan),
        machine.check_limits(),
        machine.check_shared_memory(),
        check_hub(probed["hub"]),
        check_model(probed["model"], name=recipe.model.name) if recipe else None,
        check_data(probed["data"]) if recipe else None,
        plan_finding,
    ]
    return [finding for finding in findings if finding is not None]


def _wanted(recipe: Recipe | None, seconds: float) -> dict[str, tuple[float, Mapping[str, Any]]]:
    """Probe -> its seconds and arguments."""
    wanted: dict[str, tuple[float, Mapping[str, Any]]] = {
        "engine": (seconds, {}),
        "bitsandbytes": (seconds, {}),
        "torch": (seconds, {}),
        "hub": (min(_HUB_SECONDS, seconds), {}),
        "places": (seconds, {}),
    }
    if recipe is not None:
        model = recipe.model
        wanted["model"] = (min(_MODEL_SECONDS, seconds), {"name": model.name, "revision": model.revision})
        wanted["data"] = (seconds, {"model": model.name, "data": recipe.data.model_dump(mode="json")})
    return wanted


def _disks(output_dir: str, *, probed: Mapping[str, Probed], plan: Plan | None) -> list[Finding]:
    facts = probed["places"].facts
    if "token_cache" not in facts:
        return [Finding("disk", "fail", probed["places"].trouble, "fix what failed above")]
    places = machine.used_places(output_dir, hub_cache=Path(facts["hub_cache"]), token_cache=Path(facts["token_cache"]))
    needed = {}
    if plan is not None:
        download = sum(part.bytes for part in plan.disk if part.name == "download")
        needed["hub cache"] = probed["model"].facts.get("missing_bytes", download)
        needed["runs"] = sum(part.bytes for part in plan.disk) - download
    return machine.check_disks(places, needed=needed)


def _plan(recipe: Recipe, device: Device | None) -> tuple[Plan | None, Finding | None]:
    """Whether the recipe fits on this machine's card."""
    if device is None:
        return None, None
    try:
        card = detect_card() if device.kind == "cuda" else None
        plan = plan_recipe(recipe, card=card, decision=decide_engine(recipe, device=device))
    except EngineError as error:
        return None, Finding("plan", "fail", error.message, error.hint)
    except GemmaTuneError as error:
        return None, Finding("plan", "warn", f"not possible: {error.message}", error.hint)
    found = plan.line.removeprefix("plan: ")
    if plan.verdict == "does not fit":
        changes = [" ".join(change.overrides) for change in plan.changes]
        return plan, Finding("plan", "fail", found, f"fits with {' or '.join(changes)}" if changes else "a larger card")
    if plan.verdict == "tight":
        return plan, Finding("plan", "warn", found, "gemma-tune plan RECIPE shows what takes the memory")
    return plan, Finding("plan", "ok", found)
