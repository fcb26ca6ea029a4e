"""What the forms of a model are compared on: strings to tokenize, rows for logits, prompts to answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gemma_tune.data.encode.arrays import IGNORED, EncodedRows
from gemma_tune.data.encode.encoder import Encoder
from gemma_tune.data.rows.render import Example
from gemma_tune.data.rows.segments import Segment
from gemma_tune.exporting.export_settings import ExportSettings

_MAX_TEXTS = 50
_NUM_PROMPTS = 10
_MAX_PROMPT_TOKENS = 512
# Beyond it a row is cut: the logits of 512 tokens over 262,144 pieces take 0.5 GB.
_MAX_ROW_TOKENS = 512

# Where tokenizers of one vocabulary part ways: white space at every place, bytes outside the vocabulary, scripts
# without spaces, characters of several code points, control tokens, numbers, code. Left out: a typed U+2581 next to a
# space, the one string that llama.cpp's SentencePiece cannot tell from two spaces.
TRICKY_STRINGS = (
    "a", " a", "a ", "  a", "a  b", "   three   spaces   ", "\ta\tb", "a\tb\t\tc", "\n", "\n\n", "\n\n\n\n", "a\nb",
    "a\r\nb", " \n ", "line one\n    indented\n\tand tabbed\n", "word" * 20, "ALL CAPS and mIxEd",
    "don't can't I'll we've", "1", "12", "1234567890", "3.14159", "1,000,000", "-17 °C", "2026-11-25T14:16:55Z", "50 %",
    "$5 €6 £7 ¥8",
    "?!?!...", "…—–-", "“quoted” ‘text’", "(a[b{c}d]e)", "a/b\\c", "x == y != z <= w", "def f(x):\n    return x ** 2\n",
    "for (int i = 0; i < 10; ++i) {\n\tputs(\"hi\");\n}", "{\"key\": [1, 2.5, null]}", "<b>bold</b> &amp; <br/>",
    "https://example.org/a?b=c&d=e#f", "name.surname+tag@example.org", "naïve café Zürich Łódź",
    "cafe\u0301 (combining)",
    "Привет, мир", "Καλημέρα κόσμε", "你好,世界", "こんにちは世界", "안녕하세요 세계", "สวัสดีชาวโลก", "مرحبا بالعالم",
    "שלום עולם", "नमस्ते दुनिया", "😀", "👩‍👩‍👧‍👦 👍🏽 🇺🇦", "a\u200bb\u00a0c\u2003d", "\ufeffbom", "ﬁ ﬂ ½ ² ™", "𝔊𝔢𝔪𝔪𝔞 𐍈",
    "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n", "<bos>", "<eos>", "<pad><unk>", "<unused7>",
    "almost <start_of_turn", "### Instruction:\nSay it.\n\n### Response:\n",
)  # fmt: skip

# For an adapter without eval rows. Our own sentences; what they say does not matter.
_BUILT_IN_TEXTS = (
    "A baker needs an oven, flour and an early hour. The first loaves are done before the sun is up.",
    "Water boils at a lower temperature on a mountain, because the air presses less on its surface.",
    "Question: how many legs do three spiders have? Answer: three times eight is twenty-four.",
    "def area(width, height):\n    return width * height\n\nprint(area(3, 4))\n",
    "Dear Anna,\n\nthank you for your letter. We will come on Friday, by the train that arrives at noon.\n",
    "The list of things to pack: a coat, two books, a lamp, some rope, and the map of the northern valley.",
    "In 1896 the bridge was finished; it is 412 metres long and carries two tracks across the river.",
    "Le marché est ouvert le matin. On y trouve du pain, des pommes et du fromage de chèvre.",
    "Explain why the sky is blue.",
    "Write one sentence about a duck.",
)


@dataclass(frozen=True)
class Probe:
    """What every form is asked."""

    rows: tuple[tuple[int, ...], ...]  # token ids, the BOS first
    # of each row the indices of the tokens whose loss makes the perplexity: those that were trained
    scored: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...]  # strings whose token ids must be equal
    prompts: tuple[tuple[int, ...], ...]  # token ids of prompts that are answered greedily
    stop_token_ids: tuple[int, ...]
    origin: str  # where rows and prompts come from, in words
    max_new_tokens: int = 32

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.rows))

    def targets(self) -> list[tuple[int, int]]:
        """(position, id of the token that comes next) of each scored token, positions counted through all rows."""
        starts = np.cumsum([0, *map(len, self.rows)]).tolist()
        return [
            (start + index - 1, row[index])
            for start, row, scored in zip(starts[:-1], self.rows, self.scored, strict=True)
            for index in scored
        ]

    def positions(self) -> list[int]:
        """The positions that are compared, counted through all rows: each context once.

        The rows of a template begin alike; one near-tie there would count as many times as there are rows.
        """
        seen: set[tuple[int, ...]] = set()
        found, start = [], 0
        for row in self.rows:
            for index in range(len(row)):
                if (context := row[: index + 1]) not in seen:
                    seen.add(context)
                    found.append(start + index)
            start += len(row)
        return found


def probe_of_rows(
    rows: EncodedRows,
    examples: Sequence[Example],
    *,
    encoder: Encoder,
    num_positions: int = ExportSettings.num_positions,
) -> Probe:
    """A probe of eval rows; `examples[i]` is what `rows[i]` was made of. Without rows it is the built-in one."""
    if not len(rows):
        return built_in_probe(encoder, num_positions=num_positions)
    ids, scored = _fill(
        [(row.input_ids, [index for index, label in enumerate(row.labels) if label != IGNORED]) for row in rows],
        num_positions,
    )
    prompts = (tuple(encoder.encode_prompt(example.prompt_segments)) for example in examples)
    texts = ("".join(segment.text for segment in example.segments) for example in examples[:_MAX_TEXTS])
    return Probe(
        rows=ids,
        scored=scored,
        texts=(*TRICKY_STRINGS, *texts),
        prompts=tuple(prompt for prompt in prompts if len(prompt) <= _MAX_PROMPT_TOKENS)[:_NUM_PROMPTS],
        stop_token_ids=encoder.stop_token_ids,
        origin="eval rows",
    )


def built_in_probe(encoder: Encoder, *, num_positions: int = ExportSettings.num_positions) -> Probe:
    """A probe of plain text, for an adapter whose rows are not known."""
    rows = [encoder.encode_prompt([Segment(text, supervised=False, control=False)]) for text in _BUILT_IN_TEXTS]
    ids, scored = _fill([(row, range(1, len(row))) for row in rows], num_positions)
    return Probe(
        rows=ids,
        scored=scored,
        texts=(*TRICKY_STRINGS, *_BUILT_IN_TEXTS),
        prompts=tuple(tuple(row[: len(row) // 2 + 1]) for row in rows[:_NUM_PROMPTS]),
        stop_token_ids=encoder.stop_token_ids,
        origin="built-in text",
    )


def _fill(
    rows: Sequence[tuple[Sequence[int], Sequence[int]]], num_positions: int
) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]:
    """Ids and scored indices of the shortest rows, as many as fit, so that whole answers are among them.

    Fits counts each context once, as `Probe.positions` does; the last row is cut.
    """
    ids: list[tuple[int, ...]] = []
    scored: list[tuple[int, ...]] = []
    contexts: set[tuple[int, ...]] = set()
    for row, indices in sorted(rows, key=lambda pair: len(pair[0])):
        end = 0
        while end < min(len(row), _MAX_ROW_TOKENS) and len(contexts) < num_positions:
            end += 1
            contexts.add(tuple(row[:end]))
        if not end:
            break
        ids.append(tuple(row[:end]))
        scored.append(tuple(index for index in indices if 0 < index < end))
    return tuple(ids), tuple(scored)
