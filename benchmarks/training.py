"""Training a small Gemma on dolly-like rows: gemma-tune beside the loop of an Unsloth notebook and plain TRL + PEFT.

    python benchmarks/training.py [--shape small|medium] [--batch 2 4] [--rows FILE.jsonl] [--repeats 2] [--json FILE]

Every way trains the same random-weight Gemma 1 on the same rows, in a process of its own: NF4 with double
quantisation, LoRA of rank 16 on the seven projections, torch's AdamW, no gradient checkpointing, no evaluation, loss on
every token. The ways take turns, so that a busy moment of the machine meets all of them. Step k of a way trains on the
same batch in every repeat, so the fastest k-th step of all repeats counts, and the worst memory. Compare the ratios of
one table, not seconds of two.

A process runs two epochs and the second one is measured, from the end of the first one's last step to the end of its
own: every way is timed on every row once, with the caches warm. Loading, imports and the last checkpoint are outside.
Tokens are real ones, padding left out, as each way's own tokenization counts them; memory is the peak of the whole
process up to its last step, imports included. `/ notebook` and `/ own loop` are ratios of tokens/s: to the Unsloth
notebook, and to the plain loop of the same engine.

The ways with random batches get the same random batches, gemma-tune's: on a few rows, the luck of the draw moves the
share of padding by a tenth. What is left between `equal settings` and the loops: gemma-tune gives ready-made ids where
they give text (tokenized before the first step, outside of the clock), cuts rows into prompt and response before
tokenizing (a token more or less at the border), writes a line of metrics at every step where TRL prints one at every
tenth, checks every gradient for NaN, and trains the adapter in float32 where TRL turns the adapter of a 4-bit model
into bfloat16. The loss is TRL's own in all of them, over real tokens only: padding costs nothing in the head.

`--cpu-time` gives every process one thread and counts its processor seconds: for a machine that others use as well,
where two threads that wait for each other measure mostly the others.

`packed` joins rows into sequences of `--pack-tokens`, and a step takes one of them, whatever `--batch` says: it then
holds about as many tokens as a padded batch.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

# A script's own folder is what Python puts first on its path, and the package may not be installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.flagship import SHAPES, run_in_process_of_its_own, write_dolly_like_rows, write_random_gemma
from gemma_tune.data.rows.render import Example, render_example
from gemma_tune.data.rows.template import load_template
from gemma_tune.data.sources.items import SourceRow
from gemma_tune.identity import installed_version
from gemma_tune.machine.device import detect_device
from gemma_tune.machine.main_memory import peak_resident_bytes
from gemma_tune.machine.precision import Precision, decide_precision
from gemma_tune.paths import TINY_MODEL_DIR
from gemma_tune.recipe.schema import LORA_PROJECTIONS, TrainingSection
from gemma_tune.runs.reporter import SilentReporter, StepProgress

SHAPE_NAMES = {"small": "12m", "medium": "74m"}
VERSIONS = ("torch", "transformers", "trl", "peft", "unsloth", "bitsandbytes")
LORA_RANK = 16
SEED = 0
# The first epoch warms up, the second one is measured.
NUM_EPOCHS = 2
# Above the number of steps: no checkpoint while the clock runs.
NEVER = 1_000_000


@dataclass(frozen=True)
class Job:
    """What a process is told: one way, its inputs, and where its figures go.

    Attributes:
        batch_size: rows of a forward pass.
        max_seq_tokens: no row is longer.
        cpu_time: count the process's processor seconds, not those on the clock.
        settings: changes to the recipe's section `training`, for gemma-tune's ways.
    """

    way: str
    folder: str
    model_dir: str
    rows_file: str
    output_file: str
    batch_size: int
    max_seq_tokens: int
    cpu_time: bool
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Measurement:
    """One run of one way: its second epoch.

    Attributes:
        step_seconds: of every measured step.
        num_rows, num_tokens: trained in them; padding left out.
        peak_bytes: of the process, from its start to its last step.
    """

    step_seconds: list[float]
    num_rows: int
    num_tokens: int
    peak_bytes: int

    @property
    def seconds(self) -> float:
        return sum(self.step_seconds)

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds

    @property
    def rows_per_second(self) -> float:
        return self.num_rows / self.seconds


def clock_of(job: Job) -> Callable[[], float]:
    """Returns seconds from an arbitrary start."""
    return time.process_time if job.cpu_time else time.perf_counter


# --- the rows ---------------------------------------------------------------------------------------------------------


def read_rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def write_rows(path: Path, rows: Iterable[Mapping[str, str]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def render(rows: Iterable[Mapping[str, str]]) -> list[Example]:
    template = load_template("dolly")
    return [render_example(template, SourceRow(dict(row), "rows.jsonl"), columns={}, chat=None) for row in rows]


def make_inputs(
    folder: Path, *, shape: str, rows_file: Path | None, num_rows: int, max_seq_tokens: int, tokenizer_dir: Path
) -> None:
    """Write `folder/model` and `folder/rows.jsonl`, in which no row is longer than `max_seq_tokens`."""
    from tokenizers import Tokenizer

    write_random_gemma(folder / "model", SHAPES[shape], tokenizer_dir=tokenizer_dir)
    target = folder / "rows.jsonl"
    if rows_file is None:
        tokenizer_file = tokenizer_dir / "tokenizer.json"
        write_dolly_like_rows(
            target, num_rows, tokenizer_file=tokenizer_file, max_seq_tokens=max_seq_tokens, num_longest=0
        )
        return
    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    rows = [row for row in read_rows(rows_file) if row["response"].strip()]
    texts = [example.prompt_text + example.response for example in render(rows)]
    # Three to spare: the BOS, the stop token, and a border between prompt and response that merges differently.
    fits = [len(tokenizer.encode(text, add_special_tokens=False).ids) + 3 <= max_seq_tokens for text in texts]
    write_rows(target, (row for row, is_short in zip(rows, fits, strict=True) if is_short))


# --- the loops of others ----------------------------------------------------------------------------------------------


def to_lora_arguments() -> dict[str, Any]:
    return {"r": LORA_RANK, "lora_alpha": LORA_RANK, "lora_dropout": 0.0, "target_modules": list(LORA_PROJECTIONS)}


def run_unsloth_notebook(job: Job) -> Measurement:
    """What Unsloth's notebooks do: load in 4 bits, attach, give a column of text to SFTTrainer."""
    from unsloth import FastLanguageModel  # isort: skip  (must precede torch, transformers and trl)

    import torch

    precision = decide_precision("auto", device=detect_device())
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=job.model_dir,
        max_seq_length=job.max_seq_tokens,
        dtype=getattr(torch, precision.compute),
        load_in_4bit=True,
    )
    model = FastLanguageModel.get_peft_model(
        model, bias="none", use_gradient_checkpointing=False, random_state=SEED, **to_lora_arguments()
    )
    return train_with_trl(job, model, tokenizer, precision)


