"""Training speed: ours against a plain Unsloth loop and a plain TRL + PEFT loop, on the same model and rows, in one run.

    python benchmarks/training.py [--repeats 3] [--steps 40] [--batch-size 8]
        [--model gemma-tiny | --shape 12m|74m|2b|7b] [--rows tiny-world|dolly-like|FILE] [--no-load-in-4bit]
        [--json FILE] [--markdown]

Every contender runs in a process of its own, because Unsloth rewires TRL for a whole process, and the contenders take
turns. All of them train on the same rows in the same order with the same settings; only `ours-as-shipped` makes its own
batches. The counts of rows and tokens must be equal and the losses nearly so, or the comparison is refused with exit code
1. Ratios are taken within a repeat, between runs that stood side by side. README.md says what is equal and what is not.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

# A script's own folder is what Python puts first on its path, and the package may not be installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from flagship import SHAPES, write_dolly_like_rows, write_random_gemma

WANTED_RATIO = 0.97
DOLLY_LIKE = "dolly-like"
# The losses of this share of the steps, the last ones, are averaged and compared.
_CLOSING_SHARE = 0.25


@dataclass(frozen=True)
class Contender:
    """One way to train.

    Attributes:
        kind: ours, or a loop as a notebook writes it.
        engine: what loads the model.
        group_by_length: batches of rows of similar length; ours only.
        against: the plain loop of the same engine, None for a plain loop.
    """

    kind: Literal["ours", "plain"]
    engine: Literal["unsloth", "transformers"]
    group_by_length: bool = False
    against: str | None = None


CONTENDERS = {
    "ours-unsloth": Contender("ours", "unsloth", against="plain-unsloth"),
    "plain-unsloth": Contender("plain", "unsloth"),
    "ours-transformers": Contender("ours", "transformers", against="plain-trl"),
    "plain-trl": Contender("plain", "transformers"),
    "ours-as-shipped": Contender("ours", "unsloth", group_by_length=True, against="plain-unsloth"),
}


@dataclass(frozen=True)
class Job:
    """What every contender is given. Paths are absolute.

    Attributes:
        model: a registry name or a directory.
        rows: the rows in dolly's columns, one JSON object a line: exactly steps × batch_size that fit.
        rows_in_order: the same rows in the order in which ours trains on them.
    """

    model: str
    rows: str
    rows_in_order: str
    steps: int
    batch_size: int
    max_seq_tokens: int
    load_in_4bit: bool
    learning_rate: float
    rank: int
    seed: int


@dataclass(frozen=True)
class Outcome:
    """What one run of a contender came to.

    Attributes:
        train_seconds: wall time of `trainer.train()`, its one checkpoint at the end included.
        total_seconds: of the whole process, interpreter and imports included.
        step_ends: seconds from the start of training to the end of each step.
        step_rows, step_tokens, step_slots: of each step: rows, tokens without padding, and places in the batch.
        step_losses: nats a supervised token.
        peak_memory_bytes: allocated on the card, or resident in the process.
    """

    contender: str
    train_seconds: float
    total_seconds: float
    step_ends: list[float]
    step_rows: list[int]
    step_tokens: list[int]
    step_slots: list[int]
    step_losses: list[float]
    num_trainable: int
    num_quantized: int
    precision: str
    peak_memory_bytes: int

    @property
    def num_rows(self) -> int:
        return sum(self.step_rows)

    @property
    def num_tokens(self) -> int:
        return sum(self.step_tokens)

    @property
    def rows_per_second(self) -> float:
        return self.num_rows / self.train_seconds

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.train_seconds

    @property
    def padding_share(self) -> float:
        return 1 - self.num_tokens / sum(self.step_slots)

    @property
    def closing_loss(self) -> float:
        last = self.step_losses[-max(round(len(self.step_losses) * _CLOSING_SHARE), 1) :]
        return sum(last) / len(last)

    def steady_tokens_per_second(self, warm_up: int) -> float:
        """Tokens a second between the end of step `warm_up` and the end of the last step."""
        start = self.step_ends[warm_up - 1] if warm_up else 0.0
        return sum(self.step_tokens[warm_up:]) / (self.step_ends[-1] - start)


class BatchLog:
    """Rows, tokens and places of every batch that a collator made, in order.

    accelerate's loader asks for one batch more than is trained on when it stops before the end of an epoch, so only the
    first `steps` entries count.
    """

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.tokens: list[int] = []
        self.slots: list[int] = []

    def add(self, rows: Sequence[Mapping[str, Any]], batch: Mapping[str, Any]) -> None:
        self.rows.append(len(rows))
        self.tokens.append(sum(len(row["input_ids"]) for row in rows))
        self.slots.append(batch["input_ids"].numel())


# --- inputs -----------------------------------------------------------------------------------------------------------


def make_model(directory: Path, shape: str, tokenizer_dir: Path) -> None:
    write_random_gemma(directory, SHAPES[shape], tokenizer_dir=tokenizer_dir)


def make_rows(job: Job, source: str) -> None:
    """Choose the rows of a job from `source` and write them, both as they come and in the order ours trains them in."""
    from gemma_tune import pipeline
    from gemma_tune.data.sources import load_source
    from gemma_tune.data.template import load_template
    from gemma_tune.models.fetch import fetch_model
    from gemma_tune.training.sampler import EpochSampler

    wanted = job.steps * job.batch_size
    directory = fetch_model(job.model).directory
    template = load_template("dolly")
    if source == DOLLY_LIKE:
        write_dolly_like_rows(
            Path(job.rows),
            wanted,
            tokenizer_file=directory / "tokenizer.json",
            max_seq_tokens=job.max_seq_tokens,
            num_longest=0,
        )
    else:
        fields = {row.where: row.fields for row in load_source(source).rows}
        # Everything that fits is asked for, then the first rows of ours' shuffled order are kept.
        recipe = recipe_of(job, Contender("ours", "transformers"), output_dir="runs", source=source)
        _, _, datasets = pipeline.load_data(recipe, directory=directory, template=template)
        if len(datasets.train) < wanted:
            raise SystemExit(
                f"{source} has {len(datasets.train):,} rows of at most {job.max_seq_tokens} tokens, {job.steps} steps of "
                f"{job.batch_size} rows need {wanted:,}: take fewer steps, or --rows {DOLLY_LIKE}"
            )
        _write_rows(Path(job.rows), [fields[example.where] for example in datasets.train_examples[:wanted]])

    fields = {row.where: row.fields for row in load_source(job.rows).rows}
    recipe = recipe_of(job, Contender("ours", "transformers"), output_dir="runs", source=job.rows)
    _, _, datasets = pipeline.load_data(recipe, directory=directory, template=template)
    lengths = [len(row.input_ids) for row in datasets.train]
    order = EpochSampler(lengths, batch_size=job.batch_size, seed=job.seed, group_by_length=False)
    _write_rows(Path(job.rows_in_order), [fields[datasets.train_examples[index].where] for index in order])


def _write_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


# --- ours -------------------------------------------------------------------------------------------------------------


def recipe_of(job: Job, contender: Contender, *, output_dir: str, source: str) -> Any:
    """The settings of a job as a recipe: nothing is evaluated, one checkpoint at the end."""
    from gemma_tune.recipe.schema import Recipe

    return Recipe.model_validate(
        {
            "model": {"name": job.model, "engine": contender.engine, "load_in_4bit": job.load_in_4bit},
            "lora": {"rank": job.rank, "alpha": job.rank},
            "data": {
                "source": source,
                "template": "dolly",
                "max_seq_tokens": job.max_seq_tokens,
                "eval_fraction": 0.0,
                "seed": job.seed,
            },
            "training": {
                "max_steps": job.steps,
                "batch_size": job.batch_size,
                "learning_rate": job.learning_rate,
                "gradient_checkpointing": "off",
                "group_by_length": contender.group_by_length,
                "save_every_steps": job.steps,
                "seed": job.seed,
            },
            "evaluation": {"exact_match": False, "num_questions": 0},
            "run": {"output_dir": output_dir},
        }
    )


def train_ours(name: str, job: Job) -> Outcome:
    """A recipe through `gemma_tune.pipeline.train`."""
    from gemma_tune import pipeline
    from gemma_tune.recipe.load import dump_recipe, load_recipe
    from gemma_tune.runs.record import read_metrics
    from gemma_tune.runs.reporter import SilentReporter
    from gemma_tune.runs.summary import read_summary

    recipe = Path("benchmark.yaml").resolve()
    recipe.write_text(
        dump_recipe(recipe_of(job, CONTENDERS[name], output_dir=str(recipe.parent / "runs"), source=job.rows)),
        encoding="utf-8",
    )
    log = BatchLog()
    prepared: list[Any] = []

    class Watcher(SilentReporter):
        """Starts to watch when training begins: the trainer's module must not be imported before the engine."""

        def stage(self, title: str) -> None:
            if title == "training":
                watch_batches(log)

    attach = pipeline.start_engine

    def start_watched_engine(engine: str) -> Any:
        started = attach(engine)
        attach_lora = started.attach_lora

        def attach_and_keep(*args: Any, **kwargs: Any) -> Any:
            attached = attach_lora(*args, **kwargs)
            prepared.append(attached)
            return attached

        started.attach_lora = attach_and_keep
        return started

    pipeline.start_engine = start_watched_engine
    run = pipeline.train(load_recipe(recipe), reporter=Watcher())
    summary, metrics = read_summary(run), read_metrics(run)
    steps = slice(job.steps)
    return Outcome(
        contender=name,
        train_seconds=summary.training_seconds,
        total_seconds=0.0,
        step_ends=[row["seconds"] for row in metrics],
        step_rows=log.rows[steps],
        step_tokens=log.tokens[steps],
        step_slots=log.slots[steps],
        step_losses=[row["loss"] for row in metrics],
        num_trainable=summary.num_trainable,
        num_quantized=prepared[0].loaded.num_quantized_layers,
        precision=summary.precision,
        peak_memory_bytes=summary.peak_memory_bytes,
    )
