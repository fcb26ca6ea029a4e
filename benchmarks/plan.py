"""The plan's memory against memory that was measured: on a processor with tiny Gemmas, on a card with real shapes.

    python benchmarks/plan.py            # the CPU half: tensor bytes of tiny Gemmas, about two minutes
    python benchmarks/plan.py --gpu [--shapes 2b,7b] [--json FILE]     # a CUDA card: torch.cuda.max_memory_allocated

The CPU half counts what a backward pass keeps and its peak as the tests do, over more shapes. The GPU half trains
shapes of Gemma 2B and 7B with random weights for three steps at each point of a grid (tokens, rows, checkpointing,
engine, optimizer), each in a process of its own, and compares the peak with `Plan.allocated_bytes`; a point that runs
out of memory is told, with what the plan had said. Without a card `--gpu` ends with exit code 2.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from rich.console import Console
from rich.table import Table

# A script's own folder is what Python puts first on its path, and the package may not be installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.flagship import SHAPES, write_dolly_like_rows, write_random_gemma
from gemma_tune.engines.choose import decide_engine
from gemma_tune.engines.engine_facts import ENGINES
from gemma_tune.machine.cards import detect_card
from gemma_tune.machine.device import detect_device
from gemma_tune.machine.precision import Precision
from gemma_tune.models.config import read_config
from gemma_tune.paths import TINY_MODEL_DIR
from gemma_tune.planning.activations import activations
from gemma_tune.planning.plan import plan_recipe
from gemma_tune.planning.step import Batch, Execution, Numerics, Step
from gemma_tune.planning.verdict import Plan
from gemma_tune.recipe.load import load_recipe
from gemma_tune.recipe.schema import LoraSection, ModelSection

_STEPS = 3
_NUM_ROWS = 64
_TARGETS = LoraSection().targets
# tokens, rows, checkpointing, engine, optimizer: each dimension is varied around the flagship recipe.
_GRID = [
    *itertools.product((512, 2048, 8192), (1, 2), ("unsloth",), ("unsloth", "transformers"), ("adamw",)),
    *itertools.product((1024,), (4, 8), ("on", "unsloth"), ("unsloth", "transformers"), ("adamw",)),
    *itertools.product((1024,), (1,), ("off",), ("unsloth", "transformers"), ("adamw",)),
    *itertools.product((1024,), (2,), ("unsloth",), ("transformers",), ("adamw_8bit", "paged_adamw_8bit", "adafactor")),
]


@dataclass(frozen=True)
class Point:
    """One comparison; `measured_bytes` is None where the card ran out of memory."""

    what: str
    planned_bytes: int
    measured_bytes: int | None

    @property
    def error(self) -> float | None:
        return None if self.measured_bytes is None else self.planned_bytes / self.measured_bytes - 1


# --- on a processor ---------------------------------------------------------------------------------------------------


def cpu_points() -> Iterator[Point]:
    """Tiny Gemmas in bfloat16 and NF4: what the forward pass keeps, and the peak of the backward pass."""
    shapes = [(128, 512, 2, 1), (128, 1024, 4, 1), (256, 1024, 4, 4)]
    for family, shape, checkpointing in itertools.product(("gemma", "gemma2", "gemma3"), shapes, ("off", "on")):
        yield from _cpu_point(family, shape, checkpointing, rows=2, tokens=256)


def _cpu_point(
    family: str, shape: tuple[int, int, int, int], checkpointing: Any, *, rows: int, tokens: int
) -> Iterator[Point]:
    import torch
    from transformers import AutoModelForCausalLM, Gemma2Config, Gemma3TextConfig, GemmaConfig

    from benchmarks.measure_memory import peak_bytes, saved_bytes
    from gemma_tune.engines.transformers import TransformersEngine

    classes = {"gemma": GemmaConfig, "gemma2": Gemma2Config, "gemma3": Gemma3TextConfig}
    hidden, ffn, heads, kv_heads = shape
    config = classes[family](
        vocab_size=512,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=3,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=64,
    )
    with tempfile.TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
        engine = TransformersEngine()
        loaded = engine.load(
            Path(folder),
            section=ModelSection(),
            precision=Precision("bfloat16", "bfloat16", "bf16", "benchmark"),
            max_seq_tokens=tokens,
        )
        attached = engine.attach_lora(loaded, section=LoraSection(), gradient_checkpointing=checkpointing, seed=0)
        facts = read_config(Path(folder))
    model = attached.loaded.model
    model.train()
    ids = torch.randint(0, 512, (rows, tokens))

    def forward() -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return model.get_base_model().model(input_ids=ids, attention_mask=torch.ones_like(ids))[0]

    attention = "eager" if family == "gemma2" else "sdpa"
    step = Step(
        batch=Batch(rows, tokens, padded=False),
        numerics=Numerics(compute=2, stream=2, autocast=True),
        lora=LoraSection(),
        execution=Execution(ENGINES["transformers"], attention, checkpointing, "chunked"),
    )
    planned = activations(facts, step)
    what = f"{family} H {hidden} I {ffn} heads {heads}/{kv_heads} checkpointing {checkpointing}"
    # PEFT asks this without a device, which means CUDA: say yes, as on a card in 16 bits.
    of_device = torch.is_autocast_enabled
    with patch("torch.is_autocast_enabled", lambda *device: of_device(*device) if device else True):
        yield Point(f"{what}: kept", planned.stored - planned.masks, saved_bytes(model, forward))
        forward().sum().backward()  # gradients are there from now on
        with peak_bytes(model) as peaks:
            states = forward()
            states.backward(torch.ones_like(states))
    yield Point(f"{what}: peak", planned.backward, peaks[0])


# --- on a card --------------------------------------------------------------------------------------------------------


def gpu_points(shapes: Sequence[str]) -> Iterator[Point]:
    for shape in shapes:
        with tempfile.TemporaryDirectory() as folder:
            model = Path(folder) / "model"
            write_random_gemma(model, SHAPES[shape], tokenizer_dir=TINY_MODEL_DIR)
            for tokens, rows, checkpointing, engine, optimizer in _GRID:
                source = Path(folder) / f"rows-{tokens}.jsonl"
                if not source.exists():
                    write_dolly_like_rows(
                        source,
                        _NUM_ROWS,
                        tokenizer_file=TINY_MODEL_DIR / "tokenizer.json",
                        max_seq_tokens=tokens,
                        num_longest=_NUM_ROWS,
                    )
                overrides = [
                    f"model.name={model}",
                    f"model.engine={engine}",
                    f"data.source={source}",
                    f"data.max_seq_tokens={tokens}",
                    "data.eval_fraction=0",
                    "evaluation.every_steps=null",
                    "evaluation.num_questions=0",
                    f"training.batch_size={rows}",
                    "training.gradient_accumulation=1",
                    f"training.max_steps={_STEPS}",
                    f"training.gradient_checkpointing={checkpointing}",
                    f"training.optimizer={optimizer}",
                    f"run.output_dir={folder}/runs",
                ]
                what = f"{shape}, {rows} × {tokens:,}, {checkpointing}, {engine}, {optimizer}"
                yield Point(what, _plan(overrides).allocated_bytes, _train(overrides))


def _plan(overrides: Sequence[str]) -> Plan:
    recipe = load_recipe(Path("gemma-7b-dolly"), overrides).recipe
    decision = decide_engine(recipe, device=detect_device())
    return plan_recipe(recipe, card=detect_card(), decision=decision, suggest=False)


def _train(overrides: Sequence[str]) -> int | None:
    """Peak of the card in a process of its own: an engine is imported once a process, and memory is not given back."""
    context = multiprocessing.get_context("spawn")
    results: Any = context.Queue()
    process = context.Process(target=_train_here, args=(list(overrides), results))
    process.start()
    process.join()
    return results.get() if process.exitcode == 0 else None


def _train_here(overrides: list[str], results: Any) -> None:
    from gemma_tune.flows import train as flow
    from gemma_tune.runs.reporter import SilentReporter
    from gemma_tune.runs.summary import read_summary

    run = flow.train_run(load_recipe(Path("gemma-7b-dolly"), overrides), reporter=SilentReporter())
    results.put(read_summary(run).peak_memory_bytes)


def to_table(points: Sequence[Point]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("what")
    for name in ("planned MB", "measured MB", "error"):
        table.add_column(name, justify="right")
    for point in points:
        measured = "out of memory" if point.measured_bytes is None else f"{point.measured_bytes / 1e6:,.2f}"
        error = "" if point.error is None else f"{100 * point.error:+.1f} %"
        table.add_row(point.what, f"{point.planned_bytes / 1e6:,.2f}", measured, error)
    return table


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", action="store_true", help="measure on the CUDA card")
    parser.add_argument("--shapes", default="2b,7b", help="shapes of the GPU half: 2b, 7b")
    parser.add_argument("--json", type=Path, help="also write the points to this file")
    options = parser.parse_args(argv)
    if options.gpu and detect_device().kind != "cuda":
        print("no CUDA card: nothing was measured", file=sys.stderr)
        return 2
    points = list(gpu_points(options.shapes.split(",")) if options.gpu else cpu_points())
    Console(width=120, highlight=False).print(to_table(points))
    worst = max((abs(point.error) for point in points if point.error is not None), default=0.0)
    print(f"\nlargest error: {100 * worst:.1f} %")
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(point) for point in points], indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
