"""The verdict must pass a right export at every dtype, and fail every wrong one that we know."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from gemma_tune.errors import ExportError
from gemma_tune.exporting.export_settings import ExportSettings
from gemma_tune.exporting.formats.gguf import gguf_runner
from gemma_tune.exporting.gguf.convert import GgufProvenance, convert_to_gguf
from gemma_tune.exporting.merge.write import merge_adapter
from gemma_tune.exporting.verify import prove as verify
from gemma_tune.exporting.verify.forms import PLAIN, Form, measure_here
from gemma_tune.exporting.verify.parity import LIMITS
from gemma_tune.exporting.verify.probe_texts import TRICKY_STRINGS, Probe
from gemma_tune.exporting.verify.prove import ParityReport, Reference, verify_exports
from gemma_tune.exporting.verify.runner import Runner, transformers_runner
from gemma_tune.exporting.verify.weight_check import check_merged_weights
from gemma_tune.machine.main_memory import MainMemory
from gemma_tune.runs.reporter import SilentReporter
from tests.exporting.gguf.tokenizing import Change, with_other_tokenizer

Maker = Callable[..., Path]
PROBE = Probe(
    rows=((2, 305, 17, 940, 63, 95, 11, 2003, 60, 31), (2, 9, 9, 30)),
    scored=((4, 5, 6), (2, 3)),
    texts=("Two  spaces,\na line", "<start_of_turn>user\n", "naïve 😀"),
    prompts=((2, 305, 17), (2, 9)),
    stop_token_ids=(1,),
    origin="test rows",
    max_new_tokens=6,
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads cost more than they bring for models of this size."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def base(make_gguf_source: Maker) -> Path:
    return make_gguf_source("gemma")


@pytest.fixture(scope="module")
def adapter(base: Path, make_adapter: Maker) -> Path:
    return make_adapter(base)


@pytest.fixture(scope="module")
def source(base: Path, adapter: Path) -> Reference:
    return Reference(base, adapter, tokenizer=base)


def merge(source: Reference, directory: Path, *, dtype: Any) -> Path:
    merge_adapter(
        source.base, source.adapter, output := directory / f"merged-{dtype}", settings=ExportSettings(dtype=dtype)
    )
    return output


def plain(directory: Path, limits: str, *, name: str = "merged") -> Runner:
    return transformers_runner(Form(name, PLAIN, directory, tokenizer=directory), LIMITS[limits])


def check(source: Reference, *runners: Runner, probe: Probe = PROBE) -> ParityReport:
    return verify_exports(runners, source, probe=probe, reporter=SilentReporter(), measure=measure_here)


def spoil(path: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    save_file({name: change(name, tensor) for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})


def peft_logits(base: Path, adapter: Path | None, **options: Any) -> torch.Tensor:
    """By the shortest road there is."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager", **options)
    model = PeftModel.from_pretrained(model, str(adapter)).eval() if adapter else model.eval()
    with torch.no_grad():
        return torch.cat([model(input_ids=torch.tensor([row])).logits[0] for row in PROBE.rows])


def test_a_right_merge_passes_at_every_dtype(source: Reference, tmp_path: Path) -> None:
    dtypes = ("float32", "float16", "bfloat16")
    report = check(source, *(plain(merge(source, tmp_path, dtype=dtype), dtype, name=dtype) for dtype in dtypes))
    assert [each.passed for each in report.exports] == [True] * 3, report
    assert report.effect is not None and report.effect.mean_kl > 0.05 and report.effect.top1_agreement < 1.0
    for each in report.exports:
        assert each.distance is not None and each.distance.rms < 0.05 * report.effect.rms
        assert (each.texts_equal, each.method) == (3, "logits")
    exact = report.exports[0]
    assert exact.distance is not None and exact.distance.max_abs < 1e-4 and exact.answers_equal == 2
    assert exact.perplexity == pytest.approx(report.reference_perplexity, rel=1e-5)


