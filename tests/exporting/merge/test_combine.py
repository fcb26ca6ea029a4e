"""The oracle is PEFT's add_weighted_adapter, and, where PEFT scales wrongly, the sum of the changes themselves."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft.tuners.lora.model as peft_lora
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from gemma_tune.errors import ExportError
from gemma_tune.exporting.merge.combine import combine_adapters, module_seed
from gemma_tune.exporting.merge.write import merge_adapter
from gemma_tune.runs.adapter_dir import AdapterDir

Maker = Callable[..., Path]
Logits = Callable[..., torch.Tensor]


def factors(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "adapter_model.safetensors")


def changed(directory: Path, change: Callable[[str, torch.Tensor], torch.Tensor], target: Path) -> Path:
    """A copy of an adapter with other values: make_adapter gives every adapter of one shape the same ones."""
    from safetensors.torch import save_file

    target.mkdir()
    (target / "adapter_config.json").write_bytes((directory / "adapter_config.json").read_bytes())
    tensors = {name: change(name, tensor).contiguous() for name, tensor in factors(directory).items()}
    save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})
    return target


def combined_by_peft(
    base: Path, adapters: list[Path], *, weights: list[float], method: str, density: float | None
) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(model, str(adapters[0]), adapter_name="0")
        for number, adapter in enumerate(adapters[1:], start=1):
            model.load_adapter(str(adapter), adapter_name=str(number))
        names = [str(number) for number in range(len(adapters))]
        model.add_weighted_adapter(names, weights, "combined", combination_type=method, density=density)
    model.set_adapter("combined")
    return model.eval()


def factors_by_peft(model: Any) -> dict[str, torch.Tensor]:
    state = model.state_dict()
    return {
        name.replace(".combined", ""): tensor
        for name, tensor in state.items()
        if "lora_" in name and ".combined" in name
    }


@pytest.fixture
def two(base_dir: Path, make_adapter: Maker, tmp_path: Path) -> list[Path]:
    first = make_adapter(base_dir)
    return [first, changed(first, lambda name, tensor: tensor.roll(3, dims=0) * 0.7 - 0.02, tmp_path / "second")]


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out" / "combined"


@pytest.mark.parametrize(("method", "density"), [("linear", None), ("cat", None), ("ties", 0.4), ("ties", 1.0)])
@pytest.mark.parametrize("weights", [[0.7, 0.5], [1.5, -0.4]])
def test_equals_peft(
    method: Any, density: float | None, weights: list[float], base_dir: Path, two: list[Path], output: Path,
    adapted_logits: Logits, plain_logits: Logits,
) -> None:  # fmt: skip
    combine_adapters(two, output, weights=weights, method=method, density=density)
    model = combined_by_peft(base_dir, two, weights=weights, method=method, density=density)
    found, wanted = factors(output), factors_by_peft(model)
    assert set(found) == set(wanted) and len(found) == 2 * 14
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=1e-6)
    with torch.no_grad():
        by_peft = torch.cat([model(input_ids=torch.tensor([row])).logits[0] for row in ROWS])
    assert float((adapted_logits(base_dir, output) - by_peft).abs().max()) < 1e-4
    merged = output.with_name("merged")
    merge_adapter(base_dir, output, merged)
    assert float((plain_logits(merged) - by_peft).abs().max()) < 1e-4
    assert float((by_peft - plain_logits(base_dir)).abs().max()) > 0.01
    assert AdapterDir(output).config["r"] == (8 if method == "cat" else 4)


ROWS = [[2, 5, 17, 40, 63, 95], [2, 9, 9, 30]]  # those of conftest's logits


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_equals_peft(
    method: Any, base_dir: Path, make_adapter: Maker, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One module, whose random choices PEFT is made to begin at our seed: it draws from torch's global generator."""
    first = make_adapter(base_dir, target_modules=["q_proj"], layers_to_transform=[1])
    adapters = [first, changed(first, lambda name, tensor: tensor.flip(0) * 0.7 - 0.02, tmp_path / "second")]
    module = "model.layers.1.self_attn.q_proj"
    function, calls = getattr(peft_lora, method), []

    def seeded(*args: Any) -> torch.Tensor:
        if not calls:
            torch.manual_seed(module_seed(7, module))
        calls.append(1)
        return function(*args)

    monkeypatch.setattr(peft_lora, method, seeded)
    combine_adapters(adapters, output, weights=[0.7, 0.5], method=method, density=0.6, seed=7)
    wanted = factors_by_peft(combined_by_peft(base_dir, adapters, weights=[0.7, 0.5], method=method, density=0.6))
    found = factors(output)
    assert set(found) == set(wanted) and len(calls) == 2
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=1e-6)


