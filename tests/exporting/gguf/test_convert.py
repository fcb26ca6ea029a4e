from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig

from gemma_tune.errors import ExportError
from gemma_tune.exporting.gguf.convert import GgufProvenance, convert_to_gguf, gguf_bytes, lossless_dtype
from gemma_tune.exporting.gguf.header import read_gguf_header
from gemma_tune.exporting.gguf.tensors import GgufDtype
from gemma_tune.paths import TINY_MODEL_DIR
from tests.exporting.gguf.killing import num_partials_left

gguf = pytest.importorskip("gguf")

MakeSource = Callable[..., Path]
Tensors = dict[str, torch.Tensor]
PROVENANCE = GgufProvenance(name="tales", license="gemma", base_model="google/gemma-2b", base_revision="9cf48e5")
# transformers' names -> llama.cpp's, written out: the exporter's come from the gguf package.
_LAYER = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
_NORMS_OF_GEMMA_1 = {"post_attention_layernorm": "ffn_norm"}
_NORMS_OF_LATER = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_name(name: str, family: str) -> str:
    module = name.removesuffix(".weight")
    if module in _WHOLE:
        return f"{_WHOLE[module]}.weight"
    _, _, layer, part = module.split(".", 3)
    return f"blk.{layer}.{(_LAYER | (_NORMS_OF_GEMMA_1 if family == 'gemma' else _NORMS_OF_LATER))[part]}.weight"


def tensors_of(directory: Path) -> Tensors:
    return {
        name: tensor for path in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(path).items()
    }


def convert(source: Path, output: Path, dtype: GgufDtype = "f32", **options: Any) -> Any:
    return convert_to_gguf(source, output, dtype=dtype, provenance=PROVENANCE, **options)


