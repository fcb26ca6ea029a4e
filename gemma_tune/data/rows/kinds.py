"""The kinds of data template: what each reads and needs, a row of a table each; `render.py` renders them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gemma_tune.members import Members
from gemma_tune.recipe.methods import RowKind

KindName = Literal["text", "chat", "preference"]


@dataclass(frozen=True)
class TemplateKind:
    """What a kind of template decides.

    Attributes:
        name: what a template file calls it.
        rows: what a row of it holds, as training methods call it.
        needs_chat: whether rows are rendered with the model's chat template.
        answers: columns that hold whole answers; they may bring the conversation before them along.
        keys: which of prompt, response, messages and conversation a file has together.
        shape: the same in words.
    """

    name: KindName
    rows: RowKind
    needs_chat: bool
    answers: tuple[str, ...]
    keys: tuple[frozenset[str], ...]
    shape: str


_MESSAGES, _CONVERSATION = frozenset({"messages"}), frozenset({"conversation"})
_PAIR = ("chosen", "rejected")
TEMPLATE_KINDS = Members(
    "kind of data template",
    (
        TemplateKind("text", "response", False, (), (frozenset({"prompt", "response"}),), "`prompt` and `response`"),
        TemplateKind("chat", "response", True, (), (_MESSAGES, _CONVERSATION), "either `messages` or `conversation`"),
        TemplateKind("preference", "pair", True, _PAIR, (_CONVERSATION,), "`conversation` (with chosen and rejected)"),
    ),
)