def run_trl_and_peft(job: Job) -> Measurement:
    """QLoRA as PEFT's guide has it, without Unsloth."""
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    precision = decide_precision("auto", device=detect_device())
    compute = getattr(torch, precision.compute)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
    )
    model = AutoModelForCausalLM.from_pretrained(job.model_dir, dtype=compute, quantization_config=quantization)
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", bias="none", **to_lora_arguments()))
    return train_with_trl(job, model, AutoTokenizer.from_pretrained(job.model_dir), precision)


def in_training_order(job: Job) -> list[Example]:
    """The rows as gemma-tune shuffles them once, so that one number is one row for every way."""
    from gemma_tune.data.inputs import open_inputs
    from gemma_tune.data.open import read_examples
    from gemma_tune.recipe.schema import Recipe

    section = Recipe.model_validate(to_recipe(job, engine="auto")).data
    return read_examples(section, open_inputs(section, prefers_chat=False), chat=None).train


def random_order(lengths: Sequence[int], *, batch_size: int) -> Any:
    """The row numbers of one epoch after another, in gemma-tune's random order, as a sampler of row numbers."""
    import numpy as np

    from gemma_tune.training.sampler import EpochSampler

    class RowOrder(EpochSampler):
        def __iter__(self) -> Iterator[int]:  # type: ignore[override]
            return (row for group in super().__iter__() for row in group)

    return RowOrder(np.array(lengths), batch_size=batch_size, seed=SEED, group_by_length=False)


