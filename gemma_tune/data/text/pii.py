"""Personal data and secrets in row text: found by form, confirmed by checksum or number plan, never printed.

A cheap regex decides whether a text is looked at closely; `phonenumbers` and `stdnum` see only what passed it. What is
found: e-mail addresses; phone numbers with a country code (+49 …) or in North American form (212-555-0123); payment
cards (Luhn, known prefixes and lengths); IBANs (mod 97 and the country's form); public IP addresses; keys and tokens
with a known prefix. National phone numbers of other countries look like any other number and are not found.
"""

import ipaddress
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from gemma_tune.members import Members
from gemma_tune.secrets import find_secrets


@dataclass(frozen=True, slots=True)
class PiiMatch:
    """A find in a text: `text[start:end]`."""

    kind: str
    start: int
    end: int


def find_pii(text: str) -> list[PiiMatch]:
    """Every find, in the order of the text, without overlaps."""
    taken: list[PiiMatch] = []
    for kind in PII_KINDS.values():
        found = [PiiMatch(kind.name, start, end) for start, end in kind.find(text)]
        # A find that overlaps one of its own kind is impossible: every finder walks forward.
        taken += [match for match in found if all(match.end <= old.start or old.end <= match.start for old in taken)]
    return sorted(taken, key=lambda match: match.start)


def mask_pii(text: str) -> str:
    """Replace every find by `[EMAIL]`, `[PHONE]`, `[CARD]`, `[IBAN]`, `[IP]` or `[SECRET]`; nothing is found after."""
    # Again until nothing is found: a number can become one of its own when its neighbour has gone.
    while matches := find_pii(text):
        for match in reversed(matches):
            text = f"{text[: match.start]}[{match.kind.upper()}]{text[match.end :]}"
    return text


def masked_value(value: str) -> str:
    """A value that may be shown: its first character and its length."""
    return f"{value[:1]}… ({len(value)} characters)"


# --- e-mail -----------------------------------------------------------------------------------------------------------

# Bounded everywhere, so that a long run of letters costs linear time.
_EMAIL = re.compile(
    r"(?<![\w.+-])[A-Za-z0-9](?:[\w.%+'-]{0,62}[\w+-])?@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,62})\.){1,6}[A-Za-z]{2,24}(?![\w@])",
    re.ASCII,
)
# `logo@2x.png` names a picture in high resolution.
_FILE_ENDINGS = (".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp", ".css", ".js", ".html")


def _emails(text: str) -> Iterator[tuple[int, int]]:
    if "@" not in text:
        return
    for match in _EMAIL.finditer(text):
        # `git@github.com:owner/name` is an address of a repository, and `user@host.com:22` is not in the way of people.
        if not match[0].lower().endswith(_FILE_ENDINGS) and not match[0].startswith("git@"):
            yield match.span()


# --- bank accounts and payment cards ----------------------------------------------------------------------------------

_IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Z]{2}[0-9]{2}(?: ?[A-Z0-9]){11,30}")
# Neither part of a longer number nor of a decimal fraction; groups by one kind of separator throughout.
_CARD = re.compile(
    r"(?<![\w.,+-])(?:[0-9]{14,19}|[0-9]{4}([ -])[0-9]{4}\1[0-9]{4}\1[0-9]{2,4}(?:\1[0-9]{1,3})?"
    r"|[0-9]{4}([ -])[0-9]{6}\2[0-9]{4,5})(?![\w-]|[.,][0-9])",
    re.ASCII,
)
# Prefixes → lengths: Visa, Mastercard, American Express, Discover, Diners Club, JCB, UnionPay.
_CARD_FORMS = re.compile(
    r"4[0-9]{15}(?:[0-9]{3})?|(?:5[1-5][0-9]{2}|222[1-9]|22[3-9][0-9]|2[3-6][0-9]{2}|27[01][0-9]|2720)[0-9]{12}"
    r"|3[47][0-9]{13}|(?:6011|64[4-9][0-9]|65[0-9]{2})[0-9]{12}|3(?:0[0-5]|[68][0-9])[0-9]{11}"
    r"|35(?:2[89]|[3-8][0-9])[0-9]{12}|62[0-9]{14,17}",
    re.ASCII,
)


def _ibans(text: str) -> Iterator[tuple[int, int]]:
    start = 0
    while match := _IBAN.search(text, start):
        from stdnum import iban

        start = match.start() + 4
        ends = [at + 1 for at in range(match.start(), match.end()) if text[at] != " "]
        # An IBAN in groups of four may be followed by a word in capitals; the country says how long it is.
        for end in reversed(ends[14:]):
            if not text[end : end + 1].isalnum() and iban.is_valid(text[match.start() : end]):
                start = end
                yield match.start(), end
                break


