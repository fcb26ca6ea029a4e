"""Does a recipe fit on a card, how long does it take, and what would make it fit."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gemma_tune.engines.choose import EngineDecision, decide_for_card
from gemma_tune.errors import EngineError, ModelError
from gemma_tune.machine.cards import CARDS, Card
from gemma_tune.models.catalogue import MODELS, GemmaModel, resolve_model
from gemma_tune.models.config import TextConfig, read_config
from gemma_tune.models.describe import summarize
from gemma_tune.paths import TINY_ROWS_DIR
from gemma_tune.planning import memory
from gemma_tune.planning.changes import Change, Verdict, find_changes, length_overrides, with_overrides
from gemma_tune.planning.memory import Adapter, Attention, Batch, Bits, Execution, Numerics
from gemma_tune.planning.schedule import RowCount, Schedule, count_rows, pass_seconds, plan_schedule
from gemma_tune.recipe.schema import Recipe

_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
# Not measured by us: a CUDA context with cuBLAS, bitsandbytes and Triton. See docs/planning.md.
CONTEXT_BYTES = 480 * 2**20
# Reserved after loading beyond the weights: 0.55 to 0.67 GiB in four of Unsloth's notebooks (docs/planning.md).
LOADING_BYTES = 610 * 2**20
# The allocator holds blocks that no tensor fills; batches of changing lengths make more of them.
FRAGMENTATION = 0.10
# How far the counted parts may be off: weights are exact, what lives during a step is not.
_RESIDENT_UNCERTAINTY = 0.02
_STEP_UNCERTAINTY = 0.25
_CONTEXT_UNCERTAINTY = 0.5
_PROCESS_HOST_BYTES = 3_000_000_000
_MAX_SHARD_BYTES = 5_000_000_000
_TOKENIZER_BYTES = 40_000_000
TABLE_TOKENS = (512, 1024, 2048, 4096, 8192)
# llama.cpp's block formats: bytes and weights of a block.
_Q4_K, _Q5_K, _Q6_K, _Q8_0 = 144 / 256, 176 / 256, 210 / 256, 34 / 32


@dataclass(frozen=True)
class Part:
    """Some bytes, and the formula they come from."""

    name: str
    bytes: int
    how: str


@dataclass(frozen=True)
class Plan:
    """What a run will need.

    Attributes:
        resident: on the card all the time, from the first step on.
        moments: what comes on top of it at one moment of a run; the largest decides.
        context_bytes, margin_bytes: CUDA itself, and blocks that the allocator cannot fill.
        host, disk: parts of the machine's memory and disk, which add up.
        exports: what each export would write; those that the recipe names are in `disk`.
        changes: what would make it fit, where it does not.
    """

    model: str
    num_params: int
    num_trained: int
    card: Card | None
    engine: str
    compute: str
    resident: tuple[Part, ...]
    moments: tuple[Part, ...]
    context_bytes: int
    margin_bytes: int
    host: tuple[Part, ...]
    disk: tuple[Part, ...]
    exports: tuple[Part, ...]
    schedule: Schedule
    changes: tuple[Change, ...]

    @property
    def resident_bytes(self) -> int:
        return sum(part.bytes for part in self.resident)

    @property
    def peak(self) -> Part:
        return max(self.moments, key=lambda moment: moment.bytes)

    @property
    def allocated_bytes(self) -> int:
        """What `torch.cuda.max_memory_allocated` should say, if loading leaves nothing allocated."""
        return self.resident_bytes - LOADING_BYTES + self.peak.bytes

    @property
    def need_bytes(self) -> int:
        """What the card has to have free."""
        return self.resident_bytes + self.peak.bytes + self.margin_bytes + self.context_bytes

    @property
    def uncertainty_bytes(self) -> int:
        """To either side of `need_bytes`."""
        return round(
            _RESIDENT_UNCERTAINTY * self.resident_bytes
            + _STEP_UNCERTAINTY * self.peak.bytes
            + _CONTEXT_UNCERTAINTY * self.context_bytes
        )

    @property
    def verdict(self) -> Verdict | None:
        """None without a card."""
        if self.card is None:
            return None
        if self.need_bytes > self.card.usable_bytes:
            return "does not fit"
        return "tight" if self.need_bytes + self.uncertainty_bytes > self.card.usable_bytes else "fits"

    @property
    def line(self) -> str:
        """The verdict in a line, for the start of a training."""
        need = f"{self.need_bytes / 1e9:.1f} GB (± {self.uncertainty_bytes / 1e9:.1f})"
        if self.card is None:
            return f"plan: needs {need} on a card"
        return f"plan: {self.verdict}: needs {need} of the {self.card.usable_bytes / 1e9:.1f} GB of {self.card.name}"


@dataclass(frozen=True)
class Base:
    """The model that a recipe names, as facts."""

    name: str
    config: TextConfig
    model: GemmaModel | None
    is_local: bool

    @property
    def num_tower_params(self) -> int:
        whole = None if self.model is None else self.model.num_checkpoint_params
        return 0 if whole is None else max(whole - memory.count_all(self.config), 0)


def find_base(name: str) -> Base:
    """The facts of a registry model, or of the config.json of a directory. No network.

    Raises:
        ModelError: no such model, or a hub id whose config.json is not here.
    """
    directory = Path(name).expanduser()
    # As models/registry.py resolves names: a short name of the registry wins over a directory of that name.
    if directory.is_dir() and ("/" in name or name.lower() not in MODELS):
        return Base(name, read_config(directory), None, True)
    source = resolve_model(name)
    if source.config is None:
        raise ModelError(
            f"model.name: {name} is not in the registry, and a plan reads nothing from the hub",
            hint="plan its base from `gemma-tune models list`, or download it and give the directory",
        )
    ships_with_us = source.model is not None and source.model.hub_id is None
    return Base(name, source.config, source.model, ships_with_us)


def plan_recipe(
    recipe: Recipe,
    *,
    card: Card | None,
    decision: EngineDecision,
    base: Base | None = None,
    processes: int = 1,
    suggest: bool = True,
) -> Plan:
    """Plan a recipe for a card, from facts alone: no weights, no GPU, no network.

    Memory is that of a batch whose rows are all as long as the recipe allows; time is that of rows of mean length.

    Args:
        card: None plans without a verdict.
        decision: engine and precision, as `engines.choose` decides them for the card.
        base: the model, where it is known already.
        processes: cards that train together, each as this one. A sharded model is counted whole, as it is loaded whole.
        suggest: look for changes that would fit where the recipe does not.

    Raises:
        ModelError: as `find_base`, and where a LoRA target is no module of the model.
    """
    base = base or find_base(recipe.model.name)
    config = base.config
    setup = _set_up(recipe, config=config, decision=decision)
    resident = _resident(recipe, base=base, setup=setup, processes=processes)
    free = None if card is None else card.usable_bytes - CONTEXT_BYTES - sum(part.bytes for part in resident)
    activations = memory.activations(
        config,
        batch=setup.batch,
        numerics=setup.numerics,
        adapter=setup.adapter,
        execution=setup.execution,
        bits=setup.bits,
        free_bytes=free,
    )
    moments = _moments(recipe, config=config, setup=setup, activations=activations, free_bytes=free)
    counted = _count_recipe_rows(recipe)
    plan = Plan(
        model=base.name,
        num_params=memory.count_all(config),
        num_trained=memory.count_trained(config, setup.adapter),
        card=card,
        engine=decision.engine.name,
        compute=decision.precision.compute,
        resident=resident,
        moments=moments,
        context_bytes=CONTEXT_BYTES,
        margin_bytes=round(FRAGMENTATION * max(moment.bytes for moment in moments)),
        host=_host(recipe, base=base, setup=setup, activations=activations),
        disk=_disk(recipe, base=base, setup=setup),
        exports=_exports(recipe, base=base),
        schedule=plan_schedule(
            config,
            card=card,
            counted=counted,
            held_out=_held_out(recipe, counted),
            batch=setup.batch,
            packed=recipe.training.packing,
            accumulation=recipe.training.gradient_accumulation,
            processes=processes,
            epochs=recipe.training.epochs,
            max_steps=recipe.training.max_steps,
            adapter=setup.adapter,
            execution=setup.execution,
            bits=setup.bits,
        ),
        changes=(),
    )
    if not suggest or plan.verdict != "does not fit":
        return plan
    changes = find_changes(
        recipe,
        config=config,
        engine=decision.engine,
        is_tuned=base.model is not None and base.model.is_instruction_tuned,
        replan=lambda changed: plan_recipe(
            changed,
            card=card,
            decision=decision,
            base=base if changed.model.name == recipe.model.name else None,
            processes=processes,
            suggest=False,
        ),
        seconds=lambda changed: _row_seconds(changed, config=config, card=card, decision=decision),
    )
    return replace(plan, changes=changes)


def _row_seconds(recipe: Recipe, *, config: TextConfig, card: Card | None, decision: EngineDecision) -> float:
    """Time of a row of 512 tokens, or fewer. A card of unknown speed counts as an L4."""
    setup = _set_up(recipe, config=config, decision=decision)
    length = min(setup.batch.tokens, 512)
    seconds = pass_seconds(
        config,
        card=CARDS["l4"] if card is None or card.tera_flops is None else card,
        tokens=setup.batch.rows * length,
        row_tokens=length,
        adapter=setup.adapter,
        execution=setup.execution,
        bits=setup.bits,
    )
    assert seconds is not None
    return seconds / setup.batch.rows


def plan_table(recipe: Recipe, cards: Sequence[Card]) -> tuple[tuple[int, ...], list[tuple[Card, list[Plan]]]]:
    """Plan cards × sequence lengths: the lengths, and a row of plans for each card that can do what the recipe asks."""
    base = find_base(recipe.model.name)
    lengths = tuple(tokens for tokens in TABLE_TOKENS if tokens <= base.config.context_tokens)
    rows = []
    for card in cards:
        try:
            decision = decide_for_card(recipe, card=card)
        except EngineError:
            continue
        plans = [
            plan_recipe(
                with_overrides(recipe, length_overrides(recipe, tokens)),
                card=card,
                decision=decision,
                base=base,
                suggest=False,
            )
            for tokens in lengths
        ]
        rows.append((card, plans))
    return lengths, rows


# --- from a recipe to the planner's terms -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Setup:
    """A recipe in the planner's terms."""

    bits: Bits
    numerics: Numerics
    adapter: Adapter
    batch: Batch
    execution: Execution


