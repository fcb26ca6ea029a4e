"""The oracle is PEFT itself, in float32: the logits of base + adapter, and merge_and_unload where that is right."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gemma_tune import disk
from gemma_tune.errors import ExportError, GemmaTuneError, ModelError
from gemma_tune.exporting.export_settings import ExportSettings
from gemma_tune.exporting.merge import write as merge_module
from gemma_tune.exporting.merge.write import merge_adapter
from gemma_tune.models.safetensors import stored_tensors

REPOSITORY = Path(__file__).resolve().parents[3]
TINY_MODEL = REPOSITORY / "gemma_tune" / "models" / "tiny" / "model"

Logits = Callable[..., torch.Tensor]
Merged = Callable[[Path, Path], dict[str, torch.Tensor]]
Maker = Callable[..., Path]

VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dora with rslora": {"use_dora": True, "use_rslora": True},
    "patterns": {
        "rank_pattern": {"q_proj": 8, r"layers\.0\.mlp\.up_proj": 2},
        "alpha_pattern": {"v_proj": 32, "model.layers.1.self_attn.o_proj": 1},
        "use_rslora": True,
    },
    "two targets": {"target_modules": ["q_proj", "v_proj"]},
    "one layer": {"layers_to_transform": [1]},
    "norms trained whole": {"modules_to_save": ["norm", "input_layernorm"]},
}
# What happens at the two ends of the model: settings, and whether the output is still tied.
ENDS: dict[str, tuple[dict[str, Any], bool]] = {
    "embedding lora": ({"target_modules": ["q_proj", "embed_tokens"]}, False),
    "embedding dora": ({"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}, False),
    "head lora": ({"target_modules": ["q_proj", "lm_head"]}, False),
    "head dora": ({"target_modules": ["q_proj", "lm_head"], "use_dora": True}, False),
    "both lora": ({"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, False),
    "embedding whole": ({"modules_to_save": ["embed_tokens"]}, False),
    "head whole": ({"modules_to_save": ["lm_head"]}, False),
    "both whole": ({"modules_to_save": ["embed_tokens", "lm_head"]}, False),
    "both whole, tied": ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
    "both lora, tied": ({"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}, True),
    "embedding whole, and saved beside": (
        {"modules_to_save": ["embed_tokens"], "save": {"save_embedding_layers": True}},
        False,
    ),
    "embeddings saved beside": ({"save": {"save_embedding_layers": True}}, True),
}


def merge(
    base: Path, adapter: Path, output: Path, *, on_progress: Any = None, more_texts: Any = None, **settings: Any
) -> dict[str, Any]:
    return merge_adapter(
        base, adapter, output, settings=ExportSettings(**settings), on_progress=on_progress, more_texts=more_texts
    )


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


def config_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text(encoding="utf-8"))


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def copy_of(directory: Path, target: Path) -> Path:
    shutil.copytree(directory, target)
    return target


def change_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def adapter_dir(base_dir: Path, make_adapter: Maker) -> Path:
    return make_adapter(base_dir)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out" / "merged"


def assert_nothing_left(output: Path) -> None:
    assert not output.parent.exists() or not list(output.parent.iterdir())


# --- equal to PEFT -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "variant"),
    [("gemma", variant) for variant in VARIANTS]
    + [(family, variant) for family in ("gemma2", "gemma3") for variant in ("lora", "dora", "patterns")],
)
def test_equals_peft(
    family: str, variant: str, make_base: Maker, make_adapter: Maker, output: Path,
    adapted_logits: Logits, plain_logits: Logits, merged_by_peft: Callable[..., dict[str, torch.Tensor]],
) -> None:  # fmt: skip
    base = make_base(family)
    adapter = make_adapter(base, **VARIANTS[variant])
    report = merge(base, adapter, output)
    wanted, before = merged_by_peft(base, adapter), weights(base)
    found = weights(output)
    assert set(found) == set(before)
    changed = {name for name in found if not torch.equal(found[name], before[name])}
    for name in changed:
        torch.testing.assert_close(found[name], wanted[name], atol=1e-6, rtol=1e-5)
    assert {name for name in wanted if name in before and not torch.equal(wanted[name], before[name])} == changed
    assert (report["tensors"], report["tensors_changed"]) == (len(found), len(changed))
    after = plain_logits(output)
    assert float((after - adapted_logits(base, adapter)).abs().max()) < 1e-5
    assert float((after - plain_logits(base)).abs().max()) > 0.1


@pytest.mark.parametrize(
    ("ends", "tied"),
    # PEFT's ensure_weight_tying has nothing to tie in an untied base.
    [(ends, True) for ends in ENDS] + [(ends, False) for ends in ENDS if "tied" not in ends],
)
def test_embedding_and_head(
    ends: str, tied: bool, make_base: Maker, make_adapter: Maker, output: Path,
    adapted_logits: Logits, plain_logits: Logits,
) -> None:  # fmt: skip
    settings, stays_tied = ENDS[ends]
    base = make_base(tie_word_embeddings=tied)
    adapter = make_adapter(base, **settings)
    report = merge(base, adapter, output)
    is_tied = tied and stays_tied
    assert ("lm_head.weight" in weights(output)) is not is_tied
    assert config_of(output)["tie_word_embeddings"] is is_tied
    assert any("no longer tied" in note for note in report["notes"]) is (tied and not stays_tied)
    assert float((plain_logits(output) - adapted_logits(base, adapter)).abs().max()) < 2e-5
    assert not torch.equal(plain_logits(output), plain_logits(base))


@pytest.mark.parametrize(
    "settings",
    [
        {"save": {"save_embedding_layers": True}},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"], "save": {"save_embedding_layers": True}},
    ],
    ids=["saved beside", "trained whole", "lora on it"],
)
def test_resized_vocabulary(
    settings: dict[str, Any], base_dir: Path, make_adapter: Maker, output: Path,
    adapted_logits: Logits, plain_logits: Logits,
) -> None:  # fmt: skip
    adapter = make_adapter(base_dir, resize_to=101, **settings)
    report = merge(base_dir, adapter, output)
    assert config_of(output)["vocab_size"] == 101
    assert weights(output)["model.embed_tokens.weight"].shape == (101, 32)
    assert any("resized from 96 to 101" in note for note in report["notes"])
    assert float((plain_logits(output) - adapted_logits(base_dir, adapter, resize_to=101)).abs().max()) < 2e-5


def test_untouched_bytes_and_sharded_files(make_base: Maker, make_adapter: Maker, output: Path) -> None:
    base = make_base(dtype=torch.bfloat16, shard_size="20KB")
    adapter = make_adapter(base, target_modules=["q_proj"])
    assert len(list(base.glob("*.safetensors"))) > 2
    report = merge(base, adapter, output, max_shard_bytes=30_000)
    before, after = stored_tensors(base), stored_tensors(output)
    assert set(before) == set(after) and len(list(output.glob("*.safetensors"))) > 1
    for path in output.glob("*.safetensors"):
        load_file(path)
    for name, tensor in before.items():
        same = raw_bytes(tensor) == raw_bytes(after[name])
        assert same is not name.endswith("q_proj.weight")
        assert after[name].dtype == "BF16"
    assert report["weight_bytes"] == sum(tensor.num_bytes for tensor in before.values())


def raw_bytes(tensor: Any) -> bytes:
    with tensor.file.open("rb") as file:
        file.seek(tensor.offset_bytes)
        return file.read(tensor.num_bytes)


def test_no_file_exceeds_the_limit_unless_it_holds_one_tensor(base_dir: Path, adapter_dir: Path, output: Path) -> None:
    merge(base_dir, adapter_dir, output, max_shard_bytes=9_000)
    sizes: dict[Path, list[int]] = {}
    for tensor in stored_tensors(output).values():
        sizes.setdefault(tensor.file, []).append(tensor.num_bytes)
    assert any(len(of_file) > 1 for of_file in sizes.values())
    assert all(sum(of_file) <= 9_000 or len(of_file) == 1 for of_file in sizes.values())


@pytest.mark.parametrize(("name", "dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_one_rounding_at_the_end(
    name: str, dtype: torch.dtype, make_base: Maker, make_adapter: Maker, output: Path
) -> None:
    base = make_base(dtype=torch.bfloat16)
    adapter = make_adapter(base, use_rslora=True)
    report = merge(base, adapter, output, dtype=name)
    lora, before = load_file(adapter / "adapter_model.safetensors"), weights(base)
    exact = 0
    after = weights(output)
    for key in [key for key in lora if key.endswith("lora_A.weight")]:
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        a, b = lora[key].double(), lora[key.replace("lora_A", "lora_B")].double()
        truth = before[f"{module}.weight"].double() + 6 / 4**0.5 * b @ a
        exact += int((after[f"{module}.weight"] == truth.to(dtype)).sum())
    merged = sum(after[name].numel() for name in after if "_proj" in name)
    # Rounding through float32 may miss the nearest value where the truth lies within 1e-7 of the middle of two.
    assert exact >= 0.999 * merged
    assert report["dtype"] == name and config_of(output)["dtype"] == name
    assert {tensor.dtype for tensor in after.values()} == {dtype}


# In a tied base PEFT's own merge is no truth: it adds a change trained on one end to both (peft issue 2777). Of those
# the logits are compared, in test_embedding_and_head.
TRUTHS = {name: ({}, settings) for name, settings in VARIANTS.items()} | {
    f"{name}, untied": ({"tie_word_embeddings": False}, settings)
    for name, (settings, _) in ENDS.items()
    if "tied" not in name and "save" not in settings
}


@pytest.mark.parametrize("variant", TRUTHS)
def test_as_near_to_the_truth_as_bfloat16_can_be(
    variant: str,
    make_base: Maker,
    make_adapter: Maker,
    output: Path,
    merged_exactly: Merged,
    merged_in_bfloat16: Merged,
) -> None:
    config, settings = TRUTHS[variant]
    base = make_base(dtype=torch.bfloat16, **config)
    adapter = make_adapter(base, **settings)
    merge(base, adapter, output)
    assert_nearest(weights(output), merged_exactly(base, adapter), merged_in_bfloat16(base, adapter))


def assert_nearest(
    found: dict[str, torch.Tensor], truth: dict[str, torch.Tensor], by_peft: dict[str, torch.Tensor]
) -> None:
    """The truth is PEFT's merge in float64; one bit is missed only where it lies within 1e-7 of the middle of two."""
    equal, total, peft_equal = 0, 0, 0
    for name, tensor in found.items():
        error, peft_error = (tensor.double() - truth[name]).abs(), (by_peft[name].double() - truth[name]).abs()
        assert bool((error <= peft_error + 1e-7).all()), name
        equal += int((tensor == truth[name].bfloat16()).sum())
        peft_equal += int((by_peft[name] == truth[name].bfloat16()).sum())
        total += tensor.numel()
    assert equal >= 0.9999 * total and equal >= peft_equal


