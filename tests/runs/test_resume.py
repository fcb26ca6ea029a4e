"""What may differ when a run is resumed."""

from __future__ import annotations

from gemma_tune.recipe.schema import Recipe
from gemma_tune.runs.resume import lock_differences, recipe_differences


def recipe_of(**sections: dict[str, object]) -> Recipe:
    return Recipe.model_validate(
        {**sections, "data": {"source": "x", "max_seq_tokens": 64, **sections.get("data", {})}}
    )


def test_more_steps_and_other_logging_are_allowed_and_told() -> None:
    now = recipe_of(training={"max_steps": 5}, logging={"every_steps": 7}, run={"name": "b"})
    found = recipe_differences(recipe_of(), now)
    assert found.refused == []
    assert found.allowed == ["training.max_steps: None → 5", "logging.every_steps: 1 → 7", "run.name: None → 'b'"]


def test_every_other_setting_of_the_computation_is_refused() -> None:
    now = recipe_of(
        model={"dtype": "float32"}, lora={"rank": 8}, data={"seed": 1}, training={"seed": 1, "max_grad_norm": 0.3}
    )
    assert [line.split(":")[0] for line in recipe_differences(recipe_of(), now).refused] == [
        "model.dtype", "lora.rank", "data.seed", "training.max_grad_norm", "training.seed",
    ]  # fmt: skip


def test_the_lock_tells_versions_and_refuses_other_files() -> None:
    before = {
        "base": {"name": "a", "files": {"x.safetensors": "0" * 64}},
        "data": {"label": "rows", "sha256": "1" * 64},
        "engine": {"name": "unsloth", "reason": "r"},
        "packages": {"torch": "2.13.0", "peft": "0.21.2"},
        "overrides": ["a=1"],
    }
    now = {
        "base": {"name": "b", "files": {"x.safetensors": "f" * 64}},
        "data": {"label": "other", "sha256": "1" * 64},
        "engine": {"name": "transformers", "reason": "s"},
        "packages": {"torch": "2.12.0", "peft": "0.21.2"},
        "overrides": [],
    }
    found = lock_differences(before, now)
    assert found.refused == [
        "base.files.x.safetensors: 000000000000… → ffffffffffff…",
        "engine.name: 'unsloth' → 'transformers'",
    ]
    assert found.allowed == ["packages.torch: '2.13.0' → '2.12.0'"]
