from __future__ import annotations

import importlib.util
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemma_tune.errors import ExportError
from gemma_tune.exporting.gguf import quantize
from gemma_tune.exporting.gguf.convert import GgufProvenance, convert_to_gguf, gguf_bytes
from gemma_tune.exporting.gguf.header import read_gguf_header
from gemma_tune.exporting.gguf.quantize import QUANTIZATIONS, quantize_gguf, require_gguf_packages
from gemma_tune.paths import TINY_MODEL_DIR
from tests.exporting.gguf.killing import num_partials_left

gguf = pytest.importorskip("gguf")
needs_llama_cpp = pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="no llama-cpp-python")


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("gguf") / "bf16.gguf"
    convert_to_gguf(TINY_MODEL_DIR, output, dtype="bf16", provenance=GgufProvenance(name="tiny"))
    return output


def without(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))


@pytest.mark.parametrize("name", sorted(QUANTIZATIONS))
def test_numbers_are_llama_cpps(name: str) -> None:
    assert gguf.LlamaFileType[f"MOSTLY_{name.upper()}"] == QUANTIZATIONS[name].ftype
    type_name = name.upper().removesuffix("_M").removesuffix("_S").removesuffix("_L")
    block_elements, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_name]]
    assert QUANTIZATIONS[name].bits == 8 * block_bytes / block_elements


@pytest.mark.parametrize("name", ["iq1_s", "iq2_xxs", "IQ3_XXS", "q2_k_s"])
def test_what_needs_an_importance_matrix_is_refused(name: str) -> None:
    with pytest.raises(ExportError, match=rf"{name} needs an importance matrix"):
        require_gguf_packages(name)


def test_an_unknown_name_is_answered_with_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ExportError, match=r"'q4km' is no GGUF quantization") as caught:
        require_gguf_packages("q4km")
    assert "did you mean 'q4_k_m'?" in str(caught.value.hint)
    with pytest.raises(ExportError, match=r"'Q4_K_M' is no GGUF"):
        require_gguf_packages("Q4_K_M")


def test_missing_packages_name_their_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "llama_cpp")
    require_gguf_packages("q8_0")
    with pytest.raises(ExportError, match=r"llama-cpp-python") as caught:
        require_gguf_packages("q4_k_m")
    assert "pip install 'gguf>=0.19,<0.20' 'llama-cpp-python==0.3.36'" in str(caught.value.hint)
    without(monkeypatch, "gguf")
    with pytest.raises(ExportError, match=r"needs the package `gguf`") as caught:
        require_gguf_packages("q8_0")
    assert "pip install 'gguf>=0.19,<0.20'" in str(caught.value.hint)


