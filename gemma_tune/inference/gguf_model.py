"""A GGUF file run by llama.cpp: its weights and its tokenizer, with our prompts and transformers' samplers (LEAF)."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from gemma_tune.errors import EngineError, ModelError
from gemma_tune.inference.answer_settings import AnswerSettings, Sampling
from gemma_tune.inference.generate import (
    Completion,
    WordStreamer,
    answer_budgets,
    custom_processors,
    seeded,
    to_completion,
)
from gemma_tune.inference.open_llama import open_llama
from gemma_tune.inference.streaming import OnProgress, OnText, cut_at_stop

# Keys and values of the whole context are allocated at once: 1.9 GB for Gemma 7B in float16.
CONTEXT_TOKENS = 4096


class GgufModel:
    """A model in llama.cpp."""

    def __init__(self, path: Path) -> None:
        """Load a file.

        Raises:
            EngineError: llama-cpp-python is not installed.
            ModelError: it is not a GGUF file, or one that this llama.cpp cannot load.
        """
        if importlib.util.find_spec("llama_cpp") is None:
            raise EngineError(
                f"{path.name} is a GGUF file, which llama-cpp-python runs, and that is not installed",
                hint="pip install 'llama-cpp-python==0.3.36' (compiles llama.cpp, about 10 minutes), or ask the run",
            )
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ModelError(f"{path} is not a GGUF file", hint="export it again, or download it again")
        import llama_cpp

        self._library: Any = llama_cpp
        try:
            self._llama: Any = open_llama(str(path), n_ctx=CONTEXT_TOKENS)
        except (ValueError, RuntimeError) as error:
            raise ModelError(f"llama.cpp cannot load {path}: {error}", hint="export it again") from None
        trained = int(llama_cpp.llama_model_n_ctx_train(self._llama.model))
        self.context_tokens = min(CONTEXT_TOKENS, trained)
        self.tokenizer = LlamaTokenizer(self._llama, path)

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        settings: AnswerSettings,
        *,
        on_progress: OnProgress | None = None,
        on_text: OnText | None = None,
    ) -> list[Completion]:
        """As `TransformersModel.complete`, one prompt after the other whatever the batch size.

        Raises:
            EngineError: beams are asked for, which llama.cpp does not have.
        """
        if settings.sampling.num_beams > 1:
            raise EngineError("llama.cpp has no beam search", hint="ask the run or the merged directory instead")
        budgets = answer_budgets(prompts, settings, context_tokens=self.context_tokens)
        completions = []
        with seeded(settings.sampling.seed):
            for number, (prompt, budget) in enumerate(zip(prompts, budgets, strict=True), start=1):
                completions.append(
                    to_completion(
                        self._complete_one(prompt, settings, budget=budget, on_text=on_text),
                        tokenizer=self.tokenizer,
                        stop_token_ids=self.tokenizer.stop_token_ids,
                        stop_strings=settings.stop_strings,
                    )
                )
                if on_progress is not None:
                    on_progress(number, len(prompts))
        return completions

    def _complete_one(
        self, prompt: Sequence[int], settings: AnswerSettings, *, budget: int, on_text: OnText | None
    ) -> list[int]:
        sampling, stop_strings = settings.sampling, settings.stop_strings
        streamer = WordStreamer(self.tokenizer, on_text, stop_strings) if on_text is not None else None
        processors = _processors(sampling)
        token_ids, row = list(prompt), []
        self._llama.reset()
        self._llama.eval(token_ids)
        if streamer is not None:
            streamer.put(torch.tensor(token_ids))
        while True:
            scores = processors(torch.tensor([token_ids]), self._logits())
            token = torch.multinomial(scores.softmax(-1), 1) if sampling.is_drawn else scores.argmax(-1, keepdim=True)
            row.append(int(token))
            token_ids.append(int(token))
            if streamer is not None:
                streamer.put(token[0])
            if row[-1] in self.tokenizer.stop_token_ids or len(row) == budget:
                break
            if stop_strings and cut_at_stop(self.tokenizer.decode(row), stop_strings)[1]:
                break
            self._llama.eval(row[-1:])
        if streamer is not None:
            streamer.end()
        return row

    def _logits(self) -> torch.Tensor:
        """[1, vocabulary], of the last position."""
        pointer = self._library.llama_get_logits_ith(self._llama.ctx, -1)
        return torch.tensor(np.ctypeslib.as_array(pointer, shape=(1, self._llama.n_vocab())))


def _processors(sampling: Sampling) -> LogitsProcessorList:
    """What transformers makes of the same `Sampling`, in its order."""
    processors = LogitsProcessorList()
    if sampling.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.custom is not None:
        return LogitsProcessorList([*processors, *custom_processors(sampling)])
    if sampling.temperature > 0:
        processors.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k is not None:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p is not None:
        processors.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p is not None:
        processors.append(MinPLogitsWarper(sampling.min_p))
    return processors


@dataclass(frozen=True)
class _Token:
    """A token as transformers' tokenizers describe an added one."""

    content: str
    special: bool = True


@dataclass(frozen=True)
class _Encoding:
    ids: list[int]


class LlamaTokenizer:
    """The tokenizer of a GGUF file, with the names that `Encoder`, `ChatRenderer` and the streamer read."""

    def __init__(self, llama: Any, path: Path) -> None:
        import llama_cpp

        self.name_or_path = path
        self._llama = llama
        self._vocabulary = llama_cpp.llama_model_get_vocab(llama.model)
        vocabulary_size = llama_cpp.llama_vocab_n_tokens(self._vocabulary)
        control = [n for n in range(vocabulary_size) if llama_cpp.llama_vocab_is_control(self._vocabulary, n)]
        self._control = {n: llama_cpp.llama_vocab_get_text(self._vocabulary, n).decode("utf-8") for n in control}
        self._ids = {text: token_id for token_id, text in self._control.items()}
        self.bos_token_id: int = llama_cpp.llama_vocab_bos(self._vocabulary)
        self.eos_token_id: int = llama_cpp.llama_vocab_eos(self._vocabulary)
        self.pad_token_id: int = llama_cpp.llama_vocab_pad(self._vocabulary)
        self.stop_token_ids = tuple(n for n in control if llama_cpp.llama_vocab_is_eog(self._vocabulary, n))
        self.bos_token, self.eos_token = self._control[self.bos_token_id], self._control[self.eos_token_id]
        self.all_special_tokens = list(self._ids)
        self.chat_template: str | None = llama.metadata.get("tokenizer.chat_template")
        self.backend_tokenizer = self
        self.encode_special_tokens = False

    def get_added_tokens_decoder(self) -> dict[int, _Token]:
        return {token_id: _Token(text) for token_id, text in self._control.items()}

    def token_to_id(self, token: str) -> int | None:
        return self._ids.get(token)

    def no_truncation(self) -> None:
        """Nothing is ever cut."""

    def no_padding(self) -> None:
        """Nothing is ever padded."""

    def encode_batch_fast(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[_Encoding]:
        """Ids of plain texts: control tokens that a text spells are text."""
        return [_Encoding(self._llama.tokenize(text.encode("utf-8"), add_bos=False, special=False)) for text in texts]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text without control tokens; half a character at the end becomes U+FFFD."""
        plain = [token_id for token_id in token_ids if token_id not in self._control]
        text: str = self._llama.detokenize(plain).decode("utf-8", errors="replace")
        return text
