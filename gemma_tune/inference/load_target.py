"""A target in memory, ready to be asked (LEAF)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from gemma_tune.data.encode.encoder import Encoder
from gemma_tune.data.rows.chat_template import ChatRenderer
from gemma_tune.data.rows.template import DataTemplate
from gemma_tune.engines.base import Engine, LoadSettings
from gemma_tune.engines.choose import start_engine
from gemma_tune.engines.lora import load_adapter
from gemma_tune.errors import ModelError
from gemma_tune.inference.answer_settings import AnswerSettings
from gemma_tune.inference.generate import Completion, TransformersModel
from gemma_tune.inference.gguf_model import GgufModel
from gemma_tune.inference.streaming import OnProgress, OnText
from gemma_tune.inference.target import GgufTarget, Target
from gemma_tune.machine.device import detect_device
from gemma_tune.machine.precision import decide_precision
from gemma_tune.models.tokenizer import load_tokenizer


class Complete(Protocol):
    """`TransformersModel.complete`, or that of a GGUF."""

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        settings: AnswerSettings,
        *,
        on_progress: OnProgress | None = None,
        on_text: OnText | None = None,
    ) -> list[Completion]: ...


@dataclass(frozen=True)
class LoadedTarget:
    """A model with its tokenizer and the template it is asked with."""

    model: Any  # a transformers model, or the PEFT model around it; None for a GGUF
    tokenizer: Any
    encoder: Encoder
    template: DataTemplate
    chat: ChatRenderer | None  # the model's own chat template, where the data template needs it
    complete: Complete  # generates


def load_target(
    target: Target | GgufTarget,
    *,
    engine: Engine | None = None,
    load_in_4bit: bool | None = None,
    dtype: str | None = None,
) -> LoadedTarget:
    """Load a base as it was trained on, with its adapter; or a GGUF.

    Args:
        engine: transformers unless given.
        load_in_4bit: other than the target's own.
        dtype: `model.dtype` other than the target's own.

    Raises:
        ModelError: the adapter does not fit the base, or a GGUF is asked for what only weights on disk have.
    """
    if isinstance(target, GgufTarget):
        if engine is not None or load_in_4bit is not None or dtype is not None:
            raise ModelError(
                f"{target.path} is a GGUF file, which llama.cpp runs in the precision that it is stored in",
                hint="leave engine, load_in_4bit and dtype out",
            )
        return _load_gguf(target)
    changes = {"load_in_4bit": load_in_4bit, "dtype": dtype}
    section = target.section.model_copy(update={name: value for name, value in changes.items() if value is not None})
    engine = engine or start_engine("transformers")
    precision = decide_precision(section.dtype, device=detect_device())
    settings = LoadSettings(section, precision, max_seq_tokens=target.base.config.context_tokens)
    loaded = engine.load(target.base.directory, settings)
    model = loaded.model
    if target.adapter is not None:
        model = load_adapter(model, target.adapter)
    engine.set_mode(replace(loaded, model=model), training=False)
    return loaded_target(model, tokenizer_directory=target.tokenizer, template=target.template)


def loaded_target(model: Any, *, tokenizer_directory: Path, template: DataTemplate) -> LoadedTarget:
    """A transformers model in memory with the tokenizer of a directory."""
    model.eval()
    model.config.use_cache = True
    tokenizer = load_tokenizer(tokenizer_directory)
    encoder = Encoder(tokenizer)
    complete = TransformersModel(model, tokenizer, encoder.stop_token_ids).complete
    chat = ChatRenderer.from_tokenizer(tokenizer) if template.needs_chat else None
    return LoadedTarget(model, tokenizer, encoder, template, chat, complete)


def _load_gguf(target: GgufTarget) -> LoadedTarget:
    model = GgufModel(target.path)
    tokenizer = model.tokenizer
    chat = ChatRenderer.from_tokenizer(tokenizer) if target.template.needs_chat else None
    return LoadedTarget(None, tokenizer, Encoder(tokenizer), target.template, chat, model.complete)
