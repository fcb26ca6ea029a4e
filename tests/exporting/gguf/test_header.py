from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from gemma_tune.errors import ExportError
from gemma_tune.exporting.gguf.convert import GgufProvenance, convert_to_gguf
from gemma_tune.exporting.gguf.header import read_gguf_header
from gemma_tune.paths import TINY_MODEL_DIR

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    convert_to_gguf(TINY_MODEL_DIR, output, dtype="q8_0", provenance=GgufProvenance(name="tiny"))
    return output


def test_header_is_what_the_reference_reader_reads(tiny_gguf: Path) -> None:
    header, reference = read_gguf_header(tiny_gguf), gguf.GGUFReader(tiny_gguf)
    expected = [
        (t.name, tuple(reversed(t.shape.tolist())), t.tensor_type.name, t.data_offset, t.n_bytes)
        for t in reference.tensors
    ]
    assert [(t.name, t.shape, t.type, t.offset_bytes, t.num_bytes) for t in header.tensors] == expected
    lists = {"tokenizer.ggml.tokens", "tokenizer.ggml.scores", "tokenizer.ggml.token_type"}
    fields = {key: field.contents() for key, field in reference.fields.items() if not key.startswith("GGUF.")}
    assert header.metadata == {key: value for key, value in fields.items() if key not in lists}
    assert fields.keys() - header.metadata.keys() == lists
    assert read_gguf_header(tiny_gguf, with_lists=True).metadata == fields


@pytest.mark.parametrize("length", [20, 30, 5000, -1])
def test_a_file_that_is_cut_short_is_refused(tiny_gguf: Path, tmp_path: Path, length: int) -> None:
    data = tiny_gguf.read_bytes()
    last = max(t.offset_bytes + t.num_bytes for t in read_gguf_header(tiny_gguf).tensors)
    (tmp_path / "cut.gguf").write_bytes(data[: last - 1 if length < 0 else length])
    with pytest.raises(ExportError, match=r"cut\.gguf: damaged or cut short"):
        read_gguf_header(tmp_path / "cut.gguf")


def test_a_damaged_length_is_refused(tiny_gguf: Path, tmp_path: Path) -> None:
    data = tiny_gguf.read_bytes()
    name = b"tokenizer.ggml.scores"
    at = data.index(name) + len(name) + 8  # after the kinds of the value and of its elements
    (tmp_path / "cut.gguf").write_bytes(data[:at] + (1 << 60).to_bytes(8, "little") + data[at + 8 :])
    with pytest.raises(ExportError, match=r"cut\.gguf: damaged or cut short"):
        read_gguf_header(tmp_path / "cut.gguf")


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"no such file"):
        read_gguf_header(tmp_path / "none.gguf")
    shutil.copyfile(TINY_MODEL_DIR / "model.safetensors", tmp_path / "other.gguf")
    with pytest.raises(ExportError, match=r"other\.gguf: not a GGUF file"):
        read_gguf_header(tmp_path / "other.gguf")
