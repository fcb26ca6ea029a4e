"""A credential of every form that the package knows, made up here so that no scanner takes a file for a leak."""

from __future__ import annotations

import random
import re
import string

from gemma_tune.secrets import SECRET_KINDS


def _fill(place: re.Match[str], draw: random.Random) -> str:
    letters = string.ascii_uppercase if place[1] else string.ascii_letters
    return "".join(draw.choice(letters if at % 2 else string.digits[2:]) for at in range(int(place[2])))


def _make(example: str) -> str:
    draw = random.Random(example)
    return re.sub(r"\{(A?)(\d+)\}", lambda place: _fill(place, draw), example)


SECRETS = {kind.name: _make(kind.example) for kind in SECRET_KINDS}


def telling_part(secret: str) -> str:
    """The part that must not appear: of a web address its user and password, of a key block its body."""
    address = re.fullmatch(r"https://(.*)@.*", secret)
    return address[1] if address else max(secret.split("\n"), key=len)
