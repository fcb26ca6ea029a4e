"""The planner against figures that others published; docs/planning.md quotes each with its source.

None was measured by us, and no coefficient was fitted to them: `LOADING_BYTES` comes from other figures. What those
versions did otherwise than ours is said beside each: the loss, above all, whose logits were kept as a whole.
"""

from __future__ import annotations

import pytest

from gemma_tune.engines.engine_facts import ENGINES
from gemma_tune.machine.cards import CARDS
from gemma_tune.models.catalogue import find_model
from gemma_tune.models.config import TextConfig, check_config
from gemma_tune.planning import memory
from gemma_tune.planning.activations import activations
from gemma_tune.planning.schedule import pass_seconds
from gemma_tune.planning.step import Batch, Bits, Execution, Numerics, Step
from gemma_tune.planning.verdict import CONTEXT_BYTES, FRAGMENTATION, LOADING_BYTES
from gemma_tune.recipe.schema import LoraSection

GIB = 2**30
SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BF16 = Numerics(compute=2, stream=2, autocast=True)
# transformers up to 4.44: logits in float32, log-softmax, its gradient and that gradient put back to full length.
LOGITS_OF_2024 = 16
# Unsloth's cross-entropy kernel of April 2024 overwrites 16-bit logits with their gradient.
LOGITS_IN_PLACE = 2
# Apple's CCE, which Unsloth used for these, keeps no logits.
NO_LOGITS = 0

HF = Execution(ENGINES["transformers"], "flash_attention_2", "on", "chunked")
UNSLOTH = Execution(ENGINES["unsloth"], "flash_attention_2", "on", "fused")
UNSLOTH_OFFLOAD = Execution(ENGINES["unsloth"], "flash_attention_2", "offload", "fused")


def _llama(hidden: int, ffn: int, kv_heads: int, vocab: int) -> TextConfig:
    """Llama has Gemma 1's two norms and gated MLP, 32 layers and heads, and a head of its own."""
    return check_config(
        {
            "model_type": "gemma",
            "hidden_size": hidden,
            "intermediate_size": ffn,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": kv_heads,
            "head_dim": hidden // 32,
            "vocab_size": vocab,
            "tie_word_embeddings": False,
        },
        "Llama",
    )


LLAMA_2_7B = _llama(4096, 11_008, 32, 32_000)
LLAMA_31_8B = _llama(4096, 14_336, 8, 128_256)


def _need_gib(
    config: TextConfig,
    *,
    rows: int,
    tokens: int,
    execution: Execution,
    rank: int,
    optimizer: str,
    bytes_per_logit: int,
    bits: Bits = "4bit",
) -> float:
    adapter = LoraSection(rank=rank, targets=SEVEN)
    resident = (
        memory.quantized_bytes(config, bits=bits)
        + memory.unquantized_bytes(config, bits=bits, numerics=BF16)
        + memory.adapter_bytes(config, adapter)
        + memory.gradient_bytes(config, adapter)
        + memory.optimizer_bytes(config, adapter, optimizer=optimizer)
        + LOADING_BYTES
    )
    batch = Batch(rows, tokens, padded=False)
    found = activations(config, Step(batch, BF16, adapter, execution, bits))
    logits = rows * tokens * config.vocab_size * bytes_per_logit
    head = found.stored + 2 * rows * tokens * config.hidden_size * BF16.stream + logits
    peak = max(found.backward, head)
    return (resident + peak * (1 + FRAGMENTATION) + CONTEXT_BYTES) / GIB


@pytest.mark.parametrize(
    ("tokens", "published"), [(1024, 6), (2048, 7), (4096, 9), (8192, 12), (16_384, 19), (32_768, 32)]
)
def test_llama_factory_with_transformers(tokens: int, published: float) -> None:
    """LLaMA-Factory's wiki, "Performance comparison", April 2024: LLaMA 2 7B, 4 bits, rank 8, one row, A100 40GB."""
    need = _need_gib(
        LLAMA_2_7B, rows=1, tokens=tokens, execution=HF, rank=8, optimizer="adamw", bytes_per_logit=LOGITS_OF_2024
    )
    assert need == pytest.approx(published, rel=0.15)


@pytest.mark.parametrize(("tokens", "published"), [(1024, 5), (2048, 6), (4096, 7), (8192, 8)])
def test_llama_factory_with_unsloth(tokens: int, published: float) -> None:
    """The same table, with Unsloth of April 2024."""
    need = _need_gib(
        LLAMA_2_7B, rows=1, tokens=tokens, execution=UNSLOTH, rank=8, optimizer="adamw", bytes_per_logit=LOGITS_IN_PLACE
    )
    assert need == pytest.approx(published, rel=0.15)


