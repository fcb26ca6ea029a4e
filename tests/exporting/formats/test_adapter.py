"""The oracle is plain PEFT: what leaves loads there and gives the logits of the adapter that was trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gemma_tune.errors import ExportError, ModelError
from gemma_tune.exporting.formats.adapter import check_keys, export_adapter, public_name
from gemma_tune.exporting.text_files import licence_notice
from gemma_tune.models.catalogue import find_model
from gemma_tune.models.config import read_config
from gemma_tune.models.fetch import LocalModel, fetch_model
from gemma_tune.runs.adapter_dir import AdapterDir

Maker = Callable[..., Path]
Logits = Callable[..., torch.Tensor]


def hub_base(directory: Path, name: str = "google/gemma-2b", revision: str | None = "a" * 40) -> LocalModel:
    """A directory that stands for a downloaded model."""
    return LocalModel(name, directory, revision, read_config(directory), None)


def config_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))


def change_config(directory: Path, **changes: Any) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(config_of(directory) | changes), encoding="utf-8")


@pytest.fixture
def adapter_dir(base_dir: Path, make_adapter: Maker) -> Path:
    return make_adapter(base_dir)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out" / "adapter"


@pytest.mark.parametrize(
    ("settings", "resize_to"),
    [
        ({}, None),
        ({"use_dora": True, "use_rslora": True}, None),
        ({"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"v_proj": 32}}, None),
        ({"modules_to_save": ["embed_tokens", "lm_head"]}, None),
        ({"target_modules": ["q_proj", "embed_tokens"]}, None),
        ({"save": {"save_embedding_layers": True}}, 101),
    ],
    ids=["lora", "dora with rslora", "patterns", "ends whole", "embedding", "resized"],
)
def test_plain_peft_loads_it(
    settings: dict[str, Any], resize_to: int | None, base_dir: Path, make_adapter: Maker, output: Path,
    adapted_logits: Logits, plain_logits: Logits,
) -> None:  # fmt: skip
    adapter = make_adapter(base_dir, resize_to=resize_to, **settings)
    exported = export_adapter(adapter, hub_base(base_dir), output)
    found = adapted_logits(base_dir, output, resize_to=resize_to)
    assert torch.equal(found, adapted_logits(base_dir, adapter, resize_to=resize_to))
    if resize_to is None:
        assert float((found - plain_logits(base_dir)).abs().max()) > 0.1
    assert len(exported.factors) + len(exported.trained) > 0
    assert {path.name for path in output.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


def test_nothing_of_this_machine_leaves(base_dir: Path, adapter_dir: Path, output: Path, tmp_path: Path) -> None:
    change_config(
        adapter_dir,
        base_model_name_or_path=str(base_dir),
        auto_mapping={"base_model_class": "GemmaForCausalLM", "parent_library": "somewhere.else"},
        corda_config={"cache_file": str(tmp_path / "cache"), "corda_method": "ipm"},
    )
    settings = {"tokenizer_class": "GemmaTokenizer", "special_tokens_map_file": str(tmp_path), "bos_token": "/"}
    (adapter_dir / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (adapter_dir / "tokenizer.json").write_text("{}", encoding="utf-8")
    for name in ("optimizer.pt", "training_args.bin", "README.md", "trainer_state.json", "run.py"):
        (adapter_dir / name).write_text("mine", encoding="utf-8")
    export_adapter(adapter_dir, hub_base(base_dir), output)
    assert sorted(path.name for path in output.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    config = config_of(output)
    assert (config["base_model_name_or_path"], config["revision"]) == ("google/gemma-2b", "a" * 40)
    assert "auto_mapping" not in config and config["corda_config"] == {"corda_method": "ipm"}
    tokenizer = json.loads((output / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert tokenizer == {"tokenizer_class": "GemmaTokenizer", "bos_token": "/"}
    for path in output.iterdir():
        assert str(tmp_path).encode() not in path.read_bytes() and str(base_dir).encode() not in path.read_bytes()


def test_tokenizer_template_and_licence_go_with_it(
    base_dir: Path, adapter_dir: Path, output: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(base_dir, base)
    (base / "tokenizer.model").write_bytes(b"pieces")
    (base / "LICENSE").write_text("the licence", encoding="utf-8")
    (adapter_dir / "tokenizer.json").write_text("{}", encoding="utf-8")
    (adapter_dir / "chat_template.jinja").write_text("turns", encoding="utf-8")
    notice = licence_notice(find_model("gemma-2b"))
    export_adapter(
        adapter_dir, hub_base(base), output, more_texts={"template.yaml": "name: x\n", "NOTICE": notice or ""}
    )
    written = {path.name for path in output.iterdir()}
    assert written > {"tokenizer.model", "tokenizer.json", "chat_template.jinja", "LICENSE", "template.yaml"}
    assert "Gemma Terms of Use found at ai.google.dev/gemma/terms" in (output / "NOTICE").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "public"),
    [
        ("gemma-2b", "google/gemma-2b"),
        ("google/gemma-2b", "google/gemma-2b"),
        ("somebody/gemma-of-theirs", "somebody/gemma-of-theirs"),
        ("gemma-tiny", "gemma-tiny"),
    ],
)
def test_the_name_others_find_the_base_by(name: str, public: str, base_dir: Path) -> None:
    assert public_name(hub_base(base_dir, name)) == public


def test_a_local_base_is_named_as_it_was_given(base_dir: Path, adapter_dir: Path, output: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(base_dir, base)
    (base / "tokenizer.json").write_text("{}", encoding="utf-8")
    export_adapter(adapter_dir, fetch_model(str(base)), output)
    config = config_of(output)
    assert (config["base_model_name_or_path"], config["revision"]) == (str(base), None)


# --- refusals ------------------------------------------------------------------------------------------------------


def _spoil(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(directory / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})


def _rename(tensors: dict[str, torch.Tensor], old: str, new: str) -> None:
    for key in [key for key in tensors if old in key]:
        tensors[key.replace(old, new)] = tensors.pop(key)


def _as_pickle(directory: Path) -> None:
    (directory / "adapter_model.safetensors").rename(directory / "adapter_model.bin")


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (
            lambda d: _spoil(d, lambda t: _rename(t, "layers.1", "layers.7")),
            "have no weight in the base: model.layers.7",
        ),
        (lambda d: _spoil(d, lambda t: next(iter(t.values())).view(-1)[:1].fill_(float("nan"))), "NaN or infinity"),
        (lambda d: _spoil(d, lambda t: [t[k].zero_() for k in t if "lora_B" in k]), "changes nothing"),
        (_as_pickle, "pickle"),
        (lambda d: change_config(d, peft_type="LOHA"), "LOHA"),
    ],
    ids=["stranger", "nan", "idle", "pickle", "not lora"],
)
def test_a_bad_adapter_does_not_leave(
    spoil: Callable[[Path], None], told: str, base_dir: Path, adapter_dir: Path, output: Path
) -> None:
    spoil(adapter_dir)
    with pytest.raises(ExportError, match=told):
        export_adapter(adapter_dir, hub_base(base_dir), output)
    assert not output.parent.exists()


def test_another_base(make_base: Maker, adapter_dir: Path, output: Path) -> None:
    with pytest.raises(ExportError, match="the adapter fits a weight of shape"):
        export_adapter(adapter_dir, hub_base(make_base(intermediate_size=128)), output)
    assert not output.parent.exists()


def test_a_quantised_base_is_compared_by_names(base_dir: Path, adapter_dir: Path, tmp_path: Path) -> None:
    """The 4-bit base that a run was trained on: its packed weights have no shape to compare."""
    base = tmp_path / "base"
    shutil.copytree(base_dir, base)
    tensors = load_file(base / "model.safetensors")
    packed = {name: torch.zeros(8, 1, dtype=torch.uint8) if "_proj" in name else t for name, t in tensors.items()}
    save_file(packed, base / "model.safetensors")
    config = json.loads((base / "config.json").read_text(encoding="utf-8")) | {"quantization_config": {"bits": 4}}
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    check_keys(AdapterDir(adapter_dir).read_lora(), base)
    _spoil(adapter_dir, lambda t: _rename(t, "layers.1", "layers.7"))
    with pytest.raises(ExportError, match="have no weight in the base"):
        check_keys(AdapterDir(adapter_dir).read_lora(), base)


def test_existing_output_and_incomplete_base(base_dir: Path, adapter_dir: Path, output: Path, tmp_path: Path) -> None:
    export_adapter(adapter_dir, hub_base(base_dir), output)
    with pytest.raises(ExportError, match="exists and is not an empty directory"):
        export_adapter(adapter_dir, hub_base(base_dir), output)
    base = tmp_path / "base"
    shutil.copytree(base_dir, base)
    (base / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "../model.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(ModelError, match="weight_map names"):
        export_adapter(adapter_dir, hub_base(base), output.with_name("other"))
    assert [path.name for path in output.parent.iterdir()] == [output.name]
