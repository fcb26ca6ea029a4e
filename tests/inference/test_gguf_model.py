"""A GGUF in llama.cpp against the model that it was made of, in transformers."""

from __future__ import annotations

from pathlib import Path

import pytest

from gemma_tune import Gemma, load
from gemma_tune.errors import DataError, EngineError, ModelError
from gemma_tune.exporting.gguf.convert import GgufProvenance, convert_to_gguf
from gemma_tune.inference.target import GgufTarget, find_target
from gemma_tune.paths import TINY_MODEL_DIR

pytest.importorskip("llama_cpp")
pytest.importorskip("gguf")

QUESTIONS = ["The town of Ostel", "A goat", "Zürich 🦊 <end_of_turn>"]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    provenance = GgufProvenance("tiny")
    convert_to_gguf(TINY_MODEL_DIR, path, dtype="f32", provenance=provenance)
    return path


@pytest.fixture(scope="module")
def gguf(path: Path) -> Gemma:
    return load(str(path), template="completion")


@pytest.fixture(scope="module")
def gemma() -> Gemma:
    return load("gemma-tiny", dtype="float32")


def test_the_same_tokens_and_answers(gguf: Gemma, gemma: Gemma) -> None:
    for question in QUESTIONS:
        assert gguf.encode(question) == gemma.encode(question)
    assert gguf.generate(QUESTIONS, max_new_tokens=16) == gemma.generate(QUESTIONS, max_new_tokens=16)
    stop = {"max_new_tokens": 16, "stop_strings": ["the", "The"]}
    assert gguf.generate(QUESTIONS[0], **stop) == gemma.generate(QUESTIONS[0], **stop)


@pytest.mark.parametrize(
    "given",
    [
        {"sampler": "top-k", "top_k": 5},
        {"sampler": "top-p", "temperature": 0.7},
        {"sampler": "min-p"},
        {"sampler": "random"},
    ],
    ids=str,
)
def test_the_same_draws(gguf: Gemma, gemma: Gemma, given: dict[str, object]) -> None:
    answers = []
    for each in (gguf, gemma):
        each.compile(**given, seed=3)  # type: ignore[arg-type]
        answers.append(each.generate(QUESTIONS[0], max_new_tokens=16))
        each.compile()
    assert answers[0] == answers[1]


def test_a_penalty_and_a_sampler_of_ones_own(gguf: Gemma, gemma: Gemma) -> None:
    for given in ({"repetition_penalty": 1.5}, {"sampler": lambda logits: logits.topk(2).indices[:, 1]}):
        answers = []
        for each in (gguf, gemma):
            each.compile(**given)  # type: ignore[arg-type]
            answers.append(each.generate(QUESTIONS[0], max_new_tokens=16))
            each.compile()
        assert answers[0] == answers[1]


def test_the_files_own_chat_template_is_the_last_resort(path: Path) -> None:
    found = find_target(str(path))
    assert isinstance(found, GgufTarget) and found.template.name == "chat"
    assert find_target(str(path.parent)) == found
    ids = load(str(path)).encode("Hi")
    assert ids == load("gemma-tiny", template="chat").encode("Hi")
    (path.parent / "template.yaml").write_text(
        find_target("gemma-tiny", template="dolly").template.source_text, "utf-8"
    )
    assert find_target(str(path)).template.name == "dolly"
    (path.parent / "template.yaml").unlink()


def test_what_a_gguf_cannot_do(gguf: Gemma, path: Path, tmp_path: Path) -> None:
    gguf.compile("beam")
    with pytest.raises(EngineError, match=r"no beam search"):
        gguf.generate("x")
    gguf.compile()
    with pytest.raises(EngineError, match=r"not scored"):
        gguf.score([[2]])
    with pytest.raises(EngineError, match=r"not scored"):
        gguf.score_response("x", "y")
    with pytest.raises(EngineError, match=r"layers of a GGUF"):
        gguf.summary()
    with pytest.raises(ModelError, match=r"in the precision that it is stored in"):
        load(str(path), load_in_4bit=True)
    with pytest.raises(DataError, match=r"the model's context is 4,096"):
        gguf.generate("x " * 5000)
    with pytest.raises(ModelError, match=r"no such file"):
        load(str(tmp_path / "none.gguf"))
    (tmp_path / "bad.gguf").write_bytes(b"version https://git-lfs")
    with pytest.raises(ModelError, match=r"is not a GGUF file"):
        load(str(tmp_path / "bad.gguf"))
    (tmp_path / "bad.gguf").write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ModelError, match=r"llama.cpp cannot load"):
        load(str(tmp_path / "bad.gguf"))
