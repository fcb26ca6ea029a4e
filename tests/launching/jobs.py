"""Jobs to write, and words that something on their way would change."""

from __future__ import annotations

from pathlib import Path

from gemma_tune.launching.job import Job, Resources, make_job
from gemma_tune.recipe.load import load_recipe

# What a shell, YAML or Kubernetes would take for something else.
HOSTILE = (
    """data.columns={a: "it's $(touch hit) `touch hit` $HOME $$ ${HF_TOKEN} $(HF_TOKEN) \\\\ * ~ !! # {x}"}""",
    "data.source=my rows.jsonl",
    "model.revision=a'b$(x)",
)


def job_of(recipe: Path, *overrides: str, **resources: object) -> Job:
    return make_job(load_recipe(recipe, overrides), Resources(**resources))  # type: ignore[arg-type]
