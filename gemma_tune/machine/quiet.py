"""Keeps what libraries print, and what no user can act on, off the terminal."""

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from gemma_tune.secrets import mask_secrets

_ENVIRONMENT = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "true",  # unset, a fork after its first use prints a warning
    "WANDB_SILENT": "true",
}


class _LibraryStream(io.TextIOBase):
    """Where libraries print: into `target`, or nowhere.

    It is never closed: a library that is imported inside the block keeps its log handler on it as long as it lives.
    """

    target: TextIO | None = None

    def write(self, text: str) -> int:
        if self.target is not None:
            self.target.write(mask_secrets(text))
        return len(text)

    def flush(self) -> None:
        if self.target is not None:
            self.target.flush()

    def isatty(self) -> bool:
        return False


_STREAM = _LibraryStream()


@contextlib.contextmanager
def libraries_to(log: Path | None) -> Iterator[None]:
    """Within the block, what goes to stdout or stderr is appended to `log`, or dropped when it is None.

    Exceptions pass through. The command line's console is made before the block and keeps the terminal. Blocks nest.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    before = _STREAM.target
    with contextlib.ExitStack() as stack:
        _STREAM.target = stack.enter_context(log.open("a", encoding="utf-8")) if log is not None else None
        stack.callback(setattr, _STREAM, "target", before)
        stack.enter_context(contextlib.redirect_stdout(_STREAM))
        stack.enter_context(contextlib.redirect_stderr(_STREAM))
        yield