def read_back(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Every tensor of a file in float32, by the reference reader."""
    tensors = gguf.GGUFReader(path).tensors
    return {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32) for tensor in tensors
    }


def changed(source: Path, directory: Path, change: Callable[[Tensors], object]) -> Path:
    """A copy of a model whose tensors `change` has edited."""
    shutil.copytree(source, directory)
    tensors = tensors_of(directory)
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def set_config(directory: Path, **values: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "q8_0"])
@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3"])
def test_every_tensor_reads_back(family: str, dtype: GgufDtype, make_gguf_source: MakeSource, tmp_path: Path) -> None:
    source = make_gguf_source(family, shard_size="1MB")
    assert len(list(source.glob("*.safetensors"))) > 1
    facts = convert(source, path := tmp_path / "model.gguf", dtype)
    found = read_back(path)
    stored = tensors_of(source)
    assert found.keys() == {gguf_name(name, family) for name in stored}
    for name, tensor in stored.items():
        expected, read = tensor.float().numpy(), found[gguf_name(name, family)]
        if tensor.ndim == 1:
            assert np.array_equal(read, expected + np.float32(1)), name
        elif dtype in ("f32", "bf16"):
            assert np.array_equal(read, expected), name
        elif dtype == "f16":
            assert np.array_equal(read, expected.astype(np.float16).astype(np.float32)), name
        else:
            # A step is the largest of 32 values / 127, stored as float16 (2^-11); half a step is lost by rounding.
            largest = np.abs(expected.reshape(-1, 32)).max(axis=1, keepdims=True)
            assert (np.abs(expected - read).reshape(-1, 32) <= largest / 127 * (0.5 + 127 * 2**-11)).all(), name
    assert path.stat().st_size <= gguf_bytes(source, dtype)
    assert facts["bits_per_weight"] == pytest.approx({"f32": 32, "f16": 16, "bf16": 16, "q8_0": 8.5}[dtype], rel=0.01)
    assert facts["tensor_types"].keys() == {"F32", dtype.upper()}
    assert sum(facts["tensor_types"].values()) == len(stored)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "q8_0"])
def test_other_stored_dtypes(
    stored: torch.dtype, dtype: GgufDtype, make_gguf_source: MakeSource, tmp_path: Path
) -> None:
    source = make_gguf_source("gemma", dtype=stored, num_hidden_layers=1)
    convert(source, path := tmp_path / "model.gguf", dtype)
    found = read_back(path)["token_embd.weight"]
    embedding = tensors_of(source)["model.embed_tokens.weight"]
    assert lossless_dtype(source) == {torch.float32: "f32", torch.float16: "f16"}[stored]
    if dtype == "q8_0":
        assert np.abs(found - embedding.float().numpy()).max() < 0.01
    else:
        exact = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[dtype]
        assert np.array_equal(found, embedding.to(exact).float().numpy())


def test_q8_0_is_what_the_package_makes_of_the_whole_tensor(make_gguf_source: MakeSource, tmp_path: Path) -> None:
    source = make_gguf_source("gemma")
    convert(source, tmp_path / "model.gguf", "q8_0")
    embedding = tensors_of(source)["model.embed_tokens.weight"].float().numpy()
    expected = gguf.quants.quantize(embedding, gguf.GGMLQuantizationType.Q8_0)
    (found,) = (t.data for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors if t.name == "token_embd.weight")
    assert np.array_equal(found, expected)


def test_two_conversions_are_one_file(make_gguf_source: MakeSource, tmp_path: Path) -> None:
    source = make_gguf_source("gemma3")
    first, second = tmp_path / "a.gguf", tmp_path / "b.gguf"
    for path in (first, second):
        convert(source, path, "q8_0")
    assert first.read_bytes() == second.read_bytes()


def test_metadata(make_gguf_source: MakeSource, tmp_path: Path) -> None:
    convert(make_gguf_source("gemma3"), tmp_path / "model.gguf", "q8_0")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    found = {key: field.contents() for key, field in fields.items() if not key.startswith("GGUF.")}
    tokens, scores, types = (found.pop(f"tokenizer.ggml.{name}") for name in ("tokens", "scores", "token_type"))
    assert len(tokens) == len(scores) == len(types) == 2304
    assert found.pop("tokenizer.chat_template") == (TINY_MODEL_DIR / "chat_template.jinja").read_text(encoding="utf-8")
    assert found == {
        "general.architecture": "gemma3",
        "general.type": "model",
        "general.name": "tales",
        "general.size_label": "4.7M",
        "general.license": "gemma",
        "general.license.link": "https://ai.google.dev/gemma/terms",
        "general.base_model.count": 1,
        "general.base_model.0.name": "gemma-2b",
        "general.base_model.0.organization": "google",
        "general.base_model.0.version": "9cf48e5",
        "general.base_model.0.repo_url": "https://huggingface.co/google/gemma-2b",
        "general.file_type": 7,
        "general.quantization_version": 2,
        "gemma3.context_length": 512,
        "gemma3.embedding_length": 256,
        "gemma3.block_count": 7,
        "gemma3.feed_forward_length": 512,
        "gemma3.attention.head_count": 4,
        "gemma3.attention.head_count_kv": 2,
        "gemma3.attention.key_length": 64,
        "gemma3.attention.value_length": 64,
        "gemma3.attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "gemma3.attention.sliding_window": 64,
        "gemma3.rope.freq_base": 1e6,
        "gemma3.rope.freq_base_swa": 1e4,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.eot_token_id": 107,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.mask_token_id": 4,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
    }


@pytest.mark.parametrize("base", ["/home/me/models/gemma-2b", "../gemma-2b", "C:\\models\\gemma-2b", "gemma-2b"])
def test_a_path_of_this_machine_stays_here(base: str, tmp_path: Path) -> None:
    provenance = GgufProvenance(name="x", license="apache-2.0", license_link=None, base_model=base)
    convert_to_gguf(TINY_MODEL_DIR, tmp_path / "model.gguf", dtype="q8_0", provenance=provenance)
    metadata = read_gguf_header(tmp_path / "model.gguf").metadata
    found = {key: value for key, value in metadata.items() if "base_model" in key or "license" in key}
    assert found == {
        "general.license": "apache-2.0",
        "general.base_model.count": 1,
        "general.base_model.0.name": "gemma-2b",
    }


@pytest.mark.parametrize(("dtype", "number"), [("f32", 0), ("f16", 1), ("bf16", 32), ("q8_0", 7)])
def test_file_type_is_llama_cpps(dtype: GgufDtype, number: int, tmp_path: Path) -> None:
    names = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
    assert gguf.LlamaFileType[names[dtype]] == number
    convert(TINY_MODEL_DIR, tmp_path / "model.gguf", dtype)
    assert gguf.GGUFReader(tmp_path / "model.gguf").get_field("general.file_type").contents() == number


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_transformers_reads_the_same_model(family: str, make_gguf_source: MakeSource, tmp_path: Path) -> None:
    """transformers' own GGUF reader; it knows no Gemma 1, and takes head_dim 256 for the scale of the scores."""
    source = make_gguf_source(family)
    convert(source, tmp_path / "model.gguf", "f32")
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32).state_dict()
    expected = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).state_dict()
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[name], expected[name]) for name in expected)


