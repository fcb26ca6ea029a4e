from __future__ import annotations

from pathlib import Path

import pytest

from gemma_tune.errors import ModelError
from gemma_tune.inference.target import GgufTarget, Target, find_target
from gemma_tune.paths import TINY_MODEL_DIR


def test_a_base_model_does_not_guess_its_template() -> None:
    with pytest.raises(ModelError, match=r"gemma-tiny does not say which data template") as error:
        find_target("gemma-tiny")
    assert error.value.hint and "--template" in error.value.hint
    found = find_target("gemma-tiny", default_template="completion")
    assert isinstance(found, Target)
    assert (found.template.name, found.adapter, found.tokenizer) == ("completion", None, TINY_MODEL_DIR)
    assert find_target("gemma-tiny", template="dolly", default_template="completion").template.name == "dolly"


def test_a_gguf_by_its_name_and_by_its_directory(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").touch()
    found = find_target(str(tmp_path / "a.gguf"))
    assert found == find_target(str(tmp_path)) and isinstance(found, GgufTarget)
    assert found.template.name == "chat"
    (tmp_path / "template.yaml").write_text(find_target("gemma-tiny", template="dolly").template.source_text, "utf-8")
    assert find_target(str(tmp_path)).template.name == "dolly"
    assert find_target(str(tmp_path), template="alpaca").template.name == "alpaca"
    (tmp_path / "b.gguf").touch()
    with pytest.raises(ModelError, match=r"holds 2 GGUF files"):
        find_target(str(tmp_path))
    with pytest.raises(ModelError, match=r"whose base cannot be asked"):
        find_target(str(tmp_path / "a.gguf"), without_adapter=True)
