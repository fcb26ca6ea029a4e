from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_tune.data.text.pii import find_pii, mask_pii, masked_value

# Put together here, so that no scanner takes this file for a leak.
AWS = "AKIA" + "Q3EGRZ7T2LMPXK4D"
GITHUB = "ghp_" + "a1B2c3D4e5F6g7H8i9J0k1L2m3N4o5P6q7R8"
GITHUB_FINE = "github_pat_" + "11AABBCCD0aBcDeFgHiJkL_" + "mNoPqRsTuVwXyZ0123456789"
HUGGING_FACE = "hf_" + "QwErTyUiOpAsDfGhJkLzXcVbNmQwErTyUi"
OPENAI = "sk-" + "proj-" + "aB3dE5gH7jK9mN1pQ3sT5vW7yZ"
SLACK = "xoxb-" + "123456789012-abcdEFGHijkl"
GOOGLE = "AIza" + "SyA1b2C3d4E5f6G7h8I9j0K1l2M3n4O5p6Q"
STRIPE = "sk_live_" + "4eC39HqLyjWDarjtT1zdp7dc"
JWT = "eyJhbGciOiJIUzI1NiJ9." + "eyJzdWIiOiIxMjM0NTY3ODkwIn0." + "dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U"
PEM = "-----BEGIN RSA " + "PRIVATE KEY-----\nMIIEpAIBAAKCAQEA7bq\nzX+/=\n-----END RSA " + "PRIVATE KEY-----"

PLANTED = [
    ("email", "jane.doe+news@mail.example.co.uk"),
    ("email", "o'neil_7@example.com"),
    ("phone", "+49 30 901820"),
    ("phone", "+442079460958"),
    ("phone", "+33 1 42 68 53 00"),
    ("phone", "(212) 555-0123"),
    ("phone", "212-555-0123"),
    ("phone", "1-212-555-0123"),
    ("phone", "+1 (650) 253-0000"),
    ("card", "4111111111111111"),
    ("card", "4111 1111 1111 1111"),
    ("card", "5555-5555-5555-4444"),
    ("card", "2223 0031 2200 3222"),
    ("card", "378282246310005"),
    ("card", "3782 822463 10005"),
    ("card", "6011111111111117"),
    ("card", "3056 930902 5904"),
    ("card", "3566002020360505"),
    ("iban", "DE89370400440532013000"),
    ("iban", "DE89 3704 0044 0532 0130 00"),
    ("iban", "GB82 WEST 1234 5698 7654 32"),
    ("iban", "FR14 2004 1010 0505 0001 3M02 606"),
    ("ip", "93.184.216.34"),
    ("ip", "2a00:1450:4001:82b::200e"),
    ("secret", AWS),
    ("secret", GITHUB),
    ("secret", GITHUB_FINE),
    ("secret", HUGGING_FACE),
    ("secret", OPENAI),
    ("secret", SLACK),
    ("secret", GOOGLE),
    ("secret", STRIPE),
    ("secret", JWT),
    ("secret", PEM),
]
FRAMES = ["{}", "It is {}.", "({})", "contact: {}, please", '"{}"', "one\n{}\ntwo", "key={}"]


@pytest.mark.parametrize(("kind", "value"), PLANTED, ids=lambda value: value[:12])
@pytest.mark.parametrize("frame", FRAMES)
def test_planted_value_is_found_and_masked(kind: str, value: str, frame: str) -> None:
    text = frame.format(value)
    assert [(match.kind, text[match.start : match.end]) for match in find_pii(text)] == [(kind, value)]
    assert mask_pii(text) == frame.format(f"[{kind.upper()}]")