def test_figures_are_those_of_the_logits(source: Reference, tmp_path: Path) -> None:
    """By another road: plain transformers and PEFT, all positions at once."""
    merged = merge(source, tmp_path, dtype="bfloat16")
    report = check(source, plain(merged, "bfloat16"))
    wanted, before = peft_logits(source.base, source.adapter), peft_logits(source.base, None)
    found = peft_logits(merged, None)
    kept = PROBE.positions()
    assert len(kept) == 13  # the BOS of the second row has been seen
    result, effect = report.exports[0].distance, report.effect
    assert result is not None and effect is not None
    assert result.max_abs == pytest.approx(float((wanted - found)[kept].abs().max()), rel=1e-3)
    assert effect.rms == pytest.approx(float((wanted - before)[kept].square().mean().sqrt()), rel=1e-4)
    loss = torch.nn.functional.cross_entropy(found[[3, 4, 5, 11, 12]], torch.tensor([63, 95, 11, 9, 30]))
    assert report.exports[0].perplexity == pytest.approx(float(loss.exp()), rel=1e-3)


def round_to_four_bits(weight: torch.Tensor) -> torch.Tensor:
    """16 levels a block of 32, as coarse as a 4-bit format."""
    blocks = weight.float().view(-1, 32)
    scale = blocks.abs().amax(dim=1, keepdim=True) / 7
    return ((blocks / scale).round() * scale).view_as(weight).to(weight.dtype)