@pytest.mark.parametrize(
    ("bits", "execution", "logits", "published"),
    [("4bit", UNSLOTH, LOGITS_IN_PLACE, 7), ("plain", HF, LOGITS_OF_2024, 17), ("plain", UNSLOTH, LOGITS_IN_PLACE, 16)],
)
def test_llama_factory_with_four_rows(bits: Bits, execution: Execution, logits: int, published: float) -> None:
    """The same page's first table: four rows of at most 1,024 tokens, 4 and 16 bits."""
    need = _need_gib(
        LLAMA_2_7B,
        rows=4,
        tokens=1024,
        execution=execution,
        rank=8,
        optimizer="adamw",
        bytes_per_logit=logits,
        bits=bits,
    )
    assert need == pytest.approx(published, rel=0.15)


@pytest.mark.parametrize(
    ("card_gb", "tokens"), [(8, 2972), (12, 21_848), (16, 40_724), (24, 78_475), (40, 153_977), (48, 191_728)]
)
def test_longest_context_with_unsloth(card_gb: int, tokens: int) -> None:
    """Unsloth's documentation, "Unsloth Benchmarks": Llama 3.1 8B, 4 bits, rank 32, one row that fills the card."""
    need = _need_gib(
        LLAMA_31_8B,
        rows=1,
        tokens=tokens,
        execution=UNSLOTH_OFFLOAD,
        rank=32,
        optimizer="adamw_8bit",
        bytes_per_logit=NO_LOGITS,
    )
    assert need == pytest.approx(card_gb, rel=0.15)


@pytest.mark.parametrize(("card_gb", "tokens"), [(24, 5789), (40, 12_264), (48, 15_502), (80, 28_454)])
def test_longest_context_with_transformers(card_gb: int, tokens: int) -> None:
    """The same table's column for transformers with flash attention."""
    need = _need_gib(
        LLAMA_31_8B,
        rows=1,
        tokens=tokens,
        execution=HF,
        rank=32,
        optimizer="adamw_8bit",
        bytes_per_logit=LOGITS_OF_2024,
    )
    assert need == pytest.approx(card_gb, rel=0.15)


def test_gemma_7b_fills_an_a100() -> None:
    """Unsloth's blog, "2.4x faster Gemma" (February 2024): about 15,000 tokens fit on 80 GB with flash attention."""
    need = _need_gib(
        find_model("gemma-7b").config,
        rows=2,
        tokens=7500,
        execution=HF,
        rank=16,
        optimizer="adamw_8bit",
        bytes_per_logit=LOGITS_OF_2024,
    )
    assert need == pytest.approx(80, rel=0.15)


@pytest.mark.parametrize(("name", "tokens", "card_gb"), [("gemma-2-9b", 2600, 24), ("gemma-2-27b", 3000, 40)])
def test_gemma_2_fills_a_card(name: str, tokens: int, card_gb: int) -> None:
    """Unsloth's blog, "2x faster Gemma 2" (July 2024): the longest row with transformers, whose scores were kept."""
    need = _need_gib(
        find_model(name).config,
        rows=1,
        tokens=tokens,
        execution=Execution(ENGINES["transformers"], "eager", "on", "chunked"),
        rank=32,
        optimizer="adamw_8bit",
        bytes_per_logit=LOGITS_OF_2024 + 4,  # the tanh of capped logits
    )
    assert need == pytest.approx(card_gb, rel=0.15)


@pytest.mark.parametrize(
    ("execution", "tokens", "published"),
    [
        (HF, 1024, 2295),
        (HF, 2048, 2741),
        (HF, 4096, 2926),
        (UNSLOTH, 1024, 2556),
        (UNSLOTH, 2048, 3178),
        (UNSLOTH, 4096, 3413),
        (UNSLOTH, 8192, 3632),
    ],
)
def test_tokens_a_second_of_the_table_that_the_speed_was_fitted_to(
    execution: Execution, tokens: int, published: float
) -> None:
    """No proof of the model, as two of the rows of each engine made its coefficients; the others follow."""
    step = Step(Batch(1, tokens), BF16, LoraSection(rank=8, targets=SEVEN), execution)
    seconds = pass_seconds(LLAMA_2_7B, step, card=CARDS["a100-40"], tokens=tokens, row_tokens=tokens)
    assert seconds is not None
    assert tokens / seconds == pytest.approx(published, rel=0.15)
