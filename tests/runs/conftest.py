"""The small base and the single thread of the training tests: checkpoints are made by training."""

from tests.training.conftest import base, one_thread

__all__ = ["base", "one_thread"]
