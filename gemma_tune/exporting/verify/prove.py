"""Proves exports: each one is run and compared with base + adapter as PEFT runs them in float32.

The adapter's own effect (base against base + adapter) stands next to the figures, because a difference means little
without the size of what was to be kept. A run that trained on a 4-bit base is told how far base + adapter is from the
model that was really trained (F41), on the 16-bit base and on the one that the 4 bits stand for.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gemma_tune.disk import require_free_disk
from gemma_tune.errors import ExportError, GemmaTuneError
from gemma_tune.exporting.verify.forms import NF4, NF4_EXPANDED, PLAIN, Form, Measure, Measurement, measure_in_child
from gemma_tune.exporting.verify.parity import Distance, distance, judge, perplexity
from gemma_tune.exporting.verify.probe_texts import Probe
from gemma_tune.exporting.verify.runner import Runner, tokenize_by
from gemma_tune.machine.main_memory import read_memory
from gemma_tune.models.config import read_config
from gemma_tune.models.safetensors import stored_tensors
from gemma_tune.runs.adapter_dir import AdapterDir
from gemma_tune.runs.reporter import Reporter

_FLOAT32_BYTES = 4
# Besides the weights: the libraries, and the activations of one short row.
_RUNTIME_BYTES = 1_000_000_000


@dataclass(frozen=True)
class Reference:
    """What exports are compared with: the directories of an adapter, its base and its tokenizer.

    `trained_dtype` is what the run computed in when it trained on a 4-bit base, else None."""

    base: Path
    adapter: Path
    tokenizer: Path
    trained_dtype: str | None = None


@dataclass(frozen=True)
class FormReport:
    """How one form compares with another."""

    name: str
    against: str
    # logits when the form was run, weights when its stored weights were compared, files when those of a format that
    # nothing runs were, none when nothing was
    method: str
    expected: str  # what the format may lose, in words
    passed: bool | None  # None where figures are only told, or nothing could be checked
    reason: str
    distance: Distance | None = None  # distance, perplexity: None unless it was run
    perplexity: float | None = None
    # texts_equal, answers_equal: strings with equal token ids, prompts with equal greedy answers (None where one of the
    # two does not answer)
    texts_equal: int = 0
    answers_equal: int | None = None
    first_difference: str | None = None  # the first string whose token ids differ


@dataclass(frozen=True)
class ParityReport:
    """The figures of one verification."""

    origin: str
    num_positions: int
    num_texts: int
    num_prompts: int
    effect: Distance | None = None  # base + adapter against the base; None when no model was run
    base_perplexity: float | None = None
    reference_perplexity: float | None = None
    exports: tuple[FormReport, ...] = ()
    # how far two models are from the 4-bit one that was trained; empty when there is none
    trained: tuple[FormReport, ...] = ()
    notes: tuple[str, ...] = ()  # what a reader must know, such as that logits were not run and why

    @property
    def failed(self) -> tuple[FormReport, ...]:
        """The exports whose verdict is a failure."""
        return tuple(report for report in self.exports if report.passed is False)


def verify_exports(
    runners: Sequence[Runner],
    reference: Reference,
    *,
    probe: Probe,
    reporter: Reporter,
    measure: Measure = measure_in_child,
) -> ParityReport:
    """Run every export and judge it.

    One model is in memory at a time, in float32: 4 bytes a parameter. What cannot be run, for want of memory, of
    llama.cpp or because nothing runs its format, is compared by its stored files and token ids instead, and the report
    says so. An export that cannot be loaded fails.

    Raises:
        ExportError: base + adapter themselves cannot be run.
    """
    if not probe.rows or not all(probe.rows):
        raise ExportError("verify needs at least one row of token ids, and no empty row", hint="give it some eval rows")
    forms = [runner.form for runner in runners if runner.form is not None]
    shortage = _memory_shortage(reference.base) if forms else None
    if forms and shortage is None:
        with tempfile.TemporaryDirectory(prefix="gemma-tune-verify-", ignore_cleanup_errors=True) as name:
            directory = Path(name)
            _require_room(directory, reference.base, probe, num_forms=4 + len(forms))
            return _verify_by_logits(_Bench(probe, reporter, measure, directory), runners, reference)
    if shortage is not None:
        reporter.warn(shortage)
    wanted_ids = tokenize_by(reference.tokenizer, probe.texts)
    exports = tuple(_check_stored(runner, probe, wanted_ids, why=shortage) for runner in runners)
    return ParityReport(*_described(probe), exports=exports, notes=(shortage,) if shortage else ())


def _described(probe: Probe) -> tuple[str, int, int, int]:
    """The first fields of a `ParityReport`."""
    return probe.origin, len(probe.positions()), len(probe.texts), len(probe.prompts)


class _Bench:
    """Runs forms on a probe and compares them."""

    def __init__(self, probe: Probe, reporter: Reporter, measure: Measure, directory: Path) -> None:
        self.probe = probe
        self.positions = probe.positions()
        self.targets = probe.targets()
        self.reporter = reporter
        self.measure = measure
        self.directory = directory

    def run(self, forms: Sequence[Form], *, required: int = 0) -> dict[str, Measurement | GemmaTuneError]:
        """Measure forms by name, all in one process; where that fails, each optional one in a process of its own.

        Raises:
            GemmaTuneError: one of the first `required` forms cannot be run.
        """
        try:
            return {each.form.name: each for each in self._run(forms)}
        except GemmaTuneError:
            if len(forms) == required:
                raise
        found: dict[str, Measurement | GemmaTuneError] = {each.form.name: each for each in self._run(forms[:required])}
        for form in forms[required:]:
            try:
                (found[form.name],) = self._run([form])
            except GemmaTuneError as error:
                found[form.name] = error
        return found

    def _run(self, forms: Sequence[Form]) -> list[Measurement]:
        if not forms:
            return []
        return self.measure(
            forms,
            self.probe,
            directory=self.directory,
            on_progress=lambda done, total: self.reporter.progress("rows and prompts run", done, total),
        )

    def compare(
        self,
        found: Measurement | GemmaTuneError,
        wanted: Measurement,
        *,
        name: str,
        runner: Runner | None = None,
        effect: Distance | None = None,
    ) -> FormReport:
        """Figures; and the verdict of a runner, for which the adapter's effect is given."""
        against, expected = wanted.form.name, runner.limits.expected if runner else "told, not judged"
        if isinstance(found, GemmaTuneError):
            return FormReport(name, against, "none", expected, False, f"cannot be run: {found.message}")
        if found.logits.shape != wanted.logits.shape:
            reason = f"{found.logits.shape[1]} logits a position, {wanted.logits.shape[1]} in {against}"
            return FormReport(name, against, "logits", expected, False, reason)
        drift = distance(wanted.logits, found.logits, positions=self.positions)
        different = _other_texts(self.probe, wanted.text_ids, found.text_ids)
        passed: bool | None = None
        reason = ""
        if runner is not None and effect is not None:
            passed, reason = judge(drift, effect, runner.limits)
            if passed and different:
                passed, reason = False, _told_texts(different)
            reason += runner.notes[0]
        return FormReport(
            name=name,
            against=against,
            method="logits",
            expected=expected,
            passed=passed,
            reason=reason,
            distance=drift,
            perplexity=perplexity(found.logits, self.targets),
            texts_equal=len(self.probe.texts) - len(different),
            answers_equal=_num_equal(wanted.answers, found.answers),
            first_difference=different[0] if different else None,
        )