_UNSLOTH_PROGRAM = """
import sys
from unsloth import FastLanguageModel
import torch

base, output = sys.argv[1:3]
projections = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
variants = {
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "ends": {"modules_to_save": ["embed_tokens", "lm_head"]},
}
for name, settings in variants.items():
    model, _ = FastLanguageModel.from_pretrained(base, max_seq_length=64, load_in_4bit=True, local_files_only=True)
    model = FastLanguageModel.get_peft_model(model, r=4, lora_alpha=6, target_modules=projections, **settings)
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(f"{output}/{name}")
"""


@pytest.mark.slow
def test_adapters_made_by_unsloth(
    tmp_path: Path, adapted_logits: Logits, plain_logits: Logits, merged_exactly: Merged, merged_in_bfloat16: Merged
) -> None:
    """In a process of its own, because importing unsloth changes transformers and PEFT."""
    base = TINY_MODEL
    command = [sys.executable, "-c", _UNSLOTH_PROGRAM, str(base), str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    for variant in ("rslora", "dora", "ends"):
        adapter = tmp_path / variant
        merge(base, adapter, merged := tmp_path / f"{variant} in float32", dtype="float32")
        assert float((plain_logits(merged) - adapted_logits(base, adapter)).abs().max()) < 1e-4
        assert not torch.equal(plain_logits(merged), plain_logits(base))
        if variant != "ends":  # where PEFT's merge of a tied base is no truth
            merge(base, adapter, rounded := tmp_path / f"{variant} in bfloat16", dtype="bfloat16")
            assert_nearest(weights(rounded), merged_exactly(base, adapter), merged_in_bfloat16(base, adapter))


def test_adapter_in_half_precision(base_dir: Path, adapter_dir: Path, tmp_path: Path, output: Path) -> None:
    adapter = copy_of(adapter_dir, tmp_path / "half")

    def halve(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()})

    change_weights(adapter / "adapter_model.safetensors", halve)
    merge(base_dir, adapter, output)
    merge(base_dir, adapter_dir, full := output.with_name("full"))
    found, wanted = weights(output), weights(full)
    for name in found:
        torch.testing.assert_close(found[name], wanted[name], atol=0.02, rtol=0.0)
    assert any(not torch.equal(found[name], wanted[name]) for name in found)


