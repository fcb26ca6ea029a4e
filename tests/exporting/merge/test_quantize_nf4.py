"""The oracle is transformers: it quantises the same directory while loading, and saves it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Gemma3Config, Gemma3ForConditionalGeneration

from gemma_tune.errors import ExportError, ModelError
from gemma_tune.exporting.merge import tensor_io
from gemma_tune.exporting.merge.quantize_nf4 import quantize_merged

REPOSITORY = Path(__file__).resolve().parents[3]
TOKEN_IDS = torch.tensor([[2, 5, 17, 40, 63, 95]])
# Rows of multiples of 64: for its CPU kernel bitsandbytes repacks no others, and fails.
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 192, "head_dim": 32}

Maker = Callable[..., Path]


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


def config_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text(encoding="utf-8"))


def quantized_by_transformers(directory: Path, output: Path, *, skip: list[str] | None = None) -> Any:
    dtype = getattr(torch, config_of(directory)["dtype"])
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=skip,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, quantization_config=settings)
    model.save_pretrained(output)
    return model


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=TOKEN_IDS).logits


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out" / "four-bit"


@pytest.fixture(scope="module")
def merged(make_base: Maker) -> Path:
    return make_base(dtype=torch.bfloat16, **SIZES)


def assert_same_files(found: Path, wanted: Path) -> None:
    tensors, expected = weights(found), weights(wanted)
    assert set(tensors) == set(expected)
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor), name
    settings = [config_of(directory)["quantization_config"] for directory in (found, wanted)]
    assert settings[0] == settings[1]


@pytest.mark.parametrize(
    ("family", "dtype", "config"),
    [
        ("gemma", torch.bfloat16, {}),
        ("gemma", torch.float16, {"tie_word_embeddings": False}),
        ("gemma", torch.float32, {}),
        ("gemma2", torch.bfloat16, {}),
        ("gemma3", torch.bfloat16, {}),
    ],
    ids=["gemma", "untied, float16", "float32", "gemma2", "gemma3"],
)
def test_equals_transformers(
    family: str, dtype: torch.dtype, config: dict[str, Any], make_base: Maker, output: Path, tmp_path: Path
) -> None:
    merged = make_base(family, dtype=dtype, **SIZES | config)
    quantize_merged(merged, output)
    oracle = quantized_by_transformers(merged, tmp_path / "oracle")
    assert_same_files(output, tmp_path / "oracle")
    loaded = AutoModelForCausalLM.from_pretrained(output)
    layers = [module for module in loaded.modules() if isinstance(module, Linear4bit)]
    assert len(layers) == 14 and all(layer.weight.bnb_quantized for layer in layers)
    assert torch.equal(logits_of(loaded), logits_of(oracle))
    plain = AutoModelForCausalLM.from_pretrained(merged)
    assert not torch.equal(logits_of(loaded), logits_of(plain))


def test_sizes_that_the_blocks_do_not_divide(make_base: Maker, output: Path, tmp_path: Path) -> None:
    merged = make_base(hidden_size=36, intermediate_size=50)
    quantize_merged(merged, output)
    quantized_by_transformers(merged, tmp_path / "oracle")
    assert_same_files(output, tmp_path / "oracle")


def test_blocks_do_not_change_the_result(
    merged: Path, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize_merged(merged, output)
    monkeypatch.setattr(tensor_io, "BLOCK_ELEMENTS", 128)
    quantize_merged(merged, tmp_path / "small")
    assert_same_files(tmp_path / "small", output)


def test_the_towers_of_a_multimodal_model_keep_16_bits(tmp_path: Path, output: Path) -> None:
    vision = {
        "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14,
    }  # fmt: skip
    text = {**SIZES, "vocab_size": 320, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=300)
    merged = tmp_path / "merged"
    Gemma3ForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(merged)
    quantize_merged(merged, output)
    skipped = config_of(output)["quantization_config"]["llm_int8_skip_modules"]
    oracle = quantized_by_transformers(merged, tmp_path / "oracle", skip=skipped)
    assert_same_files(output, tmp_path / "oracle")
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(output)), logits_of(oracle))
    before, after = weights(merged), weights(output)
    towers = {name for name in before if "vision_tower" in name or "multi_modal_projector" in name}
    assert towers and all(torch.equal(after[name], before[name]) for name in towers)
    assert sum(name.endswith("bitsandbytes__nf4") for name in after) == 14


def test_several_files_and_progress(merged: Path, output: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    report = quantize_merged(
        merged, output, max_shard_bytes=40_000, on_progress=lambda done, total: calls.append((done, total)),
        more_texts={"NOTICE": "terms\n"},
    )  # fmt: skip
    assert len(list(output.glob("*.safetensors"))) > 2 and (output / "NOTICE").is_file()
    quantize_merged(merged, tmp_path / "one")
    assert_same_files(output, tmp_path / "one")
    sizes = [path.stat().st_size for path in merged.glob("*.safetensors")]
    assert calls[-1][0] == calls[-1][1] < sum(sizes) and [done for done, _ in calls] == sorted(d for d, _ in calls)
    index = json.loads((output / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert set(index["weight_map"]) == set(weights(output))
    assert report["weight_bytes"] == index["metadata"]["total_size"] == sum(t.nbytes for t in weights(output).values())
    assert report["bits_per_weight"] == pytest.approx(
        8 * report["weight_bytes"] / sum(tensor.numel() for tensor in weights(merged).values())
    )
    logits_of(AutoModelForCausalLM.from_pretrained(output))


def test_tokenizer_template_and_licence_go_with_it(merged: Path, output: Path, tmp_path: Path) -> None:
    source = tmp_path / "merged"
    shutil.copytree(merged, source)
    for name in ("tokenizer.json", "tokenizer.model", "chat_template.jinja", "LICENSE", "optimizer.pt", "code.py"):
        (source / name).write_text("x", encoding="utf-8")
    quantize_merged(source, output)
    files = {path.name for path in output.iterdir()}
    assert files >= {"tokenizer.json", "tokenizer.model", "chat_template.jinja", "LICENSE", "generation_config.json"}
    assert not files & {"optimizer.pt", "code.py"}


_KILLED = """
import json, os, signal, sys, time
from pathlib import Path
from gemma_tune.exporting.merge.quantize_nf4 import quantize_merged

