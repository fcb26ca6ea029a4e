"""What libraries print goes to the log, and only there."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest

from gemma_tune.machine.quiet import libraries_to


def test_prints_and_logs_go_to_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "library.log"
    with libraries_to(log):
        print("printed")
        print("on stderr", file=sys.stderr)
        handler = logging.StreamHandler()
        logging.getLogger("noisy").addHandler(handler)
        logging.getLogger("noisy").warning("logged")
    logging.getLogger("noisy").warning("after the block")  # must not fail on a closed file
    logging.getLogger("noisy").removeHandler(handler)
    text = log.read_text(encoding="utf-8")
    assert all(word in text for word in ("printed", "on stderr", "logged"))
    assert "after the block" not in text
    assert capsys.readouterr() == ("", "")


def test_blocks_nest_and_exceptions_pass(tmp_path: Path) -> None:
    with pytest.raises(KeyError), libraries_to(tmp_path / "outer.log"):
        with libraries_to(None):
            print("dropped")
        print("kept")
        raise KeyError
    assert (tmp_path / "outer.log").read_text(encoding="utf-8") == "kept\n"
