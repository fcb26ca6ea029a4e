"""A recipe or a data template of any content: a setting, or a sentence and exit code 2; never a traceback or a row."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from gemma_tune.cli.app import main
from gemma_tune.data.rows.template import load_template
from gemma_tune.errors import DataError
from gemma_tune.recipe.keys import section_at
from gemma_tune.recipe.schema import Recipe

# What stands in rows and values and is nobody's business; it is looked for in every message.
PRIVATE = ("Quillfeather", "5550199", "quill@example", "hf_" + "abcXYZ0123" * 4)
RECIPE = f"""model:
  name: gemma-tiny  # call Zora Quillfeather, 0171-5550199
data:
  mix:
    - {{source: a.jsonl, weight: 2}}
    - {{source: b.jsonl, weight: 1.5, template: "completion"}}
  max_seq_tokens: 64
  columns: {{instruction: "Zora Quillfeather asks", response: '0171-5550199'}}
training: {{learning_rate: 2e-4, seed: 3, packing: false}}
lora:
  targets: [q_proj, v_proj]
run:
  name: mine
  # token: {PRIVATE[3]}
"""
TEMPLATE = f"""name: mine
kind: text
about: written for Zora Quillfeather <quill@example.com>
prompt: |
  {{{{ question }}}}
  Call 0171-5550199 of Zora Quillfeather.
