"""What the planner counts, against what PyTorch really holds: exact for weights, near for activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import bitsandbytes
import pytest
import torch
from transformers.optimization import Adafactor
from trl.trainer.sft_trainer import _chunked_cross_entropy_loss

from benchmarks import measure_memory as measure
from gemma_tune.engines.engine_facts import ENGINES
from gemma_tune.models.config import TextConfig, check_config
from gemma_tune.planning.activations import activations, head_bytes, layer_saved_bytes
from gemma_tune.planning.memory import (
    OPTIMIZERS,
    adapter_bytes,
    count_trained,
    gradient_bytes,
    optimizer_bytes,
    quantized_bytes,
    unquantized_bytes,
)
from gemma_tune.planning.step import Batch, Execution, Numerics, Step
from gemma_tune.recipe.schema import LoraSection

Build = Callable[..., tuple[Any, TextConfig]]
SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BF16 = Numerics(compute=2, stream=2, autocast=True)
FP32 = Numerics(compute=4, stream=4, autocast=False, dropout_mask=4)
ROWS, TOKENS = 2, 64


def _forward(model: Any, *, rows: int, tokens: int, padded: bool) -> torch.Tensor:
    ids = torch.randint(0, 512, (rows, tokens), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, tokens // 2 :] = 0
    dtype = next(weight.dtype for name, weight in model.named_parameters() if "embed_tokens" in name)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        return model.get_base_model().model(input_ids=ids, attention_mask=mask)[0]


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3"])
@pytest.mark.parametrize("load_in_4bit", [True, False])
def test_weights_and_adapter_are_counted_to_the_byte(build: Build, family: str, load_in_4bit: bool) -> None:
    model, config = build(family, load_in_4bit=load_in_4bit, lora={"rank": 5})
    bits = "4bit" if load_in_4bit else "plain"
    base = quantized_bytes(config, bits=bits) + unquantized_bytes(config, bits=bits, numerics=BF16)
    adapter = LoraSection(rank=5, targets=SEVEN)
    assert measure.parameter_bytes(model, trained=False) == base
    assert measure.parameter_bytes(model, trained=True) == adapter_bytes(config, adapter)


@pytest.mark.parametrize(
    "lora",
    [
        {"rank": 4, "targets": ("q_proj", "down_proj")},
        {"rank": 8, "targets": ("all-linear",), "use_dora": True},
        {"rank": 8, "targets": ("v_proj",), "modules_to_save": ("embed_tokens",)},
    ],
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_trained_weights_gradients_and_every_optimizer(build: Build, as_on_cuda: None, lora: dict[str, Any]) -> None:
    adapter = LoraSection(**lora)
    model, config = build("gemma", lora=lora)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    assert sum(weight.numel() for weight in trained) == count_trained(config, adapter)
    for weight in trained:
        weight.grad = torch.ones_like(weight)
    assert sum(weight.grad.untyped_storage().nbytes() for weight in trained) == gradient_bytes(config, adapter)
    for name in ("adamw", "adafactor", "sgd"):
        optimizer = _optimizers()[name](trained)
        optimizer.step()
        assert measure.optimizer_bytes(optimizer) == optimizer_bytes(config, adapter, optimizer=name), name


def _optimizers() -> dict[str, Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]]:
    """As transformers' Trainer makes them (transformers.trainer_optimizer)."""
    return {
        "adamw": lambda weights: torch.optim.AdamW(weights, lr=1e-3),
        "adamw_fused": lambda weights: torch.optim.AdamW(weights, lr=1e-3, fused=True),
        "adafactor": lambda weights: Adafactor(weights, lr=1e-3, scale_parameter=False, relative_step=False),
        "sgd": lambda weights: torch.optim.SGD(weights, lr=1e-3),
        "adamw_8bit": lambda weights: bitsandbytes.optim.AdamW(weights, lr=1e-3, optim_bits=8),
        "paged_adamw_8bit": lambda weights: bitsandbytes.optim.PagedAdamW(weights, lr=1e-3, optim_bits=8),
        "paged_adamw": lambda weights: bitsandbytes.optim.PagedAdamW(weights, lr=1e-3),
        "lion_8bit": lambda weights: bitsandbytes.optim.Lion(weights, lr=1e-3, optim_bits=8),
    }