@pytest.mark.parametrize(
    "text",
    [
        # checksums and number plans that do not hold
        "4111 1111 1111 1112",
        "1234 5678 9012 3456",
        "9999999999999995",
        "DE88 3704 0044 0532 0130 00",
        "XX89 3704 0044 0532 0130 00",
        "+999 1234 5678",
        "(012) 345-6789",
        "123-456-7890",
        # dates, times, ranges, figures
        "from 2001-09-11 to 2015-12-31, 1997-1998, 01/02/2003, 12.10.1492",
        "at 12:30:45 on 2024-05-06T07:08:09",
        "the population was 1,234,567,890 in 2020 and 8045311447 in 2024",
        "timestamps 1700000000 and 1700000000000",
        # books, versions, sections, mathematics
        "ISBN 978-3-16-148410-0, ISBN 0-306-40615-2, EAN 4006381333931",
        "version 10.0.19041.1 and Chrome 96.0.4664.110, v1.2.3.4, firmware 192.99.4.200, pip install thing==9.19.0.56",
        "see section 3.2.1.14 and OID 1.3.6.1.4.1.311.21.20",
        "pi is 3.14159265358979323846, and 0.4111111111111111 is not much",
        "2+2=4, 100 + 200 + 300 = 600, 5 - 3 - 212 555 12",
        "x = [1, 2, 3, 4111, 5105]",
        # addresses of nobody's machine
        "127.0.0.1, 192.168.0.17, 10.1.2.3, 203.0.113.9, 255.255.255.0, 0.0.0.0, 93.184.216.0/24, fe80::1, ::1",
        "2001:db8::8a2e:370:7334 and std::vector and abc::def",
        # things with an @ or a prefix that are no address and no key
        "@handle, a@b, foo@bar, logo@2x.png, git@github.com:owner/name.git, 3 @ 4.50",
        "sk-xxxxxxxxxxxxxxxxxxxxxxxx, hf_xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx, sk-your-api-key-goes-right-here-1",
        "sk-navigation-bar-item-is-active-now and the task-force and AKIAshort",
        "-----BEGIN PUBLIC KEY-----",
    ],
)
def test_look_alike_is_left_alone(text: str) -> None:
    assert find_pii(text) == []
    assert mask_pii(text) == text


def test_iban_before_a_word_in_capitals() -> None:
    assert mask_pii("DE89 3704 0044 0532 0130 00 BANK OF X") == "[IBAN] BANK OF X"


def test_several_kinds_in_one_text() -> None:
    text = f"a.b@example.com calls +49 30 901820 from 93.184.216.34 with {AWS}"
    assert mask_pii(text) == "[EMAIL] calls [PHONE] from [IP] with [SECRET]"


def test_masked_value_tells_next_to_nothing() -> None:
    assert masked_value("jane@example.com") == "j… (16 characters)"


def test_long_text_costs_linear_time() -> None:
    for text in ("a" * 200_000, "a@" * 100_000, "1 " * 100_000, "eyJ" * 60_000, "[1]" * 60_000, "1." * 100_000):
        find_pii(text)


pieces = st.one_of(
    st.sampled_from([value for _, value in PLANTED]),
    st.text(alphabet="0123456789 .-+()@ab:AZ[]\n", max_size=24),
    st.text(max_size=12),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(pieces, max_size=8))
def test_masking_leaves_no_finding(parts: list[str]) -> None:
    masked = mask_pii("".join(parts))
    assert find_pii(masked) == []
    assert mask_pii(masked) == masked


@settings(max_examples=200, deadline=None)
@given(st.lists(pieces, max_size=8))
def test_finds_do_not_overlap(parts: list[str]) -> None:
    matches = find_pii(" ".join(parts))
    assert all(one.end <= two.start for one, two in itertools.pairwise(matches))


def test_masks_are_the_documented_ones() -> None:
    text = " ".join(value for _, value in PLANTED)
    assert set(re.findall(r"\[[A-Z]+\]", mask_pii(text))) == {
        "[EMAIL]", "[PHONE]", "[CARD]", "[IBAN]", "[IP]", "[SECRET]",
    }  # fmt: skip