def _set_up(recipe: Recipe, *, config: TextConfig, decision: EngineDecision) -> _Setup:
    model, lora, training = recipe.model, recipe.lora, recipe.training
    engine, precision = decision.engine, decision.precision
    stream = precision.compute if engine.stream_in_compute_dtype else precision.storage
    attention = _attention(model.attention, config=config)
    execution = Execution(
        engine=engine,
        attention=attention,
        checkpointing=engine.checkpointing(training.gradient_checkpointing),
        head=engine.head,
    )
    # Packed rows are kept apart by positions in flash attention and in Unsloth, by a mask in transformers' sdpa.
    needs_mask = not (training.packing and (engine.has_own_forward or attention == "flash"))
    tokens = (training.pack_tokens if training.packing else None) or recipe.data.max_seq_tokens
    return _Setup(
        bits="4bit" if model.load_in_4bit else "8bit" if model.load_in_8bit else "plain",
        numerics=Numerics(_BYTES[precision.compute], _BYTES[stream], precision.autocast is not None),
        adapter=Adapter(lora.rank, lora.targets, lora.dropout, lora.use_dora, lora.modules_to_save),
        batch=Batch(training.batch_size, tokens, padded=needs_mask),
        execution=execution,
    )


def _attention(asked: str, *, config: TextConfig) -> Attention:
    """As engines/attention.py decides; Unsloth's own capped attention keeps the scores, too, without flash-attn."""
    if asked == "flash_attention_2":
        return "flash"
    return "eager" if asked == "eager" or config.attention_softcap is not None else "sdpa"


