"""Credentials in text: masked in everything that a run writes or shows (S5)."""

from __future__ import annotations

import os
import re

MASK = "***"
# By their published prefixes. A bare W&B key is 40 hexadecimal digits, as is the commit of a hub model: it is known by
# its environment variable only.
_TOKENS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|wandb_v1_\w{16,}|gh[opsur]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}"
    r"|sk-[\w-]{20,}|KGAT_\w{16,}|AKIA[A-Z0-9]{16})"
)
_NAMES = re.compile(r"(?:TOKEN|API_?KEY|PASSWORD|PASSWD|SECRET|SECRET_ACCESS_KEY)$", re.IGNORECASE)
_MIN_LENGTH = 8  # a shorter value would mask ordinary words


def mask_secrets(text: str) -> str:
    """`text` with `***` in place of tokens, and of the values of environment variables that are named like one."""
    for name, value in os.environ.items():
        if len(value) >= _MIN_LENGTH and value in text and _NAMES.search(name):
            text = text.replace(value, MASK)
    return _TOKENS.sub(MASK, text)
