from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from gemma_tune.errors import DataError
from gemma_tune.inference.answer_settings import Sampling
from gemma_tune.inference.sampling import SAMPLERS, choose_sampling, load_sampler

OWN = """
def sample(logits):
    return logits.argmax(-1)

number = 3
"""


def test_settings_alone_say_which_sampler() -> None:
    assert choose_sampling() == Sampling() == choose_sampling("greedy") == choose_sampling("greedy", temperature=0)
    assert choose_sampling(temperature=0.7) == choose_sampling("random", temperature=0.7)
    assert choose_sampling(top_k=7) == choose_sampling("top_k", top_k=7) == Sampling(temperature=1.0, top_k=7)
    assert choose_sampling(num_beams=5) == choose_sampling("beam", num_beams=5)
    assert choose_sampling(top_p=0.5, top_k=3).top_k == 3
    for name in SAMPLERS:
        assert choose_sampling(name).is_drawn == (name not in ("greedy", "beam"))


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"sampler": "topk"}, r"no sampler 'topk'; did you mean 'top-k'"),
        ({"sampler": "greedy", "top_p": 0.5}, r"greedy takes no top_p"),
        ({"sampler": "beam", "temperature": 0.5}, r"beam takes no temperature"),
        ({"sampler": "random", "top_k": 3}, r"random takes no top_k"),
        ({"sampler": "top-p", "temperature": 0.0}, r"top-p needs a temperature above 0"),
        ({"top_p": 0.0}, r"top_p is 0"),
        ({"top_p": 1.5}, r"top_p is 1.5"),
        ({"min_p": -0.1}, r"min_p is -0.1"),
        ({"top_k": 0}, r"top_k is 0"),
        ({"num_beams": 1}, r"num_beams is 1"),
        ({"temperature": -1.0}, r"temperature is -1"),
        ({"temperature": float("nan")}, r"temperature is nan"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty is 0"),
        ({"sampler": lambda logits: logits, "top_k": 3}, r"takes no top_k"),
        ({"topk": 3}, r"no setting 'topk'; did you mean 'top_k'"),
    ],
)
def test_what_does_not_go_together_is_refused(asked: dict[str, Any], told: str) -> None:
    with pytest.raises(DataError, match=told) as error:
        choose_sampling(**asked)
    assert error.value.hint


def test_a_function_from_a_module_here_or_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_own_sampler.py").write_text(OWN, encoding="utf-8")
    (tmp_path / "broken_sampler.py").write_text("1 / 0\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [each for each in sys.path if each not in ("", ".")])
    before = list(sys.path)
    assert load_sampler("my_own_sampler:sample").__name__ == "sample"
    assert sys.path == before
    monkeypatch.chdir("/")
    assert choose_sampling(f"{tmp_path}/my_own_sampler.py:sample").custom is not None
    for name, told in (
        (f"{tmp_path}/my_own_sampler.py:simple", r"has no 'simple'; did you mean 'sample'"),
        (f"{tmp_path}/my_own_sampler.py:number", r"is int, not a function"),
        (f"{tmp_path}/none.py:sample", r"no such file"),
        (f"{tmp_path}/broken_sampler.py:sample", r"ZeroDivisionError"),
        ("no_such_module:sample", r"No module named 'no_such_module'"),
    ):
        with pytest.raises(DataError, match=told):
            load_sampler(name)
