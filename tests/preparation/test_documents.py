"""Cutting long documents and joining short pieces."""

import json
import time

from hypothesis import given, settings
from hypothesis import strategies as st

from lory_jax.preparation.documents import join_pieces, split_long
from lory_jax.preparation.sources.inputs import list_inputs
from lory_jax.preparation.sources.read import read_input
from lory_jax.preparation.sources.records import ReadOptions
from lory_jax.preparation.stages.read import text_digest

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


def test_the_time_of_cutting_grows_with_the_text(tmp_path):
    """72 MB in one document, in the stage `read`: it must take under two CPU-seconds."""
    text = ("many words " * 12 + "\n\n") * 540_000
    assert len(text) > 72e6
    (tmp_path / "one.jsonl").write_text(json.dumps({"text": text}) + "\n")
    (found,) = list_inputs([str(tmp_path / "one.jsonl")])
    started = time.process_time()
    (document,) = read_input(found, ReadOptions())
    pieces = [text_digest(piece) for piece in split_long(document.text, 100_000)]
    seconds = time.process_time() - started
    assert len(pieces) > 720
    assert seconds < 2, f"{seconds:.1f} CPU-seconds"


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text("ab ", min_size=1, max_size=9), max_size=12), st.integers(1, 20))
def test_joining_keeps_the_pieces_in_order_and_reaches_the_size(pieces, enough):
    joined = list(join_pieces(pieces, enough))
    assert all(len(text.encode()) >= enough for text in joined[:-1])
    expected = "".join(pieces).replace(" ", "")
    assert "".join(joined).replace("\n\n", "").replace(" ", "") == expected


# ---------------------------------------------------------------- sources
