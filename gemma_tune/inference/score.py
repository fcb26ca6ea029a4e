"""How likely a model finds given tokens: logits and losses, layer by layer if wanted, and figures for texts (LEAF).

`score_tokens` means what KerasHub's `GemmaCausalLM.score` does (0.32, keras_hub/src/models/gemma/gemma_causal_lm.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.nn.functional import cross_entropy

from gemma_tune.data.rows.render import render_example, render_prompt
from gemma_tune.data.rows.segments import RowError, Segment
from gemma_tune.data.sources.items import SourceRow
from gemma_tune.errors import DataError, EngineError
from gemma_tune.inference.generate import pad_left
from gemma_tune.inference.load_target import LoadedTarget

# (activations [batch, tokens, hidden], index) -> activations that take their place.
Intercept = Callable[[torch.Tensor, int], torch.Tensor]
EMBEDDINGS = -1


def score_tokens(
    model: Any,
    token_ids: Any,
    padding_mask: Any = None,
    scoring_mode: Literal["logits", "loss"] = "logits",
    layer_intercept_fn: Intercept | None = None,
    target_ids: Any = None,
) -> torch.Tensor:
    """Score token ids, of a prompt and its answer for example, in one forward pass.

    Args:
        token_ids: [batch, tokens], a tensor, array or list.
        padding_mask: [batch, tokens], 0 at padding; ones by default. Positions count from the first column.
        scoring_mode: what to return.
        layer_intercept_fn: called with activations [batch, tokens, hidden] and an index: -1 for the token embeddings
            before they are multiplied by the square root of the hidden size, i for what layer i gives, before any norm
            behind it. What it returns takes their place. (KerasHub 0.32 drops what is returned for -1, against its own
            documentation.)
        target_ids: [batch, tokens], the token that is scored at each position; nothing is shifted, so the loss of the
            next token has `token_ids` rolled by -1. Needed for "loss".

    Returns:
        Logits [batch, tokens, vocabulary], soft-capped where the model caps them; or losses [batch, tokens] in nats,
        with those at padding. Gradients flow where `layer_intercept_fn` asks for them.

    Raises:
        EngineError: the model is a GGUF.
        DataError: a mode that does not exist, no targets, shapes that do not fit, or ids outside the vocabulary.
    """
    _require_weights(model)
    if scoring_mode not in ("logits", "loss"):
        raise DataError(f"scoring_mode is {scoring_mode!r}", hint="allowed: logits, loss")
    if scoring_mode == "loss" and target_ids is None:
        raise DataError(
            "a loss needs target_ids: the token that is scored at each position",
            hint="for the next token: target_ids=torch.roll(token_ids, -1, dims=1), whose last column means nothing",
        )
    vocab_size = model.config.get_text_config().vocab_size
    ids = _ids("token_ids", token_ids, vocab_size=vocab_size, device=model.device)
    mask = None
    if padding_mask is not None:
        mask = torch.as_tensor(padding_mask, device=model.device).long()
        _require_shape("padding_mask", mask, ids)
    targets = None
    if target_ids is not None:
        targets = _ids("target_ids", target_ids, vocab_size=vocab_size, device=model.device)
        _require_shape("target_ids", targets, ids)
    with _intercepted(model, layer_intercept_fn):
        logits: torch.Tensor = model(input_ids=ids, attention_mask=mask).logits
    if scoring_mode == "logits":
        return logits
    assert targets is not None
    return cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")


def _require_weights(model: Any) -> None:
    if model is None:
        raise EngineError("a GGUF file is not scored", hint="score the run or the merged directory that it was made of")


def _ids(name: str, values: Any, *, vocab_size: int, device: Any) -> torch.Tensor:
    ids = torch.as_tensor(values, device=device)
    if ids.ndim != 2 or ids.is_floating_point() or not ids.numel():
        found = f"{str(ids.dtype).removeprefix('torch.')} of shape {tuple(ids.shape)}"
        raise DataError(f"{name} is {found}", hint="expected: integers of shape [batch, tokens]")
    ids = ids.long()
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise DataError(
            f"{name} holds ids from {int(ids.min())} to {int(ids.max())}",
            hint=f"the vocabulary has {vocab_size:,} tokens",
        )
    return ids


def _require_shape(name: str, values: torch.Tensor, ids: torch.Tensor) -> None:
    if values.shape != ids.shape:
        raise DataError(f"{name} has shape {tuple(values.shape)}, token_ids has {tuple(ids.shape)}")


@contextmanager
def _intercepted(model: Any, intercept: Intercept | None) -> Iterator[None]:
    """A block in which forward passes go through `intercept`."""
    if intercept is None:
        yield
        return
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    embeddings, layers = base.get_input_embeddings(), base.get_decoder().layers
    with ExitStack() as stack:
        stack.callback(embeddings.register_forward_hook(_embedding_hook(embeddings, intercept)).remove)
        for index, layer in enumerate(layers):
            stack.callback(layer.register_forward_hook(_layer_hook(index, intercept)).remove)
        yield


def _embedding_hook(embeddings: Any, intercept: Intercept) -> Callable[..., torch.Tensor]:
    """transformers' Gemma multiplies by the scale inside its embedding; the activations are those before."""
    (scale_of,) = (module for module in embeddings.modules() if hasattr(module, "embed_scale"))

    def hook(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        # In float32, dividing and multiplying again gives a 16-bit value back as it was.
        scale = scale_of.embed_scale.to(output.dtype).float()
        replaced = _checked(intercept(output.float() / scale, EMBEDDINGS), output, EMBEDDINGS)
        return (replaced.float() * scale).to(output.dtype)

    return hook


def _layer_hook(index: int, intercept: Intercept) -> Callable[..., Any]:
    def hook(module: Any, inputs: Any, output: Any) -> Any:
        # Unsloth's layers give a tuple, transformers' the activations alone.
        if isinstance(output, tuple):
            return (_checked(intercept(output[0], index), output[0], index), *output[1:])
        return _checked(intercept(output, index), output, index)

    return hook


def _checked(replaced: Any, activations: torch.Tensor, index: int) -> torch.Tensor:
    if not isinstance(replaced, torch.Tensor) or replaced.shape != activations.shape:
        found = f"shape {tuple(replaced.shape)}" if isinstance(replaced, torch.Tensor) else type(replaced).__name__
        raise DataError(
            f"layer_intercept_fn returned {found} for index {index}",
            hint=f"return the activations, or others of their shape {tuple(activations.shape)}",
        )
    return replaced


# --- texts ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScoredToken:
    """A token of a response: `log_prob` is the natural logarithm of its probability behind all tokens before it."""

    token_id: int
    text: str
    log_prob: float


@dataclass(frozen=True)
class TextScore:
    """How likely a response is, its stop token included."""

    tokens: tuple[ScoredToken, ...]

    @property
    def log_likelihood(self) -> float:
        """In nats, of the response as a whole."""
        return math.fsum(token.log_prob for token in self.tokens)

    @property
    def perplexity(self) -> float:
        """exp of the mean loss of a token: 1 for a response that is certain."""
        return math.exp(-self.log_likelihood / len(self.tokens))

    def to_json(self) -> dict[str, float]:
        """The figures of all tokens together."""
        return {"num_tokens": len(self.tokens), "log_likelihood": self.log_likelihood, "perplexity": self.perplexity}

    @classmethod
    def joined(cls, scores: Sequence[TextScore]) -> TextScore:
        """Several responses as one, in which every token counts once."""
        return cls(tuple(token for score in scores for token in score.tokens))


@dataclass(frozen=True)
class ScoredRow:
    """Token ids of prompt and response, BOS first, and which of them are scored."""

    token_ids: Sequence[int]
    is_scored: Sequence[bool]


def row_of_response(loaded: LoadedTarget, question: dict[str, Any], response: str) -> ScoredRow:
    """A question's fields and a response, as they stand in training: templated, and ended by the stop token.

    Raises:
        RowError, DataError: the question lacks what the data template reads, or the response is empty.
    """
    response = response.strip() if loaded.template.strip_response or loaded.chat else response
    if not response.strip():
        raise RowError("the response", "is empty")
    encoder = loaded.encoder
    prompt = encoder.encode_prompt(render_prompt(loaded.template, question, chat=loaded.chat))
    answer = encoder.encode_prompt([Segment(response, supervised=True, control=False)])[1:]
    stop = encoder.stop_token_ids[-1] if loaded.chat else encoder.eos_token_id
    return ScoredRow([*prompt, *answer, stop], [False] * len(prompt) + [True] * (len(answer) + 1))


def row_of_example(loaded: LoadedTarget, row: SourceRow) -> ScoredRow:
    """A row of training or eval data; every answer of a conversation is scored.

    Raises:
        RowError, DataError: as `render_example`.
    """
    example = render_example(loaded.template, row, chat=loaded.chat)
    encoded = loaded.encoder.encode(example.segments)
    return ScoredRow(encoded.input_ids, [label >= 0 for label in encoded.labels])


def score_rows(
    loaded: LoadedTarget,
    rows: Sequence[ScoredRow],
    *,
    batch_size: int = 8,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[TextScore]:
    """Score rows in batches of about equal length; the scores come in the order of the rows.

    Logits are kept for the scored part alone: a long prompt costs no [tokens, vocabulary] of its own.

    Raises:
        EngineError: the model is a GGUF.
        DataError: a row is longer than the model's context.
    """
    model = loaded.model
    _require_weights(model)
    context_tokens = model.config.get_text_config().max_position_embeddings
    for number, row in enumerate(rows, start=1):
        if len(row.token_ids) > context_tokens:
            raise DataError(
                f"row {number} has {len(row.token_ids):,} tokens; the model's context has {context_tokens:,}"
            )
    scores: list[TextScore | None] = [None] * len(rows)
    by_length = sorted(range(len(rows)), key=lambda index: len(rows[index].token_ids))
    for start in range(0, len(rows), batch_size):
        chosen = by_length[start : start + batch_size]
        log_probs = _log_probs([rows[index] for index in chosen], model=model, pad_id=loaded.tokenizer.pad_token_id)
        for index, values in zip(chosen, log_probs, strict=True):
            scores[index] = _to_score(rows[index], values, tokenizer=loaded.tokenizer)
        if on_progress is not None:
            on_progress(min(start + batch_size, len(rows)), len(rows))
    return [score for score in scores if score is not None]


def _log_probs(rows: Sequence[ScoredRow], *, model: Any, pad_id: int) -> list[list[float]]:
    """The log probability of each scored token of each row."""
    inputs = pad_left([row.token_ids for row in rows], pad_token_id=pad_id, device=model.device)
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    # Left padding ends all rows in one column, so the last columns hold every scored token.
    kept = max(len(row.token_ids) - row.is_scored.index(True) for row in rows) + 1
    with torch.no_grad():
        logits = model(**inputs, position_ids=positions, logits_to_keep=kept).logits[:, :-1]
    targets = inputs["input_ids"][:, -(kept - 1) :]
    losses = cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")
    found = []
    for row, values in zip(rows, (-losses).tolist(), strict=True):
        flags = [False] * (kept - 1) + list(row.is_scored)
        found.append([value for value, is_scored in zip(values, flags[-(kept - 1) :], strict=True) if is_scored])
    return found


def _to_score(row: ScoredRow, log_probs: Sequence[float], *, tokenizer: Any) -> TextScore:
    scored = [token_id for token_id, is_scored in zip(row.token_ids, row.is_scored, strict=True) if is_scored]
    return TextScore(
        tuple(
            ScoredToken(token_id, tokenizer.decode([token_id]), log_prob)
            for token_id, log_prob in zip(scored, log_probs, strict=True)
        )
    )
