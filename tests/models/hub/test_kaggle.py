"""Kaggle handles, with a stand-in for kagglehub, which is an optional package."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from gemma_tune.errors import ModelError
from gemma_tune.models.fetch import fetch_config, fetch_model
from gemma_tune.models.resolve import KAGGLE_HANDLE, resolve
from gemma_tune.paths import TINY_MODEL_DIR

HANDLE = "google/gemma/transformers/2b-it"


@pytest.fixture
def kagglehub(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Install a kagglehub whose `model_download` returns this, or raises it."""

    def install(result: Path | Exception) -> list[str]:
        asked: list[str] = []

        def model_download(handle: str) -> str:
            asked.append(handle)
            if isinstance(result, Exception):
                raise result
            return str(result)

        module = ModuleType("kagglehub")
        module.model_download = model_download  # type: ignore[attr-defined]
        module.__spec__ = importlib.util.spec_from_loader("kagglehub", None)
        monkeypatch.setitem(sys.modules, "kagglehub", module)
        return asked

    return install


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (HANDLE, True),
        (f"{HANDLE}/3", True),
        ("keras/gemma/keras/gemma_2b_en", True),
        ("google/gemma-2b", False),
        ("gemma-2b", False),
        ("a/b/c", False),
        (f"{HANDLE}/x", False),
        ("/home/me/models/gemma", False),
        ("../a/b/c", False),
    ],
)
def test_what_is_a_handle(name: str, expected: bool) -> None:
    assert (KAGGLE_HANDLE.fullmatch(name) is not None) is expected


def test_a_directory_of_that_name_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / HANDLE).mkdir(parents=True)
    shutil.copytree(TINY_MODEL_DIR, tmp_path / HANDLE, dirs_exist_ok=True)
    assert resolve(HANDLE).kind == "model"


def test_a_download(kagglehub: Callable[..., list[str]]) -> None:
    asked = kagglehub(TINY_MODEL_DIR)
    model = fetch_model(HANDLE)
    assert asked == [HANDLE]
    assert fetch_config(HANDLE) == model.config
    assert model.directory == TINY_MODEL_DIR and model.revision is None and model.config.num_layers > 0


def test_files_of_another_framework() -> None:
    with pytest.raises(ModelError, match=r"holds files for keras") as caught:
        fetch_model("keras/gemma/keras/2b-it")
    assert caught.value.hint == "take the transformers variation: keras/gemma/transformers/2b-it"


def test_kagglehub_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"kagglehub is not installed") as caught:
        fetch_model(HANDLE)
    assert caught.value.hint == "pip install 'kagglehub>=1,<2'"


@pytest.mark.parametrize(
    ("status", "said", "hinted"),
    [
        (403, "Kaggle does not let this machine read", "https://www.kaggle.com/models/google/gemma"),
        (401, "Kaggle does not let this machine read", "KAGGLE_KEY"),
        (404, "Kaggle has no google/gemma/transformers/2b-it", "https://www.kaggle.com/models/google/gemma"),
        (None, "cannot be downloaded from Kaggle: HTTPSConnectionPool", "connect and try again"),
    ],
)
def test_a_refusal(kagglehub: Callable[..., list[str]], status: int | None, said: str, hinted: str) -> None:
    error = OSError("HTTPSConnectionPool: no route\nmore lines")
    error.response = SimpleNamespace(status_code=status)  # type: ignore[attr-defined]
    kagglehub(error)
    with pytest.raises(ModelError, match=said) as caught:
        fetch_model(HANDLE)
    assert hinted in (caught.value.hint or "")


def test_a_download_that_is_no_whole_model(kagglehub: Callable[..., list[str]], tmp_path: Path) -> None:
    kagglehub(tmp_path)
    with pytest.raises(ModelError, match=r"config\.json"):
        fetch_model(HANDLE)
