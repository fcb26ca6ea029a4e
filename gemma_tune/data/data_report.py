"""What was read, left out and encoded, as facts and as lines for a person."""

from __future__ import annotations

from dataclasses import dataclass

from gemma_tune.text import counted, listed

MAX_SAMPLES = 20  # kept of each kind, and shown where each one needs mending
_MAX_ON_A_LINE = 3


@dataclass(frozen=True, slots=True)
class LengthBin:
    """Rows of `low` to `high` tokens, both included."""

    low: int
    high: int
    count: int


@dataclass(frozen=True)
class SourceReport:
    """One source of train rows.

    Attributes:
        label: the source.
        template: the data template's name.
        detected: whether the template was chosen by the columns.
        rows_read, rows_bad: rows of the source, and those of them that cannot be used.
        train_rows: rows of it that are trained, repeated ones counted each time (before the length policy).
        repeats: how many of those are a second or later copy (`#N` above the rows there are).
    """

    label: str
    template: str
    detected: bool
    rows_read: int
    rows_bad: int
    train_rows: int
    repeats: int


@dataclass(frozen=True)
class ReadReport:
    """What was read and how it was divided.

    Attributes:
        sources: where train rows come from.
        eval_label: where eval rows come from when they have a source of their own.
        rows_read: rows of all sources.
        rows_bad: rows left out because a field is missing, is not text, or the chat template refuses them.
        bad_samples: the first of them, as `where: problem`.
        num_duplicates: rows whose text equals that of an earlier row, white space at the ends aside; those in train are
            kept unless data.clean.drop_duplicates says otherwise, in eval not.
        num_leaked: train rows left out because they are also eval rows.
        left_out: rows that data.clean and data.control_tokens left out, by reason.
        num_unused: rows beyond max_train_rows, max_eval_rows, `#N` and the weights.
        train_rows, eval_rows: what is encoded.
        notes: what else a person should know, one sentence each.
    """

    sources: tuple[SourceReport, ...]
    eval_label: str | None
    rows_read: int
    rows_bad: int
    bad_samples: tuple[str, ...]
    num_duplicates: int
    num_leaked: int
    left_out: dict[str, int]
    num_unused: int
    train_rows: int
    eval_rows: int
    notes: tuple[str, ...]

    @property
    def label(self) -> str:
        """All sources in a few words."""
        labels = [source.label for source in self.sources] + ([self.eval_label] if self.eval_label else [])
        return " + ".join(dict.fromkeys(labels))


@dataclass(frozen=True)
class DataReport(ReadReport):
    """What is trained, in tokens. Row counts are those behind the length policy.

    Attributes:
        max_seq_tokens: the longest row that is allowed.
        dropped_too_long: rows left out because of it (train and eval).
        truncated: rows whose prompt was cut to fit.
        truncated_answers: those of them whose answer was cut, too (`too_long: truncate`); they end in a stop token.
        length_p50, length_p90, length_p99, length_max: tokens a row before the length policy, train and eval together.
        longest_row: where the longest row stands.
        length_bins: rows by their tokens, as the percentiles count them.
        train_tokens, eval_tokens: tokens of the rows that are kept.
        train_supervised_tokens, eval_supervised_tokens: those of them in the loss.
        control_strings: control tokens spelled out in the rows' own text.
        control_as: `text`, or `control` when they are encoded as the tokens that they name.
        control_samples: where the first of them stand.
        dropped_samples: where the first dropped rows stand, with their tokens.
        sha256: of everything that decides which rows are trained and how they read.
    """

    max_seq_tokens: int
    dropped_too_long: int
    truncated: int
    truncated_answers: int
    length_p50: int
    length_p90: int
    length_p99: int
    length_max: int
    longest_row: str
    length_bins: tuple[LengthBin, ...]
    train_tokens: int
    eval_tokens: int
    train_supervised_tokens: int
    eval_supervised_tokens: int
    control_strings: int
    control_as: str
    control_samples: tuple[str, ...]
    dropped_samples: tuple[str, ...]
    sha256: str

    def lines(self) -> list[str]:
        """The report for a person, a line a fact; what did not happen is not mentioned."""
        share = self.train_supervised_tokens / self.train_tokens
        limit = f"max_seq_tokens {self.max_seq_tokens}"
        told = [
            f"{self.label} {self._templates()}: {counted(self.rows_read, 'row')} → "
            f"{self.train_rows:,} train, {self.eval_rows:,} eval"
        ]
        if len(self.sources) > 1:
            told += [
                f"  {source.label}: {counted(source.train_rows, 'train row')}, template {source.template}"
                + (f", {source.repeats:,} of them repeats" if source.repeats else "")
                for source in self.sources
            ]
        told.append(
            f"{self.train_tokens:,} tokens to train on, {share:.0%} of them in the loss; row length "
            f"{self.length_p50} (median), {self.length_p99} (99 %), {self.length_max} (longest, {self.longest_row})"
        )
        if self.rows_bad:
            told.append(f"{counted(self.rows_bad, 'row')} left out:")
            told += [f"  {sample}" for sample in self.bad_samples]
            more = self.rows_bad - len(self.bad_samples)
            told += [f"  and {more:,} more"] if more else []
        facts: list[tuple[int, str, str]] = [
            (
                self.dropped_too_long,
                "row",
                f"dropped, over {limit}: {listed(self.dropped_samples, count=self.dropped_too_long)}",
            ),
            (self.truncated, "prompt", f"cut on the left to fit {limit}"),
            (self.truncated_answers, "answer", "cut as well, each still followed by its stop token"),
            (self.num_leaked, "train row", "left out, being eval rows, too"),
            *((count, "row", f"left out: {reason}") for reason, count in self.left_out.items()),
            (self.num_unused, "row", "not used (max_train_rows, max_eval_rows, #N, weights)"),
            (
                self.control_strings,
                "control token",
                f"spelled out in row text, {'kept as text' if self.control_as == 'text' else 'encoded as such'}: "
                + ", ".join(self.control_samples[:_MAX_ON_A_LINE]),
            ),
        ]
        if not any("duplicate" in reason for reason in self.left_out):
            fact = "with the text of another row; train keeps such rows, eval does not"
            facts.insert(3, (self.num_duplicates, "row", fact))
        told += [f"{counted(count, what)} {fact}" for count, what, fact in facts if count]
        return told + list(self.notes)

    def _templates(self) -> str:
        names = dict.fromkeys(source.template for source in self.sources)
        detected = " (detected)" if all(source.detected for source in self.sources) else ""
        return f"with template{'s' if len(names) > 1 else ''} {', '.join(names)}{detected}"