output = Path(sys.argv[2])
record = output.parent / f".{output.name}.partial" / ".finished.json"

def kill(done, total):
    if len(json.loads(record.read_text(encoding="utf-8"))["files"]) == 2:
        os.kill(os.getpid(), signal.SIGKILL)

quantize_merged(Path(sys.argv[1]), output, max_shard_bytes=40_000, on_progress=kill)
"""


def test_killed_and_gone_on_with(merged: Path, output: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", _KILLED, str(merged), str(output)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, check=False)
    assert done.returncode == -signal.SIGKILL and not output.exists()
    partial = output.parent / ".four-bit.partial"
    record = json.loads((partial / ".finished.json").read_text(encoding="utf-8"))
    before = {name: (partial / name).stat().st_ino for name in record["files"]}
    report = quantize_merged(merged, output, max_shard_bytes=40_000)
    whole = quantize_merged(merged, tmp_path / "whole", max_shard_bytes=40_000)
    assert {name: (output / name).stat().st_ino for name in before} == before and len(before) == 2
    files = [{path.name: path.read_bytes() for path in made.iterdir()} for made in (output, tmp_path / "whole")]
    assert files[0] == files[1]
    assert report == whole


# --- refusals ------------------------------------------------------------------------------------------------------


def _nan(directory: Path, name: str) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors[name].view(-1)[5] = float("nan")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def _config(directory: Path, **changes: Any) -> None:
    (directory / "config.json").write_text(json.dumps(config_of(directory) | changes), encoding="utf-8")


@pytest.mark.parametrize(
    ("spoil", "error", "told"),
    [
        (lambda d: _nan(d, "model.layers.0.mlp.up_proj.weight"), ExportError, r"NaN or infinity in model\.layers\.0"),
        (lambda d: _nan(d, "model.embed_tokens.weight"), ExportError, r"NaN or infinity in model\.embed_tokens"),
        (lambda d: _config(d, quantization_config={"load_in_4bit": True}), ExportError, "is quantised already"),
        (lambda d: _config(d, auto_map={"AutoModel": "x.Y"}), ModelError, "auto_map"),
        (lambda d: (d / "model.safetensors").unlink(), ModelError, "neither"),
    ],
    ids=["nan", "nan in the embedding", "quantised", "code", "no weights"],
)
def test_refusals_leave_nothing(
    spoil: Callable[[Path], None], error: type[Exception], told: str, merged: Path, output: Path, tmp_path: Path
) -> None:
    source = tmp_path / "merged"
    shutil.copytree(merged, source)
    spoil(source)
    with pytest.raises(error, match=told):
        quantize_merged(source, output)
    assert not output.parent.exists() or not list(output.parent.iterdir())


def test_existing_output_and_too_little_disk(merged: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output.mkdir(parents=True)
    (output / "mine").write_text("mine", encoding="utf-8")
    with pytest.raises(ExportError, match="exists and is not an empty directory"):
        quantize_merged(merged, output)
    assert [path.name for path in output.iterdir()] == ["mine"]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1_000_000})())
    with pytest.raises(ExportError, match=r"the 4-bit model needs \d\.\d MB"):
        quantize_merged(merged, output.with_name("other"))
