"""What a refused or silent hub is told as. The client is the real one, in a process of its own as a user starts it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gemma_tune.models.catalogue import MODELS
from gemma_tune.paths import TINY_MODEL_DIR
from tests.models.fake_hub import COMMIT, Account, FakeHub, Repository, running_hub, silent_server, tiny_repository

GATED, OPEN = "google/gemma-2b", "unsloth/gemma-2b"
TOKEN, SCOPELESS, ACCEPTED = "hf_readerreaderreaderreader", "hf_scopelessscopelessscope", "hf_acceptedacceptedaccept"


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    repositories = {
        GATED: tiny_repository(TINY_MODEL_DIR, gated=True),
        OPEN: tiny_repository(TINY_MODEL_DIR),
        "somebody/only-gguf": Repository({"model.gguf": b"GGUF", "README.md": b""}),
        "somebody/pickled": Repository({"config.json": b"{}", "pytorch_model.bin": b"pickle"}),
    }
    accounts = {TOKEN: Account(), SCOPELESS: Account(may_read_gated=False), ACCEPTED: Account(accepted=(GATED,))}
    with running_hub(FakeHub(repositories, accounts)) as running:
        yield running


def _run(
    arguments: list[str], home: Path, *, url: str, token: str | None = None, **extra: str
) -> tuple[int, str, str, float]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", **extra}
    if token is not None:
        environment["HF_TOKEN"] = token
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "gemma_tune.cli.app", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "Traceback" not in done.stderr, done.stderr
    for secret in (TOKEN, SCOPELESS, ACCEPTED):
        assert secret not in done.stdout + done.stderr
    return done.returncode, done.stdout, done.stderr, time.monotonic() - start


@pytest.mark.parametrize(
    ("name", "token", "said", "hinted"),
    [
        (GATED, None, "google/gemma-2b is gated, and this machine is not logged in", "huggingface.co/google/gemma-2b"),
        (
            GATED,
            TOKEN,
            "the account of this machine's token has not accepted its licence",
            "model.name=unsloth/gemma-2b",
        ),
        (GATED, SCOPELESS, "this machine's token may not read gated repositories", "settings/tokens"),
        (GATED, "hf_expiredexpiredexpired", "the hub does not know this machine's token", "hf auth login"),
        ("google/gemma-2c", TOKEN, "the hub has no model google/gemma-2c", "did you mean 'google/gemma-2b'?"),
        ("google/gemma-2c", None, "the hub has no model google/gemma-2c, or it is private", "hf auth login"),
        ("somebody/only-gguf", None, "has no config.json", "gemma-tune models list"),
        ("somebody/pickled", None, "has no safetensors weights, only .bin", "pickle"),
    ],
)
def test_every_refusal_has_its_own_message(
    hub: FakeHub, tmp_path: Path, name: str, token: str | None, said: str, hinted: str
) -> None:
    code, out, err, seconds = _run(["models", "download", name], tmp_path, url=hub.url, token=token)
    flat = " ".join(err.split())
    assert code == 2 and not out
    assert said in flat and hinted in flat
    assert seconds < 10
    assert not any(path.endswith(".safetensors") for _, path, _, _ in hub.requests), "nothing was downloaded first"


@pytest.mark.slow
def test_an_accepted_licence_downloads_and_is_found_offline(hub: FakeHub, tmp_path: Path) -> None:
    code, out, err, _ = _run(["models", "download", GATED], tmp_path, url=hub.url, token=ACCEPTED)
    assert code == 0, err
    folder = Path(out.split()[0])
    assert folder.name == COMMIT and (folder / "model.safetensors").is_file()
    # Offline, on a silent hub and with a token that lost its access, the cache serves.
    for extra in ({"HF_HUB_OFFLINE": "1"}, {}):
        with silent_server() as silent:
            code, out, err, seconds = _run(["models", "download", GATED], tmp_path, url=silent, **extra)
        assert (code, Path(out.split()[0]), seconds < 10) == (0, folder, True), err
    code, out, err, _ = _run(["models", "download", GATED], tmp_path, url=hub.url, token=TOKEN)
    assert code == 0 and Path(out.split()[0]) == folder
    # What is cached is told where another model is asked for.
    with silent_server() as silent:
        code, _, err, seconds = _run(["models", "download", OPEN], tmp_path, url=silent)
    assert code == 2 and seconds < 10
    assert "no answer within" in err and GATED in err


@pytest.mark.parametrize("recipe", ["gemma-2b-dolly"])
def test_training_asks_the_hub_before_anything_else(hub: FakeHub, tmp_path: Path, recipe: str) -> None:
    code, _, err, seconds = _run(["train", recipe, f"run.output_dir={tmp_path}/runs"], tmp_path, url=hub.url)
    assert code == 2 and seconds < 10
    assert f"{GATED} is gated" in err and not (tmp_path / "runs").exists()


def test_a_name_look_up_that_hangs(tmp_path: Path) -> None:
    """The resolver of this process never returns, as behind some captive portals."""
    program = (
        "import socket, sys, time\n"
        "socket.getaddrinfo = lambda *args, **kwargs: time.sleep(600)\n"
        "from gemma_tune.cli.app import main\n"
        "sys.argv = ['gemma-tune', 'models', 'download', 'gemma-2b']\n"
        "main()\n"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://hub.invalid"}
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "no answer within 6 s" in done.stderr
    assert "gemma-tiny" in done.stderr
    assert time.monotonic() - start < 10


def test_an_unknown_host_and_a_closed_port(tmp_path: Path) -> None:
    for url in ("http://127.0.0.1:9", "http://hub.invalid"):
        code, _, err, seconds = _run(["models", "download", "gemma-2b"], tmp_path, url=url)
        assert code == 2 and seconds < 10
        assert "google/gemma-2b is not on this machine, and the hub cannot be asked" in err


def test_an_overloaded_hub_and_offline_mode(hub: FakeHub, tmp_path: Path) -> None:
    hub.status = 503
    code, _, err, _ = _run(["models", "download", "gemma-2b"], tmp_path, url=hub.url)
    assert code == 2 and "status 503" in err
    code, _, err, _ = _run(["models", "download", "gemma-2b"], tmp_path, url=hub.url, HF_HUB_OFFLINE="1")
    assert code == 2 and "HF_HUB_OFFLINE is set" in err


def test_a_log_in_page_of_the_network(hub: FakeHub, tmp_path: Path) -> None:
    """A captive portal answers everything with 200 and a page."""
    hub.page = "<html>Welcome to our hotel</html>"
    code, _, err, _ = _run(["models", "download", "gemma-2b"], tmp_path, url=hub.url)
    assert code == 2 and "what answers is no hub" in err


def test_every_gated_gemma_1_to_3_with_a_mirror_names_it() -> None:
    from gemma_tune.models.hub.access import _mirror_hint

    gated = [model for model in MODELS.values() if model.is_gated and model.mirror_16bit]
    assert gated
    for model in gated:
        assert model.hub_id is not None and model.mirror_16bit is not None
        assert model.mirror_16bit in _mirror_hint(model.hub_id)
        assert _mirror_hint(model.mirror_16bit) == ""
