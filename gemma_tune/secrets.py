"""Credentials: one table of their forms, for all that is printed, written, uploaded, audited or refused (S5)."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PureWindowsPath

MASK = "***"


@dataclass(frozen=True)
class SecretKind:
    """A form of credential."""

    name: str  # whose it is
    mark: str  # regex of what stands in every text that holds one; cheap to search
    pattern: str  # regex of all of it
    example: str  # what one looks like; tests fill `{34}` with as many letters and digits, `{A16}` with capitals
    needs_digit: bool = False  # without a digit it is words joined by hyphens


# By their published prefixes. A bare W&B key is 40 hexadecimal digits, as is the commit of a hub model: it is known by
# its environment variable only. Bounded where a long run of letters would cost more than linear time.
SECRET_KINDS = (
    SecretKind("Hugging Face", "hf_|api_org_", r"(?:hf|api_org)_[A-Za-z0-9]{16,}", "hf_{34}"),
    SecretKind("Weights & Biases", "wandb_v1_", r"wandb_v1_\w{16,}", "wandb_v1_{32}"),
    SecretKind("Kaggle", "KGAT_", r"KGAT_\w{16,}", "KGAT_{32}"),
    SecretKind("GitHub", "gh[opsur]_", r"gh[opsur]_[A-Za-z0-9]{20,}", "ghs_{36}"),
    SecretKind("GitHub, fine-grained", "github_pat_", r"github_pat_\w{20,}", "github_pat_{22}_{59}"),
    SecretKind("GitLab", "glpat-", r"glpat-[\w-]{16,}", "glpat-{20}"),
    SecretKind("OpenAI, Anthropic", "sk-", r"sk-[\w-]{20,}", "sk-proj-{40}", needs_digit=True),
    SecretKind("Stripe", "k_live_|k_test_", r"[sr]k_(?:live|test)_[A-Za-z0-9]{16,}", "sk_live_{24}"),
    SecretKind("AWS", "AKIA|ASIA", r"(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9])", "AKIA{A16}"),
    SecretKind("Google", "AIza", r"AIza[\w-]{35}(?![\w-])", "AIza{35}"),
    SecretKind("Slack", "xox[abeprs]-", r"xox[abeprs]-[A-Za-z0-9-]{10,}", "xoxb-{12}-{24}"),
    SecretKind("npm", "npm_", r"npm_[A-Za-z0-9]{30,}", "npm_{36}"),
    SecretKind("PyPI", "pypi-AgE", r"pypi-AgE[\w-]{16,}", "pypi-AgEI{40}"),
    SecretKind(
        "JSON web token", "eyJ", r"eyJ[\w-]{8,4096}\.eyJ[\w-]{8,8192}\.[\w-]{8,4096}(?![\w-])", "eyJ{20}.eyJ{30}.{40}"
    ),
    SecretKind(
        "private key",
        "PRIVATE KEY",
        r"-----BEGIN (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----"
        r"(?:[^-]{0,20000}-----END (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----)?",
        "-----BEGIN RSA PRIVATE KEY-----\n{64}\n-----END RSA PRIVATE KEY-----",
    ),
    SecretKind(
        "key in a web address",
        r"[?&][\w-]{0,32}(?i:token|api_?key|access_?key|sig|signature|credential|secret|password)=",
        r"(?<=[?&])(?i:[\w-]{0,32}(?:token|api_?key|access_?key|sig|signature|credential|secret|password))=[^\s&\"'<>]{8,512}",
        "https://host.example/rows.jsonl?access_token={24}",
        needs_digit=True,
    ),
    SecretKind(
        "web address with a password",
        "://",
        r"(?<=://)(?:[^\s/@:\"'<>]{0,64}:[^\s/\"'<>]{1,256}|[A-Za-z0-9_-]{20,256})(?=@)",
        "https://someone:{12}@host.example/rows.jsonl",
        needs_digit=True,
    ),
)
_MARK = re.compile("|".join(kind.mark for kind in SECRET_KINDS))
_FORMS = "|".join(f"(?P<kind_{number}>{kind.pattern})" for number, kind in enumerate(SECRET_KINDS))
_FORM = re.compile(f"(?<![A-Za-z0-9])(?:{_FORMS})", re.ASCII)
_VARIABLES = re.compile(r"(?:TOKEN|API_?KEY|ACCESS_KEY|KAGGLE_KEY|PASSWORD|PASSWD|SECRET)$", re.IGNORECASE)
_MIN_LENGTH = 8  # a shorter value would mask ordinary words
# `sk-xxxxxxxxxxxxxxxxxxxxxxxx` and `ghp_000…` are placeholders.
_MIN_DISTINCT = 12
_PLACEHOLDER = re.compile(r"(?i)x{5}|your|placeholder")
_PLACEHOLDER_CHARS = 64
# Not behind a letter, where it is a part of a web address.
_HOMES = r"(?<![\w.-])(?:/home/|/Users/|/root/|[A-Za-z]:\\+Users\\+)"
_REST_OF_PATH = r"[^\s\"'`|<>()]*"


def mask_secrets(text: str) -> str:
    """Return the text with `***` for whatever has the form of a credential, or is the value of a variable named so."""
    for name, value in os.environ.items():
        if len(value) >= _MIN_LENGTH and value in text and _VARIABLES.search(name):
            text = text.replace(value, MASK)
    return _FORM.sub(MASK, text) if _MARK.search(text) else text


def mask_private(text: str) -> str:
    """Return the text as `mask_secrets`, and paths below a home folder cut to their last name."""
    text = mask_secrets(text)
    home = os.path.expanduser("~")
    starts = [_HOMES] if home in ("~", "/") else [_HOMES, re.escape(f"{home}/")]
    for start in starts:
        # PureWindowsPath knows both slashes.
        text = re.sub(start + _REST_OF_PATH, lambda found: PureWindowsPath(found[0]).name, text)
    return text


def find_secrets(text: str) -> Iterator[tuple[int, int]]:
    """Yield start and end of every credential in a text of somebody else; placeholders of a manual are none."""
    if not _MARK.search(text):
        return
    for match in _FORM.finditer(text):
        kind = SECRET_KINDS[int(str(match.lastgroup).rpartition("_")[2])]
        is_placeholder = len(set(match[0])) < _MIN_DISTINCT or _PLACEHOLDER.search(match[0][:_PLACEHOLDER_CHARS])
        if not is_placeholder and (not kind.needs_digit or any(char.isdigit() for char in match[0])):
            yield match.span()
