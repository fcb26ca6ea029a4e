"""The hub, a recipe's model and its rows, through the real clients against a hub on the loopback."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gemma_tune.doctor.libraries import check_data, check_engine, check_hub, check_model
from gemma_tune.doctor.run_probes import Probed, run_probe
from gemma_tune.paths import TINY_MODEL_DIR
from tests.doctor.conftest import Stub
from tests.models.fake_hub import Account, FakeHub, running_hub, silent_server, tiny_repository

GATED, TOKEN = "google/gemma-2b", "hf_plantedplantedplanted"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    repositories = {GATED: tiny_repository(TINY_MODEL_DIR, gated=True), "a/open": tiny_repository(TINY_MODEL_DIR)}
    with running_hub(FakeHub(repositories, {TOKEN: Account(accepted=(GATED,))})) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        yield running


def _hub() -> tuple[str, str, str | None]:
    probe = run_probe("hub", seconds=20)
    assert TOKEN not in json.dumps(dict(probe.facts)) + probe.error
    finding = check_hub(probe)
    return (finding.verdict, finding.found, finding.fix)


def test_not_logged_in(hub: FakeHub) -> None:
    assert _hub() == ("warn", "reachable, not logged in: gated models (Gemma 1 to 3) are refused", "hf auth login")


def test_logged_in_by_the_environment_or_the_login(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert _hub() == ("ok", "reachable, logged in with HF_TOKEN", None)
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "token").write_text(TOKEN, encoding="ascii")
    assert _hub() == ("ok", "reachable, logged in with the login", None)
    hub.accounts[TOKEN].role = "fineGrained"
    assert "must be allowed to read public gated repositories" in _hub()[1]


def test_a_token_that_is_not_valid(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_expiredexpiredexpired")
    verdict, found, fix = _hub()
    assert verdict == "fail" and "token of HF_TOKEN is not valid" in found and fix is not None and "unset it" in fix


def test_a_hub_that_is_down(hub: FakeHub) -> None:
    hub.status = 503
    assert _hub()[:2] == ("warn", "answers with status 503")
    hub.status, hub.page = None, "<html>Welcome to our hotel</html>"
    assert _hub()[0] == "warn"


def test_offline_mode(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert _hub() == ("warn", "HF_HUB_OFFLINE is set: nothing is downloaded", "unset HF_HUB_OFFLINE")
    assert not hub.requests


def test_no_network(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    verdict, found, _ = _hub()
    assert verdict == "warn" and found.startswith("cannot be reached (") and "Errno" not in found
    with silent_server() as silent:
        monkeypatch.setenv("HF_ENDPOINT", silent)
        start = time.monotonic()
        verdict, found, _ = _hub()
        assert time.monotonic() - start < 10
    assert verdict == "warn" and "(no answer)" in found


def test_a_name_look_up_that_hangs(hub: FakeHub, stub_module: Stub) -> None:
    stub_module("sitecustomize", "import socket, time\nsocket.getaddrinfo = lambda *args, **kwargs: time.sleep(600)\n")
    finding = check_hub(run_probe("hub", seconds=3))
    assert finding.verdict == "warn" and "no answer within 3 s while asking the hub" in finding.found


def _model(name: str, revision: str | None = None) -> Probed:
    return run_probe("model", {"name": name, "revision": revision}, seconds=30)


def test_the_model_of_a_recipe(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = check_model(_model("gemma-tiny"), name="gemma-tiny")
    assert (here.verdict, here.found) == ("ok", "gemma-tiny is on this machine")
    gated = check_model(_model(GATED), name=GATED)
    assert gated.verdict == "fail" and "is gated" in gated.found and "unsloth/gemma-2b" in (gated.fix or "")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    size = (TINY_MODEL_DIR / "model.safetensors").stat().st_size
    probe = _model(GATED)
    assert size < probe.facts["missing_bytes"] < size + 3_000_000
    assert check_model(probe, name=GATED).verdict == "ok"
    unknown = check_model(_model("google/gemma-2b", "v9"), name=GATED)
    assert unknown.verdict == "fail" and "has no revision 'v9'" in unknown.found
    broken = check_model(_model(str(tmp_path / "nowhere")), name="nowhere")
    assert broken.verdict == "fail" and "no such directory" in broken.found


def test_the_rows_of_a_recipe(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n', encoding="utf-8")

    def look(**data: object) -> Probed:
        return run_probe("data", {"model": "gemma-tiny", "data": {"max_seq_tokens": 64, **data}}, seconds=60)

    good = check_data(look(source=str(rows)))
    assert (good.verdict, good.found) == ("ok", "rows.jsonl as completion")
    missing = check_data(look(source=str(tmp_path / "row.jsonl")))
    assert missing.verdict == "fail" and missing.fix
    unknown = check_data(look(source=str(rows), template="dolly"))
    assert unknown.verdict == "fail" and "instruction" in unknown.found + (unknown.fix or "")


def test_rows_that_take_long_are_a_warning() -> None:
    finding = check_data(Probed("hung", "reading the rows", {}, "no answer within 90 s", 90.0))
    assert finding.verdict == "warn"


def test_the_engine_and_the_trainer() -> None:
    both = [("unsloth", "ok"), ("trl", "ok")]
    done = Probed("done", "importing trl", {"engine": "unsloth", "trainer": "trl"}, "", 9.0)
    assert [(item.name, item.verdict) for item in check_engine(done)] == both
    plain = Probed("done", "importing trl", {"engine": "transformers", "trainer": "trl"}, "", 9.0)
    assert [(item.name, item.verdict) for item in check_engine(plain)] == [("unsloth", "warn"), ("trl", "ok")]
    half = Probed("failed", "importing trl", {"engine": "unsloth"}, "AttributeError: apply", 9.0)
    trainer = check_engine(half)[1]
    assert trainer.verdict == "fail" and trainer.found == "AttributeError: apply while importing trl"
    assert trainer.fix is not None and "'trl==1.14.2'" in trainer.fix
