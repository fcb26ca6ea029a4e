"""A model in one line of a notebook: `from gemma_tune import load`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, overload

from gemma_tune.data.rows.render import question_fields
from gemma_tune.engines.choose import start_engine
from gemma_tune.engines.engine_facts import ENGINES
from gemma_tune.errors import EngineError, ModelError
from gemma_tune.inference.answer_settings import AnswerSettings, Sampler, Sampling
from gemma_tune.inference.ask import encode_questions
from gemma_tune.inference.sampling import choose_sampling
from gemma_tune.inference.target import GgufTarget, find_target
from gemma_tune.machine.quiet import libraries_to
from gemma_tune.models.config import TextConfig
from gemma_tune.models.describe import LayerRow, summarize

if TYPE_CHECKING:
    import torch

    from gemma_tune.inference.load_target import LoadedTarget
    from gemma_tune.inference.score import Intercept, TextScore

# A question as text, or the fields of a data template, such as {"instruction": …, "context": …}.
Question = str | Mapping[str, Any]


def load(
    name: str,
    *,
    engine: str = "transformers",
    load_in_4bit: bool | None = None,
    dtype: str | None = None,
    template: str | None = None,
    without_adapter: bool = False,
    load_weights: bool = True,
) -> Gemma:
    """Load a model to ask and to score.

    Args:
        name: a run, an adapter, a merged directory, a GGUF file, a short name or hub id, or a KerasNLP preset such as
            gemma_2b_en.
        engine: one of `engines.engine_facts.ENGINES`; Unsloth wants to be imported before transformers is.
        load_in_4bit: NF4 or not; a run is loaded as it was trained unless given.
        dtype: auto, bfloat16, float16 or float32.
        template: the data template that questions go through; a run brings its own, and a base model that has none
            continues bare text.
        without_adapter: take the base of a run.
        load_weights: False makes random weights from the architecture alone.

    Raises:
        GemmaTuneError: what is wrong, and what to do.
    """
    with libraries_to(None):
        if not load_weights:
            return _random(name, dtype=dtype, template=template, load_in_4bit=load_in_4bit)
        ENGINES.find(engine, error=EngineError)
        target = find_target(name, template=template, default_template="completion", without_adapter=without_adapter)
        try:
            started = None if isinstance(target, GgufTarget) else start_engine(engine)  # before transformers
        except ModuleNotFoundError as error:
            raise EngineError(f"the engine {engine} is not installed ({error})", hint="use transformers") from None

        from gemma_tune.inference.load_target import load_target

        loaded = load_target(target, engine=started, load_in_4bit=load_in_4bit, dtype=dtype)
    config = None if isinstance(target, GgufTarget) else target.base.config
    return Gemma(name, model=loaded.model, config=config, loaded=loaded)


def _random(name: str, *, dtype: str | None, template: str | None, load_in_4bit: bool | None) -> Gemma:
    from gemma_tune.data.rows.template import load_template
    from gemma_tune.inference.load_target import loaded_target
    from gemma_tune.inference.random_model import make_random_model

    if load_in_4bit:
        raise ModelError("random weights are not quantised", hint="leave load_in_4bit out")
    model, config, directory = make_random_model(name, dtype=dtype or "auto")
    has_tokenizer = directory is not None and (directory / "tokenizer.json").is_file()
    loaded = None
    if directory is not None and has_tokenizer:
        loaded = loaded_target(model, tokenizer_directory=directory, template=load_template(template or "completion"))
    return Gemma(name, model=model, config=config, loaded=loaded)


@dataclass(frozen=True)
class Summary:
    """The layers of a model and what they weigh; printed, a table."""

    name: str
    layers: tuple[LayerRow, ...]
    num_params: int
    num_adapter_params: int  # of a LoRA adapter on top of it
    weights_bytes: int  # in memory as loaded

    def __str__(self) -> str:
        cells = [("layer", "kind", "output shape", "parameters")]
        cells += [(row.name, row.kind, row.shape_text, f"{row.num_params:,}") for row in self.layers]
        widths = [max(len(line[column]) for line in cells) for column in range(4)]
        lines = [self.name]
        for name, kind, shape, count in cells:
            lines.append(f"{name:<{widths[0]}}  {kind:<{widths[1]}}  {shape:<{widths[2]}}  {count:>{widths[3]}}")
        lines.append(f"{self.num_params:,} parameters, {self.weights_bytes:,} bytes in memory")
        if self.num_adapter_params:
            lines.append(f"{self.num_adapter_params:,} parameters of the adapter")
        return "\n".join(lines)

    __repr__ = __str__


class Gemma:
    """A model that is asked with the data template it was trained with."""

    def __init__(self, name: str, *, model: Any, config: TextConfig | None, loaded: LoadedTarget | None) -> None:
        """Made by `load`. `model` and `config` are None for a GGUF, `loaded` for random weights without a tokenizer."""
        self.name = name
        self.model = model
        self._config = config
        self._loaded = loaded
        self._sampling = Sampling()

    def summary(self) -> Summary:
        """The layer table.

        Raises:
            EngineError: the model is a GGUF.
        """
        if self._config is None:
            raise EngineError("llama.cpp does not list the layers of a GGUF", hint="load the run or merged directory")
        adapter = [each.numel() for name, each in self.model.named_parameters() if "lora_" in name]
        layers = tuple(summarize(self._config, by="layer"))
        return Summary(
            name=self.name,
            layers=layers,
            num_params=sum(row.num_params for row in layers),
            num_adapter_params=sum(adapter),
            weights_bytes=self.model.get_memory_footprint(),
        )

    def compile(self, sampler: str | Sampler = "greedy", **settings: float | None) -> None:
        """Choose how the next answers are made: a sampler's name, or a function of logits [batch, vocabulary].

        Args:
            settings: fields of `Sampling`, such as temperature, top_k, top_p, min_p, num_beams, repetition_penalty and
                seed.

        Raises:
            DataError: as `choose_sampling`.
        """
        self._sampling = choose_sampling(sampler, **settings)

    @overload
    def generate(self, questions: Question, **settings: Any) -> str: ...
    @overload
    def generate(self, questions: Sequence[Question], **settings: Any) -> list[str]: ...
    def generate(self, questions: Question | Sequence[Question], **settings: Any) -> str | list[str]:
        """Answer one question, or several in batches; the text is the answer alone.

        Args:
            settings: fields of `AnswerSettings`: max_length, max_new_tokens, stop_strings, batch_size.

        Raises:
            DataError: a question lacks what the template reads, or leaves no room for an answer.
        """
        loaded = self._asked()
        asked: Sequence[Question] = [questions] if (is_single := isinstance(questions, str | Mapping)) else questions
        rows = [self._row(question) for question in asked]
        completions = loaded.complete(
            encode_questions(loaded, rows), AnswerSettings(sampling=self._sampling, **settings)
        )
        texts = [completion.text for completion in completions]
        return texts[0] if is_single else texts

    def encode(self, question: Question) -> list[int]:
        """The token ids that ask a question, BOS and template included."""
        loaded = self._asked()
        return encode_questions(loaded, [self._row(question)])[0]

    def score(
        self,
        token_ids: Any,
        padding_mask: Any = None,
        scoring_mode: Literal["logits", "loss"] = "logits",
        layer_intercept_fn: Intercept | None = None,
        target_ids: Any = None,
    ) -> torch.Tensor:
        """Logits or losses of token ids; see `inference.score.score_tokens`."""
        from gemma_tune.inference.score import score_tokens

        return score_tokens(self.model, token_ids, padding_mask, scoring_mode, layer_intercept_fn, target_ids)

    def score_response(self, question: Question, response: str) -> TextScore:
        """How likely a response to a question is: log-likelihood, perplexity, and every token's share."""
        from gemma_tune.inference.score import row_of_response, score_rows

        loaded = self._asked()
        return score_rows(loaded, [row_of_response(loaded, self._row(question), response)])[0]

    def _row(self, question: Question) -> dict[str, Any]:
        template = self._asked().template
        return question_fields(template, question) if isinstance(question, str) else dict(question)

    def _asked(self) -> LoadedTarget:
        if self._loaded is None:
            raise EngineError(
                f"{self.name} has no tokenizer here, as it was made of random weights",
                hint="score() takes token ids; load the model itself to ask it, or a directory with a tokenizer",
            )
        return self._loaded
