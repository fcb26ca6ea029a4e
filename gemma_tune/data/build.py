"""From the recipe's data section to rows that can be trained; the only entry the other packages call.

read_examples: source → template → checks → split → order. encode_examples: tokens → length policy → report.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from gemma_tune.data.chat import ChatRenderer
from gemma_tune.data.render import Example, render_example
from gemma_tune.data.segments import RowError, Segment
from gemma_tune.data.sources import TINY_WORLD, SourceData, load_source
from gemma_tune.data.template import DataTemplate, list_templates, load_template
from gemma_tune.data.tokenize import IGNORED, EncodedRow, Encoder
from gemma_tune.errors import DataError, did_you_mean
from gemma_tune.recipe.schema import DataSection

MAX_SHOWN = 5
_MAX_LISTED = 3  # on one line
# Above this share the rows are of another kind than the template, and training on the rest would not be what was meant.
MAX_BAD_SHARE = 0.5
# A common ending that looks like the end marker of another tool (some copies of dolly end in `###eos_token###`, others
# in `</s>` or `<|im_end|>`) is told when at least this share of the responses has it.
_MARKER_CHARS = 4
_MARKER_SHARE = 0.5
_MARKER_LAST_CHARACTERS = "#>]|"


@dataclass(frozen=True)
class ReadReport:
    """What was read and how it was divided.

    Attributes:
        label: the sources.
        template: the data template's name.
        rows_read: rows of all sources.
        rows_bad: rows left out because a field is missing, is not text, or the chat template refuses them.
        bad_samples: the first of them, as `where: problem`.
        num_duplicates: rows whose text equals that of an earlier row, white space at the ends aside; those in train are
            kept, in eval not.
        num_leaked: train rows left out because they are also eval rows.
        num_unused: rows beyond max_train_rows and max_eval_rows.
        train_rows, eval_rows: what is encoded.
        notes: what else a person should know, one sentence each.
    """

    label: str
    template: str
    rows_read: int
    rows_bad: int
    bad_samples: tuple[str, ...]
    num_duplicates: int
    num_leaked: int
    num_unused: int
    train_rows: int
    eval_rows: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class DataReport(ReadReport):
    """What is trained, in tokens. Row counts are those behind the length policy.

    Attributes:
        max_seq_tokens: the longest row that is allowed.
        dropped_too_long: rows left out because of it (train and eval).
        truncated: rows whose prompt was cut to fit.
        length_p50, length_p90, length_p99, length_max: tokens a row before the length policy, train and eval together.
        longest_row: where the longest row stands.
        train_tokens, eval_tokens: tokens of the rows that are kept.
        train_supervised_tokens, eval_supervised_tokens: those of them in the loss.
        control_strings: control tokens spelled out in the rows' own text; they are encoded as text.
        control_samples: where the first of them stand.
        dropped_samples: where the first dropped rows stand, with their tokens.
        sha256: of everything that decides which rows are trained; see `datasets_sha256`.
    """

    max_seq_tokens: int
    dropped_too_long: int
    truncated: int
    length_p50: int
    length_p90: int
    length_p99: int
    length_max: int
    longest_row: str
    train_tokens: int
    eval_tokens: int
    train_supervised_tokens: int
    eval_supervised_tokens: int
    control_strings: int
    control_samples: tuple[str, ...]
    dropped_samples: tuple[str, ...]
    sha256: str

    def lines(self) -> list[str]:
        """The report for a person, a line a fact; what did not happen is not mentioned."""
        share = self.train_supervised_tokens / self.train_tokens
        limit = f"max_seq_tokens {self.max_seq_tokens}"
        told = [
            f"{self.label} with template {self.template}: {_counted(self.rows_read, 'row')} → "
            f"{self.train_rows:,} train, {self.eval_rows:,} eval",
            f"{self.train_tokens:,} tokens to train on, {share:.0%} of them in the loss; row length "
            f"{self.length_p50} (median), {self.length_p99} (99 %), {self.length_max} (longest, {self.longest_row})",
        ]
        facts = (
            (self.rows_bad, "row", f"left out: {_listed(self.bad_samples, self.rows_bad)}"),
            (
                self.dropped_too_long,
                "row",
                f"dropped, over {limit}: {_listed(self.dropped_samples, self.dropped_too_long)}",
            ),
            (self.truncated, "prompt", f"cut on the left to fit {limit}; no answer was cut"),
            (self.num_duplicates, "row", "with the text of another row; train keeps such rows, eval does not"),
            (self.num_leaked, "train row", "left out, being eval rows, too"),
            (self.num_unused, "row", "not used (max_train_rows, max_eval_rows)"),
            (
                self.control_strings,
                "control token",
                f"spelled out in row text, kept as text: {', '.join(self.control_samples)}",
            ),
        )
        told += [f"{_counted(count, what)} {fact}" for count, what, fact in facts if count]
        return told + list(self.notes)


@dataclass(frozen=True)
class Examples:
    """Rendered rows, divided and in the order of training.

    Attributes:
        train, eval: no row of one has the text of a row of the other.
        report: counts.
        source_sha256s: of the train source, and of the eval source where it is another one.
        template, chat_sha256: what the rows were rendered with.
    """

    train: list[Example]
    eval: list[Example]
    report: ReadReport
    source_sha256s: tuple[str, ...]
    template: DataTemplate
    chat_sha256: str | None


@dataclass(frozen=True)
class Datasets:
    """Encoded rows. `train_examples[i]` is what `train[i]` was made of, and so for eval."""

    train: list[EncodedRow]
    eval: list[EncodedRow]
    train_examples: list[Example]
    eval_examples: list[Example]
    report: DataReport

    @property
    def sha256(self) -> str:
        """See `datasets_sha256`."""
        return self.report.sha256


# --- reading ----------------------------------------------------------------------------------------------------------


def read_examples(section: DataSection, *, chat: ChatRenderer | None) -> Examples:
    """Read, render, check and divide the rows that a recipe names. `chat` is needed by chat templates only.

    Rows that cannot be used are left out and counted; more than half of them stop everything. Rows are divided by a
    hash of their fields and `data.seed`: a row stays on its side when others are added or another template reads the
    same fields, and equal rows are on the same side.

    Raises:
        DataError: the source, the template or the mapping is wrong, or too many rows are.
    """
    template = load_template(section.template)
    sources = _load_sources(section)
    for source in sources:
        _check_columns(section, template, source)
    rendered = [_render(source, template, section=section, chat=chat) for source in sources]
    problems = [problem for _, found in rendered for problem in found]
    rows_read = sum(len(source.rows) for source in sources)
    for (_, found), source in zip(rendered, sources, strict=True):
        _stop_if_most_are_bad(found, source=source, template=template)

    keyed = [[(example.key, example) for example in examples] for examples, _ in rendered]
    order = _Order(section.seed)
    if len(keyed) == 2:
        train, held_out = keyed
    else:
        train, held_out = _split(keyed[0], fraction=section.eval_fraction, order=order)
    distinct = {key for side in keyed for key, _ in side}
    eval_rows = sorted(dict(reversed(held_out)).items(), key=lambda item: order(item[0]))
    eval_keys = {key for key, _ in eval_rows}
    kept = [example for key, example in train if key not in eval_keys]
    num_leaked = len(train) - len(kept)
    if not kept:
        raise DataError(
            "no row is left to train on: every train row is also an eval row",
            hint="check data.source and data.eval_source",
        )
    random.Random(section.seed).shuffle(kept)
    used_train = kept[: section.max_train_rows]
    used_eval = [example for _, example in eval_rows[: section.max_eval_rows]]
    report = ReadReport(
        label=" + ".join(dict.fromkeys(source.label for source in sources)),
        template=template.name,
        rows_read=rows_read,
        rows_bad=len(problems),
        bad_samples=tuple(problems[:MAX_SHOWN]),
        num_duplicates=sum(len(side) for side in keyed) - len(distinct),
        num_leaked=num_leaked,
        num_unused=len(kept) - len(used_train) + len(eval_rows) - len(used_eval),
        train_rows=len(used_train),
        eval_rows=len(used_eval),
        notes=tuple(_notes(used_train)),
    )
    return Examples(
        train=used_train,
        eval=used_eval,
        report=report,
        source_sha256s=tuple(source.sha256 for source in sources),
        template=template,
        chat_sha256=chat.sha256 if chat else None,
    )


def _load_sources(section: DataSection) -> list[SourceData]:
    """The train source, and the eval source where there is one of its own."""
    train = load_source(section.source, subset=section.subset, split=section.split, revision=section.revision)
    if section.eval_source is not None:
        return [train, load_source(section.eval_source)]
    eval_split = section.eval_split
    if eval_split is None and section.source == TINY_WORLD and section.split == "train" and section.eval_fraction:
        eval_split = "eval"
    if eval_split is None:
        return [train]
    return [train, load_source(section.source, subset=section.subset, split=eval_split, revision=section.revision)]


def _check_columns(section: DataSection, template: DataTemplate, source: SourceData) -> None:
    """Refuse a mapping or a template that cannot fit any row, before the rows are looked at one by one."""
    known = template.conversation or template.fields
    category = (template.category,) if template.category else ()
    for name, column in section.columns.items():
        if name not in (*known, *category):
            near = did_you_mean(name, known)
            raise DataError(
                f"data.columns: the template {template.name} has no field {name!r}" + (f"; {near}" if near else ""),
                hint=f"its fields: {', '.join(known)}",
            )
        if column not in source.columns:
            near = did_you_mean(column, source.columns)
            raise DataError(
                f"data.columns.{name}: {source.label} has no column {column!r}" + (f"; {near}" if near else ""),
                hint=f"its columns: {', '.join(source.columns)}",
            )
    wanted = [section.columns.get(name, name) for name in known]
    if template.conversation:
        missing = [] if any(column in source.columns for column in wanted) else [" or ".join(wanted)]
    else:
        missing = [
            column
            for name, column in zip(known, wanted, strict=True)
            if name in template.required and column not in source.columns
        ]
    if missing:
        fitting = [name for name in list_templates() if name != template.name and _fits(load_template(name), source)]
        hint = (
            f"these columns fit data.template={fitting[0]}"
            if fitting
            else f"map it: data.columns.{missing[0].split()[0]}=COLUMN"
        )
        raise DataError(
            f"{source.label} has no column {', '.join(missing)}, which the template {template.name} needs; "
            f"its columns: {', '.join(source.columns)}",
            hint=hint,
        )


def _fits(template: DataTemplate, source: SourceData) -> bool:
    if template.conversation:
        return any(column in source.columns for column in template.conversation)
    return all(column in source.columns for column in template.required)


def _render(
    source: SourceData, template: DataTemplate, *, section: DataSection, chat: ChatRenderer | None
) -> tuple[list[Example], list[str]]:
    """Every row that can be used, and `where: problem` of every other."""
    examples: list[Example] = []
    problems: list[str] = []
    for row in source.rows:
        try:
            examples.append(render_example(template, row, columns=section.columns, chat=chat))
        except RowError as error:
            problems.append(error.message)
    return examples, problems


def _stop_if_most_are_bad(problems: Sequence[str], *, source: SourceData, template: DataTemplate) -> None:
    if len(problems) <= MAX_BAD_SHARE * len(source.rows):
        return
    shown = [f"  {problem}" for problem in problems[:MAX_SHOWN]]
    if len(problems) > MAX_SHOWN:
        shown.append(f"  and {len(problems) - MAX_SHOWN:,} more")
    example = json.dumps(dict(template.example), ensure_ascii=False)
    count = f"{len(problems):,} of {_counted(len(source.rows), 'row')}"
    raise DataError(
        f"{count} of {source.label} cannot be used with the template {template.name}\n" + "\n".join(shown),
        hint=f"a row of the right form: {example}"
        if template.example
        else "mend the rows, or take another data.template",
    )


class _Order:
    """A number in [0, 1) for every row key, fixed by the seed."""

    def __init__(self, seed: int) -> None:
        self._seed = f"gemma-tune split {seed}:".encode()

    def __call__(self, key: bytes) -> float:
        return int.from_bytes(hashlib.sha256(self._seed + key).digest()[:6], "big") / 2**48


_Keyed = list[tuple[bytes, Example]]


def _split(rows: _Keyed, *, fraction: float, order: Callable[[bytes], float]) -> tuple[_Keyed, _Keyed]:
    """Hold out the rows whose number is below `fraction`; at least one distinct row on each side."""
    keys = sorted({key for key, _ in rows}, key=order)
    if fraction == 0:
        return rows, []
    if len(keys) < 2:
        raise DataError(
            "there is only one distinct row, so none can be held out",
            hint="set data.eval_fraction=0, or give more rows",
        )
    num_eval = sum(order(key) < fraction for key in keys)
    eval_keys = set(keys[: min(max(num_eval, 1), len(keys) - 1)])
    return [row for row in rows if row[0] not in eval_keys], [row for row in rows if row[0] in eval_keys]


def _notes(examples: Sequence[Example]) -> list[str]:
    """A common ending of the responses that looks like the end marker of another tool."""
    responses = [example.response for example in examples if len(example.response) > _MARKER_CHARS]
    if len(responses) < 10:
        return []
    ending, count = Counter(response[-_MARKER_CHARS:] for response in responses).most_common(1)[0]
    if count < _MARKER_SHARE * len(responses) or ending[-1] not in _MARKER_LAST_CHARACTERS:
        return []
    sharing = [response for response in responses if response.endswith(ending)]
    while all(
        len(response) > len(ending) and response[-len(ending) - 1] == sharing[0][-len(ending) - 1]
        for response in sharing
    ):
        ending = sharing[0][-len(ending) - 1 :]
    return [
        f"{len(sharing):,} of {_counted(len(responses), 'response')} end in {ending!r}, which is learned as part of "
        "every answer; remove it from the rows if it is not meant"
    ]


# --- encoding ---------------------------------------------------------------------------------------------------------


def encode_examples(examples: Examples, encoder: Encoder, section: DataSection) -> Datasets:
    """Encode the rows and apply the length policy (`data.too_long`); an answer is never cut.

    Raises:
        DataError: no train row is short enough, or a row is too long and the policy is to refuse.
    """
    both = [*examples.train, *examples.eval]
    encoded = encoder.encode_rows([example.segments for example in both], train_on=section.train_on)
    lengths = [len(row.input_ids) for row in encoded]
    limit = section.max_seq_tokens
    too_long = [index for index, length in enumerate(lengths) if length > limit]
    if too_long and section.too_long == "refuse":
        raise DataError(
            f"{len(too_long):,} of {len(both):,} rows are longer than data.max_seq_tokens {limit}: "
            + _listed(_told_lengths(both, lengths, too_long), len(too_long)),
            hint=f"set data.max_seq_tokens={max(lengths)}, the longest row, or data.too_long=drop",
        )
    kept = dict(enumerate(zip(both, encoded, strict=True)))
    truncated = 0
    for index in too_long:
        del kept[index]
        if section.too_long == "truncate_prompt":
            fitted = _fit(both[index], encoder, section)
            if fitted is not None:
                kept[index] = fitted
                truncated += 1
    train = [kept[index] for index in range(len(examples.train)) if index in kept]
    held_out = [kept[index] for index in range(len(examples.train), len(both)) if index in kept]
    if not train:
        shortest, longest = min(lengths), max(lengths)
        raise DataError(
            f"all {len(examples.train):,} train rows are longer than data.max_seq_tokens {limit}: "
            f"they have {shortest} to {longest} tokens",
            hint=f"set data.max_seq_tokens={_percentile(sorted(lengths), 99)} to keep 99 % of them",
        )
    notes = list(examples.report.notes)
    if examples.eval and not held_out:
        notes.append(f"every eval row is longer than max_seq_tokens {limit}: nothing is evaluated")
    controls = [
        (example.where, count) for example in both if (count := encoder.count_control_strings(example.segments))
    ]
    ordered = sorted(lengths)
    dropped = [index for index in too_long if index not in kept]
    read = {field.name: getattr(examples.report, field.name) for field in fields(ReadReport)}
    report = DataReport(
        **read | {"train_rows": len(train), "eval_rows": len(held_out), "notes": tuple(notes)},
        max_seq_tokens=limit,
        dropped_too_long=len(dropped),
        truncated=truncated,
        length_p50=_percentile(ordered, 50),
        length_p90=_percentile(ordered, 90),
        length_p99=_percentile(ordered, 99),
        length_max=ordered[-1],
        longest_row=both[lengths.index(ordered[-1])].where,
        train_tokens=sum(len(row.input_ids) for _, row in train),
        eval_tokens=sum(len(row.input_ids) for _, row in held_out),
        train_supervised_tokens=sum(_num_supervised(row) for _, row in train),
        eval_supervised_tokens=sum(_num_supervised(row) for _, row in held_out),
        control_strings=sum(count for _, count in controls),
        control_samples=tuple(where for where, _ in controls[:MAX_SHOWN]),
        dropped_samples=tuple(_told_lengths(both, lengths, dropped)),
        sha256=datasets_sha256(examples, section),
    )
    return Datasets(
        train=[row for _, row in train],
        eval=[row for _, row in held_out],
        train_examples=[example for example, _ in train],
        eval_examples=[example for example, _ in held_out],
        report=report,
    )


def datasets_sha256(examples: Examples, section: DataSection) -> str:
    """One hash of all that decides which rows are trained and how they read.

    That is sources, templates, mapping, split and lengths.

    Independent of where the files lie and of the tokenizer (the run's lock has the base's own file hashes).
    """
    decided: dict[str, Any] = {
        "sources": examples.source_sha256s,
        "template": examples.template.sha256,
        "chat_template": examples.chat_sha256,
    }
    decided |= {
        name: getattr(section, name)
        for name in (
            "columns",
            "max_seq_tokens",
            "too_long",
            "train_on",
            "eval_fraction",
            "max_train_rows",
            "max_eval_rows",
            "seed",
        )
    }
    return hashlib.sha256(json.dumps(decided, sort_keys=True).encode("utf-8")).hexdigest()


def format_sample(datasets: Datasets, tokenizer: Any) -> list[tuple[str, bool]]:
    """The train row of median length, decoded from its ids: pieces of text and whether they are in the loss."""
    by_length = sorted(datasets.train, key=lambda row: len(row.input_ids))
    row = by_length[len(by_length) // 2]
    pieces: list[tuple[list[int], bool]] = []
    for token_id, label in zip(row.input_ids, row.labels, strict=True):
        supervised = label != IGNORED
        if not pieces or pieces[-1][1] != supervised:
            pieces.append(([], supervised))
        pieces[-1][0].append(token_id)
    return [(tokenizer.decode(ids, skip_special_tokens=False), supervised) for ids, supervised in pieces]


def _fit(example: Example, encoder: Encoder, section: DataSection) -> tuple[Example, EncodedRow] | None:
    """Cut the prompt's row text until the row fits: the longest piece first, from its left. None if it never fits."""
    segments = list(example.segments)
    while True:
        row = encoder.encode(segments, train_on=section.train_on)
        excess = len(row.input_ids) - section.max_seq_tokens
        if excess <= 0:
            return replace(example, segments=tuple(segments)), row
        texts = [index for index, segment in enumerate(segments) if _may_be_cut(segment)]
        if not texts:
            return None
        longest = max(texts, key=lambda index: len(segments[index].text))
        segments[longest] = replace(
            segments[longest], text=_without_first_tokens(segments[longest].text, excess, encoder)
        )


def _may_be_cut(segment: Segment) -> bool:
    return bool(segment.text) and not (segment.supervised or segment.control)


def _without_first_tokens(text: str, count: int, encoder: Encoder) -> str:
    offsets = encoder.offsets(text)
    # At least one character goes, so that cutting always ends.
    return text[max(offsets[count][0], 1) :] if count < len(offsets) else ""


def _num_supervised(row: EncodedRow) -> int:
    return len(row.labels) - row.labels.count(IGNORED)


def _percentile(ordered: Sequence[int], percent: int) -> int:
    """The smallest value that at least `percent` % of the values do not exceed."""
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]


def _told_lengths(examples: Sequence[Example], lengths: Sequence[int], indices: Sequence[int]) -> list[str]:
    return [f"{examples[index].where} ({lengths[index]} tokens)" for index in indices[:MAX_SHOWN]]


def _listed(samples: Sequence[str], count: int) -> str:
    shown = samples[:_MAX_LISTED]
    more = f", and {count - len(shown):,} more" if count > len(shown) else ""
    return ", ".join(shown) + more


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