@pytest.mark.filterwarnings("ignore:Paged optimizers")
@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit", "paged_adamw", "lion_8bit"])
def test_bitsandbytes_state(name: str) -> None:
    """Shapes on both sides of 4,096 elements, and one that does not fill its last block of 256."""
    config = _facts(hidden_size=1100, intermediate_size=40)
    adapter = LoraSection(rank=4, targets=("gate_proj", "down_proj"))
    weights = [
        torch.nn.Parameter(torch.zeros(shape)) for shape in [(4, 1100), (40, 4), (4, 40), (1100, 4)] * config.num_layers
    ]
    optimizer: Any = _optimizers()[name](weights)
    for index, weight in enumerate(weights):
        optimizer.init_state(optimizer.param_groups[0], weight, 0, index)
    assert measure.optimizer_bytes(optimizer) == optimizer_bytes(config, adapter, optimizer=name)
    assert OPTIMIZERS[name].is_paged == name.startswith("paged")


def _facts(**values: int) -> TextConfig:
    return check_config(
        {"model_type": "gemma", "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, **values},
        "test",
    )


@pytest.mark.parametrize(
    ("family", "attention", "padded", "shape", "precision"),
    [
        ("gemma", "sdpa", False, {}, "bfloat16"),
        ("gemma", "sdpa", True, {"intermediate_size": 192, "num_attention_heads": 6}, "bfloat16"),
        ("gemma", "eager", True, {"head_dim": 32}, "float32"),
        ("gemma", "eager", True, {"head_dim": 32}, "bfloat16"),
        ("gemma2", "eager", True, {"hidden_size": 160}, "bfloat16"),
        ("gemma2", "eager", False, {"num_attention_heads": 8, "intermediate_size": 224}, "float32"),
        ("gemma3", "sdpa", False, {"num_key_value_heads": 4}, "float32"),
        ("gemma3", "sdpa", True, {"intermediate_size": 640}, "bfloat16"),
    ],
)
def test_what_layers_keep(
    build: Build, as_on_cuda: None, family: str, attention: str, padded: bool, shape: dict[str, int], precision: str
) -> None:
    """The second and third layer, by the difference of three layers and one."""
    numerics = BF16 if precision == "bfloat16" else FP32
    measured = []
    for num_layers in (3, 1):
        model, config = build(
            family, precision=precision, attention=attention, lora={"rank": 8}, num_hidden_layers=num_layers, **shape
        )
        measured.append(
            measure.saved_bytes(model, lambda: _forward(model, rows=ROWS, tokens=TOKENS, padded=padded))  # noqa: B023
        )
    planned = layer_saved_bytes(
        config,
        0,
        Step(
            batch=Batch(ROWS, TOKENS, padded),
            numerics=numerics,
            lora=LoraSection(rank=8, targets=SEVEN),
            execution=Execution(ENGINES["transformers"], attention, "off", "chunked"),
        ),
    )
    assert (measured[0] - measured[1]) / 2 == pytest.approx(planned, rel=0.02)


@pytest.mark.parametrize(
    "lora",
    [
        {"rank": 8, "dropout": 0.5},
        {"rank": 24, "targets": ("q_proj", "v_proj")},
        {"rank": 8, "targets": ("down_proj", "o_proj")},
    ],
)
def test_what_adapters_keep(build: Build, lora: dict[str, Any]) -> None:
    """Without CUDA's autocast every adapter casts its input for itself, and a dropout mask is float32."""
    numerics = Numerics(compute=2, stream=2, autocast=True, casts_inputs=True, dropout_mask=4)
    measured = []
    for num_layers in (3, 1):
        model, config = build("gemma", lora=lora, num_hidden_layers=num_layers)
        measured.append(
            measure.saved_bytes(model, lambda: _forward(model, rows=ROWS, tokens=TOKENS, padded=False))  # noqa: B023
        )
    planned = layer_saved_bytes(
        config,
        0,
        Step(
            batch=Batch(ROWS, TOKENS, padded=False),
            numerics=numerics,
            lora=LoraSection(**lora),
            execution=Execution(ENGINES["transformers"], "sdpa", "off", "chunked"),
        ),
    )
    assert (measured[0] - measured[1]) / 2 == pytest.approx(planned, rel=0.02)


@pytest.mark.parametrize(
    ("family", "attention", "shape"),
    [
        ("gemma", "sdpa", {"intermediate_size": 768}),
        ("gemma", "sdpa", {"num_attention_heads": 8, "num_key_value_heads": 8}),
        ("gemma2", "eager", {"num_attention_heads": 8}),
        ("gemma3", "sdpa", {"intermediate_size": 768}),
    ],
)
@pytest.mark.parametrize("checkpointing", ["off", "on"])
def test_peak_of_a_backward_pass(
    build: Build, as_on_cuda: None, family: str, attention: str, shape: dict[str, int], checkpointing: Any
) -> None:
    model, config = build(family, attention=attention, checkpointing=checkpointing, lora={"rank": 8}, **shape)
    rows, tokens = 2, 192
    _forward(model, rows=rows, tokens=tokens, padded=False).sum().backward()  # gradients are there from now on
    with measure.peak_bytes(model) as peaks:
        hidden = _forward(model, rows=rows, tokens=tokens, padded=False)
        hidden.backward(torch.ones_like(hidden))
    planned = activations(
        config,
        Step(
            batch=Batch(rows, tokens, padded=False),
            numerics=BF16,
            lora=LoraSection(rank=8, targets=SEVEN),
            execution=Execution(ENGINES["transformers"], attention, checkpointing, "chunked"),
        ),
    )
    assert peaks[0] == pytest.approx(planned.backward, rel=0.08)


@pytest.mark.parametrize("num_layers", [2, 5])
def test_checkpointing_keeps_an_input_a_layer(build: Build, num_layers: int) -> None:
    model, config = build("gemma", checkpointing="on", num_hidden_layers=num_layers)
    saved = measure.saved_bytes(model, lambda: _forward(model, rows=ROWS, tokens=TOKENS, padded=False))
    planned = activations(
        config,
        Step(
            batch=Batch(ROWS, TOKENS, padded=False),
            numerics=BF16,
            lora=LoraSection(rank=16, targets=SEVEN),
            execution=Execution(ENGINES["transformers"], "sdpa", "on", "chunked"),
        ),
    )
    assert saved == pytest.approx(planned.stored - planned.masks, rel=0.02)


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize(("num_tokens", "vocab"), [(256, 4000), (700, 4000), (300, 9000)])
def test_logits_of_a_chunk(softcap: float | None, num_tokens: int, vocab: int) -> None:
    config = check_config(
        {"model_type": "gemma2", "vocab_size": vocab, "hidden_size": 32, "final_logit_softcapping": softcap}, "test"
    )
    head = torch.nn.Linear(32, vocab, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    hidden = torch.randn(1, num_tokens + 1, 32, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(0, vocab, (1, num_tokens + 1))
    with measure.peak_bytes(head) as peaks:
        loss = _chunked_cross_entropy_loss(hidden, head.weight, 256, labels=labels, final_logit_softcapping=softcap)[0]
        loss.backward()
    planned = head_bytes(config, num_tokens=num_tokens, numerics=BF16, head="chunked")
    assert peaks[0] == pytest.approx(planned, rel=0.05)


def test_fused_loss_shrinks_with_what_is_free() -> None:
    config = check_config({"model_type": "gemma"}, "test")
    whole = head_bytes(config, num_tokens=512, numerics=BF16, head="fused")
    assert whole == 512 * 256_000 * 16
    small = head_bytes(config, num_tokens=4096, numerics=BF16, head="fused", free_bytes=2 * 2**30)
    assert small <= 2**30
    assert head_bytes(config, num_tokens=4096, numerics=BF16, head="fused") <= 4 * 2**30


def test_the_float32_stream_of_a_t4_costs_copies() -> None:
    """float16 products beside a float32 stream: every adapter at a norm casts its own input."""
    config = check_config({"model_type": "gemma"}, "test")

    def saved(numerics: Numerics) -> int:
        return layer_saved_bytes(
            config,
            0,
            Step(
                batch=Batch(1, 128),
                numerics=numerics,
                lora=LoraSection(rank=16, targets=SEVEN),
                execution=Execution(ENGINES["transformers"], "sdpa", "on", "chunked"),
            ),
        )

    more = saved(Numerics(compute=2, stream=4, autocast=True)) - saved(BF16)
    assert more == 128 * 2 * config.hidden_size * 3  # q, k, v, gate and up: five copies instead of two
