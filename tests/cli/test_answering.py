"""The options that are made from the settings of an answer."""

from __future__ import annotations

import inspect
import json
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from gemma_tune.cli.answering import with_answer_settings
from gemma_tune.inference.answer_settings import AnswerSettings, Sampling, options_of
from gemma_tune.terminal import Terminal


@with_answer_settings(without=["batch_size"])
def ask(target: str, settings: AnswerSettings) -> None:
    Terminal().json(settings.to_json())


def asked(*arguments: str) -> dict[str, Any]:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(ask)
    done = CliRunner().invoke(app, ["model", *arguments])
    assert done.exit_code == 0, done.exception
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_every_setting_has_an_option() -> None:
    fields = {"sampler", *options_of(Sampling), *options_of(AnswerSettings)}
    assert set(inspect.signature(ask).parameters) == {"target"} | fields - {"batch_size"}
    assert {"temperature", "num_beams", "seed", "stop_strings"} < fields


def test_a_command_gets_the_settings_whole() -> None:
    found = asked("--top-p", "0.5", "--seed", "3", "--stop", "a", "--stop", "b", "--max-length", "9")
    assert found["sampling"] | {"temperature": 1.0, "top_p": 0.5, "seed": 3} == found["sampling"]
    assert (found["stop_strings"], found["max_new_tokens"], found["batch_size"]) == (["a", "b"], 9, 8)
    assert asked("--sampler", "beam", "--beams", "3")["sampling"]["num_beams"] == 3
    # A command draws the same twice; Python draws differently unless a seed is given.
    assert asked()["sampling"]["seed"] == 0 and Sampling().seed is None


@pytest.mark.parametrize("wrong", [("--max-new-tokens", "0"), ("--batch-size", "4")])
def test_what_an_option_does_not_allow(wrong: tuple[str, ...]) -> None:
    app = typer.Typer()
    app.command()(ask)
    assert CliRunner().invoke(app, ["model", *wrong]).exit_code == 2