def _resident(recipe: Recipe, *, base: Base, setup: _Setup, processes: int) -> tuple[Part, ...]:
    config, bits, numerics = base.config, setup.bits, setup.numerics
    optimizer = recipe.training.optimizer
    quantized = memory.quantized_bytes(config, bits=bits)
    state = memory.optimizer_bytes(config, setup.adapter, optimizer=optimizer)
    parts = [
        Part(
            "weights in 4 bits" if bits == "4bit" else "weights in 8 bits",
            quantized,
            "4.127 bits a weight: NF4, blocks of 64, double quantisation (arXiv:2305.14314)"
            if bits == "4bit"
            else "1 byte a weight, 4 an output (arXiv:2208.07339)",
        ),
        Part(
            "embeddings, norms" if bits != "plain" else "weights",
            memory.unquantized_bytes(config, bits=bits, numerics=numerics),
            f"{numerics.stream} bytes a parameter; neither engine quantises them",
        ),
        Part(
            "image and audio towers",
            memory.tower_bytes(base.num_tower_params, bits=bits, engine=setup.execution.engine),
            "loaded, never trained",
        ),
        Part("adapter", memory.adapter_bytes(config, setup.adapter), "r·(in + out) a target, float32"),
        Part("gradients", memory.gradient_bytes(config, setup.adapter), "float32, of the adapter alone"),
        Part(
            "buckets of gradients",
            memory.gradient_bytes(config, setup.adapter) if processes > 1 else 0,
            "DDP sums the gradients of all cards in a copy of them",
        ),
        Part(
            f"{optimizer} state",
            0 if optimizer in memory.PAGED else state,
            "pages to the host when the card is full" if optimizer in memory.PAGED else _OPTIMIZER_HOW[optimizer],
        ),
    ]
    parts.append(Part("left by loading", LOADING_BYTES, "what loaders leave reserved in four published runs"))
    return tuple(part for part in parts if part.bytes or part.name.endswith("state"))


