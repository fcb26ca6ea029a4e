"""Which languages rows are in, guessed from a sample."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from gemma_tune.data.look.audit_row import AuditRow
from gemma_tune.data.look.findings import AuditFinding

# Languages are guessed on so many rows, evenly spaced, from the first characters of each.
LANGUAGE_ROWS = 400
_LANGUAGE_CHARS = 400
# Shorter texts are mostly guessed wrong.
_LANGUAGE_MIN_WORDS = 8
_LANGUAGE_MIN_CONFIDENCE = 0.5
# Below this share of the guessed rows a second language is a misguess more often than a language.
_LANGUAGE_MIN_SHARE = 0.03


def language_mix(rows: Sequence[AuditRow]) -> tuple[tuple[tuple[str, int], ...], int]:
    """Language code and rows of an evenly spaced sample, most frequent first, and the size of the sample."""
    if not rows:
        return (), 0
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(
        MODEL_FILE, norm_probs=True, min_confidence=_LANGUAGE_MIN_CONFIDENCE
    )
    size = min(LANGUAGE_ROWS, len(rows))
    sample = [rows[index * len(rows) // size] for index in range(size)]
    return tuple(Counter(_language(row, identifier) for row in sample).most_common()), size


def _language(row: AuditRow, identifier: object) -> str:
    text = " ".join(text for _, text in row.texts)[:_LANGUAGE_CHARS]
    # A language without blanks has long words.
    if len(text.split()) < _LANGUAGE_MIN_WORDS and text.isascii():
        return "?"
    code: str = identifier.classify(text)[0]  # type: ignore[attr-defined]
    # `und` is unsure, `zxx` no language, such as a list of figures.
    return "?" if code in ("und", "zxx") else code


def language_findings(languages: Sequence[tuple[str, int]], size: int) -> list[AuditFinding]:
    known = [(code, count) for code, count in languages if code != "?" and count >= max(2, _LANGUAGE_MIN_SHARE * size)]
    if len(known) < 2:
        return []
    shares = ", ".join(f"{code} {count / size:.0%}" for code, count in known)
    return [
        AuditFinding(
            "languages",
            "info",
            sum(count for _, count in known[1:]),
            f"the rows are in {len(known)} languages, guessed from {size:,} of them: {shares}",
            (),
            "",
        )
    ]
