"""The token cache: the same rows again, never those of other inputs, never half of them."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemma_tune.data.encode import cache
from gemma_tune.data.encode.encode_rows import Datasets
from gemma_tune.data.encode.encoder import Encoder
from gemma_tune.data.inputs import open_inputs
from gemma_tune.data.open import build_datasets
from gemma_tune.paths import CACHE_VARIABLE, DATA_TEMPLATES_DIR, PACKAGE_DIR
from gemma_tune.recipe.schema import DataSection


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


def save(path: Path, count: int, *, answer: str = "It is") -> Path:
    rows = [{"instruction": f"What is {n}?", "response": f"{answer} {n}.", "category": "qa"} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def build(path: Path, tokenizer: Any, *, files: dict[str, str] | None = None, **settings: Any) -> Datasets:
    section = DataSection(**{"source": str(path), "max_seq_tokens": 256, "eval_fraction": 0.2} | settings)
    inputs = open_inputs(section, prefers_chat=False)
    files = files or {"tokenizer.json": "1"}
    return build_datasets(section, inputs, Encoder(tokenizer), chat=None, tokenizer_files=files)


def test_a_hit_is_equal_in_everything(tmp_path: Path, tokenizer: Any) -> None:
    path = save(tmp_path / "rows.jsonl", 60)
    first, second = build(path, tokenizer), build(path, tokenizer)
    assert (first.cached, second.cached) == (False, True)
    assert list(first.train) == list(second.train) and list(first.eval) == list(second.eval)
    assert list(first.train_places) == list(second.train_places) and first.eval
    assert list(first.eval_examples) == list(second.eval_examples)
    assert first.report == second.report
    assert first.report.lines() == second.report.lines()


@pytest.mark.parametrize(
    "change",
    [
        {"max_seq_tokens": 255},
        {"train_on": "all"},
        {"seed": 1},
        {"eval_fraction": 0.1},
        {"max_train_rows": 5},
        {"template": "dolly"},
        {"clean": {"strip_citations": True}},
        {"control_tokens": "refuse"},
    ],
)
def test_another_setting_is_a_miss(change: dict[str, Any], tmp_path: Path, tokenizer: Any) -> None:
    path = save(tmp_path / "rows.jsonl", 60)
    build(path, tokenizer)
    assert not build(path, tokenizer, **change).cached


def test_other_rows_template_or_tokenizer_are_a_miss(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path / "rows.jsonl", 60)
    own = tmp_path / "own.yaml"
    from gemma_tune.data.rows.template import load_template

    own.write_text(load_template("dolly").source_text, encoding="utf-8")
    build(path, tokenizer, template=str(own))
    assert build(path, tokenizer, template=str(own)).cached
    own.write_text(load_template("dolly").source_text.replace("Response", "Answer"), encoding="utf-8")
    assert not build(path, tokenizer, template=str(own)).cached
    assert not build(path, tokenizer, template=str(own), files={"tokenizer.json": "2"}).cached
    save(path, 60, answer="It's")
    assert not build(path, tokenizer, template=str(own)).cached
    monkeypatch.setattr(cache, "ENCODING_FORMAT", cache.ENCODING_FORMAT + 1)
    assert not build(path, tokenizer, template=str(own)).cached


def test_rows_that_are_held_out_instead_of_trained_are_a_miss(tmp_path: Path) -> None:
    first, second = (str(save(tmp_path / f"{name}.jsonl", 20, answer=name)) for name in "ab")
    mixed = DataSection(mix=({"source": first}, {"source": second}), max_seq_tokens=256)
    divided = DataSection(source=first, eval_source=second, max_seq_tokens=256)
    keys = {cache.cache_key(one, open_inputs(one, prefers_chat=False), tokenizer_files={}) for one in (mixed, divided)}
    assert len(keys) == 2


@pytest.mark.parametrize(
    ("package", "settings"),
    [
        ("tokenizers", {}),
        ("jinja2", {}),
        ("transformers", {}),
        ("ftfy", {"fix_encoding": True}),
        ("phonenumbers", {"pii": "mask"}),
        ("python-stdnum", {"pii": "drop"}),
    ],
)
def test_another_release_of_a_library_that_decides_tokens_is_a_miss(
    package: str, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = DataSection(source=str(save(tmp_path / "rows.jsonl", 5)), max_seq_tokens=256, clean=settings)
    inputs = open_inputs(section, prefers_chat=False)
    before = cache.cache_key(section, inputs, tokenizer_files={})
    installed = cache.version
    monkeypatch.setattr(cache, "version", lambda name: "999" if name == package else installed(name))
    assert cache.cache_key(section, inputs, tokenizer_files={}) != before


def test_an_edit_of_the_source_code_or_another_place_of_the_rows_is_a_hit(tmp_path: Path) -> None:
    """The key is made by copies of the package, one of which has a comment more in every file of its data room."""
    rows = save(tmp_path / "rows.jsonl", 5)
    script = (
        "import sys\n"
        "from gemma_tune.data.encode.cache import cache_key\n"
        "from gemma_tune.data.inputs import open_inputs\n"
        "from gemma_tune.recipe.schema import DataSection\n"
        "section = DataSection(source=sys.argv[1], max_seq_tokens=256)\n"
        "print(cache_key(section, open_inputs(section, prefers_chat=False), tokenizer_files={}))"
    )
    keys = []
    for edit in ("", "\n# a remark\n"):
        root = tmp_path / ("edited" if edit else "as it is")
        shutil.copytree(PACKAGE_DIR, root / "gemma_tune", ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
        (root / "data_templates").symlink_to(DATA_TEMPLATES_DIR)
        for path in (root / "gemma_tune" / "data").rglob("*.py"):
            path.write_text(path.read_text(encoding="utf-8") + edit, encoding="utf-8")
        moved = root / rows.name
        shutil.copy(rows, moved)
        environment = {**os.environ, "PYTHONPATH": str(root)}
        made = subprocess.run(
            [sys.executable, "-c", script, str(moved)], env=environment, cwd=root, capture_output=True, text=True
        )
        assert made.returncode == 0, made.stderr
        keys.append(made.stdout)
    assert keys[0] == keys[1]


@pytest.mark.parametrize(
    "name", ["token_ids.int32", "supervised.bool", "rows.npz", "train_places.jsonl", "eval_examples.jsonl"]
)
@pytest.mark.parametrize("damage", ["missing", "short", "empty", "flipped"])
def test_a_damaged_entry_is_made_anew(name: str, damage: str, own_cache: Path, tmp_path: Path, tokenizer: Any) -> None:
    path = save(tmp_path / "rows.jsonl", 60)
    first = build(path, tokenizer)
    (entry,) = own_cache.iterdir()
    file = entry / name
    content = file.read_bytes()
    file.unlink()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    if damage != "missing":
        file.write_bytes({"short": content[:middle], "empty": b"", "flipped": flipped}[damage])
    second = build(path, tokenizer)
    assert not second.cached and list(second.train) == list(first.train)
    assert build(path, tokenizer).cached


def test_switched_off_it_reads_and_writes_nothing(own_cache: Path, tmp_path: Path, tokenizer: Any) -> None:
    path = save(tmp_path / "rows.jsonl", 60)
    build(path, tokenizer, cache=False)
    assert not own_cache.exists()


def test_a_cache_that_cannot_be_written_stops_nothing(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file" / "below"))
    assert len(build(save(tmp_path / "rows.jsonl", 60), tokenizer).train)


def test_runs_that_write_at_once_do_not_disturb_each_other(own_cache: Path, tmp_path: Path, tokenizer: Any) -> None:
    path = save(tmp_path / "rows.jsonl", 200)
    made: list[Datasets] = []
    threads = [threading.Thread(target=lambda: made.append(build(path, tokenizer))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 6
    assert all(np.array_equal(one.train.lengths, made[0].train.lengths) for one in made)
    assert all(list(one.train) == list(made[0].train) for one in made)
    assert len(list(own_cache.iterdir())) == 1  # nothing half-written lies beside it
    assert build(path, tokenizer).cached


def test_entries_are_the_users_own_and_can_be_cleared(own_cache: Path, tmp_path: Path, tokenizer: Any) -> None:
    path = save(tmp_path / "rows.jsonl", 60)
    build(path, tokenizer)
    (entry,) = own_cache.iterdir()
    assert stat.S_IMODE(entry.stat().st_mode) == 0o700
    num_entries, num_bytes = cache.clear_cache()
    assert num_entries == 1 and num_bytes > 0
    assert not list(own_cache.iterdir())
    users = own_cache / "mine" / "facts.json"  # a name of ours in a folder that is not
    users.parent.mkdir()
    users.write_text("mine", encoding="utf-8")
    assert cache.clear_cache() == (0, 0) and users.read_text(encoding="utf-8") == "mine"
    assert not build(path, tokenizer).cached