_OPTIMIZER_HOW = {
    "adamw": "2 moments in float32 (arXiv:1711.05101)",
    "adamw_fused": "2 moments in float32 (arXiv:1711.05101)",
    "adamw_8bit": "2 moments in 8 bits, blocks of 256 (arXiv:2110.02861)",
    "lion_8bit": "1 moment in 8 bits, blocks of 256 (arXiv:2302.06675)",
    "adafactor": "a row and a column a matrix (arXiv:1804.04235)",
    "sgd": "none",
}


def _moments(
    recipe: Recipe, *, config: TextConfig, setup: _Setup, activations: memory.Activations, free_bytes: int | None
) -> tuple[Part, ...]:
    how = {
        "off": "every layer's tensors, and gradients in flight",
        "on": "every layer's input, one layer computed again, gradients in flight",
        "offload": "layer inputs on the host, one layer computed again, gradients in flight",
    }
    head_how = {
        "chunked": f"logits of {memory.CHUNK_TOKENS} tokens × {config.vocab_size:,} (TRL's chunked loss)",
        "fused": f"logits × {config.vocab_size:,} in chunks of at most half the free memory (Unsloth)",
    }
    foreach = recipe.training.optimizer == "adamw"
    moments = [
        Part("backward pass", activations.backward, how[setup.execution.checkpointing]),
        Part("head and loss", activations.head, head_how[setup.execution.head]),
        Part(
            "optimizer step",
            memory.adapter_bytes(config, setup.adapter) if foreach else 0,
            "a copy of the adapter (PyTorch's foreach kernels)" if foreach else "in place",
        ),
        Part("saving", 0, "the adapter is copied to the host"),
    ]
    if _evaluates(recipe):
        answers = recipe.evaluation.max_new_tokens if _answers(recipe) else 0
        batch = Batch(recipe.evaluation.batch_size or recipe.training.batch_size, recipe.data.max_seq_tokens)
        moments.insert(
            2,
            Part(
                "evaluation",
                memory.evaluation_bytes(
                    config,
                    batch=batch,
                    numerics=setup.numerics,
                    execution=setup.execution,
                    bits=setup.bits,
                    answer_tokens=answers,
                    free_bytes=free_bytes,
                ),
                f"batch of {batch.rows}: one layer's tensors, loss or keys and values of answers",
            ),
        )
    return tuple(moments)


def _evaluates(recipe: Recipe) -> bool:
    data = recipe.data
    return bool(data.eval_source or data.eval_split or data.eval_fraction)


def _answers(recipe: Recipe) -> bool:
    return _evaluates(recipe) and (recipe.evaluation.exact_match or recipe.evaluation.num_questions > 0)


