"""Whole recipes: verdicts, what would make them fit, and what a plan may not do."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gemma_tune.engines.choose import EngineDecision, decide_for_card
from gemma_tune.errors import EngineError, ModelError
from gemma_tune.machine.cards import CARDS, Card, find_card
from gemma_tune.models.catalogue import MODELS, TINY
from gemma_tune.paths import RECIPES_DIR, TINY_MODEL_DIR
from gemma_tune.planning.known_base import find_base
from gemma_tune.planning.plan import plan_recipe, plan_table
from gemma_tune.planning.verdict import Plan
from gemma_tune.recipe.load import load_recipe
from gemma_tune.recipe.methods import METHODS
from gemma_tune.recipe.schema import Recipe

ROOT = Path(__file__).resolve().parents[2]


def _recipe(name: str, *overrides: str) -> Recipe:
    return load_recipe(Path(name), overrides).recipe


def _decide(recipe: Recipe, card: Card, *, engine: str) -> EngineDecision:
    model = recipe.model.model_copy(update={"engine": engine})
    return decide_for_card(recipe.model_copy(update={"model": model}), card=card)


def _plan(recipe: Recipe, gpu: str, *, engine: str = "unsloth", **options: Any) -> Plan:
    card = find_card(gpu)
    return plan_recipe(recipe, card=card, decision=_decide(recipe, card, engine=engine), **options)


@pytest.mark.parametrize("engine", ["unsloth", "transformers"])
@pytest.mark.parametrize("path", sorted(RECIPES_DIR.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_on_every_kind_of_card(path: Path, engine: str) -> None:
    recipe = _recipe(str(path))
    needs = []
    for name in ("h100", "l4"):
        plan = _plan(recipe, name, engine=engine)
        assert plan.verdict in ("fits", "tight")
        assert plan.need_bytes == (plan.resident_bytes + plan.peak.bytes + plan.margin_bytes + plan.context_bytes)
        assert all(part.bytes >= 0 for part in (*plan.resident, *plan.moments, *plan.host, *plan.disk))
        assert plan.schedule.steps and plan.schedule.seconds
        needs.append(plan.need_bytes)
    assert needs[0] >= needs[1]  # Unsloth's loss takes no more on a smaller card


@pytest.mark.parametrize("name", [name for name in MODELS if name != TINY])
def test_every_model_of_the_registry_can_be_planned(name: str) -> None:
    recipe = _recipe("gemma-2b-dolly", f"model.name={name}")
    plan = _plan(recipe, "h200", engine="transformers")
    weights = sum(part.bytes for part in plan.resident[:2])
    assert 0.5 * MODELS[name].num_params < weights < 2 * MODELS[name].num_params
    assert plan.verdict == "fits"


def test_a_card_without_room_is_told_in_a_line() -> None:
    recipe = _recipe("gemma-7b-dolly")
    assert _plan(recipe, "GB=4").line.startswith("plan: does not fit: needs ")
    assert "of the 23.7 GB of L4" in _plan(recipe, "l4").line
    none = plan_recipe(recipe, card=None, decision=decide_for_card(recipe, card=None))
    assert none.verdict is None and none.line.startswith("plan: needs ")


def test_what_training_would_refuse_is_not_planned() -> None:
    with pytest.raises(EngineError, match=r"sdpa computes another model"):
        _plan(_recipe("gemma-2-9b-it-dolly", "model.attention=sdpa"), "l4")


def test_cards_that_train_together_share_the_steps() -> None:
    recipe = _recipe("gemma-7b-dolly")
    one, four = (_plan(recipe, "l4", processes=count) for count in (1, 4))
    assert one.schedule.steps and four.schedule.steps and four.schedule.tokens and one.schedule.tokens
    assert four.schedule.steps == math.ceil(one.schedule.steps / 4)
    assert four.schedule.seconds_per_step == one.schedule.seconds_per_step
    assert four.schedule.tokens == pytest.approx(one.schedule.tokens, rel=0.01)
    gradients = {part.name: part.bytes for part in four.resident}["gradients"]
    assert four.resident_bytes - one.resident_bytes == gradients > 0


def test_settings_move_the_parts_they_should() -> None:
    def parts(*overrides: str, engine: str = "transformers") -> dict[str, int]:
        plan = _plan(_recipe("gemma-2b-dolly", *overrides), "a100-80", engine=engine)
        return {part.name: part.bytes for part in (*plan.resident, *plan.moments, *plan.host)}

    base = parts()
    assert parts("lora.rank=32")["adapter"] == 2 * base["adapter"]
    assert parts("training.optimizer=sgd")["sgd state"] == 0
    assert parts("training.optimizer=paged_adamw")["paged optimizer state"] == base["adamw state"]
    assert parts("training.batch_size=8")["backward pass"] > 1.8 * parts("training.batch_size=4")["backward pass"]
    assert parts("training.gradient_checkpointing=off")["backward pass"] > 4 * base["backward pass"]
    assert parts("data.max_seq_tokens=8192")["head and loss"] < 4 * base["head and loss"]  # chunked
    assert parts(engine="unsloth")["layer inputs"] > 0
    assert "evaluation" not in parts("data.eval_fraction=0", "evaluation.every_steps=null")


def test_exports_and_downloads() -> None:
    plan = _plan(_recipe("gemma-7b-dolly", "export.formats=[gguf-q4_k_m]"), "l4")
    sizes = {part.name: part.bytes / 1e9 for part in plan.exports}
    # Sizes of google/gemma-7b's files on the hub: 17.1 GB of safetensors; 5.33 GB is bartowski's and ggml-org's Q4_K_M.
    assert sizes["merged-16bit"] == pytest.approx(17.1, rel=0.01)
    assert sizes["gguf-q4_k_m"] == pytest.approx(5.33, rel=0.02)
    assert {part.name for part in plan.disk} == {"download", "3 checkpoints", "adapter", "gguf-q4_k_m"}
    tiny = _plan(_recipe("quickstart"), "t4")
    assert "download" not in {part.name for part in tiny.disk}


def test_a_table_has_a_row_a_card_and_a_column_a_length() -> None:
    recipe = _recipe("gemma-7b-dolly", "model.engine=transformers")
    lengths, rows = plan_table(recipe, [CARDS["t4"], CARDS["h100"]])
    assert lengths == (512, 1024, 2048, 4096, 8192)
    for _, plans in rows:
        needs = [plan.need_bytes for plan in plans]
        assert needs == sorted(needs)
    assert [plan.verdict for plan in rows[1][1]] == ["fits"] * 5


def test_a_directory_is_read_from_its_config_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text((TINY_MODEL_DIR / "config.json").read_text())
    base = find_base(str(tmp_path))
    assert base.config == find_base(TINY).config
    monkeypatch.chdir(tmp_path.parent)
    assert find_base(tmp_path.name).config == base.config
    assert base.is_local and find_base(TINY).is_local and not find_base("gemma-7b").is_local
    with pytest.raises(ModelError, match=r"owner/unknown is not in the registry"):
        find_base("owner/unknown")


def test_a_plan_imports_no_torch_and_takes_under_a_second() -> None:
    program = (
        "import json, sys, time\n"
        "from pathlib import Path\n"
        "from gemma_tune.recipe.load import load_recipe\n"
        "from gemma_tune.machine.cards import CARDS\n"
        "from gemma_tune.engines.choose import decide_for_card\n"
        "from gemma_tune.planning.plan import plan_recipe\n"
        "started = time.perf_counter()\n"
        "recipe = load_recipe(Path('gemma-7b-dolly')).recipe\n"
        "cards = [CARDS[name] for name in ('t4', 'l4', 'a100-40', 'h100')]\n"
        "lines = [plan_recipe(recipe, card=card, decision=decide_for_card(recipe, card=card)).line for card in cards]\n"
        "print(json.dumps([time.perf_counter() - started, sorted({name.split('.')[0] for name in sys.modules})]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    seconds, modules = json.loads(done.stdout)
    assert seconds < 1.0
    assert not {"torch", "transformers", "numpy", "datasets", "huggingface_hub"} & set(modules)


def test_a_method_of_two_sequences_a_row_needs_the_memory_of_twice_the_rows() -> None:
    METHODS.add(replace(METHODS["sft"], name="pairs", sequences_per_row=2))
    try:
        twice = _plan(_recipe("gemma-2b-dolly", "training.batch_size=4", "evaluation.batch_size=4"), "l4")
        pairs = _plan(
            _recipe("gemma-2b-dolly", "training.batch_size=2", "evaluation.batch_size=2", "method=pairs"), "l4"
        )
    finally:
        METHODS.remove("pairs")
    assert pairs.need_bytes == twice.need_bytes