SABOTAGE: dict[str, Callable[[str, torch.Tensor], torch.Tensor]] = {
    "through four bits": lambda name, tensor: round_to_four_bits(tensor) if "_proj" in name else tensor,
    "one tensor zeroed": lambda name, tensor: (
        tensor * 0 if name == "model.layers.1.self_attn.v_proj.weight" else tensor
    ),
    "nan": lambda name, tensor: tensor * float("nan") if name == "model.norm.weight" else tensor,
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_spoilt_merge_fails(dtype: str, source: Reference, tmp_path: Path) -> None:
    candidates = [plain(source.base, dtype, name="the base itself")]
    for name, change in SABOTAGE.items():
        directory = merge(source, tmp_path / name, dtype=dtype)
        spoil(directory / "model.safetensors", change)
        candidates.append(plain(directory, dtype, name=name))
    report = check(source, *candidates)
    assert [each.name for each in report.failed] == ["the base itself", *SABOTAGE]
    assert report.exports[0].distance == report.effect


def test_a_doubled_scaling_and_another_base_fail(source: Reference, make_gguf_source: Maker, tmp_path: Path) -> None:
    doubled = tmp_path / "doubled"
    shutil.copytree(source.adapter, doubled)
    spoil(doubled / "adapter_model.safetensors", lambda name, tensor: tensor * 2 if "lora_B" in name else tensor)
    other_base = tmp_path / "other base"
    shutil.copytree(source.base, other_base)
    spoil(other_base / "model.safetensors", lambda name, tensor: tensor * 1.1)
    wrong = [
        merge(replace(source, adapter=doubled), tmp_path / "1", dtype="bfloat16"),
        merge(replace(source, base=other_base), tmp_path / "2", dtype="bfloat16"),
    ]
    report = check(source, *(plain(directory, "bfloat16", name=f"{n}") for n, directory in enumerate(wrong)))
    assert len(report.failed) == 2


def test_other_token_ids_fail(source: Reference, tmp_path: Path) -> None:
    merged = merge(source, tmp_path, dtype="bfloat16")
    settings = json.loads((merged / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = settings["model"]["vocab"]
    vocabulary["w"], vocabulary["s"] = vocabulary["s"], vocabulary["w"]
    (merged / "tokenizer.json").write_text(json.dumps(settings), encoding="utf-8")
    (failed,) = check(source, plain(merged, "bfloat16")).failed
    assert failed.first_difference == "Two  spaces,\na line" and "other token ids" in failed.reason


def test_an_adapter_without_effect_fails(source: Reference, tmp_path: Path) -> None:
    idle = tmp_path / "idle"
    shutil.copytree(source.adapter, idle)
    spoil(idle / "adapter_model.safetensors", lambda name, tensor: tensor * 0.0 if "lora_B" in name else tensor)
    with pytest.raises(ExportError, match=r"the adapter changes nothing: every lora_B is zero"):
        check(replace(source, adapter=idle), plain(source.base, "bfloat16"))


def test_a_resized_vocabulary(source: Reference, make_adapter: Maker, tmp_path: Path) -> None:
    resized = replace(source, adapter=make_adapter(source.base, resize_to=2305, save={"save_embedding_layers": True}))
    probe = replace(PROBE, rows=((2, 2304, 97, 5),), scored=((1,),))
    assert not check(resized, plain(merge(resized, tmp_path, dtype="float32"), "float32"), probe=probe).failed
    (failed,) = check(source, plain(merge(resized, tmp_path / "x", dtype="float32"), "float32")).failed
    assert failed.reason == "2305 logits a position, 2304 in base + adapter"


def test_what_cannot_be_loaded_fails_and_the_others_are_measured(source: Reference, tmp_path: Path) -> None:
    merged = merge(source, tmp_path, dtype="bfloat16")
    broken = tmp_path / "broken"
    shutil.copytree(merged, broken)
    (broken / "config.json").unlink()
    report = check(source, plain(broken, "bfloat16", name="broken"), plain(merged, "bfloat16"))
    assert [each.passed for each in report.exports] == [False, True]
    assert "cannot be run" in report.exports[0].reason and report.notes


def test_gemma_2_is_compared_with_its_soft_caps(make_gguf_source: Maker, make_adapter: Maker, tmp_path: Path) -> None:
    """transformers' default attention drops them (F27): both sides would be another model than the one trained."""
    base = make_gguf_source("gemma2", attn_logit_softcapping=0.5)
    source = Reference(base, make_adapter(base), tokenizer=base)
    report = check(source, plain(merge(source, tmp_path, dtype="float32"), "float32"))
    assert not report.failed
    logits = peft_logits(source.base, source.adapter)
    loss = torch.nn.functional.cross_entropy(logits[[3, 4, 5, 11, 12]], torch.tensor([63, 95, 11, 9, 30]))
    assert report.reference_perplexity == pytest.approx(float(loss.exp()), rel=1e-5)


def test_both_bases_are_compared_with_the_4_bit_model_that_was_trained(source: Reference, tmp_path: Path) -> None:
    """F41. The oracle quantises and expands by transformers' own means."""
    trained = replace(source, trained_dtype="float32")
    report = check(trained, plain(merge(source, tmp_path, dtype="bfloat16"), "bfloat16"))
    on_16_bits, expanded = report.trained
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    difference = peft_logits(source.base, source.adapter, quantization_config=nf4) - peft_logits(
        source.base, source.adapter
    )
    assert on_16_bits.distance is not None and expanded.distance is not None
    assert on_16_bits.distance.max_abs == pytest.approx(float(difference.abs().max()), rel=0.05)
    assert on_16_bits.distance.max_abs > 0.05 > 1e-3 > expanded.distance.max_abs
    assert on_16_bits.passed is None and not report.failed


def without_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llama_cpp" else find(name))


# --- GGUF -----------------------------------------------------------------------------------------------------------


def gguf(merged: Path, output: Path, *, of: Path | None = None) -> Runner:
    convert_to_gguf(merged, output, dtype="f16", provenance=GgufProvenance("test"))
    return run_gguf(output, of or merged)


def run_gguf(path: Path, merged: Path | None) -> Runner:
    return replace(gguf_runner(path.stem, path, merged_dir=merged), limits=LIMITS["gguf"])


def without_norm_offset(merged: Path, directory: Path) -> Path:
    """Its GGUF holds w where 1 + w belongs."""
    shutil.copytree(merged, directory)
    spoil(directory / "model.safetensors", lambda name, tensor: tensor - 1 if "norm" in name else tensor)
    return directory


def test_a_gguf_is_run(source: Reference, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    merged = merge(source, tmp_path, dtype="float16")
    wrong = gguf(without_norm_offset(merged, tmp_path / "off"), tmp_path / "off.gguf", of=merged)
    report = check(source, gguf(merged, tmp_path / "right.gguf"), wrong)
    right, off = report.exports
    assert right.passed and right.method == "logits" and right.answers_equal == 2, right
    assert right.texts_equal == 3 and "run and tokenized by llama.cpp" in right.reason
    assert not off.passed and off.distance is not None and off.distance.mean_kl > 0.1


def test_without_llama_cpp_its_weights_and_its_token_ids_are_compared(
    source: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_llama_cpp(monkeypatch)
    merged = merge(source, tmp_path, dtype="float16")
    wrong = gguf(without_norm_offset(merged, tmp_path / "off"), tmp_path / "off.gguf", of=merged)
    report = check(source, gguf(merged, tmp_path / "right.gguf"), wrong, replace(wrong, check=None))
    right, off, alone = report.exports
    assert right.passed and right.method == "weights" and "logits were not run" in right.reason
    assert right.texts_equal == 3 and "by the file's own lists, without llama.cpp" in right.reason
    assert not off.passed and "norm" in off.reason
    assert alone.passed is None and "weights were not checked" in alone.reason and alone.texts_equal == 3
    assert report.failed == (off,)
    assert any("logits were not run" in note for note in report.notes)


def swap(values: list[str], first: int, second: int) -> None:
    values[first], values[second] = values[second], values[first]


DAMAGE: dict[str, Change] = {
    "one score": lambda lists, id_of: lists["scores"].__setitem__(id_of("▁t"), 1.0),
    "all scores": lambda lists, id_of: lists.update(scores=[0.0] * len(lists["scores"])),
    "two tokens": lambda lists, id_of: swap(lists["tokens"], id_of("w"), id_of("s")),
    "one type": lambda lists, id_of: lists["token_type"].__setitem__(id_of("<start_of_turn>"), 1),
    "no bos": lambda lists, id_of: lists.update(add_bos_token=False),
    "eos": lambda lists, id_of: lists.update(add_eos_token=True),
    "a space in front": lambda lists, id_of: lists.update(add_space_prefix=True),
}


@pytest.mark.parametrize("reader", ["llama.cpp", "its lists"])
def test_a_damaged_tokenizer_fails(
    reader: str, source: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if reader == "llama.cpp":
        pytest.importorskip("llama_cpp")
    else:
        without_llama_cpp(monkeypatch)
    merged = merge(source, tmp_path, dtype="float16")
    gguf(merged, tmp_path / "right.gguf")
    changes: dict[str, Change] = {"nothing": lambda lists, id_of: None, **DAMAGE}
    candidates = []
    for name, change in changes.items():
        path = with_other_tokenizer(tmp_path / "right.gguf", tmp_path / f"{name}.gguf", change)
        candidates.append(run_gguf(path, merged))
    report = check(source, *candidates, probe=replace(PROBE, texts=TRICKY_STRINGS))
    assert report.exports[0].passed and report.exports[0].texts_equal == len(TRICKY_STRINGS), report.exports[0]
    assert [each.name for each in report.failed] == list(DAMAGE)
    assert all("strings have other token ids" in each.reason and each.first_difference for each in report.failed)


def test_a_gguf_that_cannot_be_read_fails_and_the_others_are_checked(
    source: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_llama_cpp(monkeypatch)
    merged = merge(source, tmp_path, dtype="float16")
    right = gguf(merged, tmp_path / "right.gguf")
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "right.gguf").read_bytes()[:5000])
    cut = run_gguf(tmp_path / "cut.gguf", merged)
    report = check(source, cut, right)
    assert [each.passed for each in report.exports] == [False, True]
    assert "cannot be read" in report.exports[0].reason
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (unread,) = check(source, run_gguf(tmp_path / "right.gguf", merged)).exports
    assert unread.passed is None and "package `gguf`" in unread.reason


# --- too little memory ----------------------------------------------------------------------------------------------


def test_too_little_memory_is_told_and_the_weights_are_compared(
    source: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "read_memory", lambda: MainMemory(10**10, 500_000_000, 0, None))
    merged = merge(source, tmp_path, dtype="bfloat16")
    spoilt = tmp_path / "spoilt"
    shutil.copytree(merged, spoilt)
    spoil(spoilt / "model.safetensors", SABOTAGE["one tensor zeroed"])
    runners = [
        replace(
            plain(path, "bfloat16", name=path.name),
            check=partial(check_merged_weights, source.base, source.adapter, path),
        )
        for path in (merged, spoilt)
    ]
    report = check(source, *runners)
    right, wrong = report.exports
    assert right.passed and right.method == "weights" and "logits were not run" in right.reason
    assert right.texts_equal == 3 and "3 strings have the same token ids" in right.reason
    assert not wrong.passed and "model.layers.1.self_attn.v_proj.weight" in wrong.reason
    assert "1.0 GB of memory" in report.notes[0] and "0.5 GB are free" in report.notes[0]


def test_nothing_to_compare(source: Reference) -> None:
    for rows in ((), ((2, 3), ())):
        with pytest.raises(ExportError, match="at least one row"):
            check(source, plain(source.base, "bfloat16"), probe=replace(PROBE, rows=rows))