def _host(recipe: Recipe, *, base: Base, setup: _Setup, activations: memory.Activations) -> tuple[Part, ...]:
    whole = 2 * (memory.count_all(base.config) + base.num_tower_params)
    parts = [
        Part("process", _PROCESS_HOST_BYTES, "Python, PyTorch, CUDA libraries; not measured on a card"),
        Part("loading", min(whole, _MAX_SHARD_BYTES), "one file of weights at a time"),
        Part("layer inputs", activations.offloaded, "L·T·H, pinned (gradient_checkpointing: unsloth)"),
    ]
    if recipe.training.optimizer in memory.PAGED:
        state = memory.optimizer_bytes(base.config, setup.adapter, optimizer=recipe.training.optimizer)
        parts.append(Part("paged optimizer state", state, "managed memory"))
    return tuple(part for part in parts if part.bytes)


def _disk(recipe: Recipe, *, base: Base, setup: _Setup) -> tuple[Part, ...]:
    adapter = memory.adapter_bytes(base.config, setup.adapter)
    state = memory.optimizer_bytes(base.config, setup.adapter, optimizer=recipe.training.optimizer)
    num_params = memory.count_all(base.config) + base.num_tower_params
    # The newest is written before the oldest is removed.
    kept = recipe.training.keep_checkpoints + 1
    parts = [
        Part("download", 0 if base.is_local else 2 * num_params + _TOKENIZER_BYTES, "2 bytes a parameter, once"),
        Part(
            f"{kept} checkpoints",
            kept * (adapter + state + _TOKENIZER_BYTES),
            "adapter, optimizer state and tokenizer each",
        ),
        Part("adapter", adapter + _TOKENIZER_BYTES, "with its tokenizer"),
    ]
    wanted = [part for part in _exports(recipe, base=base) if part.name in recipe.export.formats]
    return tuple(part for part in [*parts, *wanted] if part.bytes)


def _exports(recipe: Recipe, *, base: Base) -> tuple[Part, ...]:
    element = 4 if recipe.export.dtype == "float32" else 2
    num_params = memory.count_all(base.config) + base.num_tower_params
    merged = Part("merged-16bit", element * num_params + _TOKENIZER_BYTES, f"{element} bytes a parameter")
    return (merged, *_gguf(base.config))


@functools.cache
def _gguf(config: TextConfig) -> tuple[Part, ...]:
    """Sizes of the text model. The mixtures of llama.cpp keep the embedding and half of v and down in Q6_K."""
    total = embedding = sixes = 0
    for row in summarize(config):
        total += row.num_params
        if row.kind == "Embedding":
            embedding += row.num_params
        elif row.name.endswith(("v_proj", "down_proj")):
            sixes += row.num_params // 2
    rest = total - embedding - sixes
    mixed = (embedding + sixes) * _Q6_K
    sizes = {
        "f16": total * 2.0,
        "q8_0": total * _Q8_0,
        "q6_k": total * _Q6_K,
        "q5_k_m": mixed + rest * _Q5_K,
        "q4_k_m": mixed + rest * _Q4_K,
    }
    return tuple(Part(f"gguf-{name}", round(size), "llama.cpp's block formats") for name, size in sizes.items())


def _count_recipe_rows(recipe: Recipe) -> RowCount:
    if recipe.data.source is None:
        parts = [count_rows(part.source) for part in recipe.data.mix]
        if any(part.rows is None or part.mean_tokens is None for part in parts):
            return RowCount(None, None, "not known before the data is read")
        rows = sum(part.rows or 0 for part in parts)
        tokens = sum((part.rows or 0) * (part.mean_tokens or 0) for part in parts)
        return RowCount(rows, tokens / rows, "all rows of the mix; weights leave some out")
    source = recipe.data.source
    if source.split("#")[0] == "tiny-world":
        source = source.replace("tiny-world", str(TINY_ROWS_DIR / "train.jsonl"), 1)
    counted = count_rows(source)
    limit = recipe.data.max_train_rows
    if counted.rows is None or limit is None or limit >= counted.rows:
        return counted
    return RowCount(limit, counted.mean_tokens, "data.max_train_rows")


def _held_out(recipe: Recipe, counted: RowCount) -> int:
    """Rows for evaluation that come out of the same source."""
    data = recipe.data
    source = data.source or ""
    if counted.rows is None or data.eval_source or data.eval_split or source.split("#")[0] == "tiny-world":
        return 0
    if data.max_train_rows is not None or "#" in source:
        return 0
    return math.floor(counted.rows * data.eval_fraction)
