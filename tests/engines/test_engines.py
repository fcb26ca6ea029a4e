"""The transformers engine on random tiny Gemmas: what is loaded, what is trained, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GemmaConfig,
    PretrainedConfig,
)

from gemma_tune.engines.base import AttachedLora, LoadedModel, LoadSettings
from gemma_tune.engines.quantized import require_quantized
from gemma_tune.engines.transformers import TransformersEngine
from gemma_tune.errors import EngineError
from gemma_tune.machine.precision import Precision
from gemma_tune.recipe.schema import LORA_PROJECTIONS, LoraSection, ModelSection

FLOAT32 = Precision("float32", "float32", None, "test")
SIZES = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
VISION = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "gemma": GemmaConfig(**SIZES),
    "gemma2": Gemma2Config(**SIZES, sliding_window=8, query_pre_attn_scalar=64),
    "gemma3_text": Gemma3TextConfig(**SIZES, sliding_window=8, query_pre_attn_scalar=64),
    "gemma3": Gemma3Config(
        text_config={**SIZES, "sliding_window": 8}, vision_config=VISION, mm_tokens_per_image=4, image_token_index=300
    ),
}


@pytest.fixture(scope="module", params=list(CONFIGS))
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp(request.param)
    AutoModelForCausalLM.from_config(CONFIGS[request.param]).save_pretrained(path)
    return path


def load(directory: Path, **settings: object) -> tuple[TransformersEngine, LoadedModel]:
    engine = TransformersEngine()
    section = ModelSection.model_validate({"name": str(directory), **settings})
    return engine, engine.load(directory, LoadSettings(section, FLOAT32, max_seq_tokens=64))


def attach(directory: Path, *, load_in_4bit: bool = True, **lora: object) -> AttachedLora:
    engine, loaded = load(directory, load_in_4bit=load_in_4bit)
    section = LoraSection.model_validate({"rank": 4, **lora})
    return engine.attach_lora(loaded, section=section, gradient_checkpointing="off", seed=0)


BATCH = {"input_ids": torch.tensor([[2, 5, 9, 17, 33, 65, 129, 255, 7, 1]])}


def loss_of(model: torch.nn.Module) -> torch.Tensor:
    return model(**BATCH, labels=BATCH["input_ids"], use_cache=False).loss


@pytest.mark.parametrize("load_in_4bit", [True, False])
def test_every_projection_of_the_text_model_is_trained_and_nothing_else(directory: Path, load_in_4bit: bool) -> None:
    attached = attach(directory, load_in_4bit=load_in_4bit)
    model = attached.loaded.model
    assert attached.num_modules == dict.fromkeys(LORA_PROJECTIONS, 2)
    assert bool(attached.loaded.num_quantized_layers) == load_in_4bit
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert all("lora_" in name and "vision" not in name for name in trained)
    assert {weight.dtype for weight in trained.values()} == {torch.float32}
    assert attached.num_trainable == sum(weight.numel() for weight in trained.values())
    loss_of(model).backward()
    assert all(weight.grad is not None for weight in trained.values())
    assert any(weight.grad.abs().sum() > 0 for name, weight in trained.items() if "lora_B" in name)


def test_a_fresh_adapter_changes_nothing(directory: Path) -> None:
    _, base = load(directory)
    with torch.no_grad():
        assert torch.equal(loss_of(base.model), loss_of(attach(directory).loaded.model))


def test_the_same_seed_gives_the_same_adapter(directory: Path) -> None:
    first, second = (dict(attach(directory).loaded.model.named_parameters()) for _ in range(2))
    assert all(torch.equal(weight, second[name]) for name, weight in first.items() if "lora_A" in name)


def test_an_evaluation_before_training_keeps_the_gradients_right(directory: Path) -> None:
    """bitsandbytes repacks 4-bit weights at the first pass without gradients; then the backward pass is wrong."""

    def gradients(*, evaluate_first: bool) -> dict[str, torch.Tensor]:
        model = attach(directory).loaded.model
        if evaluate_first:
            with torch.no_grad():
                model.eval()(**BATCH)
            model.train()
        loss_of(model).backward()
        return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}

    expected, found = gradients(evaluate_first=False), gradients(evaluate_first=True)
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)


def test_checkpointing_gives_the_same_gradients(directory: Path) -> None:
    engine, loaded = load(directory, load_in_4bit=False)
    section = LoraSection(rank=4)
    plain = attach(directory, load_in_4bit=False).loaded.model
    saving = engine.attach_lora(loaded, section=section, gradient_checkpointing="on", seed=0).loaded.model
    loss_of(plain.train()).backward()
    loss_of(saving.train()).backward()
    expected = dict(plain.named_parameters())
    for name, weight in saving.named_parameters():
        if weight.grad is not None:
            torch.testing.assert_close(weight.grad, expected[name].grad, rtol=1e-5, atol=1e-7)


def test_targets_that_the_model_lacks_are_refused(directory: Path) -> None:
    with pytest.raises(EngineError, match="no module named 'qproj'; did you mean 'q_proj'") as caught:
        attach(directory, targets=["q_proj", "qproj"])
    assert "down_proj" in (caught.value.hint or "")
    with pytest.raises(EngineError, match=r"lora\.modules_to_save: the model has no module named 'embeddings'"):
        attach(directory, modules_to_save=["embeddings"])


def test_a_model_is_what_the_recipe_asks_for(directory: Path) -> None:
    """Unsloth's CPU backend, for one, loads 16 bits where it cannot quantise, with a printed line only."""
    with pytest.raises(EngineError, match="no layer could be quantised"):
        require_quantized(load(directory, load_in_4bit=False)[1].model, wanted=True)
    with pytest.raises(EngineError, match="already quantised"):
        require_quantized(load(directory)[1].model, wanted=False)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"use_rslora": True}, {"targets": ["all-linear"]}])
def test_variants_attach_and_train(directory: Path, settings: dict[str, object]) -> None:
    model = attach(directory, **settings).loaded.model
    loss_of(model.train()).backward()
    assert not any("vision" in name for name, weight in model.named_parameters() if weight.requires_grad)
    assert any(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in model.parameters())