def train_with_trl(job: Job, model: Any, tokenizer: Any, precision: Precision) -> Measurement:
    """SFTTrainer with TRL's defaults over a column of text. Unsloth, if at all, is imported before."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    examples = in_training_order(job)
    texts = [example.prompt_text + example.response + tokenizer.eos_token for example in examples]
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"text": texts}),
        args=SFTConfig(
            output_dir=str(Path(job.folder) / "output"),
            dataset_text_field="text",
            per_device_train_batch_size=job.batch_size,
            num_train_epochs=NUM_EPOCHS,
            learning_rate=2e-4,
            optim="adamw_torch",
            max_length=job.max_seq_tokens,
            gradient_checkpointing=False,
            bf16=precision.autocast == "bf16",
            fp16=precision.autocast == "fp16",
            use_cpu=model.device.type == "cpu",
            seed=SEED,
            report_to="none",
        ),
    )
    lengths = [len(ids) for ids in trainer.train_dataset["input_ids"]]
    trainer._get_train_sampler = lambda *_: random_order(lengths, batch_size=job.batch_size)
    now, ends = clock_of(job), list[float]()

    class StepEnds(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            ends.append(now())

    trainer.add_callback(StepEnds())
    trainer.train()
    return Measurement(of_last_epoch(ends), len(lengths), sum(lengths), peak_resident_bytes())


def of_last_epoch(ends: Sequence[float]) -> list[float]:
    """Seconds of each step of the last epoch, from when each step of all epochs ended."""
    num_steps, rest = divmod(len(ends), NUM_EPOCHS)
    if rest or not num_steps:
        raise ValueError(f"{len(ends)} steps are not {NUM_EPOCHS} epochs")
    return [end - start for start, end in pairwise(ends[-num_steps - 1 :])]


# --- ours -------------------------------------------------------------------------------------------------------------


class Clock(SilentReporter):
    """Notes when each step ended, and the peak memory by then."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now = now
        self.ends: list[float] = []
        self.peak = 0

    def step(self, progress: StepProgress) -> None:
        self.ends.append(self.now())
        self.peak = peak_resident_bytes()


def to_recipe(job: Job, *, engine: str) -> dict[str, Any]:
    """The recipe of a job: the defaults, but for what makes it equal to the loops above."""
    return {
        "model": {"name": job.model_dir, "engine": engine},
        "lora": {"rank": LORA_RANK, "alpha": LORA_RANK},
        "data": {
            "source": job.rows_file,
            "template": "dolly",
            "max_seq_tokens": job.max_seq_tokens,
            "too_long": "refuse",
            "train_on": "all",
            "eval_fraction": 0,
            "cache": False,
        },
        "training": {
            "epochs": NUM_EPOCHS,
            "batch_size": job.batch_size,
            "optimizer": "adamw",
            "gradient_checkpointing": "off",
            "save_every_steps": NEVER,
            "seed": SEED,
            **job.settings,
        },
        "evaluation": {"num_questions": 0, "exact_match": False},
        "run": {"name": "run", "output_dir": str(Path(job.folder) / "runs")},
    }


def run_gemma_tune(job: Job, *, engine: str) -> Measurement:
    """`gemma-tune train`, as the command line calls it."""
    from gemma_tune.flows import train as flow
    from gemma_tune.recipe.load import load_recipe
    from gemma_tune.runs.metrics_log import read_metrics

    recipe_file = Path(job.folder) / "recipe.yaml"
    recipe_file.write_text(json.dumps(to_recipe(job, engine=engine)), encoding="utf-8")  # JSON is YAML
    clock = Clock(clock_of(job))
    run = flow.train_run(load_recipe(recipe_file), reporter=clock)
    num_rows = len(read_rows(Path(job.rows_file)))
    step_seconds = of_last_epoch(clock.ends)
    tokens = [row["num_tokens"] for row in read_metrics(run) if "num_tokens" in row]
    num_tokens = tokens[-1] - tokens[-len(step_seconds) - 1]
    return Measurement(step_seconds, num_rows, num_tokens, clock.peak)


def run_with_unsloth(job: Job) -> Measurement:
    return run_gemma_tune(job, engine="unsloth")


