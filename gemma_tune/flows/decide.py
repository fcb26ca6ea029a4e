"""What a run works with on this machine, decided before anything heavy is loaded."""

import time
from dataclasses import asdict, dataclass, field
from typing import Any

from gemma_tune.data.inputs import Inputs, require_rows
from gemma_tune.data.open import open_data
from gemma_tune.disk import write_json
from gemma_tune.engines.choose import EngineDecision, decide_engine
from gemma_tune.exporting.formats.registry import find_formats
from gemma_tune.flows.check_base import check_base
from gemma_tune.machine.cards import detect_card
from gemma_tune.machine.device import detect_device
from gemma_tune.machine.world import World
from gemma_tune.models.fetch import LocalModel
from gemma_tune.planning.known_base import Base
from gemma_tune.planning.plan import plan_recipe
from gemma_tune.recipe.load import LoadedRecipe
from gemma_tune.recipe.schema import Recipe
from gemma_tune.runs.adapter_base import base_record
from gemma_tune.runs.context import RunContext
from gemma_tune.runs.lock import Lock
from gemma_tune.runs.warm_start import StartAdapter, find_adapter
from gemma_tune.training.trackers import require_trackers


@dataclass(frozen=True)
class Decisions:
    """The recipe, and what it comes to on this machine."""

    loaded: LoadedRecipe
    base: LocalModel
    inputs: Inputs
    engine: EngineDecision  # the engine, the precision and the device, and why
    adapter: StartAdapter | None  # the adapter that the training starts from; None for a fresh one
    notes: tuple[str, ...] = ()  # what is to be said of the base before it is trained
    # when the run was started, by the monotonic clock in seconds
    started: float = field(default_factory=time.monotonic)

    @property
    def recipe(self) -> Recipe:
        return self.loaded.recipe

    @property
    def quantization(self) -> str:
        model = self.recipe.model
        return "NF4" if model.load_in_4bit else "LLM.int8" if model.load_in_8bit else "16 or 32 bits"


def decide(loaded: LoadedRecipe) -> Decisions:
    """Decide on everything that needs no model in memory, and refuse what can be refused.

    Raises:
        GemmaTuneError: what is wrong, where, and what to do next.
    """
    started, recipe = time.monotonic(), loaded.recipe
    find_formats(recipe.export.formats)  # a wrong name is refused before the training, not after it
    require_trackers(recipe.logging.trackers)
    base, inputs = open_data(recipe)
    adapter = find_adapter(recipe.model.adapter, lora=recipe.lora, base=base) if recipe.model.adapter else None
    require_rows(inputs, recipe.method_facts)
    return Decisions(
        loaded=loaded,
        base=base,
        inputs=inputs,
        engine=decide_engine(recipe, device=detect_device()),
        notes=check_base(recipe, base.config, base.directory),
        adapter=adapter,
        started=started,
    )


def report_plan(context: RunContext, decisions: Decisions) -> None:
    """Say whether the run fits its card before anything is loaded, and keep it next to what will be measured."""
    base, reporter = decisions.base, context.reporter
    planned = plan_recipe(
        decisions.recipe,
        card=detect_card(),
        decision=decisions.engine,
        base=Base(base.name, base.config, base.model, True),
        processes=context.world.size,
    )
    (reporter.detail if planned.verdict == "fits" else reporter.warn)(planned.line)
    for change in planned.changes:
        reporter.detail(f"would fit: {' '.join(change.overrides)}")
    derived = {"allocated_bytes": planned.allocated_bytes, "uncertainty_bytes": planned.uncertainty_bytes}
    write_json(context.run.plan, asdict(planned) | derived)


def lock_of(decisions: Decisions, *, data: dict[str, Any], world: World) -> Lock:
    """Return everything that a run depends on. `data`: label and SHA-256 of the rows and of their template."""
    base, adapter = decisions.base, decisions.adapter
    return Lock(
        recipe=decisions.loaded.name,
        overrides=list(decisions.loaded.overrides),
        base=base_record(base),
        method=decisions.recipe.method.name,
        data=data,
        engine=asdict(decisions.engine.choice),
        precision=asdict(decisions.engine.precision),
        hardware=asdict(decisions.engine.device),
        seed=decisions.recipe.training.seed,
        processes=world.size,
        adapter={"name": adapter.name, "sha256": adapter.sha256} if adapter else None,
    )
