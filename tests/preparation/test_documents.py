"""Cutting long documents and joining short pieces."""

from hypothesis import given, settings
from hypothesis import strategies as st

from lory_jax.preparation.documents import join_pieces, split_long

TEXTS = st.text(st.sampled_from("ab\n é漢"), max_size=80)


@settings(max_examples=200, deadline=None)
@given(TEXTS, st.integers(4, 30))
def test_cutting_loses_only_line_ends_and_keeps_the_limit(text, max_bytes):
    pieces = list(split_long(text, max_bytes))
    assert all(0 < len(piece.encode()) <= max_bytes for piece in pieces)
    assert "".join(pieces).replace("\n", "") == text.replace("\n", "")


def test_cutting_prefers_empty_lines_then_line_ends():
    assert list(split_long("one\ntwo\n\nthree\nfour", 14)) == ["one\ntwo", "three\nfour"]
    assert list(split_long("one two\nthree four", 14)) == ["one two", "three four"]
    assert list(split_long("漢字漢字", 7)) == ["漢字", "漢字"]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text("ab ", min_size=1, max_size=9), max_size=12), st.integers(1, 20))
def test_joining_keeps_the_pieces_in_order_and_reaches_the_size(pieces, enough):
    joined = list(join_pieces(pieces, enough))
    assert all(len(text.encode()) >= enough for text in joined[:-1])
    expected = "".join(pieces).replace(" ", "")
    assert "".join(joined).replace("\n\n", "").replace(" ", "") == expected


# ---------------------------------------------------------------- sources
