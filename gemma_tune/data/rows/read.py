"""From opened sources to rendered rows: clean, render, check, divide, mix, order."""

import json
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import numpy as np

from gemma_tune.data.data_report import MAX_SAMPLES, ReadReport, SourceReport
from gemma_tune.data.encode.arrays import Ints
from gemma_tune.data.inputs import Input, Inputs
from gemma_tune.data.rows.chat_template import ChatRenderer
from gemma_tune.data.rows.cleaner import RowCleaner
from gemma_tune.data.rows.divide import RowKeys
from gemma_tune.data.rows.render import Example, prepare_fields, render_example
from gemma_tune.data.rows.segments import RowError
from gemma_tune.data.rows.spool import Chosen, ExampleSpool
from gemma_tune.data.rows.unread import Tally, unread_notes
from gemma_tune.data.sources.items import BrokenLine, SourceRow, stop_if_broken, told
from gemma_tune.data.text.shared_ends import SAMPLE_TEXTS, SharedEnds, has_end, is_marker
from gemma_tune.errors import DataError
from gemma_tune.identity import json_sha256
from gemma_tune.recipe.schema import CleanSection, DataSection
from gemma_tune.text import counted


@dataclass(frozen=True)
class Examples:
    """Rendered rows, divided and in the order of training."""

    train: Sequence[Example]  # read from disk one by one, as `eval`
    eval: Sequence[Example]  # without a row whose text is in `train`
    report: ReadReport
    sha256: str  # of the sources, templates, mappings and settings that decide which rows these are and how they read


@dataclass
class _Read:
    """One source: its rows that can be used, and what is wrong with the others."""

    input: Input
    rows: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))  # where those that can be used are spooled
    rows_read: int = 0
    broken: list[BrokenLine] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)  # not the errors: each keeps the frames that it passed through
    left_out: Counter[str] = field(default_factory=Counter)
    labelled_false: int = 0  # KTO's mark of an unwanted answer
    tally: Tally = field(default_factory=Tally)


def read_examples(
    section: DataSection, inputs: Inputs, *, chat: ChatRenderer | None, scratch: Path | None = None
) -> Examples:
    """Read, clean, render, check, divide and mix the rows that a recipe names. `chat` is needed by chat templates only.

    The rendered rows lie in a file in `scratch` (else where the system keeps temporary files) that is gone with them;
    about 0.1 kB of each row stays in memory.

    Rows that cannot be used are left out and counted, up to `data.max_bad_fraction` of a source; a line that is no row
    at all stops everything. Rows are divided by a hash of their fields and `data.seed`: a row stays on its side when
    others are added or another template reads the same fields, and equal rows are on the same side. Weights and `#N`
    act after that, on train rows.

    Raises:
        DataError: lines are broken, or too many rows cannot be used.
    """
    cleaner, spool = RowCleaner(section.clean), ExampleSpool(scratch)
    read = [_read(item, cleaner=cleaner, chat=chat, spool=spool) for item in inputs.all]
    bad = [problem for source in read for problem in source.bad]
    stop_if_broken([line for source in read for line in source.broken], unusable=bad)
    for source in read:
        _stop_if_too_many_are_bad(source, allowed=section.max_bad_fraction)

    keys = RowKeys.of(spool.keys, seed=section.seed)
    own_train = read[: len(inputs.train)]
    train = [source.rows for source in own_train]
    if inputs.eval is None:
        is_eval = keys.held_out(fraction=section.eval_fraction)
        held_out = np.flatnonzero(is_eval)
        train = [rows[~is_eval[rows]] for rows in train]
    else:
        held_out = read[-1].rows
    eval_rows = keys.ordered(keys.firsts(held_out))
    is_leaked = keys.are_among(eval_rows)
    kept = [rows[~is_leaked[rows]] for rows in train]
    num_leaked = sum(map(len, train)) - sum(map(len, kept))
    left_out = sum((source.left_out for source in read), Counter())
    if section.clean.drop_duplicates != "off":
        kept, dropped = _without_duplicates(
            kept, eval_rows, keys=keys, spool=spool if section.clean.drop_duplicates == "near" else None
        )
        left_out += dropped
    if not any(map(len, kept)):
        raise DataError(
            "no row is left to train on" + (": every train row is also an eval row" if num_leaked else ""),
            hint="check data.source, data.eval_source and data.clean",
        )
    mixed, repeats = _mix(kept, inputs.train, keys=keys)
    shuffled = list(range(sum(map(len, mixed))))
    random.Random(section.seed).shuffle(shuffled)
    order = np.array(shuffled[: section.max_train_rows], dtype=np.int64)
    used_train = Chosen(spool, np.concatenate(mixed)[order])
    used_eval = Chosen(spool, eval_rows[: section.max_eval_rows])
    per_source = Counter(np.repeat(np.arange(len(mixed)), [len(part) for part in mixed])[order].tolist())
    report = ReadReport(
        sources=tuple(
            SourceReport(
                label=source.input.source.label,
                template=source.input.template.name,
                detected=source.input.detected,
                rows_read=source.rows_read,
                rows_bad=len(source.bad),
                train_rows=per_source[index],
                repeats=repeats[index],
            )
            for index, source in enumerate(own_train)
        ),
        eval_label=inputs.eval.source.label if inputs.eval else None,
        rows_read=sum(source.rows_read for source in read),
        rows_bad=len(bad),
        bad_samples=tuple(bad[:MAX_SAMPLES]),
        num_duplicates=len(spool) - len(np.unique(keys.numbers)),
        num_leaked=num_leaked,
        left_out={reason: count for reason, count in left_out.items() if count},
        stripped=dict(cleaner.stripped),
        num_unused=sum(map(len, kept)) + sum(repeats) - len(used_train) + len(eval_rows) - len(used_eval),
        train_rows=len(used_train),
        eval_rows=len(used_eval),
        notes=(
            *dict.fromkeys(note for item in inputs.all for note in item.source.notes),
            *unread_notes([(item.input.source.label, item.tally) for item in read], section.drop_fields),
            *_label_notes(own_train),
            *_strip_notes(section.clean, cleaner.stripped),
            *_ending_notes(used_train),
        ),
    )
    return Examples(used_train, used_eval, report, examples_sha256(section, inputs, chat=chat))


