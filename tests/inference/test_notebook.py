"""`from gemma_tune import load`, as a notebook uses it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import gemma_tune
from gemma_tune import Gemma, load
from gemma_tune.errors import DataError, EngineError, ModelError
from gemma_tune.models.catalogue import MODELS
from gemma_tune.models.config import read_config
from gemma_tune.models.describe import count_params
from gemma_tune.paths import TINY_MODEL_DIR


@pytest.fixture(scope="module")
def gemma() -> Gemma:
    return load("gemma-tiny", dtype="float32")


def test_importing_the_package_is_cheap() -> None:
    program = "import sys, gemma_tune; assert 'load' in gemma_tune.__all__; print(len(sys.modules))"
    plain = subprocess.run(
        [sys.executable, "-c", "import sys; print(len(sys.modules))"], capture_output=True, text=True
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) - int(plain.stdout) < 10
    with pytest.raises(AttributeError, match=r"no attribute 'lod'"):
        gemma_tune.lod  # noqa: B018


def test_it_answers_as_transformers_does(gemma: Gemma) -> None:
    model = AutoModelForCausalLM.from_pretrained(TINY_MODEL_DIR, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL_DIR)
    texts = ["The town of Ostel", "A goat"]
    wanted = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        row = model.generate(ids, max_length=20, do_sample=False, eos_token_id=[1, 107], pad_token_id=0)[0]
        wanted.append(tokenizer.decode(row[ids.shape[1] :], skip_special_tokens=True).strip())
    assert gemma.generate(texts, max_length=20) == wanted
    assert gemma.generate(texts[0], max_length=20) == wanted[0]
    assert gemma.generate({"prompt": texts[1]}, max_length=20) == wanted[1]
    assert gemma.encode("A goat") == tokenizer("A goat")["input_ids"]


def test_samplers_are_swapped(gemma: Gemma) -> None:
    greedy = gemma.generate("A", max_new_tokens=8)
    gemma.compile("random", temperature=2.0, seed=1)
    assert gemma.generate("A", max_new_tokens=8) != greedy
    gemma.compile(lambda logits: logits.argmax(-1))
    assert gemma.generate("A", max_new_tokens=8) == greedy
    gemma.compile("beam", num_beams=2)
    assert gemma.generate("A", max_new_tokens=8, stop_strings=["e"]).count("e") == 0
    gemma.compile()
    assert gemma.generate("A", max_new_tokens=8) == greedy
    with pytest.raises(DataError, match=r"did you mean 'top-k'"):
        gemma.compile("topk")


def test_scores(gemma: Gemma) -> None:
    ids = [gemma.encode("A goat")]
    assert torch.equal(gemma.score(ids), gemma.model(torch.tensor(ids)).logits)
    score = gemma.score_response("A goat", " eats.")
    token_ids = [*ids[0], *(token.token_id for token in score.tokens)]
    losses = gemma.score([token_ids], scoring_mode="loss", target_ids=[[*token_ids[1:], 0]])
    assert -score.log_likelihood == pytest.approx(float(losses[0, len(ids[0]) - 1 : -1].sum()), abs=1e-3)


def test_the_summary_counts_what_is_there(gemma: Gemma) -> None:
    summary = gemma.summary()
    assert summary.num_params == sum(parameter.numel() for parameter in gemma.model.parameters())
    assert summary.weights_bytes >= 4 * summary.num_params
    assert "model.layers.3" in str(summary)
    assert f"{summary.num_params:,} parameters" in repr(summary)


def test_random_weights(tmp_path: Path) -> None:
    first, second = load("gemma-tiny", load_weights=False), load("gemma-tiny", load_weights=False)
    ids = first.encode("A goat")
    assert torch.equal(first.score([ids]), second.score([ids]))
    assert not torch.allclose(first.score([ids]), load("gemma-tiny", dtype="float32").score([ids]))
    assert first.generate("A", max_new_tokens=3)
    shutil.copyfile(TINY_MODEL_DIR / "config.json", tmp_path / "config.json")
    bare = load(str(tmp_path), load_weights=False)
    assert bare.summary().num_params == count_params(read_config(TINY_MODEL_DIR))
    assert bare.score([[2, 5]]).shape == (1, 2, 2304)
    with pytest.raises(EngineError, match=r"has no tokenizer here"):
        bare.generate("x")


def test_weights_that_do_not_fit_are_refused_with_their_bytes(tmp_path: Path) -> None:
    config = json.loads((TINY_MODEL_DIR / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "num_hidden_layers": 1000, "intermediate_size": 40_000}), encoding="utf-8"
    )
    with pytest.raises(ModelError, match=r"take 123,\d{3},\d{3},\d{3} bytes in float32, and [\d,]+ are"):
        load(str(tmp_path), load_weights=False, dtype="float32")


def test_names_and_settings_that_do_not_exist() -> None:
    with pytest.raises(ModelError, match=r"no Gemma is known by the name 'gemma_2b_enn'"):
        load("gemma_2b_enn", load_weights=False)
    with pytest.raises(EngineError, match=r"no engine 'unslot'; did you mean 'unsloth'"):
        load("gemma-tiny", engine="unslot")
    with pytest.raises(ModelError, match=r"random weights are not quantised"):
        load("gemma-tiny", load_weights=False, load_in_4bit=True)


def test_4_bits_when_asked() -> None:
    gemma = load("gemma-tiny", load_in_4bit=True)
    assert gemma.summary().weights_bytes < 0.5 * load("gemma-tiny", dtype="float32").summary().weights_bytes


@pytest.mark.parametrize("preset", ["gemma_2b_en", "gemma_instruct_7b_en", "gemma2_2b_en", "gemma3_1b"])
def test_kerasnlp_presets_are_names(preset: str) -> None:
    assert any(preset in model.keras_presets for model in MODELS.values())
    with pytest.raises(ModelError, match=r"google/gemma.* is not on this machine"):
        load(preset)