def run_with_transformers(job: Job) -> Measurement:
    return run_gemma_tune(job, engine="transformers")


# --- the ways ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """A row of the table.

    Attributes:
        title: what the table calls it.
        engine: unsloth or transformers.
        run: called in the way's own process.
        settings: changes to the recipe's section `training`.
    """

    title: str
    engine: str
    run: Callable[[Job], Measurement]
    settings: Mapping[str, Any] = field(default_factory=dict)


NOTEBOOK = "notebook"
PLAIN_LOOPS = {"unsloth": NOTEBOOK, "transformers": "trl"}
_RANDOM = {"group_by_length": False}
WAYS: dict[str, Way] = {
    NOTEBOOK: Way("unsloth notebook", "unsloth", run_unsloth_notebook),
    "trl": Way("trl + peft", "transformers", run_trl_and_peft),
    "equal-unsloth": Way("gemma-tune, equal settings", "unsloth", run_with_unsloth, _RANDOM),
    "equal-transformers": Way("gemma-tune, equal settings", "transformers", run_with_transformers, _RANDOM),
    "by-length": Way("gemma-tune, by length", "unsloth", run_with_unsloth, {"group_by_length": True}),
    "packed": Way("gemma-tune, packed", "unsloth", run_with_unsloth, {"packing": True, "batch_size": 1}),
}


def known_ways() -> list[str]:
    """Every way that the recipe has settings for."""
    return [name for name, way in WAYS.items() if set(way.settings) <= set(TrainingSection.model_fields)]


def measure(job: Job) -> Measurement:
    """Run one way once, in a fresh process, in its own folder."""
    folder = Path(job.folder)
    folder.mkdir()
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}  # everything is local: a look-up would only cost time
    if job.cpu_time:
        environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", json.dumps(asdict(job))]
    log = folder / "log.txt"
    with log.open("w", encoding="utf-8") as stream:
        # Unsloth leaves its compiled modules where it is run: beside the folders, so that the next run finds them.
        done = subprocess.run(
            command, env=environment, cwd=folder.parent, stdout=stream, stderr=subprocess.STDOUT, check=False
        )
    if done.returncode:
        raise SystemExit(f"{job.way} failed:\n{log.read_text(encoding='utf-8', errors='replace')[-3000:]}")
    return Measurement(**json.loads(Path(job.output_file).read_text(encoding="utf-8")))


def work(job: Job) -> None:
    """What the process of a way does."""
    measured = WAYS[job.way].run(job)
    Path(job.output_file).write_text(json.dumps(asdict(measured)), encoding="utf-8")


def measure_all(
    ways: Sequence[str],
    scratch: Path,
    *,
    batch_size: int,
    max_seq_tokens: int,
    pack_tokens: int,
    repeats: int,
    cpu_time: bool,
) -> dict[str, list[Measurement]]:
    """Every way `repeats` times, in turns."""
    runs: dict[str, list[Measurement]] = {way: [] for way in ways}
    for repeat in range(repeats):
        for way in ways:
            folder = scratch / f"{way}-{batch_size}-{repeat}"
            settings = dict(WAYS[way].settings)
            if "packing" in settings:
                settings["pack_tokens"] = pack_tokens
            job = Job(
                way=way,
                folder=str(folder),
                model_dir=str(scratch / "model"),
                rows_file=str(scratch / "rows.jsonl"),
                output_file=str(folder / "measured.json"),
                batch_size=batch_size,
                max_seq_tokens=max_seq_tokens,
                cpu_time=cpu_time,
                settings=settings,
            )
            runs[way].append(measure(job))
            speed = runs[way][-1].tokens_per_second
            print(f"batch {batch_size}, turn {repeat + 1}, {way}: {speed:,.0f} tokens/s", file=sys.stderr)
    return runs


def best_of(runs: Sequence[Measurement]) -> Measurement:
    """Each step's fastest time, as it has the same batch in every run, and the worst memory of all."""
    steps = [min(seconds) for seconds in zip(*(run.step_seconds for run in runs), strict=True)]
    peak = max(run.peak_bytes for run in runs)
    return Measurement(steps, runs[0].num_rows, runs[0].num_tokens, peak)


