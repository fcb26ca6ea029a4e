from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from gemma_tune.disk import directory_bytes
from gemma_tune.errors import ModelError
from gemma_tune.models.safetensors import file_hashes, read_config, read_header, stored_tensors, weight_files


def write_index(directory: Path, weight_map: Any) -> None:
    path = directory / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")


def make_sharded(directory: Path) -> Path:
    directory.mkdir()
    save_file({"a": torch.zeros(3, 2, dtype=torch.bfloat16)}, directory / "model-00001-of-00002.safetensors")
    save_file({"b": torch.ones(5), "c": torch.tensor(7)}, directory / "model-00002-of-00002.safetensors")
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    write_index(directory, {"b": second, "a": first, "c": second})
    return directory


def write_raw(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_one_file_comes_before_an_index(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    write_index(tmp_path, {"a": "gone.safetensors"})
    assert weight_files(tmp_path) == [tmp_path / "model.safetensors"]
    assert set(stored_tensors(tmp_path)) == {"a"}


def test_shards_through_the_index(tmp_path: Path) -> None:
    directory = make_sharded(tmp_path / "model")
    (directory / "stray.safetensors").write_bytes(b"not named by the index")
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert [path.name for path in weight_files(directory)] == names
    tensors = stored_tensors(directory)
    assert {name: (t.dtype, t.shape, t.num_bytes) for name, t in tensors.items()} == {
        "a": ("BF16", (3, 2), 12),
        "b": ("F32", (5,), 20),
        "c": ("I64", (), 8),
    }
    with tensors["b"].file.open("rb") as file:
        file.seek(tensors["b"].offset_bytes)
        assert torch.frombuffer(bytearray(file.read(20)), dtype=torch.float32).tolist() == [1.0] * 5


@pytest.mark.parametrize(
    "name",
    ["../secret.safetensors", "/etc/secret.safetensors", "a/b.safetensors", "a\\b.safetensors", "c:x.safetensors",
     "..", ".", "", "weights.bin", "x\0.safetensors"],
)  # fmt: skip
def test_an_index_that_points_elsewhere_is_refused(name: str, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    directory.mkdir()
    save_file({"a": torch.zeros(1)}, tmp_path / "secret.safetensors")
    write_index(directory, {"a": name})
    with pytest.raises(ModelError, match="weight_map names"):
        weight_files(directory)


@pytest.mark.parametrize("weight_map", [None, {}, [], "model.safetensors"])
def test_an_index_without_a_map(weight_map: Any, tmp_path: Path) -> None:
    write_index(tmp_path, weight_map)
    with pytest.raises(ModelError, match="no weight_map"):
        weight_files(tmp_path)


def test_incomplete_models(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such model directory"):
        weight_files(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="neither"):
        weight_files(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"pickle \(pytorch_model.bin\)"):
        weight_files(tmp_path)
    directory = make_sharded(tmp_path / "model")
    (directory / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match=r"1 of 2 weight files are missing: model-00002"):
        weight_files(directory)
    with pytest.raises(ModelError, match="no config"):
        read_config(directory)
    (directory / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match="not JSON"):
        read_config(directory)
    (directory / "config.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ModelError, match="not a mapping"):
        read_config(directory)


def test_index_and_files_that_disagree(tmp_path: Path) -> None:
    directory = make_sharded(tmp_path / "model")
    second = "model-00002-of-00002.safetensors"
    save_file({"b": torch.ones(5)}, directory / second)
    with pytest.raises(ModelError, match="says that c is in"):
        stored_tensors(directory)
    save_file({"b": torch.ones(5), "c": torch.ones(1), "a": torch.ones(1)}, directory / second)
    with pytest.raises(ModelError, match=r"a is in model-00001-of-00002\.safetensors and in model-00002"):
        stored_tensors(directory)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "told"),
    [
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        ([], "not a mapping"),
        ({"a": None}, "malformed"),
        ({"a": ENTRY | {"shape": ["x"]}}, "malformed"),
        ({"a": ENTRY | {"data_offsets": [0]}}, "malformed"),
        ({"a": ENTRY | {"dtype": "F3"}}, "unknown dtype F3"),
        ({"a": ENTRY | {"shape": [3]}}, "do not fit"),
        ({"a": ENTRY | {"shape": [-2]}}, "do not fit"),
        ({"a": ENTRY | {"shape": [-1, -2]}}, "do not fit"),
        ({"a": ENTRY | {"data_offsets": [8, 16]}}, "do not fit"),
        ({"a": ENTRY | {"data_offsets": [-8, 0]}}, "do not fit"),
    ],
)
def test_broken_headers(header: Any, told: str, tmp_path: Path) -> None:
    path = write_raw(tmp_path / "x.safetensors", header, b"\0" * 8)
    with pytest.raises(ModelError, match=told):
        read_header(path)


def test_truncated_files(tmp_path: Path) -> None:
    whole = write_raw(
        tmp_path / "x.safetensors", {"a": ENTRY, "__metadata__": {"format": "pt"}}, b"\0" * 8
    ).read_bytes()
    assert list(read_header(tmp_path / "x.safetensors")) == ["a"]
    for length in range(len(whole)):
        path = tmp_path / "cut.safetensors"
        path.write_bytes(whole[:length])
        with pytest.raises(ModelError, match="not a sound safetensors file"):
            read_header(path)


@given(data=st.binary(max_size=64), length=st.integers(0, 2**64 - 1))
def test_any_bytes_give_tensors_or_a_model_error(
    data: bytes, length: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    for content in (data, length.to_bytes(8, "little") + data, len(data).to_bytes(8, "little") + data):
        path.write_bytes(content)
        try:
            assert read_header(path) == {}
        except ModelError:
            continue


def test_hashes_are_the_identity_of_a_model(tmp_path: Path) -> None:
    directory = make_sharded(tmp_path / "model")
    (directory / "config.json").write_text("{}", encoding="utf-8")
    (directory / "tokenizer.json").write_text('{"model": 1}', encoding="utf-8")
    (directory / "README.md").write_text("not part of it", encoding="utf-8")
    hashes = file_hashes(directory)
    assert sorted(hashes) == [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
    ]
    assert list(hashes) == sorted(hashes)
    for name, digest in hashes.items():
        assert digest == hashlib.sha256((directory / name).read_bytes()).hexdigest()


def test_bytes_of_a_directory(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"12345")
    (tmp_path / "model" / "below").mkdir(parents=True)
    (tmp_path / "model" / "below" / "a").write_bytes(b"123")
    (tmp_path / "model" / "link").symlink_to(tmp_path / "blob")
    assert directory_bytes(tmp_path / "model") == 8
