"""Names of formats: each has a writer and limits, and a wrong one is told with what is near."""

from __future__ import annotations

import importlib
import importlib.util

import pytest

from gemma_tune.errors import ExportError
from gemma_tune.exporting.formats.table import FORMATS, GGUF_AS_MERGED, OLLAMA, find_formats, gguf_for_ollama
from gemma_tune.exporting.verify.parity import LIMITS


@pytest.mark.parametrize("name", FORMATS)
def test_each_has_a_writer_limits_and_something_it_is_made_from(name: str) -> None:
    each = FORMATS[name]
    module, function = each.writer.split(":")
    assert callable(getattr(importlib.import_module(module), function))
    assert each.limits is None or each.limits in LIMITS
    assert each.made_from is None or each.made_from in {*FORMATS, GGUF_AS_MERGED}
    assert each.about


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("merged-16bits", "did you mean 'merged-16bit'"),
        ("gguf-q4_k_n", "did you mean 'q4_k"),
        ("gguf-iq2_xs", "importance matrix"),
        ("onnx", "no export format 'onnx'"),
        ("", "no export format"),
    ],
)
def test_a_wrong_name(name: str, told: str) -> None:
    with pytest.raises(ExportError) as caught:
        find_formats(["adapter", name])
    assert told in f"{caught.value.message} {caught.value.hint}"


def test_names_are_taken_once_in_any_case() -> None:
    assert [each.name for each in find_formats([" Merged-16bit", "adapter", "merged-16bit"])] == [
        "merged-16bit",
        "adapter",
    ]


@pytest.mark.parametrize(
    ("package", "name", "extra"), [("gguf", "ollama", "[gguf]"), ("llama_cpp", "gguf-q4_k_m", "[gguf-quant]")]
)
def test_a_missing_package_is_named_with_its_extra(
    package: str, name: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None if module == package else find(module))
    with pytest.raises(ExportError) as caught:
        find_formats([name])
    assert extra in str(caught.value.hint)


def test_ollama_takes_the_gguf_that_is_asked_for_beside_it() -> None:
    assert gguf_for_ollama(find_formats(["merged-16bit", "gguf-f16", OLLAMA])) == "gguf-f16"
    assert gguf_for_ollama(find_formats([OLLAMA])) == "gguf-q8_0"