def _cards(text: str) -> Iterator[tuple[int, int]]:
    for match in _CARD.finditer(text):
        digits = match[0].replace(" ", "").replace("-", "")
        if not _CARD_FORMS.fullmatch(digits):
            continue
        from stdnum import luhn

        if luhn.is_valid(digits):
            yield match.span()


# --- IP addresses -----------------------------------------------------------------------------------------------------

# A network (`…/24`, or an address that ends in .0) is no machine, and a fifth number makes it a version or an OID.
_IPV4 = re.compile(r"(?<![\w.-])(?:[1-9][0-9]{0,2})(?:\.(?:0|[1-9][0-9]{0,2})){3}(?![\w-]|\.[0-9]|/[0-9])", re.ASCII)
_IPV6 = re.compile(r"(?<![\w:.])[23][0-9A-Fa-f]{3}:(?:[0-9A-Fa-f]{0,4}:){1,6}[0-9A-Fa-f]{1,4}(?![\w:]|\.[0-9]|/[0-9])")
_VERSION_WORD = re.compile(
    r"(?i)(?:\bv|\bver|\bversion|\brelease|\bbuild|\bfirmware|\bsection|\bchapter|§|[=<>~!]=)[.:]?\s*$"
)
# Sections and versions such as 3.2.1.14 count in small numbers; a machine's address does so once in a thousand times.
_SMALL_PART = 32
_VERSION_WORD_CHARS = 12


def _ip_addresses(text: str) -> Iterator[tuple[int, int]]:
    for match in _IPV4.finditer(text):
        parts = [int(part) for part in match[0].split(".")]
        if max(parts) > 255 or max(parts) < _SMALL_PART or parts[3] == 0:
            continue
        if _VERSION_WORD.search(text, max(0, match.start() - _VERSION_WORD_CHARS), match.start()):
            continue
        # Private, loopback, documentation and reserved addresses belong to nobody.
        address = ipaddress.IPv4Address(match[0])
        if address.is_global and not address.is_multicast:
            yield match.span()
    for match in _IPV6.finditer(text):
        try:
            is_global = ipaddress.IPv6Address(match[0]).is_global
        except ValueError:
            continue
        if is_global:
            yield match.span()


# --- phone numbers ----------------------------------------------------------------------------------------------------

_NORTH_AMERICAN = re.compile(
    r"(?<![\w.+-])(?:1[ .-])?(?:\([2-9][0-9]{2}\) ?|[2-9][0-9]{2}[ .-])[2-9][0-9]{2}[ .-][0-9]{4}(?![\w-]|\.[0-9])",
    re.ASCII,
)
_COUNTRY_CODE = re.compile(r"(?<![\w+)])\+\(?[1-9][0-9 ()./-]{6,}", re.ASCII)


def _phones(text: str) -> Iterator[tuple[int, int]]:
    """Not PhoneNumberMatcher for North American numbers: it takes any ten digits for one."""
    spans: list[tuple[int, int]] = []
    if _COUNTRY_CODE.search(text):
        import phonenumbers

        for found in phonenumbers.PhoneNumberMatcher(text, None):
            # The matcher takes the bracket of `(+49 …)` along, and not the one that closes it.
            opened = found.raw_string.startswith("(") and found.raw_string.count("(") > found.raw_string.count(")")
            spans.append((found.start + opened, found.end))
    for match in _NORTH_AMERICAN.finditer(text):
        import phonenumbers

        if phonenumbers.is_valid_number(phonenumbers.parse(match[0], "US")) and not any(
            start < match.end() and match.start() < end for start, end in spans
        ):
            spans.append(match.span())
    yield from sorted(spans)


@dataclass(frozen=True, slots=True)
class PiiKind:
    """A kind of personal data."""

    name: str
    title: str  # with its article
    find: Callable[[str], Iterable[tuple[int, int]]]


# In the order of precedence: where two finds overlap, the earlier kind is kept.
PII_KINDS = Members(
    "kind of personal data",
    (
        PiiKind("secret", "a key or token", find_secrets),
        PiiKind("email", "an e-mail address", _emails),
        PiiKind("iban", "an IBAN", _ibans),
        PiiKind("card", "a payment card number", _cards),
        PiiKind("ip", "a public IP address", _ip_addresses),
        PiiKind("phone", "a phone number", _phones),
    ),
)
