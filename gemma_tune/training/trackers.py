"""The experiment trackers that a recipe names: installed, and ready to run without a question (F3)."""

import contextlib
import importlib.util
import netrc
import os
from collections.abc import Iterator, Sequence

from gemma_tune.errors import RunError
from gemma_tune.runs.layout import RunDir

_TENSORBOARD_DIR = "TENSORBOARD_LOGGING_DIR"  # transformers asks this variable alone
# The packages of which one has to be there.
_PACKAGES = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
    "trackio": ("trackio",),
}


def require_trackers(names: Sequence[str]) -> None:
    """Refuse a tracker that would fail, or ask something, once the model is loaded.

    Raises:
        RunError: a tracker is not installed, or Weights & Biases has no key.
    """
    for name in names:
        if not any(importlib.util.find_spec(package) for package in _PACKAGES[name]):
            raise RunError(
                f"logging.trackers names {name}, which is not installed",
                hint=f"pip install {_PACKAGES[name][0]}, or leave it out: metrics.jsonl has every step in any case",
            )
    if "wandb" in names and not _wandb_has_key():
        raise RunError(
            "logging.trackers names wandb, and Weights & Biases knows no key on this machine",
            hint="run `wandb login` once, set WANDB_API_KEY, or set WANDB_MODE=offline",
        )


@contextlib.contextmanager
def tracking(names: Sequence[str], *, run: RunDir) -> Iterator[None]:
    """Within the block trackers keep their files in the run where they can; one that fails is reported in a sentence.

    Raises:
        RunError: a named tracker raised one of its own exceptions.
    """
    is_ours = _TENSORBOARD_DIR not in os.environ
    if is_ours:
        os.environ[_TENSORBOARD_DIR] = str(run.tensorboard)
    try:
        yield
    except Exception as error:
        name = type(error).__module__.partition(".")[0]
        if name not in names:
            raise
        raise RunError(
            f"the tracker {name} failed: {error}",
            hint="fix it, or leave it out of logging.trackers: metrics.jsonl has every step in any case",
        ) from error
    finally:
        if is_ours:
            del os.environ[_TENSORBOARD_DIR]


def _wandb_has_key() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        return True
    try:
        hosts = netrc.netrc(os.environ.get("NETRC")).hosts  # where `wandb login` keeps it
    except (OSError, netrc.NetrcParseError):
        return False
    return any("wandb" in host for host in hosts)
