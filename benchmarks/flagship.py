"""The flagship recipe on a CUDA card, without a download: Gemma 7B with random weights, dolly-like rows, 20 steps.

    python benchmarks/flagship.py [--shape 7b|2b|tiny] [--steps 20] [--json FILE] [section.field=value ...]

Runs `recipes/gemma-7b-dolly.yaml` through `gemma_tune.flow.train` with the engine unsloth; only the model's
directory, the rows' file, the number of steps and the evaluation (off) differ from the recipe. Speed and memory do not
depend on the values of the weights; what the model learns does, so the loss says no more than that the
steps ran. `--shape tiny` runs the same code on any machine; the other shapes end with exit code 2 where there is no
CUDA card.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import random
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

# A script's own folder is what Python puts first on its path, and the package may not be installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gemma_tune.data.rows.render import render_example
from gemma_tune.data.rows.template import load_template
from gemma_tune.data.sources.items import SourceRow
from gemma_tune.disk import write_json
from gemma_tune.models.catalogue import ARCHITECTURES
from gemma_tune.models.config import TextConfig, check_config, read_config
from gemma_tune.models.describe import count_lora_params, count_params, count_weight_bytes
from gemma_tune.paths import RECIPES_DIR, TINY_MODEL_DIR
from gemma_tune.runs.reporter import SilentReporter, StepProgress

# config.json of Gemma 1 in several sizes. The small ones keep the proportions that decide what a step costs: an FFN of
# 4 times the width and more, multi-query attention, and a vocabulary that is a good part of the weights.
SHAPES: dict[str, Mapping[str, Any]] = {
    "7b": ARCHITECTURES["gemma-7b"],
    "2b": ARCHITECTURES["gemma-2b"],
    "74m": {
        "model_type": "gemma",
        "vocab_size": 27_648,
        "hidden_size": 640,
        "intermediate_size": 2560,
        "num_hidden_layers": 10,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 64,
    },
    "12m": {
        "model_type": "gemma",
        "vocab_size": 16_000,
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 64,
    },
    "tiny": {
        "model_type": "gemma",
        "vocab_size": 8192,
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 64,
    },
}
# Half the width of a uniform distribution whose standard deviation is Gemma's initializer_range of 0.02.
_UNIFORM = 0.02 * math.sqrt(3)
_SHARD_BYTES = 2_000_000_000
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")

# Steps before the speed is measured: kernels are compiled, and the longest batch of the run comes first.
WARM_UP_STEPS = 3
RECIPE = "gemma-7b-dolly.yaml"


# --- the model --------------------------------------------------------------------------------------------------------


def tensor_shapes(config: TextConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a Gemma 1 checkpoint with a tied head, in the order of the model."""
    hidden, ffn = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for number in range(config.num_layers):
        layer = {
            "input_layernorm": (hidden,),
            "self_attn.q_proj": (queries, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, queries),
            "post_attention_layernorm": (hidden,),
            "mlp.gate_proj": (ffn, hidden),
            "mlp.up_proj": (ffn, hidden),
            "mlp.down_proj": (hidden, ffn),
        }
        shapes |= {f"model.layers.{number}.{name}.weight": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    return shapes


def write_random_gemma(
    directory: Path, architecture: Mapping[str, Any], *, tokenizer_dir: Path, seed: int = 0
) -> TextConfig:
    """Write a Gemma 1 with random bfloat16 weights; at no time is more than one shard (2 GB) in memory.

    The tokenizer is copied from `tokenizer_dir`; the model's vocabulary may be larger, its ids are then not used.
    """
    import torch
    from safetensors.torch import save_file

    config = check_config(architecture, "the shape")
    shapes = tensor_shapes(config)
    num_params = sum(math.prod(shape) for shape in shapes.values())
    if num_params != count_params(config):
        raise ValueError(f"the checkpoint has {num_params:,} parameters, the architecture {count_params(config):,}")
    directory.mkdir(parents=True)
    for name in _TOKENIZER_FILES:
        shutil.copy(tokenizer_dir / name, directory / name)
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    fixed = {"architectures": ["GemmaForCausalLM"], "dtype": "bfloat16", "tie_word_embeddings": True}
    write_json(directory / "config.json", {**fixed, "hidden_act": "gelu_pytorch_tanh", **ids, **architecture})
    write_json(directory / "generation_config.json", ids)

    generator = torch.Generator().manual_seed(seed)
    shards = list(_cut_into_shards(shapes))
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for name in names:
            tensor = torch.zeros(shapes[name], dtype=torch.bfloat16)
            if tensor.dim() == 2:  # a norm keeps its zeros: Gemma scales by 1 + weight
                tensor.uniform_(-_UNIFORM, _UNIFORM, generator=generator)
            tensors[name] = tensor
            weight_map[name] = file_name
        save_file(tensors, directory / file_name, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 2 * num_params}, "weight_map": weight_map}
    write_json(directory / "model.safetensors.index.json", index)
    return config