@pytest.mark.parametrize(
    ("base_prefix", "adapter_prefix"),
    [
        ("language_model.model.", "model.language_model."),
        ("model.language_model.", "language_model.model."),
        ("model.language_model.", "model."),
        ("model.", "model.language_model."),
    ],
)
def test_prefixes_of_multimodal_gemma(
    base_prefix: str, adapter_prefix: str, base_dir: Path, adapter_dir: Path, tmp_path: Path, output: Path
) -> None:
    base, adapter = copy_of(base_dir, tmp_path / "base"), copy_of(adapter_dir, tmp_path / "adapter")

    def rename(path: Path, old: str, new: str) -> None:
        renamed = {new + name.removeprefix(old): tensor for name, tensor in load_file(path).items()}
        save_file(renamed, path, metadata={"format": "pt"})

    rename(base / "model.safetensors", "model.", base_prefix)
    rename(adapter / "adapter_model.safetensors", "base_model.model.model.", "base_model.model." + adapter_prefix)
    merge(base, adapter, output)
    merge(base_dir, adapter_dir, plain := output.with_name("plain"))
    wanted = weights(plain)
    found = weights(output)
    assert set(found) == {base_prefix + name.removeprefix("model.") for name in wanted}
    for name, tensor in wanted.items():
        assert torch.equal(found[base_prefix + name.removeprefix("model.")], tensor)