def test_the_seed_decides_and_nothing_else_does(two: list[Path], output: Path) -> None:
    state = torch.random.get_rng_state()
    for number, seed in enumerate((1, 1, 2)):
        combine_adapters(two, output / str(number), weights=[0.5, 0.5], method="dare_ties", density=0.5, seed=seed)
    made = [factors(output / str(number)) for number in range(3)]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(tensor, made[1][name]) for name, tensor in made[0].items())
    assert not all(torch.equal(tensor, made[2][name]) for name, tensor in made[0].items())
    kept = torch.cat([(tensor != 0).float().view(-1) for tensor in made[0].values()]).mean()
    assert 0.6 < float(kept) < 0.9  # of two, each kept with 0.5


def test_cat_of_all_kinds_is_the_sum_of_the_changes(
    base_dir: Path, make_adapter: Maker, output: Path, tmp_path: Path
) -> None:
    """Different ranks, reaches and scalings, rsLoRA among them, where PEFT's own result is scaled by the root of r."""
    adapters = [
        make_adapter(base_dir, use_rslora=True, r=2),
        make_adapter(base_dir, target_modules=["q_proj", "embed_tokens"], alpha_pattern={"q_proj": 32}),
        make_adapter(base_dir, target_modules=["up_proj"], layers_to_transform=[0], rank_pattern={"up_proj": 8}),
    ]
    weights = [0.7, -0.5, 1.2]
    combine_adapters(adapters, output, weights=weights, method="cat")
    found = AdapterDir(output).read_lora()
    assert {change.scaling for change in found.factors.values()} == {1.0}
    assert found.factors["model.layers.0.mlp.up_proj"].a.shape[0] == 10

    def merged(adapter: Path, name: str) -> dict[str, torch.Tensor]:
        merge_adapter(base_dir, adapter, tmp_path / name)
        return load_file(tmp_path / name / "model.safetensors")

    base = load_file(base_dir / "model.safetensors")
    parts = [merged(adapter, str(number)) for number, adapter in enumerate(adapters)]
    for name, tensor in merged(output, "combined").items():
        before = base.get(name, base["model.embed_tokens.weight"])  # an untied head
        changes = [weight * (part.get(name, before) - before) for weight, part in zip(weights, parts, strict=True)]
        torch.testing.assert_close(tensor - before, sum(changes), atol=1e-5, rtol=1e-5)


