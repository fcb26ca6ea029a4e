"""A talk with a model that has chat turns: its history, and the commands that change it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gemma_tune.data.rows.segments import RowError
from gemma_tune.data.rows.template import DataTemplate
from gemma_tune.disk import to_json_lines
from gemma_tune.errors import DataError
from gemma_tune.inference.answer_settings import AnswerSettings
from gemma_tune.inference.streaming import OnText
from gemma_tune.text import in_shell, suggestion

if TYPE_CHECKING:
    from gemma_tune.data.rows.chat_template import ChatRenderer
    from gemma_tune.inference.generate import Completion
    from gemma_tune.inference.load_target import LoadedTarget

Message = dict[str, str]


def require_turns(template: DataTemplate, *, target: str) -> None:
    """Refuse a model that was trained on single prompts of plain text: it has never seen a turn.

    Raises:
        DataError: the template is not one of chat turns.
    """
    if not template.needs_chat:
        raise DataError(
            f"{target} is asked with the data template {template.name}, which has no turns of a talk",
            hint=f'ask single questions: gemma-tune generate {in_shell(target)} --prompt "…"; for a talk, train on '
            "chat rows (data.template=chat or dolly-chat), or take an -it model; --template chat tries it anyway",
        )


class Talk:
    """The messages so far. Every answer is given behind all of them, through the model's own chat template."""

    def __init__(self, loaded: LoadedTarget, *, settings: AnswerSettings) -> None:
        assert loaded.chat is not None, "require_turns has let it pass"
        self._loaded = loaded
        self._chat: ChatRenderer = loaded.chat
        self._settings = settings
        self._turns: list[Message] = []
        self._system = ""
        self.is_over = False
        self.has_system_turn = self._chat.has_system_turn

    @property
    def num_answers(self) -> int:
        return len(self._turns) // 2

    @property
    def messages(self) -> list[Message]:
        """The talk, with its system text as a turn."""
        return [{"role": "system", "content": self._system}] * bool(self._system) + self._turns

    def ask(self, text: str, *, on_text: OnText | None = None) -> Completion:
        """Say something and get the answer; both are kept. Without an answer, neither is.

        Raises:
            DataError: the talk has become longer than the model's context.
        """
        self._turns.append({"role": "user", "content": text})
        try:
            prompt = self._loaded.encoder.encode_prompt(self._chat.prompt(self._chat.fold_system(self.messages)))
            (completion,) = self._loaded.complete([prompt], self._settings, on_text=on_text)
        except BaseException:
            self._turns.pop()
            raise
        self._turns.append({"role": "assistant", "content": completion.text})
        return completion

    def restart(self, *, system: str) -> None:
        """Forget the talk and set the system text: no answer stands behind a text that it was not given with."""
        self._turns.clear()
        self._system = system

    def undo(self) -> bool:
        """Forget the last question and its answer; False when there is none."""
        removed = self._turns[-2:]
        del self._turns[-2:]
        return bool(removed)

    def reset(self) -> None:
        """Forget everything but the system text."""
        self._turns.clear()

    def save(self, path: Path) -> int:
        """Add the talk to a .jsonl file as a row that the data template `chat` trains on; the number of its rows.

        Raises:
            DataError: there is nothing to save, an answer is empty, or the file cannot be written.
        """
        if not self._turns:
            raise DataError("there is no talk yet", hint="say something first")
        if path.suffix != ".jsonl":
            raise DataError(f"{path} is not a .jsonl file", hint=f"for example: /save {path.with_suffix('.jsonl')}")
        try:
            self._chat.row(self._chat.fold_system(self.messages), where="the talk")
        except RowError as error:
            raise DataError(f"the talk cannot be trained on: {error.problem}", hint="/undo takes a turn back") from None
        line = to_json_lines([{"messages": self.messages}])
        try:
            before = path.read_text(encoding="utf-8") if path.is_file() else ""
            with path.open("a", encoding="utf-8", newline="\n") as file:
                file.write(("\n" if before and not before.endswith("\n") else "") + line)
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise DataError(f"cannot write {path}: {reason}") from None
        return len(before.splitlines()) + 1


@dataclass(frozen=True)
class Command:
    """What is typed in a talk instead of a message; `run` gets what stands behind its name, and returns what it did."""

    usage: str
    about: str
    run: Callable[[Talk, str], str]


def obey(talk: Talk, line: str) -> str:
    """Run one of COMMANDS, and return what to say about it.

    Raises:
        DataError: there is no such command, or it cannot do that.
    """
    name, _, rest = line.partition(" ")
    if name not in COMMANDS:
        raise DataError(
            f"there is no command {name}{suggestion(name, COMMANDS)}", hint=f"commands: {' '.join(COMMANDS)}"
        )
    return COMMANDS[name].run(talk, rest.strip())


def _help(talk: Talk, _: str) -> str:
    return "\n".join(f"  {command.usage:<18}{command.about}" for command in COMMANDS.values())


def _reset(talk: Talk, _: str) -> str:
    talk.reset()
    return "the talk is forgotten"


def _undo(talk: Talk, _: str) -> str:
    return "the last question and its answer are forgotten" if talk.undo() else "there is nothing to undo"


def _system(talk: Talk, text: str) -> str:
    talk.restart(system=text)
    where = "" if talk.has_system_turn or not text else "; the model has no system turn: it goes before message 1"
    return f"a new talk {'with this' if text else 'without a'} system text{where}"


def _save(talk: Talk, name: str) -> str:
    if not name:
        raise DataError("/save needs a file", hint="for example: /save talk.jsonl")
    return f"{name}: row {talk.save(Path(name).expanduser())}, {talk.num_answers} answers"


def _quit(talk: Talk, _: str) -> str:
    talk.is_over = True
    return ""


_COMMANDS = (
    Command("/help", "this list", _help),
    Command("/reset", "forget the talk; the system text stays", _reset),
    Command("/undo", "forget the last question and its answer", _undo),
    Command("/system TEXT", "start again with this text before the talk; without TEXT with none", _system),
    Command("/save FILE.jsonl", "add the talk to a file of training rows (data.template=chat)", _save),
    Command("/quit", "end (Ctrl-D as well; Ctrl-C ends an answer)", _quit),
)
COMMANDS = {command.usage.split()[0]: command for command in _COMMANDS}
