"""What holds for every test: no network, and no test of a GPU where there is none."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

if sys.platform != "win32":
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests of a closed terminal, which nohup has every child ignore
_connect = socket.socket.connect
_resolve = socket.getaddrinfo
_LOCAL_HOSTS = {None, "", "localhost", "127.0.0.1", "::1"}


def _refuse_connect(self: socket.socket, address: Any) -> None:
    """Unix sockets and the own machine are fine: worker processes talk through them."""
    if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in _LOCAL_HOSTS:
        raise ConnectionRefusedError(f"tests open no network connection: {address}")
    _connect(self, address)


def _refuse_resolve(host: Any, *args: Any, **kwargs: Any) -> Any:
    if host not in _LOCAL_HOSTS:
        raise socket.gaierror(socket.EAI_NONAME, f"tests look up no host name: {host}")
    return _resolve(host, *args, **kwargs)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a connection at once and everywhere, instead of after a time-out on machines without network only."""
    monkeypatch.setattr(socket.socket, "connect", _refuse_connect)
    monkeypatch.setattr(socket, "getaddrinfo", _refuse_resolve)


@pytest.fixture(autouse=True, scope="session")
def own_token_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The user's own cache is neither read nor written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GEMMA_TUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_tests:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_tests:
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))


@pytest.fixture
def read_only_directory(tmp_path: Path) -> Path:
    """A directory in which nothing can be made, for root neither."""
    directory = tmp_path / "read-only"
    directory.mkdir()
    directory.chmod(0o500)
    if not os.access(directory, os.W_OK):
        return directory
    if sys.platform != "linux":
        pytest.skip("root may write anywhere here")
    return Path("/sys")


@pytest.fixture
def gemma(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[str, str]]:
    """Run a command in tmp_path; returns stdout and stderr, which hold no escape sequence."""
    from gemma_tune.cli.app import main

    monkeypatch.chdir(tmp_path)

    def command(*arguments: str, code: int = 0) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["gemma-tune", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        assert (ended.value.code or 0) == code, err
        assert "\x1b" not in out + err
        return out, err

    return command
