"""Names of formats: each has a parent, and a wrong one is refused with what is near."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from gemma_tune.errors import ExportError
from gemma_tune.exporting.export_source import ExportSource
from gemma_tune.exporting.formats.registry import FORMATS, find_formats
from gemma_tune.models.fetch import fetch_model
from gemma_tune.paths import TINY_MODEL_DIR
from gemma_tune.runs.layout import RunDir

SOURCE = ExportSource("mine", fetch_model("gemma-tiny"), {}, Path(), RunDir(Path()), TINY_MODEL_DIR, None, None)


@pytest.mark.parametrize("name", FORMATS)
def test_each_says_what_it_is_and_is_made_from(name: str) -> None:
    each = FORMATS[name]
    assert each.about and each.card.about and each.files
    parents = []
    while (parent := each.parent(SOURCE, [each], "auto")) is not None:
        each = FORMATS[parent]
        parents.append(parent)
    assert name in ("adapter", "merged-16bit") or parents[-1] == "merged-16bit"


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
    ("package", "name", "command"),
    [("gguf", "ollama", "pip install 'gguf>="), ("llama_cpp", "gguf-q4_k_m", "'llama-cpp-python==")],
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    package: str, name: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None if module == package else find(module))
    with pytest.raises(ExportError) as caught:
        find_formats([name])
    assert command in str(caught.value.hint)


def test_ollama_takes_the_smallest_gguf_that_is_asked_for_with_it() -> None:
    ollama = FORMATS["ollama"]
    assert ollama.parent(SOURCE, find_formats(["merged-16bit", "gguf-f16", "ollama"]), "auto") == "gguf-f16"
    assert ollama.parent(SOURCE, find_formats(["ollama"]), "auto") == "gguf-q8_0"
    several = find_formats(["gguf-f32", "gguf-f16", "ollama", "gguf-q8_0"])
    assert ollama.parent(SOURCE, several, "auto") == "gguf-q8_0"
    assert ollama.parent(SOURCE, several[:3], "auto") == "gguf-f16"
