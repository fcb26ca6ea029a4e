"""Downloads from a hub on the loopback; the oracle is the repository's own bytes and huggingface_hub's cache."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants, scan_cache_dir, snapshot_download

from gemma_tune.errors import ModelError
from gemma_tune.models.directory import check_directory
from gemma_tune.models.fetch import fetch_config, fetch_model
from gemma_tune.models.hub import download as module
from gemma_tune.models.hub.access import HubFile, HubModel, ask_hub, cached_directory, cached_models
from gemma_tune.models.hub.download import download_model, wanted_files
from gemma_tune.paths import TINY_MODEL_DIR
from tests.models import fake_hub
from tests.models.fake_hub import COMMIT, FakeHub, Repository, running_hub, tiny_repository

NAME = "unsloth/gemma-2b"
WEIGHTS = (TINY_MODEL_DIR / "model.safetensors").read_bytes()
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with running_hub(FakeHub({NAME: tiny_repository(TINY_MODEL_DIR)})) as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        template = f"{running.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield running


def _blob(tmp_path: Path, data: bytes = WEIGHTS) -> Path:
    return tmp_path / "hub" / "models--unsloth--gemma-2b" / "blobs" / hashlib.sha256(data).hexdigest()


def test_what_is_needed_and_no_more(hub: FakeHub, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    folder = download_model(ask_hub(NAME), progress=lambda *bytes_: told.append(bytes_))
    assert {path.name for path in folder.iterdir()} == {path.name for path in TINY_MODEL_DIR.iterdir()} - {"README.md"}
    for path in folder.iterdir():
        assert path.read_bytes() == hub.repositories[NAME].files[path.name]
    check_directory(folder)
    assert folder.name == COMMIT
    num_bytes = sum(path.stat().st_size for path in folder.iterdir())
    assert told[-1] == (num_bytes, num_bytes)
    assert [here for here, _ in told] == sorted(here for here, _ in told)
    # huggingface_hub finds the same files by itself, offline, by branch and by commit.
    for revision in (None, "main", COMMIT):
        found = snapshot_download(NAME, revision=revision, local_files_only=True, allow_patterns=["model.safetensors"])
        assert Path(found) == folder
        assert cached_directory(NAME, revision=revision) == folder
    assert not scan_cache_dir(tmp_path / "hub").warnings and cached_models() == [NAME]


def test_a_second_download_fetches_nothing(hub: FakeHub) -> None:
    first = download_model(ask_hub(NAME))
    hub.requests.clear()
    again = download_model(ask_hub(NAME))
    assert again == first
    assert not [path for method, path, *_ in hub.requests if method == "GET" and "/resolve/" in path]
    hub.requests.clear()
    assert fetch_model(NAME, revision=COMMIT).directory == first
    assert not hub.requests, "a commit that is here needs no hub"


def test_a_model_is_shown_from_its_config_alone(hub: FakeHub) -> None:
    hub.repositories["somebody/gemma"] = hub.repositories[NAME]
    assert fetch_config("somebody/gemma") == check_directory(TINY_MODEL_DIR)
    read = {path.rpartition("/")[2] for method, path, *_ in hub.requests if method == "GET" and "/resolve/" in path}
    assert read == {"config.json"}


def test_a_broken_connection_goes_on_where_it_stopped(hub: FakeHub, tmp_path: Path) -> None:
    hub.cut_after = {"model.safetensors": 3_000_000}
    folder = download_model(ask_hub(NAME))
    first, second = hub.ranges("model.safetensors")
    assert first == "bytes=0-" and second is not None
    assert 1_000_000 < int(second[6:-1]) < 3_200_000
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS


def test_a_killed_download_goes_on_where_it_stopped(hub: FakeHub, tmp_path: Path) -> None:
    hub.chunk_seconds = 0.02
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "gemma_tune.cli.app", "models", "download", NAME, "--json"]
    partial = _blob(tmp_path).with_suffix(".partial")
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(300):
        if partial.is_file() and partial.stat().st_size > 2_000_000:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = partial.stat().st_size
    assert 2_000_000 < kept < len(WEIGHTS)
    hub.chunk_seconds = 0.0
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert hub.ranges("model.safetensors") == ["bytes=0-", f"bytes={kept}-"]
    assert (Path(told["directory"]) / "model.safetensors").read_bytes() == WEIGHTS
    assert told["settings"] == [f"model.name={NAME}"] and told["revision"] == COMMIT
    assert not partial.exists()


def test_a_server_without_ranges_sends_all_of_it_again(hub: FakeHub, tmp_path: Path) -> None:
    partial = _blob(tmp_path).with_suffix(".partial")
    partial.parent.mkdir(parents=True)
    partial.write_bytes(WEIGHTS[:1_000_000])
    hub.ignores_ranges = True
    folder = download_model(ask_hub(NAME))
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert hub.ranges("model.safetensors") == ["bytes=1000000-"]


@pytest.mark.parametrize("start", [b"\0" * 1_000_000, WEIGHTS + b"more"], ids=["other bytes", "too long"])
def test_a_damaged_part_is_fetched_again(hub: FakeHub, tmp_path: Path, start: bytes) -> None:
    partial = _blob(tmp_path).with_suffix(".partial")
    partial.parent.mkdir(parents=True)
    partial.write_bytes(start)
    told: list[tuple[int, int]] = []
    folder = download_model(ask_hub(NAME), progress=lambda *bytes_: told.append(bytes_))
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert hub.ranges("model.safetensors")[-1] == "bytes=0-"
    assert told[-1][0] == told[-1][1] and max(here for here, _ in told) <= told[-1][1]


def test_a_file_that_arrives_damaged_is_refused_and_not_kept(hub: FakeHub, tmp_path: Path) -> None:
    hub.damaged = {"model.safetensors"}
    with pytest.raises(ModelError, match=r"model\.safetensors arrived damaged: SHA-256") as caught:
        download_model(ask_hub(NAME))
    assert "proxy" in (caught.value.hint or "")
    blob = _blob(tmp_path)
    assert not blob.exists() and not blob.with_suffix(".partial").exists()
    assert cached_directory(NAME) is None


def test_a_connection_that_breaks_for_good(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    model = ask_hub(NAME)
    hub.status = 503
    with pytest.raises(ModelError, match=r"the download of unsloth/gemma-2b broke off") as caught:
        download_model(model)
    assert "goes on where it stopped" in (caught.value.hint or "")
    assert len(hub.ranges("model.safetensors")) == 5
    hub.requests.clear()
    hub.status = 403
    with pytest.raises(ModelError, match=r"broke off: .*403"):
        download_model(model)
    assert len(hub.ranges("model.safetensors")) == 1, "a refusal is not asked again"


@pytest.mark.parametrize("sha256", ["../../../../etc/passwd", "0" * 63, "G" * 64])
def test_a_hash_that_is_a_path_is_no_hash(hub: FakeHub, sha256: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_hub, "_facts", lambda name, data: {"size": 1, "git": "0" * 40, "sha256": sha256})
    with pytest.raises(ModelError, match=r"what answers is no hub"):
        ask_hub(NAME)


def test_ctrl_c_keeps_the_part(hub: FakeHub, tmp_path: Path) -> None:
    hub.chunk_seconds = 0.01

    def interrupt(done: int, total: int) -> None:
        if done > 2_000_000:
            raise KeyboardInterrupt

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        download_model(ask_hub(NAME), progress=interrupt)
    assert time.monotonic() - start < 10
    assert _blob(tmp_path).with_suffix(".partial").stat().st_size > 1_000_000


def test_a_full_disk_is_told_before_the_first_byte(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 0, 50_000_000))
    with pytest.raises(ModelError, match=r"models--.*: the rest of .* needs \d+\.\d MB, 50\.0 MB are free") as caught:
        download_model(ask_hub(NAME))
    assert "HF_HOME" in (caught.value.hint or "")
    assert not hub.ranges("model.safetensors")


def _model(*names: str) -> HubModel:
    return HubModel("a/b", None, COMMIT, tuple(HubFile(name, 1, None) for name in ("config.json", *names)))


def test_which_weights_are_taken() -> None:
    def names(*files: str) -> list[str]:
        return [file.name for file in wanted_files(_model(*files))]

    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = "model.safetensors.index.json"
    assert names(*shards, index, "consolidated.safetensors", "gemma.gguf") == ["config.json", *shards, index]
    # As in transformers, one file with everything in it comes before shards.
    assert names("model.safetensors", *shards, index) == ["config.json", "model.safetensors"]
    assert names("model.safetensors", "original/consolidated.00.pth", "model-q4.gguf", "rng_state.pth") == [
        "config.json",
        "model.safetensors",
    ]
    texts = ["tokenizer.json", "tokenizer.model", "chat_template.jinja", "preprocessor_config.json"]
    assert names("model.safetensors", *texts, "README.md", ".gitattributes") == [
        "config.json", "model.safetensors", *texts,
    ]  # fmt: skip
    with pytest.raises(ModelError, match=r"has no safetensors weights, only \.bin, \.gguf"):
        names("pytorch_model.bin", "x.gguf")


def test_shards_arrive_at_the_same_time(hub: FakeHub) -> None:
    shards = {f"model-0000{number}-of-00004.safetensors": os.urandom(1_500_000) for number in range(1, 5)}
    index = {"weight_map": {f"t{number}": name for number, name in enumerate(shards)}}
    files = {"config.json": b"{}", "model.safetensors.index.json": json.dumps(index).encode(), **shards}
    hub.repositories[NAME] = Repository(files)
    hub.chunk_seconds = 0.02
    start = time.monotonic()
    folder = download_model(ask_hub(NAME))
    one_by_one = 4 * (1_500_000 / 65_536) * 0.02
    assert time.monotonic() - start < one_by_one
    assert all((folder / name).read_bytes() == data for name, data in shards.items())