def examples_sha256(section: DataSection, inputs: Inputs, *, chat: ChatRenderer | None) -> str:
    """Hash all that decides which rows are trained and how they read: not where files lie, and not the tokenizer."""
    decided = {
        "inputs": [
            (item.source.sha256, item.template.sha256, dict(item.row_format.columns), item.num_rows, item.weight)
            for item in inputs.all
        ],
        "chat_template": chat.sha256 if chat else None,
        "section": section.model_dump(
            mode="json", exclude={"source", "eval_source", "mix", "template", "columns", "cache"}
        ),
    }
    return json_sha256(decided)


def render_rows(
    item: Input, *, cleaner: RowCleaner | None, chat: ChatRenderer | None, tally: Tally | None = None
) -> Iterator[tuple[SourceRow | None, Example | RowError | BrokenLine]]:
    """Every row of a source with what became of it; without `cleaner` rows are rendered as they stand.

    What the template does not read is counted in `tally`.
    """
    for row in item.source.rows():
        if isinstance(row, BrokenLine):
            yield None, row
            continue
        fields, spelled = prepare_fields(item.template, row.fields, item.row_format.columns)
        if fields is not row.fields:
            row = replace(row, fields=dict(fields))
        if tally is not None:
            tally.spelled.update(spelled)
        try:
            clean = replace(row, fields=cleaner.fields(row.fields)) if cleaner and cleaner.changes_text else row
            example = render_example(item.template, clean, chat=chat, row_format=item.row_format, tally=tally)
            yield clean, example
        except RowError as error:
            yield row, error


def _read(item: Input, *, cleaner: RowCleaner, chat: ChatRenderer | None, spool: ExampleSpool) -> _Read:
    first, read = len(spool), _Read(item)
    for row, result in render_rows(item, cleaner=cleaner, chat=chat, tally=read.tally):
        read.rows_read += row is not None
        read.labelled_false += row is not None and row.fields.get("label") is False
        if isinstance(result, Example):
            assert row is not None
            reason = cleaner.reason_to_leave_out(item.texts(row.fields), result)
            if reason:
                read.left_out[reason] += 1
            else:
                spool.append(result)
        elif isinstance(result, BrokenLine):
            read.broken.append(result)
        else:
            read.bad.append(result.message)
    read.rows = np.arange(first, len(spool))
    return read