def _adapter_rows(adapter_dir: Path) -> int | None:
    """The vocabulary rows that the adapter's embedding has, if it carries one."""
    adapter = AdapterDir(adapter_dir).read_lora()
    carried = dict(adapter.base_copies) | {n.removesuffix(".weight"): tensor for n, tensor in adapter.trained.items()}
    ends = [tensor for module, tensor in carried.items() if module.rpartition(".")[2] in ("embed_tokens", "lm_head")]
    return ends[0].shape[0] if ends else None


def _other_texts(probe: Probe, wanted: list[list[int]], found: list[list[int]]) -> list[str]:
    """The texts whose token ids differ."""
    return [text for text, want, have in zip(probe.texts, wanted, found, strict=True) if want != have]


def _told_texts(different: Sequence[str]) -> str:
    return f"{len(different)} strings have other token ids, such as {different[0]!r}"


def _num_equal(wanted: list[list[int]] | None, found: list[list[int]] | None) -> int | None:
    if wanted is None or found is None:
        return None
    return sum(want == have for want, have in zip(wanted, found, strict=True))


def _verify_by_logits(bench: _Bench, runners: Sequence[Runner], reference: Reference) -> ParityReport:
    tokenizer, rows = reference.tokenizer, _adapter_rows(reference.adapter)

    def form(name: str, opener: str, *, dtype: str = "float32", answers: bool = True) -> Form:
        return Form(name, opener, reference.base, reference.adapter, tokenizer, rows, dtype, answers)

    base_form = Form("base", PLAIN, reference.base, tokenizer=tokenizer, num_rows=rows)
    required = [base_form, form("base + adapter", PLAIN)]
    if reference.trained_dtype is not None:
        required.append(form("4-bit base + adapter", NF4, dtype=reference.trained_dtype, answers=False))
        required.append(form("expanded 4-bit base + adapter", NF4_EXPANDED))
    runnable = [runner.form for runner in runners if runner.form is not None and runner.why_not_run is None]
    # What transformers loads shares a process with the base; any other library has one of its own.
    shared = [each for each in runnable if each.opener == PLAIN]
    apart = [each for each in runnable if each.opener != PLAIN]
    measured = bench.run([*required, *shared], required=len(required)) | bench.run(apart)
    ran = [found for each in required if isinstance(found := measured[each.name], Measurement)]
    base, wanted = ran[:2]
    trained, expanded = ran[2:] or (None, None)
    effect = distance(wanted.logits, base.logits, positions=bench.positions)
    exports = []
    for runner in runners:
        if runner.name in measured:
            against = expanded if runner.against_trained and expanded else wanted
            report = bench.compare(measured[runner.name], against, name=runner.name, runner=runner, effect=effect)
        else:
            report = _check_stored(runner, bench.probe, wanted.text_ids)
        exports.append(report)
    return ParityReport(
        *_described(bench.probe),
        effect=effect,
        base_perplexity=perplexity(base.logits, bench.targets),
        reference_perplexity=perplexity(wanted.logits, bench.targets),
        exports=tuple(exports),
        trained=tuple(
            bench.compare(found, trained, name=name)
            for found, name in ((wanted, "16-bit base + adapter"), (expanded, "expanded base + adapter"))
            if trained and found
        ),
        notes=tuple(f"{each.name}: {each.reason}" for each in exports if each.method != "logits"),
    )


