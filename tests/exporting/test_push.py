"""Pushing through the real hub client to a hub on the loopback (tests/exporting/fake_hub.py)."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from gemma_tune.errors import ExportError, GemmaTuneError, HubError
from gemma_tune.exporting.push import find_export, push
from tests.exporting import fake_hub
from tests.made_secrets import SECRETS

TOKEN = "hf_" + "s3cret" * 6


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A hub that knows TOKEN, whose owner is `me`; the client reads its address as it does at its import."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with fake_hub.running_hub({TOKEN: ("me", "team")}) as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        yield running


@pytest.fixture
def export_dir(tmp_path: Path) -> Path:
    """An exported adapter, and beside it what must never leave."""
    directory = tmp_path / "runs" / "mine-001" / "export" / "adapter"
    directory.mkdir(parents=True)
    save_file({"a": torch.ones(64)}, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text('{"base_model_name_or_path": "google/gemma-2b", "r": 8}', "utf-8")
    (directory / "README.md").write_text("---\nlicense: gemma\n---\n# x\n`OWNER/NAME`\n", encoding="utf-8")
    (directory / "NOTICE").write_text("Gemma is provided under\n", encoding="utf-8")
    (directory / "template.yaml").write_text("name: x\n", encoding="utf-8")
    for name in ("optimizer.pt", "training_args.bin", "library.log", "token", ".env", "rng_state.pth", "metrics.jsonl"):
        (directory / name).write_text(TOKEN, encoding="utf-8")
    (directory / "checkpoint-3").mkdir()
    (directory / "checkpoint-3" / "adapter_model.safetensors").write_text("x", encoding="utf-8")
    return directory


PUSHED = {"README.md", "NOTICE", "adapter_config.json", "adapter_model.safetensors", "template.yaml"}


def record(directory: Path, *, passed: bool | None = None, files: dict[str, int] | None) -> None:
    """Write an export.json as `gemma-tune export` does; `files` None is that of an export being written."""
    values: dict[str, Any] = {"format": "adapter", "fingerprint": "f", "base": {}, "adapter": {}, "files": files}
    values["verification"] = None if passed is None else {"result": {"passed": passed}}
    (directory / "export.json").write_text(json.dumps(values | {"schema": 1, "packages": {}}), encoding="utf-8")


def snapshot(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_only_files_of_the_list_go_up_and_all_bytes_arrive(hub: Any, export_dir: Path) -> None:
    before = snapshot(export_dir)
    report = push(export_dir, "me/gemma-mine")
    found = hub.files("me/gemma-mine")
    assert set(found) == PUSHED == set(report.files)
    for name in PUSHED - {"README.md"}:
        assert found[name] == (export_dir / name).read_bytes()
    assert found["README.md"].endswith(b"`me/gemma-mine`\n")
    assert {"optimizer.pt", "checkpoint-3", ".env", "token"} <= set(report.left_out)
    assert report.url == f"{hub.url}/me/gemma-mine" and len(report.commit) == 40
    assert hub.repositories["me/gemma-mine"].commits == ["Upload with gemma-tune"]
    assert snapshot(export_dir) == before
    # The token is in the header that carries it and nowhere else.
    for _, path, sent in hub.requests:
        lines = [line for line in sent.splitlines() if TOKEN.encode() in line]
        assert all(line.startswith((b"Authorization: ", b"authorization: ")) for line in lines)
        assert not path.startswith("/objects/") or not lines


def test_private_branch_message_and_a_second_push(hub: Any, export_dir: Path) -> None:
    push(export_dir, "team/x", private=True, revision="v2", commit_message="Second try")
    assert hub.repositories["team/x"].private
    assert set(hub.files("team/x", "v2")) == PUSHED and hub.files("team/x") == {}
    assert hub.repositories["team/x"].commits == ["Second try"]
    uploads = sum(method == "PUT" for method, _, _ in hub.requests)
    push(export_dir, "team/x", private=True)
    assert sum(method == "PUT" for method, _, _ in hub.requests) == uploads, "weights go up once"
    assert set(hub.files("team/x")) == PUSHED


def test_private_weights_never_go_to_a_public_repository(hub: Any, export_dir: Path) -> None:
    push(export_dir, "me/open")
    with pytest.raises(ExportError, match=r"me/open exists already and is public"):
        push(export_dir, "me/open", private=True)
    assert len(hub.repositories["me/open"].commits) == 1


def test_weights_are_not_mixed_with_others(hub: Any, export_dir: Path) -> None:
    hub.repositories["me/x"] = fake_hub.Repository(private=False)
    hub.files("me/x").update({"model-00001-of-00002.safetensors": b"", "model.safetensors.index.json": b"{}"})
    with pytest.raises(ExportError, match=r"would not replace: model-00001-of-00002\.safetensors, model\.safe"):
        push(export_dir, "me/x")
    assert not hub.repositories["me/x"].commits


def test_several_gguf_files_share_a_repository(hub: Any, tmp_path: Path) -> None:
    for name in ("a-q8_0", "a-f16"):
        directory = tmp_path / name
        directory.mkdir()
        (directory / f"{name}.gguf").write_bytes(b"GGUF" + name.encode())
        push(directory, "me/gguf")
    assert set(hub.files("me/gguf")) == {"a-q8_0.gguf", "a-f16.gguf"}


# --- refused before anything is sent ----------------------------------------------------------------------------------


def refused(directory: Path, hub: Any, match: str, **options: Any) -> GemmaTuneError:
    with pytest.raises(GemmaTuneError, match=match) as caught:
        push(directory, options.pop("repo_id", "me/x"), **options)
    assert not hub.requests
    assert TOKEN not in f"{caught.value.message} {caught.value.hint}"
    return caught.value


def test_a_failed_verdict_needs_force(hub: Any, export_dir: Path) -> None:
    record(export_dir, passed=False, files={})
    assert "--force" in (refused(export_dir, hub, r"did not pass its check").hint or "")
    push(export_dir, "me/x", force=True)
    assert "export.json" not in hub.files("me/x")


@pytest.mark.parametrize("passed", [True, None])
def test_a_passed_and_an_unchecked_export(passed: bool | None, hub: Any, export_dir: Path) -> None:
    size = (export_dir / "adapter_model.safetensors").stat().st_size
    record(export_dir, passed=passed, files={"adapter_model.safetensors": size})
    assert set(push(export_dir, "me/x").files) == PUSHED


def test_unfinished_or_changed_exports(hub: Any, export_dir: Path) -> None:
    record(export_dir, files=None)
    refused(export_dir, hub, r"was not finished")
    record(export_dir, files={"adapter_model.safetensors": 1, "config.json": 3})
    refused(export_dir, hub, r"adapter_model\.safetensors, config\.json changed or missing", force=True)
    partial = export_dir.rename(export_dir.with_name(".adapter.partial"))
    refused(partial, hub, r"was not finished")


def test_a_missing_shard_and_no_export_at_all(hub: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    refused(tmp_path, hub, r"is no export: it has neither an adapter nor a model nor a GGUF file")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    save_file({"a": torch.ones(1)}, tmp_path / "model-00001-of-00002.safetensors")
    refused(tmp_path, hub, r"model-00002-of-00002\.safetensors")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("adapter_config.json", '{"base_model_name_or_path": "/home/alice/gemma"}'),
        ("adapter_config.json", '{"base_model_name_or_path": "../gemma"}'),
        ("tokenizer_config.json", '{"tokenizer_file": "/srv/x/tokenizer.json"}'),
        ("template.yaml", "# see /Users/alice/notes.txt"),
        *(("README.md", f"# x {secret}") for secret in SECRETS.values()),
        *(("template.yaml", f"# x {secret}") for secret in SECRETS.values()),
    ],
)
def test_paths_and_secrets_are_found(name: str, content: str, hub: Any, export_dir: Path) -> None:
    (export_dir / name).write_text(content, encoding="utf-8")
    refused(export_dir, hub, rf"{name} holds a path of this machine or a secret")


def test_links_do_not_carry_other_files_away(hub: Any, export_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x", encoding="utf-8")
    (export_dir / "config.json").symlink_to(tmp_path / "secret")
    refused(export_dir, hub, r"config\.json is not a plain file")


@pytest.mark.parametrize("repo_id", ["x", "me/x/y", "me/", "../x", "me/x y", "https://huggingface.co/me/x"])
def test_names_that_are_no_repository(repo_id: str, hub: Any, export_dir: Path) -> None:
    refused(export_dir, hub, r"is not a repository on the hub", repo_id=repo_id)


# --- what the hub answers ---------------------------------------------------------------------------------------------


def failed(directory: Path, match: str, **options: Any) -> HubError:
    """The push fails as a HubError whose hint holds the command to go on with; the files stay as they are."""
    before = snapshot(directory)
    with pytest.raises(HubError, match=match) as caught:
        push(directory, options.pop("repo_id", "me/x"), **options)
    assert caught.value.exit_code == 4
    assert f"gemma-tune push {directory} " in (caught.value.hint or "")
    assert TOKEN not in f"{caught.value.message} {caught.value.hint}"
    assert snapshot(directory) == before
    return caught.value


def test_not_logged_in(hub: Any, export_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(export_dir / "none"))
    options = {"private": True, "revision": "v2", "commit_message": "a b", "force": True}
    error = failed(export_dir, r"this machine is not logged in", **options)
    assert error.hint and "hf auth login" in error.hint
    assert error.hint.endswith("me/x --private --revision v2 --message 'a b' --force")
    assert not hub.requests


def test_a_token_that_the_hub_does_not_know(hub: Any, export_dir: Path) -> None:
    hub.tokens.clear()
    assert "hf auth login" in failed(export_dir, r"does not accept this machine's token").hint


def test_no_right_to_write(hub: Any, export_dir: Path) -> None:
    failed(export_dir, r"may not write to google/gemma-2b", repo_id="google/gemma-2b")
    hub.repositories["google/gemma-2b"] = fake_hub.Repository(private=False)
    failed(export_dir, r"may not write to google/gemma-2b", repo_id="google/gemma-2b")
    assert not hub.repositories["google/gemma-2b"].commits


@pytest.mark.parametrize("part", ["/api/repos/create", "/commit/"])
@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_hub_in_trouble(part: str, status: int, hub: Any, export_dir: Path) -> None:
    hub.fail[("POST", part)] = status
    failed(export_dir, rf"the hub answered with status {status}; nothing was lost, .*adapter is complete")
    assert not any(repository.commits for repository in hub.repositories.values())


def test_an_upload_that_breaks_off_is_gone_on_with(hub: Any, export_dir: Path) -> None:
    hub.fail[("PUT", "/objects/")] = 403
    failed(export_dir, r"may not write to me/x")
    assert hub.files("me/x") == {}
    hub.fail.clear()
    push(export_dir, "me/x")
    assert set(hub.files("me/x")) == PUSHED


def test_a_card_that_the_hub_refuses(hub: Any, export_dir: Path) -> None:
    hub.fail[("POST", "/api/validate-yaml")] = 400
    failed(export_dir, r"the hub refused the upload")


def test_an_unreachable_hub(export_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with socket.socket() as unused:  # bound, not listening: a connection is refused
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        failed(export_dir, r"the hub cannot be reached \(ConnectError\); nothing was lost")
    monkeypatch.setattr(constants, "ENDPOINT", "http://hub.invalid")
    failed(export_dir, r"the hub cannot be reached \(ConnectError\)")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    failed(export_dir, r"the hub cannot be reached \(OfflineModeIsEnabled\)")


# --- which directory --------------------------------------------------------------------------------------------------


def test_the_export_of_a_run(export_dir: Path, tmp_path: Path) -> None:
    run = export_dir.parents[1]
    assert find_export(export_dir) == export_dir
    (run / "manifest.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ExportError, match=r"mine-001 has no export yet") as caught:
        find_export(run)
    assert f"gemma-tune export {run} --format adapter" in (caught.value.hint or "")
    record(export_dir, files={})
    assert find_export(run) == export_dir
    other = export_dir.with_name("gguf-q8_0")
    other.mkdir()
    record(other, files={})
    with pytest.raises(ExportError, match=r"has 2 exports") as caught:
        find_export(run)
    assert str(other) in (caught.value.hint or "")
    with pytest.raises(ExportError, match=r"no such directory"):
        find_export(tmp_path / "none")