def to_table(best: Mapping[str, Measurement], *, title: str, caption: str) -> Table:
    table = Table(title=title, caption=caption)
    for column in ("way", "engine"):
        table.add_column(column)
    for column in ("steps", "rows/s", "tokens/s", "peak (GB)", "/ notebook", "/ own loop"):
        table.add_column(column, justify="right")

    def ratio(way: str, peer: str) -> str:
        return f"{best[way].tokens_per_second / best[peer].tokens_per_second:.2f}" if peer in best else "-"

    for name, run in best.items():
        way = WAYS[name]
        table.add_row(
            way.title,
            way.engine,
            f"{len(run.step_seconds)}",
            f"{run.rows_per_second:.1f}",
            f"{run.tokens_per_second:,.0f}",
            f"{run.peak_bytes / 1e9:.2f}",
            ratio(name, NOTEBOOK),
            ratio(name, PLAIN_LOOPS[way.engine]),
        )
    return table


def main(argv: Sequence[str] | None = None) -> int:
    ways = known_ways()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPE_NAMES), default="small", help="12 or 74 million parameters")
    parser.add_argument("--batch", type=int, nargs="+", default=[2, 4], metavar="ROWS", help="rows of a forward pass")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="rows in dolly's schema; drawn ones without it")
    parser.add_argument("--num-rows", type=int, default=32, help="how many rows are drawn; more say more")
    parser.add_argument("--max-seq-tokens", type=int, default=1024, help="longer rows are left out for everyone")
    parser.add_argument("--pack-tokens", type=int, default=1024, help="tokens of a pack")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true", help="one thread, processor seconds")
    parser.add_argument("--ways", nargs="+", choices=ways, default=ways)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every run's figures there as well")
    parser.add_argument("--workdir", type=Path, help="where the files are made (a temporary directory)")
    parser.add_argument("--tokenizer", type=Path, default=TINY_MODEL_DIR, help="directory with tokenizer.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.worker:
        work(Job(**json.loads(arguments.worker)))
        return 0

    results: dict[int, dict[str, list[Measurement]]] = {}
    with tempfile.TemporaryDirectory(
        dir=arguments.workdir, prefix="training-benchmark-", ignore_cleanup_errors=True
    ) as name:
        scratch = Path(name).resolve()
        # Elsewhere, as a child's peak memory starts at what its parent had resident when it was started.
        run_in_process_of_its_own(
            make_inputs,
            scratch,
            shape=SHAPE_NAMES[arguments.shape],
            rows_file=arguments.rows.resolve() if arguments.rows else None,
            num_rows=arguments.num_rows,
            max_seq_tokens=arguments.max_seq_tokens,
            tokenizer_dir=arguments.tokenizer.resolve(),
        )
        for batch_size in arguments.batch:
            results[batch_size] = measure_all(
                arguments.ways,
                scratch,
                batch_size=batch_size,
                max_seq_tokens=arguments.max_seq_tokens,
                pack_tokens=arguments.pack_tokens,
                repeats=arguments.repeats,
                cpu_time=arguments.cpu_time,
            )
    rows_name = arguments.rows.name if arguments.rows else "drawn dolly-like rows"
    for batch_size, runs in results.items():
        best = {way: best_of(done) for way, done in runs.items()}
        some = next(iter(best.values()))
        title = f"training: Gemma 1 of {SHAPE_NAMES[arguments.shape].upper()} parameters, NF4, batch {batch_size}"
        caption = f"{some.num_rows} {rows_name}, {some.num_tokens:,} tokens; best steps of {arguments.repeats} run(s); "
        speed = "one thread, processor seconds" if arguments.cpu_time else f"{os.cpu_count()} cores"
        Console(width=None if sys.stdout.isatty() else 110).print(
            to_table(best, title=title, caption=f"{caption}{speed}")
        )
    if arguments.json:
        record = {
            "shape": arguments.shape,
            "rows": rows_name,
            "max_seq_tokens": arguments.max_seq_tokens,
            "cpu_time": arguments.cpu_time,
            "pack_tokens": arguments.pack_tokens,
            "versions": {name: installed_version(name) for name in VERSIONS},
            "batches": {
                batch_size: {way: [asdict(run) for run in done] for way, done in runs.items()}
                for batch_size, runs in results.items()
            },
        }
        arguments.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
