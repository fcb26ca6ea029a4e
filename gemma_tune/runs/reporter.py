"""How the long-running stages tell the user where they are, without printing themselves."""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class StepProgress:
    """One logged optimizer step."""

    step: int  # step, total_steps: optimizer steps done and planned
    total_steps: int
    epoch: float  # passes over the rows
    loss: float  # mean over the supervised tokens since the last log, in nats a token
    learning_rate: float  # learning_rate, grad_norm: of this step
    grad_norm: float
    tokens_per_second: float  # tokens that are not padding, since the last log
    eta_seconds: float  # time left at the mean speed so far
    memory_bytes: int  # peak memory, of the card on CUDA and of the process elsewhere


class Reporter(Protocol):
    """Receives what happens during a run. The command line draws it; a test records it."""

    def stage(self, title: str) -> None:
        """A stage begins, such as 'load'."""
        ...

    def detail(self, text: str) -> None:
        """A fact worth a line, such as the chosen engine and why."""
        ...

    def warn(self, text: str) -> None:
        """Something the user should act on or know; the run goes on."""
        ...

    def step(self, progress: StepProgress) -> None:
        """Training made a step."""
        ...

    def evaluated(self, *, step: int, loss: float) -> None:
        """An evaluation while training; `loss` in nats a supervised token."""
        ...

    def progress(self, what: str, done: int, total: int) -> None:
        """A counted task moved on, such as rows answered."""
        ...

    def progress_bytes(self, what: str, done: int, total: int) -> None:
        """Bytes were written; `what` was done to them."""
        ...


class SilentReporter:
    """Says nothing; for library use."""

    def stage(self, title: str) -> None: ...

    def detail(self, text: str) -> None: ...

    def warn(self, text: str) -> None: ...

    def step(self, progress: StepProgress) -> None: ...

    def evaluated(self, *, step: int, loss: float) -> None: ...

    def progress(self, what: str, done: int, total: int) -> None: ...

    def progress_bytes(self, what: str, done: int, total: int) -> None: ...
