"""`export`, `merge` and `verify` on a short run of the embedded Gemma: tables, JSON, exit codes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from gemma_tune.flows import train as flow
from gemma_tune.recipe.load import load_recipe
from gemma_tune.runs.layout import RunDir
from gemma_tune.runs.reporter import SilentReporter

Gemma = Callable[..., tuple[str, str]]
SHORT = (
    "model.engine=transformers",
    "training.max_steps=3",
    "data.max_eval_rows=8",
    "evaluation.exact_match=false",
    "evaluation.num_questions=1",
    "evaluation.max_new_tokens=4",
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads cost more than they bring for a model of this size, here and in the processes that check exports."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    folder = tmp_path_factory.mktemp("runs")
    return flow.train_run(
        load_recipe(Path("quickstart"), [*SHORT, f"run.output_dir={folder}"]), reporter=SilentReporter()
    )


@pytest.fixture
def run(trained: RunDir, tmp_path: Path) -> str:
    """A copy that a test may export into; the base is built in, so it needs no more than itself."""
    shutil.copytree(trained.path, tmp_path / "run")
    return "run"


def test_several_formats_are_written_proven_and_measured_again(gemma: Gemma, run: str) -> None:
    out, err = gemma("export", run, "--format", "merged-16bit,ollama", "--positions", "40")
    assert "merged-16bit" in out and "FAILED" not in out and out.count("passed") == 4  # two formats, two tables
    assert "compared at 40 tokens of eval rows" in out
    assert "16-bit base + adapter" in out  # the run trained in 4 bits (F41)
    assert "ollama create run -f Modelfile" in out
    assert "MB of 6 MB merged" in err
    assert sorted(os.listdir("run/export")) == ["merged-16bit", "ollama"]
    expected = {"Modelfile", "run-q8_0.gguf", "export.json", "template.yaml", "README.md", "NOTICE"}
    assert set(os.listdir("run/export/ollama")) == expected
    model = AutoModelForCausalLM.from_pretrained("run/export/merged-16bit")
    assert model.config.vocab_size == 2304

    as_json = json.loads(gemma("verify", run, "--positions", "30", "--json")[0])
    assert as_json["passed"] is True
    assert [each["verification"]["num_positions"] for each in as_json["exports"]] == [30, 30]
    out, _ = gemma("report", run)
    assert "run/export/merged-16bit" in out


def test_ollama_takes_the_smallest_gguf_that_passed_and_says_so(gemma: Gemma, run: str) -> None:
    gemma("export", run, "--format", "gguf-q8_0", "--skip-verify")
    (path,) = Path("run/export/gguf-q8_0").glob("*.gguf")
    path.write_bytes(path.read_bytes()[:-2000] + bytes(2000))  # weights that are not those of training
    out, _ = gemma("export", run, "--format", "ollama,gguf-f16,gguf-q8_0", "--positions", "8", code=1)
    assert "ollama: made of run-f16.gguf, the smallest of gguf-f16, gguf-q8_0 that passed" in out
    record = json.loads(Path("run/export/ollama/export.json").read_text(encoding="utf-8"))
    assert record["facts"]["gguf"] == "run-f16.gguf" and record["verification"]["result"]["passed"] is True
    assert record["verification"]["result"]["reason"].startswith("the file of gguf-f16: ")
    card = Path("run/export/ollama/README.md").read_text(encoding="utf-8")
    assert "- made of run-f16.gguf, the smallest of" in card and "the file of gguf-f16" in card
    assert "FROM ./run-f16.gguf\n" in Path("run/export/ollama/Modelfile").read_text(encoding="utf-8")


def test_a_wrong_export_has_exit_code_1_and_stays(gemma: Gemma, run: str) -> None:
    gemma("merge", run, "--skip-verify")
    weights = Path("run/export/merged-16bit/model.safetensors")
    tensors = load_file(weights)
    tensors["model.embed_tokens.weight"] *= 1.5
    save_file(tensors, weights, metadata={"format": "pt"})
    out, err = gemma("merge", run, "--positions", "30", "--json", code=1)
    found = json.loads(out)
    assert found["passed"] is False and found["exports"][0]["kept"] is True
    assert "does not compare as it should" in err and str(weights.parent) in err and "hint: " in err
    assert weights.is_file()


def test_a_bare_adapter_and_its_exports_elsewhere(gemma: Gemma, run: str) -> None:
    shutil.copytree("run/adapter", "bare")
    out, _ = gemma("export", "bare", "--format", "adapter", "--base", "gemma-tiny", "-o", "out", "--skip-verify")
    assert "unchecked" in out and "out/adapter" in out
    _, err = gemma("verify", "out", code=2)
    assert "--of RUN" in err
    out, _ = gemma("verify", "out/adapter", "--of", "bare", "--base", "gemma-tiny", "--positions", "30")
    assert "built-in text" in out and "passed" in out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("export", "run", "--format", "gguf-q4_k_n"), "did you mean 'q4_k"),
        (("export", "run", "--format", "merged"), "did you mean 'merged-"),
        (("export", "run", "--format", "adapter", "--base", "nowhere"), "nowhere"),
        (("export", "nowhere", "--format", "adapter"), "no such run: nowhere"),
        (("verify", "run"), "has no export yet"),
        (("verify", "nowhere"), "no such run: nowhere"),
        (("merge", "run", "-o", "taken"), "nothing is ever overwritten"),
    ],
)
def test_mistakes(gemma: Gemma, run: str, arguments: tuple[str, ...], told: str) -> None:
    Path("taken/merged-16bit").mkdir(parents=True)
    Path("taken/merged-16bit/mine").touch()
    before = sorted(Path().rglob("*"))
    out, err = gemma(*arguments, code=2)
    assert told in err and out == "" and "Traceback" not in err
    assert sorted(Path().rglob("*")) == before


def test_a_moved_data_file_is_told_and_does_not_stop_the_check(gemma: Gemma, run: str) -> None:
    recipe = Path("run/resolved.yaml")
    text = recipe.read_text(encoding="utf-8")
    recipe.write_text(text.replace("source: tiny-world", "source: gone.jsonl"), encoding="utf-8")
    out, err = gemma("export", run, "--format", "adapter", "--positions", "30")
    assert "gone.jsonl" in err and "built-in text" in out
