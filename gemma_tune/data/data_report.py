"""What was read, left out and encoded, as facts and as lines for a person."""

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
    """One source of train rows."""

    label: str
    template: str  # its name
    detected: bool  # whether the template was chosen by the columns
    rows_read: int
    rows_bad: int  # those that cannot be used
    train_rows: int  # that are trained, repeated ones counted each time (before the length policy)
    repeats: int  # how many of those are a second or later copy (`#N` above the rows there are)


@dataclass(frozen=True)
class ReadReport:
    """What was read and how it was divided."""

    sources: tuple[SourceReport, ...]  # where train rows come from
    eval_label: str | None  # where eval rows come from when they have a source of their own
    rows_read: int  # rows of all sources
    rows_bad: int  # rows left out because a field is missing, is not text, or the chat template refuses them
    bad_samples: tuple[str, ...]  # the first of them, as `where: problem`
    num_duplicates: int  # rows whose text equals that of an earlier row, white space at the ends aside
    num_leaked: int  # train rows left out because they are also eval rows
    left_out: dict[str, int]  # rows that data.clean and data.control_tokens left out, by reason
    stripped: dict[str, int]  # rows that held a string of data.clean.strip_heads or strip_tails, by that string
    num_unused: int  # rows beyond max_train_rows, max_eval_rows, `#N` and the weights
    train_rows: int  # that are encoded
    eval_rows: int
    notes: tuple[str, ...]  # what else a person should know, one sentence each

    @property
    def label(self) -> str:
        """All sources in a few words."""
        labels = [source.label for source in self.sources] + ([self.eval_label] if self.eval_label else [])
        return " + ".join(dict.fromkeys(labels))

    def bad_lines(self) -> list[str]:
        """The rows that cannot be used: how many, and the first of them."""
        more = self.rows_bad - len(self.bad_samples)
        count, tail = f"{counted(self.rows_bad, 'row')} left out:", [f"  and {more:,} more"] if more else []
        return [count, *(f"  {sample}" for sample in self.bad_samples), *tail] if self.rows_bad else []


@dataclass(frozen=True)
class DataReport(ReadReport):
    """What is trained, in tokens. Row counts are those behind the length policy."""

    max_seq_tokens: int  # the longest row that is allowed
    dropped_too_long: int  # rows left out because of it (train and eval)
    truncated: int  # rows whose prompt was cut to fit
    truncated_answers: int  # those of them whose answer was cut, too (`too_long: truncate`); they end in a stop token
    length_p50: int  # tokens a row before the length policy, train and eval together
    length_p90: int
    length_p99: int
    length_max: int
    longest_row: str  # where the longest row stands
    length_bins: tuple[LengthBin, ...]  # rows by their tokens, as the percentiles count them
    train_tokens: int  # of the rows that are kept
    eval_tokens: int
    train_supervised_tokens: int  # those in the loss
    eval_supervised_tokens: int
    control_strings: int  # control tokens spelled out in the rows' own text
    control_as: str  # `text`, or `control` when they are encoded as the tokens that they name
    control_samples: tuple[str, ...]  # where the first of them stand
    dropped_samples: tuple[str, ...]  # where the first dropped rows stand, with their tokens
    sha256: str  # of everything that decides which rows are trained and how they read

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
        told += self.bad_lines()
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
            *((count, "row", f"stripped of {shared!r}") for shared, count in self.stripped.items()),
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
