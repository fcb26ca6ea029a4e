"""The forms that a model can be loaded in, each measured on a probe in a process of its own.

A process of its own, because Unsloth changes transformers for the process that trains, llama.cpp aborts instead of
raising, and the memory of a model goes back to the system with its process alone. One model is loaded at a time; logits
go straight to the disk.
"""

import importlib
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter

from gemma_tune.errors import ExportError
from gemma_tune.exporting.verify.parity import Logits
from gemma_tune.exporting.verify.probe_texts import Probe
from gemma_tune.machine.child import ChildEnd, Send, run_child

OnProgress = Callable[[int, int], None]

# A Hugging Face directory in float32, 4-bit weights expanded to it.
PLAIN = "gemma_tune.exporting.verify.transformers_form:open_plain"
# 16-bit weights quantized on loading, as QLoRA trains; and the same, expanded to float32.
NF4 = "gemma_tune.exporting.verify.transformers_form:open_nf4"
NF4_EXPANDED = "gemma_tune.exporting.verify.transformers_form:open_nf4_expanded"
_LAST_LINES = 12


@dataclass(frozen=True)
class Form:
    """A model on the disk and how it is loaded."""

    name: str  # what it is called in reports
    # `module:function` that returns an `OpenForm`, called as `opener(form, before=...)` in the process that measures;
    # `before` is what it returned for the form before this one when both have one path, else None
    opener: str
    path: Path  # directory or file
    adapter: Path | None = None  # PEFT adapter on top of it
    tokenizer: Path | None = None  # directory of its tokenizer; None for a file that holds its own
    num_rows: int | None = None  # the vocabulary's rows, where the adapter resized it
    dtype: str = "float32"  # in which precision an nf4 form computes
    # whether prompts are answered; not in 4 bits, where every token would expand all weights again
    answers: bool = True


_FORMS = TypeAdapter(list[Form])


class OpenForm(Protocol):
    """A form in memory."""

    def logits(self, token_ids: Sequence[int]) -> Logits:
        """Logits of every position, (positions, vocabulary)."""
        ...

    def tokenize(self, text: str) -> list[int]:
        """The ids of a text as a user of this form gets them, BOS and control tokens included."""
        ...

    def answer(self, prompt: Sequence[int], *, max_new_tokens: int, stop_token_ids: Sequence[int]) -> list[int]:
        """Greedy continuation, without the stop token."""
        ...


@dataclass(frozen=True)
class Measurement:
    """What a form gave on a probe."""

    form: Form
    logits: Logits  # file of (positions, vocabulary) float32, mapped
    text_ids: list[list[int]]  # token ids of each of the probe's texts
    answers: list[list[int]] | None  # token ids that answer each prompt; None where the form does not answer


Measure = Callable[..., list[Measurement]]


def measure_here(
    forms: Sequence[Form], probe: Probe, *, directory: Path, on_progress: OnProgress | None = None
) -> list[Measurement]:
    """Measure each form in turn, in this process. A form on the weights of the one before it keeps them loaded."""
    report = on_progress or (lambda done, total: None)
    steps = len(probe.rows) + len(probe.prompts)
    measured: list[Measurement] = []
    opened: OpenForm | None = None
    for index, form in enumerate(forms):
        module_name, function_name = form.opener.split(":")
        last = forms[index - 1] if index else None
        shares_weights = last is not None and (last.opener, last.path, last.adapter) == (form.opener, form.path, None)
        before = opened if shares_weights else None
        del opened  # free the model before the next one is loaded
        opened = getattr(importlib.import_module(module_name), function_name)(form, before=before)
        del before

        def tell(done: int, index: int = index) -> None:
            report(index * steps + done, len(forms) * steps)

        measured.append(_measure(form, opened, probe, path=directory / f"{form.name}.npy", tell=tell))
    return measured


def _measure(form: Form, opened: OpenForm, probe: Probe, *, path: Path, tell: Callable[[int], None]) -> Measurement:
    text_ids = [opened.tokenize(text) for text in probe.texts]
    stored: npt.NDArray[np.float32] | None = None
    start = 0
    for number, row in enumerate(probe.rows, start=1):
        logits = opened.logits(row)
        if stored is None:
            shape = (probe.num_tokens, logits.shape[1])
            stored = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
        stored[start : start + len(row)] = logits
        start += len(row)
        tell(number)
    answers: list[list[int]] = []
    for number, prompt in enumerate(probe.prompts if form.answers else (), start=1):
        answers.append(opened.answer(prompt, max_new_tokens=probe.max_new_tokens, stop_token_ids=probe.stop_token_ids))
        tell(len(probe.rows) + number)
    assert stored is not None, "a probe has rows"
    return Measurement(form, stored, text_ids, answers if form.answers else None)


# --- in a process of its own ----------------------------------------------------------------------------------------


def measure_in_child(
    forms: Sequence[Form], probe: Probe, *, directory: Path, on_progress: OnProgress | None = None
) -> list[Measurement]:
    """`measure_here` in a new process.

    Raises:
        ExportError: what the process raised, or that it was ended by the system or by an abort of a library.
    """
    request = {"forms": _FORMS.dump_python([*forms], mode="json"), "probe": asdict(probe), "directory": str(directory)}

    def tell(message: dict[str, Any]) -> None:
        if on_progress is not None:
            on_progress(message["done"], message["total"])

    end = run_child(
        f"{__name__}:send_measured",
        request,
        on_message=tell,
        environment={
            # Threads that wait without spinning: on two cores shared with other work, 9 s instead of 33 s.
            "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "passive"),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "true",
        },
    )
    if end.is_ours and end.error is not None:
        raise ExportError(end.error, hint=end.hint)
    if not end.has_result:
        raise _ended(forms, end)
    return [
        Measurement(form, np.load(path, mmap_mode="r", allow_pickle=False), text_ids, answers)
        for form, (path, text_ids, answers) in zip(forms, end.result, strict=True)
    ]


def _ended(forms: Sequence[Form], end: ChildEnd) -> ExportError:
    names = ", ".join(form.name for form in forms)
    if end.signal == "SIGKILL":
        return ExportError(
            f"the process that ran {names} was killed, most likely for want of memory",
            hint="free some memory, or leave the check out with --skip-verify",
        )
    how = "failed" if end.error else f"ended with {end.signal}" if end.signal else f"ended with code {end.code}"
    told = "\n".join(end.last_lines(_LAST_LINES))
    return ExportError(f"the process that ran {names} {how}:\n{told}", hint="the export may be damaged")


def send_measured(send: Send, *, forms: list[Any], probe: dict[str, Any], directory: str) -> list[Any]:
    """Measure for `measure_in_child`, in the process that it starts."""
    folder = Path(directory)
    measured = measure_here(
        _FORMS.validate_python(forms),
        TypeAdapter(Probe).validate_python(probe),
        directory=folder,
        on_progress=lambda done, total: send(done=done, total=total),
    )
    return [(str(folder / f"{each.form.name}.npy"), each.text_ids, each.answers) for each in measured]
