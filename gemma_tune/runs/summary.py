"""What came out of a run, as it is stored in summary.json and shown at the end."""

from dataclasses import asdict, dataclass, fields

from gemma_tune.disk import read_json_object, write_json
from gemma_tune.errors import RunError
from gemma_tune.runs.layout import RunDir


@dataclass(frozen=True)
class Question:
    """An eval row with the base's and the tuned model's answer."""

    question: str
    expected: str
    before: str
    after: str


@dataclass(frozen=True)
class RunSummary:
    """The figures of a finished run."""

    model: str
    engine: str
    quantization: str
    precision: str
    train_rows: int  # train_rows, eval_rows, dropped_rows: rows after the length policy; dropped ones were too long
    eval_rows: int
    dropped_rows: int
    num_trainable: int  # trained parameters
    steps: int  # optimizer steps
    training_seconds: float  # training_seconds, total_seconds: the steps alone, and the command from start to end
    total_seconds: float
    num_tokens: int  # real tokens trained on
    peak_memory_bytes: int  # of the card on CUDA, of the process elsewhere
    train_loss: float  # mean of the last tenth of the steps; all losses are in nats a supervised token
    eval_loss_before: float | None
    eval_loss_after: float | None
    # exact_match_before, exact_match_after: share of `exact_match_rows` answered word for word, 0 to 1
    exact_match_before: float | None
    exact_match_after: float | None
    exact_match_rows: int
    questions: list[Question]

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.training_seconds if self.training_seconds else 0.0


def write_summary(run: RunDir, summary: RunSummary) -> None:
    write_json(run.summary, {**asdict(summary), "tokens_per_second": summary.tokens_per_second})


def read_summary(run: RunDir) -> RunSummary:
    """The summary of a finished run; a `RunError` when there is none yet, or it is damaged."""
    values = read_json_object(run.summary)
    try:
        known = {each.name: values[each.name] for each in fields(RunSummary)}
        return RunSummary(**{**known, "questions": [Question(**question) for question in known["questions"]]})
    except (KeyError, TypeError) as cause:
        raise RunError(
            f"{run.summary} is damaged: {str(cause).strip()}",
            hint="put it back from a copy of the run; its adapter is not touched",
        ) from None