@needs_llama_cpp
@pytest.mark.parametrize("name", sorted(QUANTIZATIONS))
def test_every_quantization(name: str, bf16: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    path = tmp_path / "q.gguf"
    facts = quantize_gguf(bf16, path, quantization=name, on_progress=lambda *each: told.append(each))
    source, result = read_gguf_header(bf16), read_gguf_header(path)
    assert told == [(number + 1, len(source.tensors)) for number in range(len(source.tensors))]
    assert result.metadata["general.file_type"] == QUANTIZATIONS[name].ftype
    changed = {"general.file_type"}
    assert {k: v for k, v in result.metadata.items() if k not in changed} == {
        k: v for k, v in source.metadata.items() if k not in changed
    }
    data_bytes = sum(tensor.num_bytes for tensor in result.tensors)
    num_bytes = path.stat().st_size
    assert num_bytes > data_bytes
    assert facts["bits_per_weight"] == 8 * data_bytes / sum(tensor.num_elements for tensor in result.tensors)
    assert QUANTIZATIONS[name].bits <= facts["bits_per_weight"] < QUANTIZATIONS[name].bits + 1.5
    assert sum(facts["tensor_types"].values()) == len(result.tensors)
    assert facts["notes"] == []
    if name != "q8_0":  # which needs no file between
        assert 0.7 * gguf_bytes(TINY_MODEL_DIR, name) < bf16.stat().st_size + num_bytes
        assert bf16.stat().st_size + num_bytes <= gguf_bytes(TINY_MODEL_DIR, name)


@needs_llama_cpp
def test_q8_0_is_the_same_by_either_road(bf16: Path, tmp_path: Path) -> None:
    convert_to_gguf(TINY_MODEL_DIR, tmp_path / "ours.gguf", dtype="q8_0", provenance=GgufProvenance(name="tiny"))
    quantize_gguf(bf16, tmp_path / "theirs.gguf", quantization="q8_0")
    ours, theirs = (
        {t.name: t.data for t in gguf.GGUFReader(tmp_path / name).tensors} for name in ("ours.gguf", "theirs.gguf")
    )
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


@needs_llama_cpp
def test_rows_that_256_does_not_divide_are_told(make_gguf_source: Callable[..., Path], tmp_path: Path) -> None:
    source = make_gguf_source("gemma3", hidden_size=160, intermediate_size=512, num_hidden_layers=2)
    convert_to_gguf(source, tmp_path / "bf16.gguf", dtype="bf16", provenance=GgufProvenance(name="narrow"))
    facts = quantize_gguf(tmp_path / "bf16.gguf", tmp_path / "q.gguf", quantization="q4_k_m")
    (note,) = facts["notes"]
    assert "11 of 15 matrices have rows that are no multiple of 256" in note
    assert "Q5_0" in note
    assert facts["bits_per_weight"] > 5.5
    sizes = [path.stat().st_size for path in (tmp_path / "bf16.gguf", tmp_path / "q.gguf")]
    assert sum(sizes) <= gguf_bytes(source, "q4_k_m")


@needs_llama_cpp
def test_a_quantised_source_is_refused(tmp_path: Path) -> None:
    convert_to_gguf(TINY_MODEL_DIR, tmp_path / "q8.gguf", dtype="q8_0", provenance=GgufProvenance(name="tiny"))
    with pytest.raises(ExportError, match=r"is quantised already \(Q8_0\)"):
        quantize_gguf(tmp_path / "q8.gguf", tmp_path / "q4.gguf", quantization="q4_k_m")


@needs_llama_cpp
def test_a_dtype_is_no_quantization(bf16: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"f16 is no quantization"):
        quantize_gguf(bf16, tmp_path / "out.gguf", quantization="f16")


@needs_llama_cpp
def test_what_llama_cpp_refuses_is_told_and_nothing_is_left(bf16: Path, tmp_path: Path) -> None:
    """The file names an architecture that llama.cpp does not know."""
    known, unknown = (len(name).to_bytes(8, "little") + name for name in (b"gemma", b"gemmx"))
    (tmp_path / "strange.gguf").write_bytes(bf16.read_bytes().replace(known, unknown, 1))
    with pytest.raises(ExportError, match=r"llama\.cpp gave up \(code 1\) while it made q4_k_m: .*gemmx"):
        quantize_gguf(tmp_path / "strange.gguf", tmp_path / "out" / "q.gguf", quantization="q4_k_m")
    assert not list((tmp_path / "out").iterdir())


@needs_llama_cpp
@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("import os; os.abort()", r"was ended by SIGABRT"),
        ("import sys; print('out of luck'); sys.exit(3)", r"gave up \(code 3\) while it made q4_k_m: out of luck"),
        ("print('progress 1 2')", r"not a GGUF file"),
    ],
)  # fmt: skip
def test_a_worker_that_dies_leaves_nothing(
    program: str, message: str, bf16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = quantize.subprocess.Popen

    def start_other(command: list[str], **options: Any) -> Any:
        return start([sys.executable, "-c", program], **options)

    monkeypatch.setattr(quantize.subprocess, "Popen", start_other)
    with pytest.raises(ExportError, match=message):
        quantize_gguf(bf16, tmp_path / "out" / "q.gguf", quantization="q4_k_m")
    assert not list((tmp_path / "out").iterdir())


@needs_llama_cpp
def test_ctrl_c_ends_the_worker_and_leaves_nothing(bf16: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_gguf(bf16, tmp_path / "out" / "q.gguf", quantization="q4_k_m", on_progress=interrupt)
    assert not list((tmp_path / "out").iterdir())


@needs_llama_cpp
def test_an_existing_output_and_a_full_disk_are_refused(
    bf16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "q.gguf").write_text("mine", encoding="utf-8")
    with pytest.raises(ExportError, match=r"q\.gguf exists"):
        quantize_gguf(bf16, tmp_path / "q.gguf", quantization="q4_0")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    with pytest.raises(ExportError, match=r"the q4_0 GGUF needs \d\.\d MB, 1\.0 MB are free"):
        quantize_gguf(bf16, tmp_path / "other.gguf", quantization="q4_0")


_KILLED_PROGRAM = """
import sys
from pathlib import Path
from gemma_tune.exporting.gguf.quantize import quantize_gguf
import gguf
source, output = map(Path, sys.argv[1:])
print("ready", flush=True)
number = 0
while True:
    number += 1
    quantize_gguf(source, output / f"{number}.gguf", quantization="q4_k_m")
"""


@needs_llama_cpp
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL")
def test_what_has_its_name_is_complete_after_a_kill(make_gguf_source: Callable[..., Path], tmp_path: Path) -> None:
    source = make_gguf_source("gemma", hidden_size=512, intermediate_size=2048)
    convert_to_gguf(source, tmp_path / "bf16.gguf", dtype="bf16", provenance=GgufProvenance(name="killed"))

    def write(path: Path) -> object:
        return quantize_gguf(tmp_path / "bf16.gguf", path, quantization="q4_k_m")

    assert num_partials_left(_KILLED_PROGRAM, tmp_path / "bf16.gguf", tmp_path, write=write, longest_seconds=1.5) > 0
