"""Which of two answers is better: asked of a model at an endpoint, or of a local one."""

from __future__ import annotations

import functools
import os
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol
from urllib.parse import urlsplit

from gemma_tune.errors import DataError, ModelError
from gemma_tune.evaluation.prompt_sets import Prompt
from gemma_tune.identity import text_sha256
from gemma_tune.inference.answer_settings import AnswerSettings
from gemma_tune.inference.target import GgufTarget, Target, find_target

if TYPE_CHECKING:
    import httpx

Verdict = Literal["first", "second", "tie", "malformed"]

KEY_VARIABLE = "GEMMA_TUNE_JUDGE_API_KEY"
JUDGE_PROMPT = Path(__file__).with_name("judge_prompt.txt").read_text(encoding="utf-8").removesuffix("\n")
_MAX_REPLY_TOKENS = 512
_VERDICT = re.compile(r"^\W*VERDICT\s*:\W*(A|B|TIE)\W*$", re.IGNORECASE | re.MULTILINE)
_VERDICTS: dict[str, Verdict] = {"A": "first", "B": "second", "TIE": "tie"}
_ATTEMPTS = 4
_PARALLEL = 4
_MAX_WAIT_SECONDS = 60.0


@dataclass(frozen=True)
class Duel:
    """Two answers to a question, in the order in which they are shown."""

    prompt: Prompt
    first: str
    second: str


@dataclass(frozen=True)
class Ruling:
    """The verdict on one duel, and what the judge wrote."""

    verdict: Verdict
    reply: str


class Judge(Protocol):
    """Rules on duels.

    Attributes:
        name: distinguishes it from other judges in the files of a comparison.
        asks_both_orders: whether every pair is shown twice, the second time the other way round.
    """

    @property
    def name(self) -> str: ...

    @property
    def asks_both_orders(self) -> bool: ...

    def rule(self, duels: Sequence[Duel]) -> Iterator[Ruling | None]:
        """A ruling for each duel, in order, None for one that was passed over; it may end early."""
        ...


def judge_prompt(duel: Duel) -> str:
    """What a judge model reads. The mark follows from the texts, so that no answer can hold it."""
    texts = (duel.prompt.text, duel.first, duel.second)
    mark = f"[[{text_sha256(repr(texts))[:12]}]]"
    reference = "" if duel.prompt.reference is None else f"{mark} A RIGHT ANSWER\n{duel.prompt.reference}\n"
    return JUDGE_PROMPT.format(
        mark=mark, question=duel.prompt.text, reference=reference, first=duel.first, second=duel.second
    )


def parse_verdict(reply: str) -> Verdict:
    """The verdict of a reply; `malformed` where it has none, or several that differ."""
    found = {match.upper() for match in _VERDICT.findall(reply)}
    return _VERDICTS[found.pop()] if len(found) == 1 else "malformed"


