"""How an export is run and compared with what was trained: what its format says of it. Nothing heavy is imported."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from gemma_tune.exporting.verify.forms import Form
from gemma_tune.exporting.verify.parity import Limits


class StoredCheck(Protocol):
    """What a comparison of stored files found."""

    @property
    def passed(self) -> bool: ...

    @property
    def against(self) -> str:
        """What the files were compared with."""
        ...

    def told(self) -> str:
        """The result in words."""
        ...


@dataclass(frozen=True)
class Runner:
    """How an export is run and compared with base + adapter."""

    name: str
    limits: Limits
    form: Form | None = None  # what is loaded and run; None for a format that nothing runs
    # compares its stored files where it is not run; None where there is nothing to compare them with
    check: Callable[[], StoredCheck] | None = None
    # texts -> token ids by its own tokenizer, without loading the model; None where it has none
    tokenize: Callable[[Sequence[str]], list[list[int]]] | None = None
    why_not_run: str | None = None  # why this machine cannot run the form; None when it can
    why_not_read: str | None = None  # why this machine cannot even read its files; None when it can
    # what a verdict adds where the form was run, and where only its tokenizer was read
    notes: tuple[str, str] = ("", "")
    # compare with the 4-bit model that was trained, where there is one, instead of base + adapter
    against_trained: bool = False


def transformers_runner(
    form: Form, limits: Limits, *, check: Callable[[], StoredCheck] | None = None, against_trained: bool = False
) -> Runner:
    """Return the runner of a form that transformers loads."""
    assert form.tokenizer is not None, "a form of transformers has a tokenizer directory"
    tokenize = partial(tokenize_by, form.tokenizer)
    return Runner(form.name, limits, form, check=check, tokenize=tokenize, against_trained=against_trained)


def tokenize_by(directory: Path, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts by the tokenizer of a directory, as training has them."""
    from gemma_tune.models.tokenizer import load_tokenizer, with_one_bos

    tokenizer = load_tokenizer(directory)
    return [with_one_bos(tokenizer, text) for text in texts]