def test_plain_peft_loads_it_and_nothing_of_this_machine_is_in_it(
    base_dir: Path, two: list[Path], output: Path, adapted_logits: Logits
) -> None:
    config_path = two[0] / "adapter_config.json"
    config = json.loads(config_path.read_text(encoding="utf-8"))
    config_path.write_text(json.dumps(config | {"corda_config": {"cache_file": "/home/x"}}), encoding="utf-8")
    (two[0] / "tokenizer.json").write_text("{}", encoding="utf-8")
    (two[0] / "NOTICE").write_text("terms\n", encoding="utf-8")
    combine_adapters(two, output, weights=[1, 1], method="cat")
    assert {path.name for path in output.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "NOTICE",
    }
    assert "/home/x" not in (output / "adapter_config.json").read_text(encoding="utf-8")
    assert not torch.equal(adapted_logits(base_dir, output), adapted_logits(base_dir, two[0]))


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"weights": [1.0], "method": "cat"}, "2 adapters and 1 weights"),
        ({"weights": [1.0, float("nan")], "method": "cat"}, "weights 1.0, nan"),
        ({"weights": [1.0, 0.0], "method": "cat"}, "other than 0"),
        ({"weights": [1.0, 1.0], "method": "ties"}, "ties with density None"),
        ({"weights": [1.0, 1.0], "method": "dare_linear", "density": 0.0}, "above 0"),
        ({"weights": [1.0, 1.0], "method": "dare_ties", "density": 1.5}, "at most 1"),
        ({"weights": [1.0, 1.0], "method": "linear", "density": 0.5}, "linear takes no density"),
    ],
)
def test_wrong_options(options: dict[str, Any], told: str, two: list[Path], output: Path) -> None:
    with pytest.raises(ExportError, match=told):
        combine_adapters(two, output, **options)
    assert not output.parent.exists()


@pytest.mark.parametrize(
    ("settings", "method", "told"),
    [
        ({"r": 8}, "linear", "linear needs adapters of one rank, found 4, 8"),
        ({"use_dora": True}, "cat", "DoRA adapters cannot be combined"),
        ({"modules_to_save": ["norm"]}, "cat", r"holds model\..*norm\.weight as a whole"),
    ],
)
def test_adapters_that_have_no_sum(
    settings: dict[str, Any], method: Any, told: str, base_dir: Path, make_adapter: Maker, output: Path
) -> None:
    adapters = [make_adapter(base_dir), make_adapter(base_dir, **settings)]
    with pytest.raises(ExportError, match=told):
        combine_adapters(adapters, output, weights=[1, 1], method=method)
    assert not output.exists()


def test_adapters_of_two_bases(
    base_dir: Path, make_base: Maker, make_adapter: Maker, two: list[Path], output: Path
) -> None:
    other = make_adapter(make_base(intermediate_size=128))
    with pytest.raises(ExportError, match="of different bases"):
        combine_adapters([two[0], other], output, weights=[1, 1], method="cat")
    config_path = other / "adapter_config.json"
    config = json.loads(config_path.read_text(encoding="utf-8"))
    config_path.write_text(json.dumps(config | {"base_model_name_or_path": str(base_dir)}), encoding="utf-8")
    with pytest.raises(ExportError, match="the adapters fit weights of shapes"):
        combine_adapters([two[0], other], output, weights=[1, 1], method="cat")
    assert not output.exists()


def test_vocabularies_that_were_resized_apart(base_dir: Path, make_adapter: Maker, output: Path) -> None:
    adapters = [
        make_adapter(base_dir, resize_to=rows, save={"save_embedding_layers": True}, target_modules=["embed_tokens"])
        for rows in (100, 101)
    ]
    with pytest.raises(ExportError, match=r"brings another model\.embed_tokens of the base|fit weights of shapes"):
        combine_adapters(adapters, output, weights=[1, 1], method="cat")
    assert not output.exists()


def test_nan_and_existing_output(two: list[Path], output: Path, tmp_path: Path) -> None:
    def spoil(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor * float("nan") if "layers.1" in name else tensor

    bad = changed(two[0], spoil, tmp_path / "bad")
    with pytest.raises(ExportError, match="NaN or infinity"):
        combine_adapters([two[0], bad], output, weights=[1, 1], method="cat")
    output.mkdir(parents=True)
    (output / "mine").write_text("mine", encoding="utf-8")
    with pytest.raises(ExportError, match="exists and is not an empty directory"):
        combine_adapters(two, output, weights=[1, 1], method="cat")
    assert [path.name for path in output.iterdir()] == ["mine"]