@dataclass(frozen=True)
class EndpointJudge:
    """A model behind an OpenAI-compatible `POST …/chat/completions`."""

    url: str  # of the API, such as http://localhost:8000/v1. The key comes from KEY_VARIABLE and from nowhere else.
    model: str
    timeout_seconds: float = 120.0  # of a single request
    asks_both_orders: bool = True

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.username or parts.password:
            raise ModelError(
                "the judge's address holds a user name or password", hint=f"put the key into {KEY_VARIABLE}"
            )
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ModelError(f"{self.url} is not a web address", hint="for example http://localhost:8000/v1")

    @property
    def name(self) -> str:
        return f"{self.model} at {self.url}"

    def rule(self, duels: Sequence[Duel]) -> Iterator[Ruling | None]:
        """Asks some duels at a time.

        Raises:
            ModelError: the endpoint refuses, or does not answer after several attempts.
        """
        import httpx

        key = os.environ.get(KEY_VARIABLE)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        # httpx follows no redirect by itself, so the key goes to this host only.
        with (
            httpx.Client(headers=headers, timeout=self.timeout_seconds) as client,
            ThreadPoolExecutor(_PARALLEL) as pool,
        ):
            for start in range(0, len(duels), _PARALLEL):
                prompts = map(judge_prompt, duels[start : start + _PARALLEL])
                for reply in pool.map(functools.partial(self._ask, client), prompts):
                    yield Ruling(parse_verdict(reply), reply)

    def _ask(self, client: httpx.Client, prompt: str) -> str:
        import httpx

        address = self.url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        problem = ""
        for attempt in range(_ATTEMPTS):
            wait = float(2**attempt)
            try:
                response = client.post(
                    address,
                    json={
                        "model": self.model,
                        "messages": [{"role": "user", "content": prompt}],
                        "temperature": 0,
                        "max_tokens": _MAX_REPLY_TOKENS,
                    },
                )
            except httpx.TimeoutException:
                problem = f"no answer within {self.timeout_seconds:g} s"
            except httpx.TransportError as error:
                problem = str(error) or type(error).__name__
            else:
                if response.status_code == 200:
                    return self._reply(response)
                problem = f"status {response.status_code}"
                if response.status_code not in (408, 409, 429) and response.status_code < 500:
                    raise self._refused(problem, response.text)
                wait = _asked_wait(response.headers.get("retry-after"), default=wait)
            if attempt < _ATTEMPTS - 1:
                time.sleep(wait)
        raise ModelError(
            f"the judge {self.name} did not answer in {_ATTEMPTS} attempts: {problem}",
            hint="what was judged is kept; the same command resumes",
        )

    def _reply(self, response: httpx.Response) -> str:
        """The text of a chat completion; nothing where the model wrote nothing."""
        try:
            return str(response.json()["choices"][0]["message"]["content"] or "")
        except (ValueError, LookupError, TypeError):
            raise ModelError(
                f"{self.url} answers with something that is not a chat completion: {response.text[:200]!r}",
                hint="give the address of an OpenAI-compatible API, up to and with /v1",
            ) from None

    def _refused(self, problem: str, text: str) -> ModelError:
        hints = {
            "status 401": f"put the key into the environment variable {KEY_VARIABLE}",
            "status 403": f"the key in {KEY_VARIABLE} may not use that model",
            "status 404": "check the address (up to and with /v1) and --judge-model",
        }
        return ModelError(f"the judge {self.name} refuses: {problem} {text[:200]!r}", hint=hints.get(problem))


def _asked_wait(header: str | None, *, default: float) -> float:
    """Seconds that Retry-After asks for, within bounds; its form with a date is left alone."""
    return min(float(header), _MAX_WAIT_SECONDS) if header and header.isdecimal() else default


@dataclass(frozen=True)
class LocalJudge:
    """A model on this machine, asked with its own template; it is loaded when it has something to rule on."""

    name: str
    target: Target | GgufTarget
    batch_size: int
    asks_both_orders: bool = True

    def rule(self, duels: Sequence[Duel]) -> Iterator[Ruling | None]:
        """Asks a batch of duels at a time.

        Raises:
            GemmaTuneError: it cannot be loaded, or a question with its two answers is longer than its context.
        """
        from gemma_tune.inference.ask import encode_questions
        from gemma_tune.inference.load_target import load_target
        from gemma_tune.inference.questions import questions_of

        loaded = load_target(self.target)
        settings = AnswerSettings(max_new_tokens=_MAX_REPLY_TOKENS, batch_size=self.batch_size)
        for start in range(0, len(duels), self.batch_size):
            prompts = [judge_prompt(duel) for duel in duels[start : start + self.batch_size]]
            rows = questions_of(loaded.template, prompts).rows
            for completion in loaded.complete(encode_questions(loaded, rows), settings):
                yield Ruling(parse_verdict(completion.text), completion.text)


def find_judge(
    name: str, *, person: Judge, model: str | None, timeout_seconds: float, template: str | None, batch_size: int
) -> Judge | None:
    """Find the judge that the user named.

    Args:
        name: `rules`, for which None stands; `person`; the address of an API; or a local model.
        model: the one to ask behind an address.
        template: data template of a local model that does not say how it is asked.

    Raises:
        GemmaTuneError: `model` goes without an address or an address without it, or there is no such model.
    """
    is_address = name.startswith(("http://", "https://"))
    if is_address != (model is not None):
        raise DataError(
            f"--judge {name} needs --judge-model" if is_address else f"--judge {name} takes no --judge-model",
            hint="--judge-model names the model behind an address: --judge http://localhost:8000/v1 --judge-model NAME",
        )
    if model is not None:
        return EndpointJudge(name, model, timeout_seconds=timeout_seconds)
    not_models: dict[str, Judge | None] = {"rules": None, "person": person}
    if name in not_models:
        return not_models[name]
    return LocalJudge(name, find_target(name, default_template=template), batch_size=batch_size)