# --- without running -------------------------------------------------------------------------------------------------


def _check_stored(runner: Runner, probe: Probe, wanted_ids: list[list[int]], *, why: str | None = None) -> FormReport:
    """The verdict on stored files and the tokenizer alone; `why` says why the model was not run."""
    why = runner.why_not_run or why or "nothing runs this format"
    if runner.why_not_read is not None:
        reason = f"not checked: {why}, and {runner.why_not_read}"
        return FormReport(runner.name, "nothing", "none", runner.limits.expected, None, reason)
    try:
        check = runner.check() if runner.check else None
        found_ids = runner.tokenize(probe.texts) if runner.tokenize else None
    except GemmaTuneError as error:
        reason = f"cannot be read: {error.message}"
        return FormReport(runner.name, "nothing", "none", "a form that can be read", False, reason)
    told = [check.told() if check else f"weights were not checked: {why}"]
    different = _other_texts(probe, wanted_ids, found_ids) if found_ids is not None else []
    num_equal = len(probe.texts) - len(different) if found_ids is not None else 0
    if found_ids is not None:
        ids = _told_texts(different) if different else f"{num_equal} strings have the same token ids"
        told.append(ids + runner.notes[1])
    if check:
        told.append("logits were not run")
    return FormReport(
        name=runner.name,
        against=check.against if check else "token ids",
        method="none" if check is None else "weights" if runner.form else "files",
        expected="stored weights and token ids equal" if runner.form else runner.limits.expected,
        passed=False if different else check.passed if check else None,
        reason="; ".join(told),
        texts_equal=num_equal,
        first_difference=different[0] if different else None,
    )


def _memory_shortage(base: Path) -> str | None:
    """Why the model cannot be run in float32 here; None when it can, or when the free memory is not known."""
    weights = _FLOAT32_BYTES * sum(tensor.num_elements for tensor in stored_tensors(base).values())
    free = read_memory().available
    if free is None or weights + _RUNTIME_BYTES <= free:
        return None
    return (
        f"logits were not run: the model needs {(weights + _RUNTIME_BYTES) / 1e9:.1f} GB of memory in float32, "
        f"{free / 1e9:.1f} GB are free"
    )


def _require_room(directory: Path, base: Path, probe: Probe, *, num_forms: int) -> None:
    """Refuse when the logits of all forms do not fit on the disk."""
    needed = num_forms * probe.num_tokens * read_config(base).vocab_size * _FLOAT32_BYTES
    require_free_disk(
        directory, needed, what="the check's logits", spare_bytes=0,
        hint="free some space, set TMPDIR to another disk, or compare fewer positions",
    )  # fmt: skip
