"""A recipe on a machine: does it fit, and is there room for what it writes."""

from __future__ import annotations

import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest

from gemma_tune.doctor.examine import _disks, _plan, _wanted
from gemma_tune.doctor.run_probes import Probed
from gemma_tune.machine.device import Device
from gemma_tune.recipe.load import load_recipe
from gemma_tune.recipe.schema import DataSection, Recipe

T4 = Device("cuda", "Tesla T4", (7, 5), 15_828_320_256)
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def with_t4(nvidia_smi: Callable[..., None]) -> None:
    nvidia_smi(listed="", shown="", plan="Tesla T4, 15360, 7.5")


def _recipe(*overrides: str) -> Recipe:
    return load_recipe(Path("gemma-7b-it-dolly-t4"), overrides).recipe


def test_a_recipe_that_fits(with_t4: None) -> None:
    plan, finding = _plan(_recipe(), T4)
    assert plan is not None and finding is not None
    assert finding.verdict == "ok" and "T4" in finding.found


def test_the_fix_of_a_recipe_that_does_not_fit_fits(with_t4: None) -> None:
    _, finding = _plan(_recipe("training.batch_size=64", "data.max_seq_tokens=4096"), T4)
    assert finding is not None and finding.verdict == "fail" and finding.fix is not None
    assert finding.fix.startswith("fits with ")
    changes = finding.fix.removeprefix("fits with ").split(" or ")[0].split()
    overrides = ["training.batch_size=64", "data.max_seq_tokens=4096", *changes]
    _, after = _plan(_recipe(*overrides), T4)
    assert after is not None and after.verdict != "fail"


def test_what_the_card_cannot_do(with_t4: None) -> None:
    _, finding = _plan(_recipe("model.dtype=bfloat16"), T4)
    assert finding is not None and (finding.verdict, finding.fix) == ("fail", "use model.dtype=auto")
    _, finding = _plan(_recipe("model.name=somebody/gemma"), T4)
    assert finding is not None and finding.verdict == "warn" and "not in the registry" in finding.found
    assert _plan(_recipe(), None) == (None, None)


def test_the_disk_that_a_recipe_needs(with_t4: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 0, 18 * 10**9))
    plan, _ = _plan(_recipe(), T4)
    places = {"hub_cache": str(tmp_path), "token_cache": str(tmp_path)}

    def look(**model: int) -> str:
        probed = {"places": Probed("done", "", places, "", 1), "model": Probed("done", "", model, "", 1)}
        return _disks(str(tmp_path), probed=probed, plan=plan)[0].verdict

    assert look() == "fail", "17 GB to download and checkpoints of a GB"
    assert look(missing_bytes=0) == "ok"
    lost = {"places": Probed("failed", "importing huggingface_hub", {}, "ImportError", 1)}
    assert _disks(str(tmp_path), probed=lost, plan=None)[0].verdict == "fail"


def test_a_recipe_travels_whole_to_its_probe() -> None:
    recipe = _recipe("data.columns.response=answer")
    (_, arguments) = _wanted(recipe, 90.0)["data"]
    assert DataSection.model_validate(arguments["data"]) == recipe.data
    assert set(_wanted(None, 90.0)) == {"engine", "bitsandbytes", "torch", "hub", "places"}
