"""SHA-256 that are kept: never one of another content, whatever was done to the file or to the cache."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gemma_tune.models import hash_cache
from gemma_tune.models.hash_cache import cached_sha256


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("GEMMA_TUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hash_cache, "_UNSETTLED_NS", 0)  # no test waits for two seconds, but the one of that
    yield tmp_path / "cache"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def make(path: Path, content: bytes) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    time.sleep(0.01)
    return path


def stored(cache: Path) -> dict[str, Any]:
    (file,) = (cache / "hashes").glob("*.json")
    entries: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return entries


def test_what_has_not_changed_is_not_read_again(tmp_path: Path, cache: Path) -> None:
    file = make(tmp_path / "m" / "a.safetensors", b"one")
    assert cached_sha256([file]) == {"a.safetensors": sha256(b"one")}
    (entry,) = (cache / "hashes").glob("*.json")
    text = entry.read_text(encoding="utf-8").replace(sha256(b"one"), "f" * 64)
    entry.write_text(text, encoding="utf-8")
    assert cached_sha256([file]) == {"a.safetensors": "f" * 64}
    assert cached_sha256([]) == {}


@pytest.mark.parametrize("how", ["in place", "replaced", "time set back", "same name elsewhere", "link turned"])
def test_every_change_is_seen(tmp_path: Path, how: str) -> None:
    file = make(tmp_path / "m" / "a", b"one")
    if how == "link turned":
        file = tmp_path / "m" / "link"
        file.symlink_to("a")
    cached_sha256([file])
    before = file.stat()
    if how == "same name elsewhere":
        file = make(tmp_path / "n" / "a", b"two")
    elif how == "replaced":
        make(tmp_path / "m" / "b", b"two").replace(file)
    elif how == "link turned":
        make(tmp_path / "m" / "b", b"two")
        file.unlink()
        file.symlink_to("b")
    else:
        make(file, b"two")
    if how in ("time set back", "replaced"):
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert cached_sha256([file]) == {file.name: sha256(b"two")}


def test_what_was_written_a_moment_ago_is_not_kept(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A clock of two seconds, as FAT has: the second content has the stamp of the first.
    monkeypatch.setattr(hash_cache, "_UNSETTLED_NS", 2_000_000_000)
    file = make(tmp_path / "m" / "a", b"one")
    cached_sha256([file])
    assert not (cache / "hashes").exists()
    os.utime(file, ns=(0, time.time_ns() + 10**12))  # of the future
    cached_sha256([file])
    assert not (cache / "hashes").exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": 1}', '{"a": {}}', '{"a": {"stamp": null}}'])
def test_a_damaged_cache_costs_time_alone(tmp_path: Path, cache: Path, content: str) -> None:
    file = make(tmp_path / "m" / "a", b"one")
    cached_sha256([file])
    (entry,) = (cache / "hashes").glob("*.json")
    entry.write_text(content, encoding="utf-8")
    assert cached_sha256([file]) == {"a": sha256(b"one")}
    assert stored(cache)["a"]["sha256"] == sha256(b"one")


def test_a_cache_that_cannot_be_written_costs_time_alone(
    tmp_path: Path, read_only_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = make(tmp_path / "m" / "a", b"one")
    for place in (read_only_directory / "cache", file):  # a folder without rights, and a file
        monkeypatch.setenv("GEMMA_TUNE_CACHE", str(place))
        assert cached_sha256([file]) == {"a": sha256(b"one")}


def test_files_are_kept_one_by_one(tmp_path: Path, cache: Path) -> None:
    one, two = make(tmp_path / "m" / "b", b"one"), make(tmp_path / "m" / "a", b"two")
    cached_sha256([one])
    assert list(cached_sha256([one, two])) == ["a", "b"]
    assert stored(cache).keys() == {"a", "b"}