response: '{{{{ answer }}}}'
example: {{question: "Zora Quillfeather, 0171-5550199", answer: "{PRIVATE[3]}"}}
"""
Mutate = Callable[[str, random.Random], str | bytes]


def at_a_place(*pieces: str) -> Mutate:
    """Put one of the pieces somewhere; what stood behind it stays, or goes."""

    def mutate(text: str, dice: random.Random) -> str:
        at = dice.randrange(len(text))
        return text[:at] + dice.choice(["", " ", "\n", "\n  "]) + dice.choice(pieces) + dice.choice(["", text[at:]])

    return mutate


def as_a_value(*pieces: str) -> Mutate:
    """Put one of the pieces in the place of a value."""

    def mutate(text: str, dice: random.Random) -> str:
        lines = text.splitlines()
        places = [number for number, line in enumerate(lines) if ": " in line and "#" not in line]
        place = dice.choice(places)
        lines[place] = lines[place].partition(": ")[0] + ": " + dice.choice(pieces)
        return "\n".join(lines)

    return mutate


def flip(text: str, dice: random.Random) -> bytes:
    content = bytearray(text.encode("utf-8", "surrogatepass"))
    for _ in range(dice.randint(1, 20)):
        content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    return bytes(content)


def cut(text: str, dice: random.Random) -> bytes:
    return text.encode()[: dice.randrange(len(text))]


def double_a_line(text: str, dice: random.Random) -> str:
    lines = text.splitlines(keepends=True)
    place = dice.randrange(len(lines))
    return "".join(lines[: place + 1] + lines[place:])


def encode(text: str, dice: random.Random) -> bytes:
    return ("ü" + text).encode(dice.choice(["utf-16", "utf-16-be", "latin-1", "utf-32"]))


BOMB = "&a0 [x]\n" + "".join(f"b{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
# ruff: noqa: E501
MUTATIONS: dict[str, Mutate] = {
    "flipped bytes": flip,
    "cut": cut,
    "doubled line": double_a_line,
    "encoding": encode,
    "nested": as_a_value(*(mark * depth for mark in ("[", "{a: ", "[{") for depth in (30, 500, 5000))),
    "nested in blocks": as_a_value(
        "\n" + "".join(f"{' ' * n}a:\n" for n in range(40, 240)), "\n      " + "- " * 500, "\n      " + "? " * 500
    ),
    "bombs": as_a_value(BOMB, "&a [*a, *a]", "*nobody", "&x 0171-5550199", "&" + "y" * 5000 + " 1"),
    "merge keys": as_a_value("\n    <<: {a: 1}\n    <<: [*x]", "{<<: *Quillfeather}", "{<<: {seed: 1}}"),
    "tags": as_a_value(
        "!!python/object/apply:os.system [true]", "!!python/name:os.system", "!foo Quillfeather", "!!binary '%'",
        "!!set {a}", "!!timestamp x", "!!int Quillfeather", "!<%ff> a", "!x!y z", "!!omap [a: b]",
    ),
    "dates": as_a_value("2001-99-99", "2001-12-14t21:59:43.10-05:00", "0000-00-00", "12:30:45", "9999-12-31"),
    "numbers": as_a_value(
        "9" * 60_000, "-" + "9" * 5000, "1e999999999", "0x" + "f" * 5000, "." + "0" * 5000, ".inf", "-.INF", ".NaN", "0b_",
        "1_000", "1e400", "+49-171-5550199", "quill@example.com", "0171/5550199",
    ),
    "controls": at_a_place("\x00", "\x07", "\x1b[2J", "\x7f", "\x85", "\u2028", "\ufeff", "\ufffe", "\u202e", "\r", "\t"),
    "surrogates": as_a_value('"\\ud83d"', "\ud83d", '"\\U99999999"', '"\\xZZ"'),
    "long keys": at_a_place("k" * 20_000 + ": 1\n", f"\n{'Zora Quillfeather ' * 60}: 1\n", "\n? [a]\n: b\n", "\n0171-5550199: 1\n"),
    "documents": at_a_place("\n---\n", "\n...\n", "%YAML 9.9\n", "%TAG ! x\n", "\n--- Quillfeather\n"),
    "marks": at_a_place(*"'\"|>@`:]}#,*&!%?", "|9\n", "{{ Quillfeather", "{% for %}", "{{ question.__class__ }}", "{# "),
    "another file": lambda _, dice: dice.choice((
        '{"prompt": "Zora Quillfeather", "n": 0171}\n' * 9, "Zora Quillfeather: 0171-5550199\n", "- Zora Quillfeather\n",
         "name,phone\nZora Quillfeather,0171-5550199\n", "", "\n", "null", "5550199", "Quillfeather",
    )),
}  # fmt: skip


@pytest.fixture
def validate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., str]:
    """Run `validate`; returns what a refusal said, or nothing."""
    monkeypatch.chdir(tmp_path)

    def command(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["gemma-tune", "validate", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        err = capsys.readouterr().err
        assert ended.value.code in (0, 2), err
        if not ended.value.code:
            return ""
        assert err.startswith("error: ") and "Traceback" not in err and len(err) < 9000, err
        assert not [text for text in PRIVATE if text in err], err
        return err

    return command


@pytest.mark.parametrize("kind", MUTATIONS)
def test_a_mutated_recipe_is_answered_in_a_sentence(kind: str, validate: Callable[..., str]) -> None:
    dice, file = random.Random(kind), Path("mine.yaml")
    for _ in range(18):  # times 18 kinds: 324 files
        text = MUTATIONS[kind](RECIPE, dice)
        file.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
        if told := validate("mine.yaml"):
            assert "mine.yaml" in told or "no Gemma is known" in told or "lora.targets" in told


@pytest.mark.parametrize("kind", MUTATIONS)
def test_a_mutated_template_is_answered_in_a_sentence(kind: str, validate: Callable[..., str]) -> None:
    dice, file = random.Random(kind), Path("rows.yaml")
    for number in range(18):
        text = MUTATIONS[kind](TEMPLATE, dice)
        file.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
        told = ""
        if number % 3 == 0:
            told = validate("quickstart", "data.template=rows.yaml", "data.source=elsewhere.jsonl")
        else:  # without the command line around it, for the time that it takes
            try:
                load_template("rows.yaml")
            except DataError as error:
                told = f"{error.message}\n{error.hint}"
        assert not told or ("rows.yaml" in told and not [text for text in PRIVATE if text in told]), told


def keys_of(section: type[BaseModel], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name in section.model_fields:
        here = (*path, name)
        yield here
        if (inner := section_at(Recipe, here)) is not None and name != "mix":
            yield from keys_of(inner, here)


WRONG = [
    "null", "true", "-1", "1e400", "''", "[]", "{}", "[[]]", "2001-12-14", "9" * 50, "9" * 60_000, "x" * 3000,
    "Zora Quillfeather", "0171-5550199", ".nan", "{a: {b: 1}}", "[null, 1, {}]", PRIVATE[3],
]  # fmt: skip


@pytest.mark.parametrize("section", Recipe.model_fields)
def test_every_key_with_every_wrong_value(section: str, validate: Callable[..., str]) -> None:
    """All keys of a section with one value, and each of them with one alone."""
    keys, dice = [path for path in keys_of(Recipe) if path[0] == section], random.Random(section)
    single = [path for path in keys if len(path) == 2]
    files = [[(path, value)] for path in keys for value in dice.sample(WRONG, 1)]
    files += [[(path, value) for path in single] for value in WRONG if single and len(value) < 1000]
    for settings in files:
        lines = [f"{section}:"] if len(settings[0][0]) > 1 else []
        for path, value in settings:
            lines += [f"{'  ' * depth}{part}:" for depth, part in enumerate(path) if depth or not lines]
            lines[-1] += f" {value}"
        Path("mine.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")
        if told := validate("mine.yaml"):
            assert "mine.yaml" in told or section in told or "no Gemma is known" in told, told
