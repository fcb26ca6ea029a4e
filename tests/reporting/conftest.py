from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from gemma_tune.runs.layout import RunDir
from tests.reporting.made_runs import make_run_in

MakeRun = Callable[..., RunDir]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    return functools.partial(make_run_in, tmp_path)