def test_the_text_part_of_a_multimodal_gemma_3(make_gguf_source: MakeSource, tmp_path: Path) -> None:
    text_dir = make_gguf_source("gemma3")
    text = Gemma3TextConfig.from_pretrained(text_dir)
    vision = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
    }
    model = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4))
    weights = tensors_of(text_dir)
    model.model.language_model.load_state_dict(
        {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    )
    directory = tmp_path / "multimodal"
    model.to(torch.bfloat16).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(TINY_MODEL_DIR / name, directory / name)
    with safe_open(directory / "model.safetensors", "pt") as file:
        assert any("language_model" in name for name in file.keys())  # noqa: SIM118 (safe_open is no mapping)
    facts = convert(directory, tmp_path / "of-both.gguf")
    convert(text_dir, tmp_path / "of-text.gguf")
    assert (tmp_path / "of-both.gguf").read_bytes() == (tmp_path / "of-text.gguf").read_bytes()
    (note,) = facts["notes"]
    assert "the image part" in note


def test_rows_without_tokens_are_named(make_gguf_source: MakeSource, tmp_path: Path) -> None:
    source = make_gguf_source("gemma", vocab_size=2368, num_hidden_layers=1)
    convert(source, tmp_path / "model.gguf", "q8_0")
    tokens = gguf.GGUFReader(tmp_path / "model.gguf").get_field("tokenizer.ggml.tokens").contents()
    assert len(tokens) == 2368
    assert tokens[2304:2306] == ["[PAD2304]", "[PAD2305]"]


def test_a_head_that_is_the_embedding_is_left_out(make_gguf_source: MakeSource, tmp_path: Path) -> None:
    def add_head(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    source = changed(make_gguf_source("gemma"), tmp_path / "source", add_head)
    convert(source, path := tmp_path / "model.gguf")
    assert "output.weight" not in read_back(path)


def test_gemma_3_keeps_a_head_of_its_own_and_gemma_2_is_refused(make_gguf_source: MakeSource, tmp_path: Path) -> None:
    def add_head(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0).contiguous()

    source = changed(make_gguf_source("gemma3"), tmp_path / "source-3", add_head)
    set_config(source, tie_word_embeddings=False)
    convert(source, path := tmp_path / "model.gguf")
    found = read_back(path)
    assert np.array_equal(found["output.weight"], found["token_embd.weight"][::-1])
    source = changed(make_gguf_source("gemma2"), tmp_path / "source-2", add_head)
    with pytest.raises(ExportError, match=r"lm_head\.weight differs from the embedding; llama\.cpp's gemma2 ties"):
        convert(source, tmp_path / "model-2.gguf")


def test_progress_counts_the_bytes(make_gguf_source: MakeSource, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    convert(
        make_gguf_source("gemma"), path := tmp_path / "model.gguf", "f16", on_progress=lambda *each: told.append(each)
    )
    done = [each[0] for each in told]
    assert done == sorted(done)
    assert told[-1][0] == told[-1][1] == sum(tensor.num_bytes for tensor in read_gguf_header(path).tensors)


def _with(name: str, value: float) -> Callable[[Tensors], object]:
    return lambda tensors: tensors[name].view(-1)[-1:].fill_(value)


DOWN, NORM = "model.layers.3.mlp.down_proj.weight", "model.norm.weight"


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "q8_0"])
@pytest.mark.parametrize("name", [DOWN, NORM])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers_are_refused(
    dtype: GgufDtype, name: str, value: float, make_gguf_source: MakeSource, tmp_path: Path
) -> None:
    source = changed(make_gguf_source("gemma"), tmp_path / "source", _with(name, value))
    with pytest.raises(ExportError, match=rf"NaN or infinity in {name}"):
        convert(source, tmp_path / "out" / "model.gguf", dtype)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(("dtype", "value"), [("f16", -70000.0), ("q8_0", 9e6)])
def test_weights_beyond_the_type_are_refused(
    dtype: GgufDtype, value: float, make_gguf_source: MakeSource, tmp_path: Path
) -> None:
    source = changed(make_gguf_source("gemma"), tmp_path / "source", _with(DOWN, value))
    with pytest.raises(ExportError, match=rf"{DOWN}: a value of .* is beyond the range of {dtype}"):
        convert(source, tmp_path / "out" / "model.gguf", dtype)
    assert not list((tmp_path / "out").iterdir())
    convert(source, tmp_path / "out" / "model.gguf", "bf16")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(DOWN), rf"the model lacks {DOWN}"),
        (
            lambda t: t.update({"model.layers.0.extra.weight": torch.ones(3)}),
            r"unknown tensors model\.layers\.0\.extra",
        ),
        (lambda t: t.update({DOWN: torch.ones(3, 4)}), rf"{DOWN} has shape \(3, 4\), config\.json says \(256, 512\)"),
        (lambda t: t.update({DOWN: torch.ones(256, 512).double()}), r"stored as F64"),
        (lambda t: t.update({"language_model." + DOWN: torch.ones(256, 512)}), r"are one weight under two names"),
    ],
)
def test_other_tensors_than_the_config_says_are_refused(
    change: Callable[[Tensors], object], message: str, make_gguf_source: MakeSource, tmp_path: Path
) -> None:
    source = changed(make_gguf_source("gemma"), tmp_path / "source", change)
    with pytest.raises(ExportError, match=message):
        convert(source, tmp_path / "out" / "model.gguf")
    assert not (tmp_path / "out").exists()


