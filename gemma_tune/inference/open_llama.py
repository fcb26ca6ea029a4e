"""Opens a GGUF file in llama.cpp."""

from typing import Any


def open_llama(path: str, **options: Any) -> Any:
    """Load a file, without its chat templates: the bindings compile them here, which computes what is constant in them.

    `options` are those of `llama_cpp.Llama`, whose errors this raises.
    """
    import llama_cpp
    from llama_cpp import llama_chat_format

    compiled = llama_chat_format.Jinja2ChatFormatter
    llama_chat_format.Jinja2ChatFormatter = _Uncompiled
    try:
        return llama_cpp.Llama(path, verbose=False, **options)
    finally:
        llama_chat_format.Jinja2ChatFormatter = compiled


class _Uncompiled:
    """Stands for a chat template; ours are rendered by `ChatRenderer`."""

    def __init__(self, **_: object) -> None: ...

    def to_chat_handler(self) -> None: ...
