"""The experiment trackers that a recipe names: installed, and ready to run without a question (F3)."""

from __future__ import annotations

import importlib.util
import netrc
import os
from collections.abc import Sequence

from gemma_tune.errors import RunError

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


def _wandb_has_key() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        return True
    try:
        hosts = netrc.netrc(os.environ.get("NETRC")).hosts  # where `wandb login` keeps it
    except (OSError, netrc.NetrcParseError):
        return False
    return any("wandb" in host for host in hosts)
