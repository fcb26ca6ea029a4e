"""What decides a result is told apart, and nothing else is."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from gemma_tune.identity import (
    file_sha256,
    file_stamp,
    files_sha256,
    fingerprint_of,
    installed_version,
    json_sha256,
    text_sha256,
)


def test_versions() -> None:
    assert installed_version("torch")
    assert installed_version("no-such-package") is None


def test_hashes_are_those_of_the_bytes(tmp_path: Path) -> None:
    for name, content in (("b", b"second"), ("a", b"first" * 1_000_000)):
        (tmp_path / name).write_bytes(content)
    expected = {name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in ("a", "b")}
    assert list(files_sha256([tmp_path / "b", tmp_path / "a"]).items()) == sorted(expected.items())
    assert file_sha256(tmp_path / "a") == expected["a"]
    assert text_sha256("ü") == hashlib.sha256("ü".encode()).hexdigest() and text_sha256("\ud800")
    assert json_sha256({"a": 1, "b": [2]}) == json_sha256({"b": [2], "a": 1}) != json_sha256({"a": 1, "b": [3]})


def test_a_fingerprint_changes_with_every_fact_and_file(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"12345")
    before = fingerprint_of([file], "float32", 7)
    assert fingerprint_of([file, file], "float32", 7) == before != fingerprint_of([file], "float32", 8)
    stamp = file_stamp(file)
    os.utime(file, ns=(stamp[1] + 1, stamp[1] + 1))
    assert fingerprint_of([file], "float32", 7) != before and file_stamp(file)[0] == 5