def _stop_if_too_many_are_bad(read: _Read, *, allowed: float) -> None:
    if len(read.bad) <= allowed * read.rows_read:
        return
    template = read.input.template
    example = json.dumps(dict(template.example), ensure_ascii=False)
    raise DataError(
        f"{len(read.bad):,} of {counted(read.rows_read, 'row')} of {read.input.source.label} cannot be used with the "
        f"template {template.name}\n" + told(read.bad),
        hint=read.tally.hint()
        or (
            f"a row of the right form: {example}" if template.example else "fix the rows, or take another data.template"
        ),
    )


def _without_duplicates(
    parts: Sequence[Ints], eval_rows: Ints, *, keys: RowKeys, spool: ExampleSpool | None
) -> tuple[list[Ints], Counter[str]]:
    """Leave out train rows that repeat an earlier one; with `spool` also those close to one or to an eval row."""
    rows = np.concatenate(parts)
    kept = keys.firsts(rows)
    dropped = Counter({"exact duplicate": len(rows) - len(kept)})
    if spool is not None:
        from gemma_tune.data.text.duplicates import NearDuplicates

        near = NearDuplicates(len(spool), read=lambda row: spool[row].own_texts)
        for example in spool:
            near.add(example.own_texts)
        leaked = [row for row, _ in near.pairs(kept.tolist(), eval_rows.tolist())]
        # Only then the groups: a row whose group begins with a leaked row would go with it otherwise.
        kept = kept[~np.isin(kept, leaked)]
        repeated = [row for group in near.groups(kept.tolist()) for row in group[1:]]
        kept = kept[~np.isin(kept, repeated)]
        dropped += Counter({"near duplicate of an eval row": len(leaked), "near duplicate": len(repeated)})
    return [part[np.isin(part, kept)] for part in parts], dropped


def _mix(parts: Sequence[Ints], inputs: Sequence[Input], *, keys: RowKeys) -> tuple[list[Ints], list[int]]:
    """Apply weights and `#N`: the rows of each source that are trained, and how many of them are repeats.

    With weights the mix is as large as it can be without repeating a row. Which rows are taken follows from the seed
    and the rows alone, so that a source keeps its choice when another one changes (weights aside).
    """
    weights = [item.weight for item in inputs]
    if all(weight is not None for weight in weights):
        size = min(len(part) / weight for part, weight in zip(parts, weights, strict=True) if weight)
        counts: list[int | None] = [max(1, round(size * weight)) if weight else None for weight in weights]
    else:
        counts = [item.num_rows for item in inputs]
    mixed: list[Ints] = []
    repeats: list[int] = []
    for part, count in zip(parts, counts, strict=True):
        if count is None or not len(part):
            mixed.append(part)
            repeats.append(0)
            continue
        passes, rest = divmod(count, len(part))
        mixed.append(np.concatenate([*[part] * passes, keys.ordered(part)[:rest]]))
        repeats.append(max(0, count - len(part)))
    return mixed, repeats


def _label_notes(read: Sequence[_Read]) -> Iterator[str]:
    for source in read:
        if source.labelled_false:
            yield (
                f"{source.labelled_false:,} rows of {source.input.source.label} have label false (KTO's unwanted "
                "answers); they are learned like the others, so take them out unless that is meant"
            )


def _ending_notes(rows: Sequence[Example]) -> Iterator[str]:
    """End markers of other tools that many responses end in."""
    num_rows = min(len(rows), SAMPLE_TEXTS)
    for tail in SharedEnds(row.response for row in islice(rows, num_rows)).find("tail"):
        if is_marker(tail):
            num_sharing = sum(has_end(row.response, tail, "tail") for row in islice(rows, num_rows))
            yield (
                f"{num_sharing:,} of {counted(num_rows, 'response')} looked at end in {tail!r}, which is learned "
                f"as part of every answer; data.clean.strip_tails=[{json.dumps(tail, ensure_ascii=False)}] removes it"
            )


def _strip_notes(section: CleanSection, stripped: Mapping[str, int]) -> Iterator[str]:
    for key, strings in (("strip_heads", section.strip_heads), ("strip_tails", section.strip_tails)):
        yield from (f"data.clean.{key}: no row has {shared!r} there" for shared in strings if not stripped[shared])
