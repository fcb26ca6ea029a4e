"""The texts of the forgetting check: whether the tuned model still reads plain text as well as its base."""

import itertools
import json
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

from gemma_tune.data.encode.arrays import EncodedRows
from gemma_tune.data.encode.encoder import Encoder
from gemma_tune.data.rows.segments import Segment
from gemma_tune.identity import json_sha256
from gemma_tune.models.catalogue import TINY
from gemma_tune.models.fetch import LocalModel
from tools.tiny.documents import iter_documents
from tools.tiny.world import build_world

_FILE = Path(__file__).with_name("general.jsonl")
# Another seed than that of the pre-training, so another draw of the same kind of text.
_TINY_SEED, _NUM_TINY_DOCUMENTS = 20_260, 28


@dataclass(frozen=True)
class GeneralText:
    """One text. `prompt` is read without being scored; every token of `text` is scored."""

    kind: str
    prompt: str
    text: str


@dataclass(frozen=True)
class GeneralSet:
    """Texts that belong to no training, and what they are in a few words."""

    label: str
    texts: tuple[GeneralText, ...]

    @property
    def sha256(self) -> str:
        return json_sha256([astuple(text) for text in self.texts])

    @property
    def kinds(self) -> list[str]:
        return [text.kind for text in self.texts]


def general_set(base: LocalModel) -> GeneralSet:
    """English prose and simple questions, written for this; the invented world's own text for the embedded model.

    gemma-tiny has never seen English beyond its world: there is nothing of it that it could forget.
    """
    if base.model is not None and base.model.name == TINY:
        documents = itertools.islice(iter_documents(build_world(), seed=_TINY_SEED), _NUM_TINY_DOCUMENTS)
        texts = tuple(GeneralText("tiny world", "", document) for document in documents)
        return GeneralSet("text of the kind that gemma-tiny was pre-trained on", texts)
    lines = _FILE.read_text(encoding="utf-8").splitlines()
    return GeneralSet(
        "plain English prose and simple questions, shipped", tuple(GeneralText(**json.loads(line)) for line in lines)
    )


def encode_general(texts: Sequence[GeneralText], encoder: Encoder) -> EncodedRows:
    """The texts after one BOS each, as plain text in no template."""
    return encoder.encode_rows(
        [
            (Segment(text.prompt, supervised=False, control=False), Segment(text.text, supervised=True, control=False))
            for text in texts
        ]
    )