def test_rows_that_q8_0_cannot_divide_are_refused(make_gguf_source: MakeSource, tmp_path: Path) -> None:
    source = make_gguf_source("gemma", intermediate_size=520, num_hidden_layers=1)
    with pytest.raises(ExportError, match=r"rows of .*down_proj.* have 520 values; q8_0 needs a multiple of 32"):
        convert(source, tmp_path / "model.gguf", "q8_0")
    convert(source, tmp_path / "model.gguf", "f16")


def test_an_existing_output_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text("mine", encoding="utf-8")
    with pytest.raises(ExportError, match=r"model\.gguf exists"):
        convert(TINY_MODEL_DIR, tmp_path / "model.gguf")
    assert (tmp_path / "model.gguf").read_text(encoding="utf-8") == "mine"


def test_a_full_disk_is_refused_with_both_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    with pytest.raises(ExportError, match=r"the f32 GGUF needs \d+\.\d MB, 1\.0 MB are free"):
        convert(TINY_MODEL_DIR, tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_grown_leaves_nothing(tmp_path: Path) -> None:
    """As on a disk that fills up meanwhile: the system refuses every byte beyond a limit."""
    program = (
        "import resource, signal, sys\nfrom pathlib import Path\n"
        "from gemma_tune.exporting.gguf.convert import GgufProvenance, convert_to_gguf\n"
        "from gemma_tune.errors import ExportError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))\n"
        "try:\n    convert_to_gguf(Path(sys.argv[1]), Path(sys.argv[2]), dtype='f32', provenance=GgufProvenance('x'))\n"
        "except ExportError as error:\n    sys.exit(f'{error} | {error.hint}')\n"
    )
    output = tmp_path / "out" / "model.gguf"
    command = [sys.executable, "-c", program, str(TINY_MODEL_DIR), str(output)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)
    assert done.returncode == 1
    assert "cannot write" in done.stderr
    assert "File too large" in done.stderr
    assert not list(output.parent.iterdir())


_KILLED_PROGRAM = """
import sys
from pathlib import Path
from gemma_tune.exporting.gguf.convert import GgufProvenance, convert_to_gguf
import gguf
source, output = map(Path, sys.argv[1:])
print("ready", flush=True)
number = 0
while True:
    number += 1
    convert_to_gguf(source, output / f"{number}.gguf", dtype="q8_0", provenance=GgufProvenance("x"))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL")
def test_what_has_its_name_is_complete_after_a_kill(make_gguf_source: MakeSource, tmp_path: Path) -> None:
    source = make_gguf_source("gemma")

    def write(path: Path) -> object:
        return convert_to_gguf(source, path, dtype="q8_0", provenance=GgufProvenance("x"))

    assert num_partials_left(_KILLED_PROGRAM, source, tmp_path, write=write, longest_seconds=0.6) > 0
