"""Proves exports: each one is run and compared with base + adapter as PEFT runs them in float32.

The adapter's own effect (base against base + adapter) stands beside the figures, because a difference means little
without the size of what was to be kept. A run that trained on a 4-bit base is told how far base + adapter is from the
model that was really trained (F41), on the 16-bit base and on the one that the 4 bits stand for.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gemma_tune.disk import require_free_disk
from gemma_tune.errors import ExportError, GemmaTuneError
from gemma_tune.exporting.gguf.token_lists import read_gguf_tokenizer
from gemma_tune.exporting.verify.forms import Form, Measure, Measurement, measure_in_child
from gemma_tune.exporting.verify.gguf_form import has_llama_cpp
from gemma_tune.exporting.verify.parity import LIMITS, Distance, Limits, distance, judge, perplexity
from gemma_tune.exporting.verify.probe import Probe
from gemma_tune.exporting.verify.weight_check import WeightCheck, check_gguf_weights, check_merged_weights
from gemma_tune.models.config import read_config
from gemma_tune.models.safetensors import stored_tensors
from gemma_tune.runs.adapter import read_adapter
from gemma_tune.runs.reporter import Reporter

_FLOAT32_BYTES = 4
# Beside the weights: the libraries, and the activations of one short row.
_RUNTIME_BYTES = 1_000_000_000


@dataclass(frozen=True)
class Source:
    """What exports are made of and compared with.

    Attributes:
        base, adapter, tokenizer: directories.
        trained_dtype: what the run computed in when it trained on a 4-bit base; None when it did not, or nobody knows.
    """

    base: Path
    adapter: Path
    tokenizer: Path
    trained_dtype: str | None = None


@dataclass(frozen=True)
class Candidate:
    """An export to be proven.

    Attributes:
        limits: key of `LIMITS`.
        against_trained: compare with the 4-bit model that was trained, where there is one, instead of base + adapter.
        merged: the merged directory that a GGUF was made of, to compare stored weights with; None when it is gone.
    """

    form: Form
    limits: str
    against_trained: bool = False
    merged: Path | None = None


@dataclass(frozen=True)
class FormReport:
    """How one form compares with another.

    Attributes:
        method: logits when the form was run, weights when its stored weights were compared, none when neither.
        distance, perplexity: None unless it was run.
        texts_equal, answers_equal: strings with equal token ids, prompts with equal greedy answers (None where one of
            the two does not answer).
        first_difference: the first string whose token ids differ.
        expected: what the format may lose, in words.
        passed: None where figures are only told, or nothing could be checked.
    """

    name: str
    against: str
    method: str
    expected: str
    passed: bool | None
    reason: str
    distance: Distance | None = None
    perplexity: float | None = None
    texts_equal: int = 0
    answers_equal: int | None = None
    first_difference: str | None = None


@dataclass(frozen=True)
class ParityReport:
    """The figures of one verification.

    Attributes:
        effect: base + adapter against the base; None when no model was run.
        exports: the verdicts.
        trained: how far two models are from the 4-bit one that was trained; empty when there is none.
        notes: what a reader must know, such as that logits were not run and why.
    """

    origin: str
    num_positions: int
    num_texts: int
    num_prompts: int
    effect: Distance | None
    base_perplexity: float | None
    reference_perplexity: float | None
    exports: tuple[FormReport, ...]
    trained: tuple[FormReport, ...]
    notes: tuple[str, ...]

    @property
    def failed(self) -> tuple[FormReport, ...]:
        """The exports whose verdict is a failure."""
        return tuple(report for report in self.exports if report.passed is False)


def verify_exports(
    candidates: Sequence[Candidate],
    source: Source,
    *,
    probe: Probe,
    reporter: Reporter,
    measure: Measure = measure_in_child,
) -> ParityReport:
    """Run every candidate and judge it.

    One model is in memory at a time, in float32: 4 bytes a parameter. Where that does not fit, or a GGUF finds no
    llama.cpp, sampled rows of the stored weights and token ids are compared instead, and the report says so. A
    candidate that cannot be loaded fails; ExportError is raised only when base + adapter themselves cannot be run.
    """
    if not probe.rows or not all(probe.rows):
        raise ExportError("verify needs at least one row of token ids, and no empty row", hint="give it some eval rows")
    shortage = _memory_shortage(source.base)
    if shortage is not None:
        reporter.warn(shortage)
        wanted_ids = _tokenize_all(Form("base + adapter", "plain", source.base, tokenizer=source.tokenizer), probe)
        reports = tuple(
            _unrun(candidate, source, probe=probe, wanted_ids=wanted_ids, why=shortage) for candidate in candidates
        )
        return _report(probe, exports=reports, notes=(shortage,))
    with tempfile.TemporaryDirectory(prefix="gemma-tune-verify-", ignore_cleanup_errors=True) as name:
        directory = Path(name)
        _require_room(directory, source, probe, num_forms=4 + len(candidates))
        return _verify_by_logits(_Bench(probe, reporter, measure, directory), candidates, source)


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
        limits: Limits | None = None,
        effect: Distance | None = None,
    ) -> FormReport:
        """Figures, and the verdict where limits are given."""
        expected = limits.expected if limits else "told, not judged"
        if isinstance(found, GemmaTuneError):
            return FormReport(name, wanted.form.name, "none", expected, False, f"cannot be run: {found.message}")
        if found.logits.shape != wanted.logits.shape:
            reason = f"{found.logits.shape[1]} logits a position, {wanted.logits.shape[1]} in {wanted.form.name}"
            return FormReport(name, wanted.form.name, "logits", expected, False, reason)
        drift = distance(wanted.logits, found.logits, positions=self.positions)
        different = _other_texts(self.probe, wanted.text_ids, found.text_ids)
        passed: bool | None = None
        reason = ""
        if limits is not None and effect is not None:
            passed, reason = judge(drift, effect, limits)
            if passed and different:
                passed, reason = False, _told_texts(different)
            if found.form.kind == "gguf":
                reason += "; run and tokenized by llama.cpp"
        return FormReport(
            name=name,
            against=wanted.form.name,
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
    adapter = read_adapter(adapter_dir)
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


def _verify_by_logits(bench: _Bench, candidates: Sequence[Candidate], source: Source) -> ParityReport:
    files = (source.base, source.adapter, source.tokenizer, _adapter_rows(source.adapter))
    base_form = Form("base", "plain", source.base, tokenizer=source.tokenizer, num_rows=files[-1])
    reference_form = Form("base + adapter", "plain", *files)
    required = [base_form, reference_form]
    trained_form = expanded_form = None
    if source.trained_dtype is not None:
        trained_form = Form("4-bit base + adapter", "nf4", *files, source.trained_dtype)
        expanded_form = Form("expanded 4-bit base + adapter", "nf4-expanded", *files)
        required += [trained_form, expanded_form]
    plain = [candidate.form for candidate in candidates if candidate.form.kind != "gguf"]
    gguf = [candidate.form for candidate in candidates if candidate.form.kind == "gguf"] if has_llama_cpp() else []
    measured = bench.run([*required, *plain], required=len(required)) | bench.run(gguf)

    def ran(form: Form) -> Measurement:
        found = measured[form.name]
        assert isinstance(found, Measurement), "a required form was measured, or run() raised"
        return found

    base, reference = ran(base_form), ran(reference_form)
    trained = ran(trained_form) if trained_form else None
    expanded = ran(expanded_form) if expanded_form else None
    effect = distance(reference.logits, base.logits, positions=bench.positions)
    exports = []
    for candidate in candidates:
        name, limits = candidate.form.name, LIMITS[candidate.limits]
        if name not in measured:
            why = "llama-cpp-python is not installed"
            exports.append(_unrun(candidate, source, probe=bench.probe, wanted_ids=reference.text_ids, why=why))
        else:
            wanted = expanded if candidate.against_trained and expanded else reference
            exports.append(bench.compare(measured[name], wanted, name=name, limits=limits, effect=effect))
    return _report(
        bench.probe,
        effect=effect,
        base_perplexity=perplexity(base.logits, bench.targets),
        reference_perplexity=perplexity(reference.logits, bench.targets),
        exports=tuple(exports),
        trained=tuple(
            bench.compare(found, trained, name=name)
            for found, name in ((reference, "16-bit base + adapter"), (expanded, "expanded base + adapter"))
            if trained and found
        ),
    )


def _report(
    probe: Probe,
    *,
    exports: tuple[FormReport, ...],
    effect: Distance | None = None,
    base_perplexity: float | None = None,
    reference_perplexity: float | None = None,
    trained: tuple[FormReport, ...] = (),
    notes: tuple[str, ...] = (),
) -> ParityReport:
    unrun = tuple(f"{each.name}: {each.reason}" for each in exports if each.method != "logits" and effect is not None)
    return ParityReport(
        origin=probe.origin,
        num_positions=len(probe.positions()),
        num_texts=len(probe.texts),
        num_prompts=len(probe.prompts),
        effect=effect,
        base_perplexity=base_perplexity,
        reference_perplexity=reference_perplexity,
        exports=exports,
        trained=trained,
        notes=(*notes, *unrun),
    )


# --- without running -------------------------------------------------------------------------------------------------


def _unrun(candidate: Candidate, source: Source, *, probe: Probe, wanted_ids: list[list[int]], why: str) -> FormReport:
    """The verdict on stored weights and the tokenizer alone; `why` says why the model was not run."""
    form = candidate.form
    if form.kind == "gguf" and importlib.util.find_spec("gguf") is None:
        reason = f"not checked: {why}, and the package `gguf` is not installed, which reads it"
        return FormReport(form.name, "nothing", "none", LIMITS[candidate.limits].expected, None, reason)
    try:
        check, against = _check_weights(candidate, source)
        different = _other_texts(probe, wanted_ids, _tokenize_all(form, probe))
    except GemmaTuneError as error:
        reason = f"cannot be read: {error.message}"
        return FormReport(form.name, "nothing", "none", "a form that can be read", False, reason)
    num_equal = len(probe.texts) - len(different)
    passed = False if different else check.passed if check else None
    told = _told_texts(different) if different else f"{num_equal} strings have the same token ids"
    told += " (by the file's own lists, without llama.cpp)" if form.kind == "gguf" else ""
    return FormReport(
        name=form.name,
        against=against,
        method="weights" if check else "none",
        expected="stored weights and token ids equal",
        passed=passed,
        reason=f"{check.told()}; {told}; logits were not run" if check else f"weights were not checked: {why}; {told}",
        texts_equal=num_equal,
        first_difference=different[0] if different else None,
    )


def _check_weights(candidate: Candidate, source: Source) -> tuple[WeightCheck | None, str]:
    """What the stored weights are, and what they were compared with; None where there is nothing to compare."""
    form = candidate.form
    if form.kind == "gguf" and candidate.merged is not None:
        return check_gguf_weights(candidate.merged, form.path), "the merged weights"
    if form.kind == "plain" and form.adapter is None and candidate.limits != "4bits":
        return check_merged_weights(source.base, source.adapter, form.path), "base + scaling × B × A"
    return None, "token ids"


def _tokenize_all(form: Form, probe: Probe) -> list[list[int]]:
    """The ids of the probe's texts by a form's own tokenizer, without loading the form."""
    if form.kind == "gguf":
        return [*map(read_gguf_tokenizer(form.path).tokenize, probe.texts)]
    from gemma_tune.models.tokenizer import load_tokenizer

    assert form.tokenizer is not None, "a form of transformers has a tokenizer directory"
    tokenizer = load_tokenizer(form.tokenizer)
    return [tokenizer(text).input_ids for text in probe.texts]


def _memory_shortage(base: Path) -> str | None:
    """Why the model cannot be run in float32 here; None when it can, or when the free memory is not known."""
    weights = _FLOAT32_BYTES * sum(tensor.num_elements for tensor in stored_tensors(base).values())
    free = free_memory_bytes()
    if free is None or weights + _RUNTIME_BYTES <= free:
        return None
    return (
        f"logits were not run: the model needs {(weights + _RUNTIME_BYTES) / 1e9:.1f} GB of memory in float32, "
        f"{free / 1e9:.1f} GB are free"
    )


def free_memory_bytes() -> int | None:
    """Memory that can be had without swapping, of the machine and of the container; None where nobody says."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return None
    free = 1024 * int(_facts(meminfo)["MemAvailable:"])
    group = Path("/sys/fs/cgroup")
    limit = group / "memory.max"
    if limit.is_file() and (text := limit.read_text(encoding="ascii").strip()) != "max":
        stat = _facts(group / "memory.stat")
        used = int((group / "memory.current").read_text(encoding="ascii"))
        # Cached files count as used there, and are given back on demand.
        free = min(free, int(text) - used + int(stat["active_file"]) + int(stat["inactive_file"]))
    return free


def _facts(path: Path) -> dict[str, str]:
    """A file of `name value` lines, as the kernel writes them."""
    pairs = (line.split() for line in path.read_text(encoding="ascii").splitlines())
    return {words[0]: words[1] for words in pairs if len(words) > 1}


def _require_room(directory: Path, source: Source, probe: Probe, *, num_forms: int) -> None:
    """Refuse when the logits of all forms do not fit on the disk."""
    needed = num_forms * probe.num_tokens * read_config(source.base).vocab_size * _FLOAT32_BYTES
    require_free_disk(
        directory, needed, what="the check's logits", spare_bytes=0,
        hint="free some space, set TMPDIR to another disk, or compare fewer positions",
    )  # fmt: skip
