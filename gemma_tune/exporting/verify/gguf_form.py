"""A GGUF file as llama.cpp runs it. Only in a process of its own: llama.cpp aborts where Python would raise."""

from collections.abc import Sequence
from typing import Any

from gemma_tune.exporting.verify.forms import Form
from gemma_tune.exporting.verify.parity import Logits
from gemma_tune.inference.open_llama import open_llama

_CONTEXT_TOKENS = 2048


class GgufForm:
    """A model in llama.cpp, with its own tokenizer and float32 keys and values."""

    def __init__(self, path: str) -> None:
        import llama_cpp

        float32 = llama_cpp.GGML_TYPE_F32
        self.model: Any = open_llama(path, n_ctx=_CONTEXT_TOKENS, logits_all=True, type_k=float32, type_v=float32)
        self.adds_bos = bool(llama_cpp.llama_vocab_get_add_bos(llama_cpp.llama_model_get_vocab(self.model.model)))

    def logits(self, token_ids: Sequence[int]) -> Logits:
        self.model.reset()
        self.model.eval(list(token_ids))
        logits: Logits = self.model.scores[: len(token_ids)].copy()
        return logits

    def tokenize(self, text: str) -> list[int]:
        ids: list[int] = self.model.tokenize(text.encode("utf-8"), add_bos=self.adds_bos, special=True)
        return ids

    def answer(self, prompt: Sequence[int], *, max_new_tokens: int, stop_token_ids: Sequence[int]) -> list[int]:
        self.model.reset()
        answer: list[int] = []
        tokens = list(prompt)
        while len(answer) < max_new_tokens:
            self.model.eval(tokens)
            token = int(self.model.scores[self.model.n_tokens - 1].argmax())
            if token in stop_token_ids:
                break
            answer.append(token)
            tokens = [token]
        return answer


def open_gguf(form: Form, *, before: GgufForm | None) -> GgufForm:
    """Load a file; `before` never fits, as no adapter goes on top of one."""
    return GgufForm(str(form.path))
