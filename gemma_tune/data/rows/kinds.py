"""The kinds of data template: what each reads and needs, a row of a table each; `render.py` renders them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gemma_tune.members import Members
from gemma_tune.recipe.methods import RowKind

KindName = Literal["text", "chat", "preference"]


@dataclass(frozen=True)
class TemplateKind:
    """What a kind of template decides."""

    name: KindName  # what a template file calls it
    rows: RowKind  # what a row of it holds, as training methods call it
    needs_chat: bool  # whether rows are rendered with the model's chat template
    answers: tuple[str, ...]  # columns that hold whole answers; they may bring the conversation before them along
    keys: tuple[frozenset[str], ...]  # which of prompt, response, messages and conversation a file has together
    shape: str  # the same in words


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
