"""Merging a LoRA adapter: ours, PEFT's merge_and_unload + save_pretrained, and `cp` of the base as the floor.

    python benchmarks/merge.py [--shape gemma-2b] [--layers 2] [--rank 16] [--repeats 3] [--workdir DIR]

Makes a random Gemma-shaped checkpoint (bfloat16, sharded) and a random adapter on all seven projections, then runs
every way in a process of its own. Seconds are those of the work inside the process (imports apart) with the output
flushed to disk; peak memory is the whole process's, interpreter and imports included. Best time and worst memory count.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

SHAPES: dict[str, dict[str, int]] = {
    "gemma-2b": {
        "hidden_size": 2048,
        "intermediate_size": 16384,
        "num_hidden_layers": 18,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "vocab_size": 256000,
    },
    "gemma-7b": {
        "hidden_size": 3072,
        "intermediate_size": 24576,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 256,
        "vocab_size": 256000,
    },
}
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
WAYS = ("cp", "gemma-tune", "peft")


@dataclass(frozen=True)
class Measurement:
    """One way's best run. Bytes are of the whole process at its peak."""

    seconds: float
    peak_bytes: int


def make_base(directory: Path, shape: dict[str, int], *, num_shards: int) -> None:
    """Write a random bfloat16 checkpoint, one layer at a time, with about equal shards."""
    import torch
    from safetensors.torch import save_file

    directory.mkdir(parents=True)
    hidden, ffn, head = shape["hidden_size"], shape["intermediate_size"], shape["head_dim"]
    heads, kv_heads = shape["num_attention_heads"] * head, shape["num_key_value_heads"] * head
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape["vocab_size"], hidden)}
    for layer in range(shape["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        shapes |= {
            f"{name}.input_layernorm.weight": (hidden,),
            f"{name}.post_attention_layernorm.weight": (hidden,),
            f"{name}.self_attn.q_proj.weight": (heads, hidden),
            f"{name}.self_attn.k_proj.weight": (kv_heads, hidden),
            f"{name}.self_attn.v_proj.weight": (kv_heads, hidden),
            f"{name}.self_attn.o_proj.weight": (hidden, heads),
            f"{name}.mlp.gate_proj.weight": (ffn, hidden),
            f"{name}.mlp.up_proj.weight": (ffn, hidden),
            f"{name}.mlp.down_proj.weight": (hidden, ffn),
        }
    shapes["model.norm.weight"] = (hidden,)
    total_bytes = sum(2 * torch.Size(size).numel() for size in shapes.values())
    shards: list[list[str]] = [[] for _ in range(num_shards)]
    filled = 0
    for name, size in shapes.items():
        shards[min(num_shards - 1, filled * num_shards // total_bytes)].append(name)
        filled += 2 * torch.Size(size).numel()
    shards = [names for names in shards if names]
    weight_map = {}
    generator = torch.Generator().manual_seed(0)
    for number, names in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for name in names:
            # uniform_ on bfloat16 is several times as fast as a normal in float32, and the values do not matter here
            tensors[name] = torch.empty(shapes[name], dtype=torch.bfloat16).uniform_(-0.03, 0.03, generator=generator)
            weight_map[name] = file_name
        save_file(tensors, directory / file_name, metadata={"format": "pt"})
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    write_json(directory / "model.safetensors.index.json", index)
    config: dict[str, Any] = {"architectures": ["GemmaForCausalLM"], "model_type": "gemma", "dtype": "bfloat16"}
    config |= {"hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True, "rms_norm_eps": 1e-6}
    write_json(directory / "config.json", config | shape)


def make_adapter(directory: Path, base_dir: Path, *, rank: int) -> None:
    """Write a random float32 LoRA on the seven projections of every layer."""
    import torch
    from safetensors.torch import save_file

    from gemma_tune.models.safetensors import stored_tensors

    directory.mkdir(parents=True)
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, tensor in stored_tensors(base_dir).items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] not in PROJECTIONS:
            continue
        outputs, inputs = tensor.shape
        tensors[f"base_model.model.{module}.lora_A.weight"] = 0.02 * torch.randn(rank, inputs, generator=generator)
        tensors[f"base_model.model.{module}.lora_B.weight"] = 0.02 * torch.randn(outputs, rank, generator=generator)
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank}
    config |= {"target_modules": list(PROJECTIONS), "base_model_name_or_path": str(base_dir)}
    write_json(directory / "adapter_config.json", config)


def make_inputs(base_dir: Path, adapter_dir: Path, shape: dict[str, int], *, num_shards: int, rank: int) -> None:
    make_base(base_dir, shape, num_shards=num_shards)
    make_adapter(adapter_dir, base_dir, rank=rank)


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")


# Each way is a program of its own: it prints its seconds and its peak in kilobytes (Linux) as JSON on its last line.
_PROGRAM = """
import json, os, resource, sys, time
from pathlib import Path
base, adapter, output = map(Path, sys.argv[1:])
{imports}
started = time.perf_counter()
{work}
for path in output.iterdir():
    with path.open("rb+") as file:
        os.fsync(file.fileno())
seconds = time.perf_counter() - started
who = {who}
print(json.dumps({{"seconds": seconds, "peak_kb": resource.getrusage(who).ru_maxrss}}))
"""
_PROGRAMS = {
    "cp": _PROGRAM.format(
        imports="import subprocess",
        work="subprocess.run(['cp', '-r', str(base), str(output)], check=True)",
        who="resource.RUSAGE_CHILDREN",
    ),
    "gemma-tune": _PROGRAM.format(
        imports="from gemma_tune.exporting.merge.write import merge_adapter\n"
        "from gemma_tune.exporting.export_settings import ExportSettings",
        work="merge_adapter(base, adapter, output, settings=ExportSettings(max_shard_bytes=2_000_000_000))",
        who="resource.RUSAGE_SELF",
    ),
    "peft": _PROGRAM.format(
        imports="import torch\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM",
        work=(
            "model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)\n"
            "model = PeftModel.from_pretrained(model, adapter).merge_and_unload()\n"
            "model.save_pretrained(output, max_shard_size='2GB')"
        ),
        who="resource.RUSAGE_SELF",
    ),
}


def measure(way: str, base_dir: Path, adapter_dir: Path, output_dir: Path) -> Measurement:
    """Run one way once in a fresh process and remove what it wrote."""
    repository = str(Path(__file__).resolve().parent.parent)
    environment = os.environ | {"PYTHONPATH": repository, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", _PROGRAMS[way], str(base_dir), str(adapter_dir), str(output_dir)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, encoding="utf-8", check=False)
    if done.returncode:
        raise SystemExit(f"{way} failed:\n{done.stderr[-3000:]}")
    result = json.loads(done.stdout.strip().splitlines()[-1])
    shutil.rmtree(output_dir)
    return Measurement(seconds=result["seconds"], peak_bytes=result["peak_kb"] * 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="gemma-2b")
    parser.add_argument("--layers", type=int, default=2, help="layers to make; the shape's own number with 0")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--shards", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--workdir", type=Path, default=None, help="where the files are made (a temporary directory)")
    arguments = parser.parse_args()
    shape = dict(SHAPES[arguments.shape])
    shape["num_hidden_layers"] = arguments.layers or shape["num_hidden_layers"]

    with tempfile.TemporaryDirectory(dir=arguments.workdir, prefix="merge-benchmark-") as scratch:
        base_dir, adapter_dir = Path(scratch) / "base", Path(scratch) / "adapter"
        # In a process of its own: a child's ru_maxrss starts at what its parent had resident when it was started.
        maker = multiprocessing.get_context("spawn").Process(
            target=make_inputs,
            args=(base_dir, adapter_dir, shape),
            kwargs={"num_shards": arguments.shards, "rank": arguments.rank},
        )
        maker.start()
        maker.join()
        if maker.exitcode:
            raise SystemExit("the checkpoint could not be made")
        num_bytes = sum(path.stat().st_size for path in base_dir.iterdir())
        os.sync()
        runs: dict[str, list[Measurement]] = {way: [] for way in arguments.ways}
        for _ in range(arguments.repeats):  # in turns, so that a busy moment of the machine meets all ways
            for way in arguments.ways:
                runs[way].append(measure(way, base_dir, adapter_dir, Path(scratch) / "output"))

    best = {
        way: Measurement(min(m.seconds for m in done), max(m.peak_bytes for m in done)) for way, done in runs.items()
    }
    size = f"{shape['num_hidden_layers']} layers, {num_bytes / 1e9:.2f} GB, rank {arguments.rank}"
    table = Table(
        title=f"merge: {arguments.shape}, {size}", caption=f"best of {arguments.repeats}; {os.cpu_count()} cores"
    )
    for column in ("way", "seconds", "GB/s", "peak memory (GB)", "time / cp"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for way, measured in best.items():
        ratio = f"{measured.seconds / best['cp'].seconds:.2f}" if "cp" in best else "-"
        speed = f"{num_bytes / 1e9 / measured.seconds:.2f}"
        table.add_row(way, f"{measured.seconds:.2f}", speed, f"{measured.peak_bytes / 1e9:.2f}", ratio)
    Console().print(table)


if __name__ == "__main__":
    main()