def _cut_into_shards(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[list[str]]:
    names: list[str] = []
    num_bytes = 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        if names and num_bytes + size > _SHARD_BYTES:
            yield names
            names, num_bytes = [], 0
        names.append(name)
        num_bytes += size
    yield names


# --- the rows ---------------------------------------------------------------------------------------------------------

# Median length in tokens and standard deviation of its logarithm, from 100 rows of databricks-dolly-15k at 4.4
# characters a token (Gemma's on English text). 28 of the 100 have a context.
_LENGTHS = {"instruction": (11, 0.66), "context": (290, 0.73), "response": (45, 1.13)}
_CONTEXT_SHARE = 0.28
_WORDS = [
    "the",
    "river",
    "runs",
    "past",
    "old",
    "houses",
    "and",
    "under",
    "a",
    "narrow",
    "bridge",
    "where",
    "people",
    "meet",
    "every",
    "evening",
    "before",
    "supper",
    "to",
    "talk",
    "of",
    "weather",
    "work",
    "children",
    "music",
    "distant",
    "cities",
    "and",
    "what",
    "they",
    "read",
    "in",
    "papers",
    "some",
    "bring",
    "bread",
    "others",
    "fruit",
    "or",
    "a",
    "little",
    "cheese",
    "while",
    "dogs",
    "sleep",
    "beside",
    "warm",
    "stones",
    "nobody",
    "hurries",
    "because",
    "summer",
    "days",
    "are",
    "long",
    "here",
    "when",
    "rain",
    "comes",
    "it",
    "falls",
    "for",
    "hours",
    "on",
    "roofs",
    "gardens",
    "fields",
    "making",
    "small",
    "lakes",
    "that",
    "birds",
    "visit",
    "until",
    "sun",
    "returns",
]


def write_dolly_like_rows(
    path: Path, count: int, *, tokenizer_file: Path, max_seq_tokens: int, num_longest: int, seed: int = 0
) -> None:
    """Write `count` different rows with dolly's columns and dolly's lengths, counted in tokens of the given tokenizer.

    None is longer than `max_seq_tokens` with the dolly template. The first `num_longest` are just as long as allowed:
    15,000 real rows hold a batch of such rows, a few hundred drawn ones would not, and it decides the peak memory.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    template = load_template("dolly")
    chance = random.Random(seed)

    def tokens_of(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False).ids)

    word_tokens = {word: tokens_of(f"and {word}") - tokens_of("and") for word in _WORDS}

    def text_of(num_tokens: int) -> str:
        words: list[str] = []
        while num_tokens > 0:
            words.append(chance.choice(_WORDS))
            num_tokens -= word_tokens[words[-1]]
        return " ".join(words) + "."

    def length_of(row: Mapping[str, str]) -> int:
        example = render_example(template, SourceRow(dict(row), path.name), columns={}, chat=None)
        return 2 + tokens_of(example.prompt_text) + tokens_of(example.response)  # the BOS and the stop token

    def draw(name: str) -> int:
        median, sigma = _LENGTHS[name]
        return max(3, round(median * math.exp(chance.gauss(0, sigma))))

    rows: dict[str, dict[str, str]] = {}
    while len(rows) < count:
        row = {
            "instruction": text_of(draw("instruction")),
            "context": text_of(draw("context")) if chance.random() < _CONTEXT_SHARE else "",
            "response": text_of(draw("response")),
            "category": "closed_qa",
        }
        if len(rows) < num_longest:
            row["response"] = text_of(max_seq_tokens)
        while (excess := length_of(row) - max_seq_tokens) > 0 and len(rows) < num_longest:
            row["response"] = row["response"].split(" ", max(excess // 4, 1))[-1]
        if excess <= 0:
            rows[json.dumps(row)] = row
    path.write_text("".join(f"{line}\n" for line in rows), encoding="utf-8")


# --- the run ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flagship:
    """What a run came to.

    Attributes:
        device, precision, versions: what it ran on and with.
        weights_4bit_bytes, num_trainable: counted from the architecture, not measured.
        overrides: what differs from the recipe, in the recipe's own words.
        losses: of every step, nats a supervised token.
        step_seconds: of every step.
        measured_from_step: the first step that counts for the two rates.
        tokens_per_second, rows_per_second: tokens without padding.
        preparation_seconds: everything but the steps: imports, rows, hashes, loading.
        peak_allocated_bytes: of the card over the whole run, loading included; of the process without a card.
        peak_reserved_bytes: what PyTorch held of the card; None without one.
    """

    shape: str
    device: str
    precision: str
    versions: dict[str, str | None]
    num_params: int
    weights_4bit_bytes: int
    num_trainable: int
    overrides: list[str]
    rows_per_step: int
    losses: list[float]
    step_seconds: list[float]
    measured_from_step: int
    tokens_per_second: float
    rows_per_second: float
    preparation_seconds: float
    peak_allocated_bytes: int
    peak_reserved_bytes: int | None


class _Progress(SilentReporter):
    """Stages and steps on stderr; keeps the stream that was there before the pipeline silences the libraries."""

    def __init__(self) -> None:
        self._console = Console(file=sys.stderr)

    def stage(self, title: str) -> None:
        self._console.print(f"[bold]{title}[/]")

    def detail(self, text: str) -> None:
        self._console.print(f"  {text}", markup=False, highlight=False)

    def step(self, progress: StepProgress) -> None:
        speed = f"{progress.tokens_per_second:,.0f} tokens/s, {progress.memory_bytes / 1e9:.2f} GB"
        self._console.print(
            f"  step {progress.step}/{progress.total_steps}: loss {progress.loss:.3f}, {speed}", highlight=False
        )


def make_inputs(
    folder: Path, *, shape: str, num_rows: int, max_seq_tokens: int, num_longest: int, tokenizer_dir: Path
) -> None:
    """Write `folder/model` and `folder/rows.jsonl`."""
    write_random_gemma(folder / "model", SHAPES[shape], tokenizer_dir=tokenizer_dir)
    write_dolly_like_rows(
        folder / "rows.jsonl",
        num_rows,
        tokenizer_file=tokenizer_dir / "tokenizer.json",
        max_seq_tokens=max_seq_tokens,
        num_longest=num_longest,
    )


def run_in_process_of_its_own(target: Any, *args: Any, **kwargs: Any) -> None:
    """Call a function elsewhere, so that its memory and its imports are not this process's.

    A child's peak memory also starts at what its parent had resident (Linux).
    """
    process = multiprocessing.get_context("spawn").Process(target=target, args=args, kwargs=kwargs)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{target.__name__} failed")


def run_flagship(folder: Path, *, shape: str, steps: int, overrides: Sequence[str], tokenizer_dir: Path) -> Flagship:
    """Make the inputs in `folder` and run the recipe on them. One call a process, as with every engine."""
    from gemma_tune.flows import train as flow
    from gemma_tune.identity import installed_version
    from gemma_tune.machine.device import detect_device
    from gemma_tune.recipe.load import load_recipe
    from gemma_tune.runs.lock import RECORDED_PACKAGES
    from gemma_tune.runs.metrics_log import read_metrics
    from gemma_tune.runs.summary import read_summary

    changes = [
        f"model.name={folder / 'model'}",
        "model.engine=unsloth",
        f"data.source={folder / 'rows.jsonl'}",
        "data.eval_fraction=0",
        f"training.max_steps={steps}",
        f"training.save_every_steps={steps}",
        "evaluation.every_steps=null",
        "evaluation.num_questions=0",
        f"run.output_dir={folder / 'runs'}",
        *overrides,
    ]
    loaded = load_recipe(RECIPES_DIR / RECIPE, changes)
    training = loaded.recipe.training
    rows_per_step = training.batch_size * training.gradient_accumulation
    run_in_process_of_its_own(
        make_inputs,
        folder,
        shape=shape,
        num_rows=steps * rows_per_step,  # one epoch exactly: every length is trained on as often as it occurs
        max_seq_tokens=loaded.recipe.data.max_seq_tokens,
        num_longest=training.batch_size,
        tokenizer_dir=tokenizer_dir,
    )
    run = flow.train_run(loaded, reporter=_Progress())

    import torch

    summary, metrics = read_summary(run), read_metrics(run)
    config = read_config(folder / "model")
    seconds = [row["seconds"] for row in metrics]
    tokens = [row["num_tokens"] for row in metrics]
    before = min(WARM_UP_STEPS, steps - 1) - 1  # the last step that is not measured
    measured_seconds = seconds[-1] - (seconds[before] if before >= 0 else 0.0)
    measured_tokens = tokens[-1] - (tokens[before] if before >= 0 else 0)
    has_cuda = torch.cuda.is_available()
    return Flagship(
        shape=shape,
        device=detect_device().name,
        precision=summary.precision,
        versions={name: installed_version(name) for name in RECORDED_PACKAGES} | {"cuda": torch.version.cuda},
        num_params=count_params(config),
        weights_4bit_bytes=count_weight_bytes(config, load="4bit"),
        num_trainable=count_lora_params(config, rank=loaded.recipe.lora.rank, targets=loaded.recipe.lora.targets),
        overrides=[change for change in changes if str(folder) not in change],
        rows_per_step=rows_per_step,
        losses=[math.nan if row["loss"] is None else row["loss"] for row in metrics],
        step_seconds=[round(end - start, 3) for start, end in zip([0.0, *seconds], seconds, strict=False)],
        measured_from_step=before + 2,
        tokens_per_second=measured_tokens / measured_seconds,
        rows_per_second=(steps - before - 1) * rows_per_step / measured_seconds,
        preparation_seconds=summary.total_seconds - summary.training_seconds,
        peak_allocated_bytes=summary.peak_memory_bytes,
        peak_reserved_bytes=torch.cuda.max_memory_reserved() if has_cuda else None,
    )


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.3g} GB"


def to_table(result: Flagship) -> Table:
    measured = result.step_seconds[result.measured_from_step - 1 :]
    peak = _gigabytes(result.peak_allocated_bytes)
    memory = [("peak memory of the process, there being no card", peak)]
    if result.peak_reserved_bytes is not None:
        reserved = _gigabytes(result.peak_reserved_bytes)
        memory = [("peak memory, allocated", peak), ("peak memory, reserved", reserved)]
    since = f"from step {result.measured_from_step} on"
    rows = [
        ("device", f"{result.device}, {result.precision}"),
        ("parameters", f"{result.num_params:,}, {result.num_trainable:,} trained"),
        ("tokens/s without padding", f"{result.tokens_per_second:,.0f} ({since})"),
        ("rows/s", f"{result.rows_per_second:.2f} ({since})"),
        (
            "step",
            f"{statistics.median(measured):.2f} s (median), {min(measured):.2f} to {max(measured):.2f}; "
            f"the first one {result.step_seconds[0]:.2f}",
        ),
        ("before and after the steps", f"{result.preparation_seconds:.1f} s"),
        ("weights in 4 bits, counted", _gigabytes(result.weights_4bit_bytes)),
        *memory,
        ("loss", f"{result.losses[0]:.3f} → {result.losses[-1]:.3f} (random weights)"),
        ("changed in the recipe", ", ".join(result.overrides)),
        ("versions", ", ".join(f"{name} {version}" for name, version in result.versions.items() if version)),
    ]
    table = Table(title=f"{RECIPE} on a random Gemma {result.shape}, {len(result.losses)} steps", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("7b", "2b", "tiny"), default="7b")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    parser.add_argument("--workdir", type=Path, help="where the model is made (17 GB for 7b); a temporary directory")
    parser.add_argument("--tokenizer", type=Path, default=TINY_MODEL_DIR, help="directory with tokenizer.json")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="further changes to the recipe")
    arguments = parser.parse_args(argv)
    if arguments.steps < 1:
        parser.error("--steps is 1 or more")

    import torch

    if arguments.shape != "tiny" and not torch.cuda.is_available():
        print(
            f"Gemma {arguments.shape} needs a CUDA card, and there is none (--shape tiny runs here).", file=sys.stderr
        )
        return 2
    os.environ["HF_HUB_OFFLINE"] = "1"  # everything is local: a look-up would only cost time
    json_file = arguments.json.resolve() if arguments.json else None
    tokenizer_dir = arguments.tokenizer.resolve()
    with (
        tempfile.TemporaryDirectory(dir=arguments.workdir, prefix="flagship-", ignore_cleanup_errors=True) as scratch,
        contextlib.chdir(scratch),  # Unsloth leaves its compiled modules where it is run
    ):
        result = run_flagship(
            Path(scratch).resolve(),
            shape=arguments.shape,
            steps=arguments.steps,
            overrides=arguments.overrides,
            tokenizer_dir=tokenizer_dir,
        )
    if json_file:
        json_file.write_text(json.dumps(asdict(result), indent=2) + "\n", encoding="utf-8")
    Console().print(to_table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
