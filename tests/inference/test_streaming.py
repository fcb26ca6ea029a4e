from __future__ import annotations

from itertools import pairwise

from hypothesis import example, given
from hypothesis import strategies as st

from gemma_tune.inference.streaming import StreamedText, cut_at_stop

TEXT = st.text(alphabet=" \nabc", max_size=30)


@given(TEXT, st.lists(st.integers(0, 30), max_size=6), st.lists(st.text("abc ", min_size=1, max_size=3), max_size=2))
@example(" a", [1], [" a"])
def test_however_it_is_cut_the_pieces_are_the_finished_text(text: str, cuts: list[int], stops: list[str]) -> None:
    places = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    pieces: list[str] = []
    streamed = StreamedText(pieces.append, stops)
    for start, end in pairwise(places):
        streamed.add(text[start:end])
    streamed.add("", is_last=True)
    assert "".join(pieces) == cut_at_stop(text, stops)[0].strip()
    assert all(pieces)


def test_text_is_not_held_back_without_need() -> None:
    pieces: list[str] = []
    streamed = StreamedText(pieces.append, ["END"])
    for piece in ("One ", "two E", "ven EN", "D three"):
        streamed.add(piece)
    assert pieces == ["One", " two", " Even"]