def test_blocks_and_workers_do_not_change_the_result(
    base_dir: Path, make_adapter: Maker, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block of 100 elements splits every matrix, also unevenly."""
    adapter = make_adapter(base_dir, use_dora=True, target_modules=["q_proj", "down_proj", "embed_tokens"])
    merge(base_dir, adapter, output)
    monkeypatch.setattr(merge_module, "BLOCK_ELEMENTS", 100)
    merge(base_dir, adapter, small := output.with_name("small"))
    monkeypatch.setattr(merge_module, "MAX_WORKERS", 1)
    merge(base_dir, adapter, one := output.with_name("one"))
    wanted, found, single = weights(output), weights(small), weights(one)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], atol=1e-6, rtol=1e-6)
        assert torch.equal(found[name], single[name])


def test_threads_of_torch_are_as_before(base_dir: Path, adapter_dir: Path, output: Path) -> None:
    before = torch.get_num_threads()
    merge(base_dir, adapter_dir, output)
    assert torch.get_num_threads() == before


# --- the small files -----------------------------------------------------------------------------------------------


def test_config_is_plain(base_dir: Path, adapter_dir: Path, tmp_path: Path, output: Path) -> None:
    base = copy_of(base_dir, tmp_path / "base")
    config = config_of(base)
    del config["dtype"]
    nested = {"text_config": {"dtype": "float64", "vocab_size": 96}, "torch_dtype": "float64"}
    extra = {"_name_or_path": "somewhere/model", "quantization_config": None}
    (base / "config.json").write_text(json.dumps(config | nested | extra), encoding="utf-8")
    (base / "generation_config.json").write_text('{"max_new_tokens": 7}', encoding="utf-8")
    merge(base, adapter_dir, output, dtype="bfloat16")
    written = config_of(output)
    assert written["dtype"] == written["torch_dtype"] == written["text_config"]["dtype"] == "bfloat16"
    assert "quantization_config" not in written and "_name_or_path" not in written
    assert written["num_hidden_layers"] == 2
    assert json.loads((output / "generation_config.json").read_text(encoding="utf-8")) == {"max_new_tokens": 7}


def test_tokenizer_comes_from_the_adapter_where_it_has_one(
    base_dir: Path, adapter_dir: Path, tmp_path: Path, output: Path
) -> None:
    base, adapter = copy_of(base_dir, tmp_path / "base"), copy_of(adapter_dir, tmp_path / "adapter")
    for name in ("tokenizer.json", "tokenizer.model", "special_tokens_map.json", "chat_template.jinja"):
        (base / name).write_text(f'{{"from": "base {name}"}}', encoding="utf-8")
    merge(base, adapter, output)
    assert "base" in (output / "tokenizer.json").read_text(encoding="utf-8")

    (adapter / "chat_template.jinja").write_text("trained with", encoding="utf-8")
    merge(base, adapter, only_template := output.with_name("template"))
    assert (only_template / "chat_template.jinja").read_text(encoding="utf-8") == "trained with"
    assert "base" in (only_template / "tokenizer.json").read_text(encoding="utf-8")

    (adapter / "tokenizer").mkdir()
    (adapter / "tokenizer" / "tokenizer.json").write_text('{"from": "adapter"}', encoding="utf-8")
    merge(base, adapter, own := output.with_name("own"))
    assert "adapter" in (own / "tokenizer.json").read_text(encoding="utf-8")
    assert "base" in (own / "tokenizer.model").read_text(encoding="utf-8")
    assert not (own / "special_tokens_map.json").exists() and not (own / "chat_template.jinja").exists()


def test_licence_and_given_texts_go_with_it(base_dir: Path, adapter_dir: Path, tmp_path: Path, output: Path) -> None:
    base = copy_of(base_dir, tmp_path / "base")
    (base / "LICENSE").write_text("the licence", encoding="utf-8")
    merge(base, adapter_dir, output, more_texts={"template.yaml": "name: x\n", "NOTICE": "terms\n"})
    assert {"LICENSE", "NOTICE", "template.yaml"} < {path.name for path in output.iterdir()}
    assert (output / "template.yaml").read_text(encoding="utf-8") == "name: x\n"
    assert (output / "LICENSE").read_text(encoding="utf-8") == "the licence"


def test_settings_of_another_machine_stay_behind(
    base_dir: Path, adapter_dir: Path, tmp_path: Path, output: Path
) -> None:
    base = copy_of(base_dir, tmp_path / "base")
    settings = {"tokenizer_class": "GemmaTokenizer", "tokenizer_file": "/home/somebody/tokenizer.json", "auto_map": {}}
    (base / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    merge(base, adapter_dir, output)
    written = json.loads((output / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert written == {"tokenizer_class": "GemmaTokenizer"}


def test_code_of_the_base_is_not_copied(base_dir: Path, adapter_dir: Path, tmp_path: Path, output: Path) -> None:
    base = copy_of(base_dir, tmp_path / "base")
    (base / "modeling_gemma.py").write_text("raise SystemExit", encoding="utf-8")
    merge(base, adapter_dir, output)
    assert not (output / "modeling_gemma.py").exists()


def test_progress_reaches_the_total(base_dir: Path, adapter_dir: Path, output: Path) -> None:
    calls: list[tuple[int, int]] = []
    report = merge(base_dir, adapter_dir, output, on_progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (report["weight_bytes"], report["weight_bytes"])
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


# --- refusals: nothing is written ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"bias": "all"}, "bias"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"lora_bias": True}, "lora_bias"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"megatron_config": {"a": 1}}, "megatron_config"),
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters"),
        ({"use_qalora": True}, "use_qalora"),
        ({"a_setting_of_tomorrow": 3}, "a_setting_of_tomorrow"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"init_lora_weights": "loftq"}, "loftq"),
        ({"r": 8}, "rank 8"),
        ({"r": 0}, "rank 0"),
        ({"use_dora": True}, "lora_magnitude_vector"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_unsupported_adapters_are_refused_by_name(
    changes: dict[str, Any], told: str, base_dir: Path, adapter_dir: Path, tmp_path: Path, output: Path
) -> None:
    adapter = copy_of(adapter_dir, tmp_path / "adapter")
    change_json(adapter / "adapter_config.json", **changes)
    with pytest.raises(ExportError, match=told):
        merge(base_dir, adapter, output)
    assert_nothing_left(output)


def _rename_one(tensors: dict[str, torch.Tensor], old: str, new: str) -> None:
    key = next(key for key in tensors if old in key)
    tensors[key.replace(old, new)] = tensors.pop(key)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: _rename_one(t, "layers.0", "layers.7"), r"layers\.7|needs"),
        (
            lambda t: [_rename_one(t, "layers.1.mlp.up_proj", "layers.7.mlp.up_proj") for _ in range(2)],
            "layers.7.mlp.up",
        ),
        (lambda t: t.pop(next(k for k in t if "lora_B" in k)), "needs lora_A, lora_B"),
        (lambda t: _rename_one(t, "base_model.model.", ""), "cannot tell"),
        (lambda t: _rename_one(t, "lora_A.weight", "lora_A.default.weight"), "lora_A.default.weight"),
        (lambda t: t.update({"base_model.model.model.norm.weight": torch.ones(32)}), "model.norm.weight"),
        (lambda t: t.update({"base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias": torch.ones(32)}), "bias"),
        (
            lambda t: t.update({k: t[k].repeat(1, 2) for k in t if "lora_A" in k}),
            r"down_proj: .*\(32, 128\), the base has \(32, 64\)",
        ),
        (lambda t: t.update({k: t[k].to(torch.int8) for k in t}), "cannot tell"),
        (lambda t: t[next(iter(t))].view(-1)[3:4].fill_(float("nan")), "NaN or infinity in 1 adapter tensors"),
        (lambda t: t[next(iter(t))].view(-1)[3:4].fill_(-float("inf")), "NaN or infinity in 1 adapter tensors"),
        (lambda t: [t[k].zero_() for k in t if "lora_B" in k], "changes nothing"),
        (lambda t: t.clear(), "no tensor"),
    ],
)
def test_wrong_adapter_tensors_are_refused_by_key(
    change: Callable[[dict[str, torch.Tensor]], None],
    told: str,
    base_dir: Path,
    adapter_dir: Path,
    tmp_path: Path,
    output: Path,
) -> None:
    adapter = copy_of(adapter_dir, tmp_path / "adapter")
    change_weights(adapter / "adapter_model.safetensors", change)
    with pytest.raises(ExportError, match=told):
        merge(base_dir, adapter, output)
    assert_nothing_left(output)


def test_adapter_of_another_size(make_base: Maker, adapter_dir: Path, output: Path) -> None:
    with pytest.raises(ExportError, match=r"\(64, 32\).*\(128, 32\)|\(32, 64\).*\(32, 128\)"):
        merge(make_base(intermediate_size=128), adapter_dir, output)
    assert_nothing_left(output)


def test_pickle_adapter(base_dir: Path, adapter_dir: Path, tmp_path: Path, output: Path) -> None:
    adapter = copy_of(adapter_dir, tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(ExportError, match="pickle"):
        merge(base_dir, adapter, output)
    (adapter / "adapter_model.bin").unlink()
    with pytest.raises(ExportError, match=r"no adapter_model\.safetensors"):
        merge(base_dir, adapter, output)
    (adapter / "adapter_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ExportError, match="not JSON"):
        merge(base_dir, adapter, output)
    with pytest.raises(ExportError, match=r"no adapter_config\.json"):
        merge(base_dir, tmp_path, output)


def _quantise(base: Path) -> None:
    change_weights(
        base / "model.safetensors",
        lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(1024, 1, dtype=torch.uint8)}),
    )


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda base: change_json(base / "config.json", quantization_config={"load_in_4bit": True}), "quantised"),
        (_quantise, "up_proj.weight is U8"),
        (lambda base: change_json(base / "config.json", model_type="llama"), "'llama' is not a Gemma"),
        (lambda base: change_json(base / "config.json", auto_map={"AutoModel": "x--y.Z"}), "auto_map"),
        (lambda base: change_json(base / "config.json", _attn_implementation_internal="x/y"), "_attn_implementation"),
        (lambda base: change_json(base / "config.json", tie_word_embeddings=False), "no lm_head.weight"),
        (
            lambda base: change_weights(
                base / "model.safetensors", lambda t: t.update({"model.language_model.norm.weight": torch.ones(32)})
            ),
            "two names",
        ),
    ],
)
def test_wrong_bases_are_refused(
    change: Callable[[Path], None], told: str, base_dir: Path, adapter_dir: Path, tmp_path: Path, output: Path
) -> None:
    base = copy_of(base_dir, tmp_path / "base")
    change(base)
    with pytest.raises(ExportError, match=told):
        merge(base, adapter_dir, output)
    assert_nothing_left(output)


def test_a_quantised_base_is_told_its_16_bit_name(
    base_dir: Path, adapter_dir: Path, tmp_path: Path, output: Path
) -> None:
    base, adapter = copy_of(base_dir, tmp_path / "base"), copy_of(adapter_dir, tmp_path / "adapter")
    change_json(base / "config.json", quantization_config={"load_in_4bit": True})
    change_json(adapter / "adapter_config.json", base_model_name_or_path="unsloth/gemma-7b-bnb-4bit")
    with pytest.raises(ExportError) as caught:
        merge(base, adapter, output)
    assert caught.value.hint == "merge into the 16-bit base: unsloth/gemma-7b"


@pytest.mark.parametrize("where", ["model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_nan_in_the_base(where: str, base_dir: Path, adapter_dir: Path, tmp_path: Path, output: Path) -> None:
    base = copy_of(base_dir, tmp_path / "base")
    change_weights(base / "model.safetensors", lambda t: t[where].view(-1)[7:8].fill_(float("nan")))
    with pytest.raises(ExportError, match=f"NaN or infinity in {where}"):
        merge(base, adapter_dir, output)
    assert_nothing_left(output)


def test_a_sum_beyond_float16(make_base: Maker, make_adapter: Maker, tmp_path: Path, output: Path) -> None:
    base = make_base()
    adapter = copy_of(make_adapter(base), tmp_path / "adapter")
    change_weights(
        adapter / "adapter_model.safetensors", lambda t: [t[k].mul_(1e4) for k in t if "layers.1.mlp.up_proj" in k]
    )
    with pytest.raises(ExportError, match=r"layers\.1\.mlp\.up_proj\.weight.*beyond the range of F16") as caught:
        merge(base, adapter, output, dtype="float16")
    assert "bfloat16" in str(caught.value.hint)
    assert_nothing_left(output)
    merge(base, adapter, output, dtype="bfloat16")
    assert max(float(weight.abs().max()) for weight in weights(output).values()) > 65504


def test_existing_output_is_kept(base_dir: Path, adapter_dir: Path, output: Path) -> None:
    output.mkdir(parents=True)
    merge(base_dir, adapter_dir, output)
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    with pytest.raises(ExportError, match="not an empty directory"):
        merge(base_dir, adapter_dir, output)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    file = output.with_name("file")
    file.write_text("mine", encoding="utf-8")
    with pytest.raises(ExportError, match="file exists"):
        merge(base_dir, adapter_dir, file)
    with pytest.raises(ExportError, match="cannot write"):
        merge(base_dir, adapter_dir, file / "below")


def test_a_read_only_directory(
    base_dir: Path, adapter_dir: Path, read_only_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10**9})())
    before = sorted(read_only_directory.iterdir())
    told = r"cannot write .*merged: (Permission denied|Operation not permitted|Read-only file system)"
    with pytest.raises(ExportError, match=told):
        merge(base_dir, adapter_dir, read_only_directory / "merged")
    assert sorted(read_only_directory.iterdir()) == before


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/model.safetensors", "below/model.safetensors"])
def test_an_index_that_leads_out_of_the_base(
    name: str, base_dir: Path, adapter_dir: Path, tmp_path: Path, output: Path
) -> None:
    base = copy_of(base_dir, tmp_path / "in" / "base")
    weight_map = dict.fromkeys(load_file(base / "model.safetensors"), name)
    (base / "model.safetensors").rename(base.parent / "model.safetensors")
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    with pytest.raises(ModelError, match=r"weight_map names .*, which is not a plain"):
        merge(base, adapter_dir, output)
    assert_nothing_left(output)


def test_too_little_disk(base_dir: Path, adapter_dir: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1_000_000})())
    with pytest.raises(ExportError, match=r"needs \d+\.\d MB, 1\.0 MB are free"):
        merge(base_dir, adapter_dir, output)
    assert_nothing_left(output)


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_while_writing_leaves_nothing(
    failure: BaseException, base_dir: Path, adapter_dir: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> None:
        raise failure

    monkeypatch.setattr(disk, "sync_file", fail)
    expected = ExportError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(expected, match="(?i)no space left" if expected is ExportError else None):
        merge(base_dir, adapter_dir, output)
    assert_nothing_left(output)


def test_a_disk_that_fails_before_the_end_of_a_file(
    base_dir: Path, adapter_dir: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> None:
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(merge_module, "_FLUSH_BYTES", 1000)
    monkeypatch.setattr(merge_module, "sync_file", fail)
    with pytest.raises(ExportError, match=r"Input/output error.*model\.safetensors"):
        merge(base_dir, adapter_dir, output)
    assert_nothing_left(output)


def test_a_file_that_reads_back_otherwise_is_refused(
    base_dir: Path, adapter_dir: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damage(path: Path) -> None:
        if path.suffix == ".safetensors":
            with path.open("rb+") as file:
                file.truncate(path.stat().st_size - 4)

    monkeypatch.setattr(disk, "sync_file", damage)
    with pytest.raises(ExportError, match="cannot be read back"):
        merge(base_dir, adapter_dir, output)
    assert_nothing_left(output)


def test_a_tokenizer_beyond_the_embedding(base_dir: Path, adapter_dir: Path, tmp_path: Path, output: Path) -> None:
    adapter = copy_of(adapter_dir, tmp_path / "adapter")
    tokenizer = {"version": "1.0", "added_tokens": [{"id": 2, "content": "<bos>"}, {"id": 96, "content": "<new>"}]}
    (adapter / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(ExportError, match="'<new>' has id 96, the embedding has 96 rows"):
        merge(base_dir, adapter, output)
    tokenizer["added_tokens"] = tokenizer["added_tokens"][:1]
    (adapter / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    merge(base_dir, adapter, output)
    assert (output / "tokenizer.json").is_file()


def test_two_merges_to_one_output(base_dir: Path, adapter_dir: Path, output: Path) -> None:
    refused: list[GemmaTuneError] = []

    def merge_again(done: int, total: int) -> None:
        if not refused:
            with pytest.raises(ExportError, match="another process is writing") as caught:
                merge(base_dir, adapter_dir, output)
            refused.append(caught.value)

    merge(base_dir, adapter_dir, output, on_progress=merge_again)
    assert refused and [path.name for path in output.parent.iterdir()] == [output.name]


def test_a_damaged_base_is_a_model_error(base_dir: Path, adapter_dir: Path, tmp_path: Path, output: Path) -> None:
    base = copy_of(base_dir, tmp_path / "base")
    with (base / "model.safetensors").open("rb+") as file:
        file.truncate(5_000)
    with pytest.raises(ModelError, match="not a sound safetensors file"):
        merge(base, adapter_dir, output)
    assert_nothing_left(output)


# --- processes: kill and memory ------------------------------------------------------------------------------------

_MERGE_PROGRAM = """
import sys
from pathlib import Path
from gemma_tune.exporting.merge.write import merge_adapter
from gemma_tune.exporting.export_settings import ExportSettings

merge_adapter(*map(Path, sys.argv[1:4]), settings=ExportSettings(max_shard_bytes=2_000_000))
if Path("/proc/self/status").exists():
    # Not ru_maxrss: a child's starts at what its parent had resident, and pytest with torch is large.
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    print(next(line.split()[1] for line in lines if line.startswith("VmHWM")), flush=True)
"""


def start_merge(base: Path, adapter: Path, output: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _MERGE_PROGRAM, str(base), str(adapter), str(output)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="utf-8", env=environment)


def make_wide_pair(directory: Path, *, layers: int, vocab: int, width: int) -> tuple[Path, Path]:
    """A checkpoint of the right names, written without a model, and an adapter on its projections."""
    base, adapter = directory / "base", directory / "adapter"
    base.mkdir(parents=True)
    adapter.mkdir()
    tensors, lora = {"model.embed_tokens.weight": torch.ones(vocab, width, dtype=torch.bfloat16)}, {}
    for layer in range(layers):
        module = f"model.layers.{layer}.mlp.up_proj"
        tensors[f"{module}.weight"] = torch.ones(4 * width, width, dtype=torch.bfloat16)
        lora[f"base_model.model.{module}.lora_A.weight"] = torch.full((8, width), 0.5)
        lora[f"base_model.model.{module}.lora_B.weight"] = torch.full((4 * width, 8), 0.5)
    save_file(tensors, base / "model.safetensors")
    (base / "config.json").write_text('{"model_type": "gemma"}', encoding="utf-8")
    save_file(lora, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["up_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return base, adapter


def test_killed_at_any_moment(tmp_path: Path) -> None:
    """A directory of the output's name is whole, or there is none; and the next merge tidies up and completes."""
    base, adapter = make_wide_pair(tmp_path, layers=24, vocab=4096, width=512)
    output = tmp_path / "out" / "merged"
    partial = output.parent / f".{output.name}.partial"
    generator = random.Random(0)
    killed = 0
    for _ in range(5):
        shutil.rmtree(partial, ignore_errors=True)
        with start_merge(base, adapter, output) as process:
            while process.poll() is None and not partial.exists():
                time.sleep(0.001)
            time.sleep(generator.uniform(0.0, 0.05))
            process.kill()
        killed += process.returncode == -signal.SIGKILL
        if output.exists():
            assert set(stored_tensors(output)) == set(stored_tensors(base))
            shutil.rmtree(output)
    assert killed, "no merge was still running: the test showed nothing"
    partial.mkdir(parents=True, exist_ok=True)
    (partial / "model-00001-of-00099.safetensors").write_bytes(b"left behind")
    merge(base, adapter, output)
    assert [path.name for path in output.parent.iterdir()] == [output.name]
    assert set(weights(output)) == set(weights(base)) and not (output / "model-00001-of-00099.safetensors").exists()


_KILLED_PROGRAM = """
import json, os, signal, sys, time
from pathlib import Path
from gemma_tune.exporting.merge.write import merge_adapter
from gemma_tune.exporting.export_settings import ExportSettings

base, adapter, output = map(Path, sys.argv[1:4])

def kill_after_two_files(done, total):
    record = output.parent / f".{output.name}.partial" / ".finished.json"
    while done > 5_000_000 and len(json.loads(record.read_text(encoding="utf-8"))["files"]) < 2:
        time.sleep(0.001)  # until the thread that flushes has caught up
    if done > 5_000_000:
        os.kill(os.getpid(), signal.SIGKILL)

settings = ExportSettings(max_shard_bytes=2_000_000)
merge_adapter(base, adapter, output, settings=settings, on_progress=kill_after_two_files)
"""


def kill_after_two_files(base: Path, adapter: Path, output: Path) -> dict[str, tuple[int, int]]:
    """Leaves a partial merge with at least two finished files; returns name -> (inode, time of change) of all files."""
    command = [sys.executable, "-c", _KILLED_PROGRAM, str(base), str(adapter), str(output)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, check=False)
    assert done.returncode == -signal.SIGKILL and not output.exists()
    return stamps(output.parent / f".{output.name}.partial")


def stamps(directory: Path) -> dict[str, tuple[int, int]]:
    status = {path.name: path.stat() for path in directory.glob("*.safetensors")}
    return {name: (found.st_ino, found.st_mtime_ns) for name, found in status.items()}


def file_bytes(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_a_killed_merge_is_gone_on_with(tmp_path: Path) -> None:
    base, adapter = make_wide_pair(tmp_path, layers=8, vocab=1024, width=512)
    output = tmp_path / "out" / "merged"
    before = kill_after_two_files(base, adapter, output)
    calls: list[int] = []
    report = merge(base, adapter, output, max_shard_bytes=2_000_000, on_progress=lambda done, total: calls.append(done))
    kept = {name for name, stamp in stamps(output).items() if stamp == before.get(name)}
    assert 2 <= len(kept) < len(before) <= len(stamps(output))
    assert calls[-1] == report["weight_bytes"]
    whole = merge(base, adapter, output.with_name("whole"), max_shard_bytes=2_000_000)
    assert file_bytes(output) == file_bytes(output.with_name("whole"))
    assert report == whole


@pytest.mark.parametrize("change", ["adapter", "base", "dtype", "shards", "alpha"])
def test_a_killed_merge_of_other_inputs_starts_anew(change: str, tmp_path: Path) -> None:
    base, adapter = make_wide_pair(tmp_path, layers=8, vocab=1024, width=512)
    output = tmp_path / "out" / "merged"
    before = kill_after_two_files(base, adapter, output)
    options: dict[str, Any] = {"max_shard_bytes": 2_000_000}
    if change == "adapter":
        change_weights(adapter / "adapter_model.safetensors", lambda t: [t[k].mul_(2.0) for k in t if "lora_B" in k])
    elif change == "base":
        change_weights(base / "model.safetensors", lambda t: t["model.embed_tokens.weight"].add_(1.0))
    elif change == "alpha":
        change_json(adapter / "adapter_config.json", lora_alpha=16)
    else:
        options |= {"dtype": "float16"} if change == "dtype" else {"max_shard_bytes": 5_000_000}
    merge(base, adapter, output, **options)
    assert not set(stamps(output).items()) & set(before.items())
    merge(base, adapter, output.with_name("whole"), **options)
    assert file_bytes(output) == file_bytes(output.with_name("whole"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """0.27 GB of embedding and 1 or 40 layers (0.34 GB): the same peak, and far less than either model."""
    peaks = {}
    for layers in (1, 40):
        base, adapter = make_wide_pair(tmp_path / str(layers), layers=layers, vocab=131_072, width=1024)
        with start_merge(base, adapter, tmp_path / f"out{layers}") as process:
            lines = process.communicate()[0].split()
        assert process.returncode == 0
        peaks[layers] = int(lines[0]) * 1024
        shutil.rmtree(tmp_path / str(layers))
    assert peaks[40] - peaks[1] < 40e6
    assert peaks[40] < 0.5e9
