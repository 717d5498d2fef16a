import random

import numpy as np
import pytest

from lory_jax.data.prepared import PreparedData
from lory_jax.preparation.deduplication import is_near, near_duplicates, repeated
from lory_jax.preparation.engine.columns import Ragged
from tests.support.corpora import SETTINGS, prepare_here, read_drop_lists, write_records

WIDTH = 4
VOCABULARY = 5000


def document(rng, length=250):
    return rng.integers(2, VOCABULARY, length).astype(np.uint16)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_repeated_keeps_the_first_place():
    digest = np.array([[1, 2], [3, 4], [1, 2], [1, 5], [1, 2]], np.uint64)
    place = np.array([[1, 0], [0, 0], [0, 7], [0, 1], [2, 0]])
    assert sorted(repeated(digest, place).tolist()) == [0, 4]
    assert len(repeated(digest[:0], place[:0])) == 0


@pytest.mark.parametrize("position", [0.0, 0.3, 0.8, 0.95, 1.0])
def test_a_small_edit_anywhere_leaves_a_near_duplicate(rng, position):
    tokens = document(rng)
    at = int(position * len(tokens))
    assert is_near(tokens, np.concatenate([tokens[:at], document(rng, 3), tokens[at:]]), WIDTH)
    assert is_near(np.delete(tokens, slice(at, at + 3)), tokens, WIDTH)


def test_several_edits_leave_a_near_duplicate(rng):
    tokens = document(rng)
    other = tokens.copy()
    other[[20, 120, 240]] = 1
    assert is_near(tokens, other, WIDTH)


@pytest.mark.parametrize("body", [20, 60, 200])
def test_a_common_header_makes_no_duplicate(rng, body):
    """Not even if it is nearly the whole document."""
    header, footer = document(rng, 600), document(rng, 50)
    a, b = (np.concatenate([header, document(rng, body), footer]) for _ in range(2))
    assert not is_near(a, b, WIDTH)


def test_other_documents_are_not_near(rng):
    assert not is_near(document(rng), document(rng), WIDTH)
    assert not is_near(document(rng), document(rng, 0), WIDTH)
    words = [document(rng, 5) for _ in range(8)]
    a, b = (np.concatenate([words[i] for i in rng.integers(0, 8, 60)]) for _ in range(2))
    assert not is_near(a, b, width=20), "texts of the same few words"


def test_of_each_group_the_first_is_kept(rng):
    """Even where the lists of neighbours do not link each member with the first."""
    docs = [document(rng) for _ in range(3)]
    order = [0, 1, 0, 1, 0, 2]
    tokens = Ragged.of([docs[i] for i in order], np.uint16)
    ids = np.array([[2], [3], [4], [1], [2], [0]])
    cosines = np.array([[1], [1], [1], [1], [1], [0.96]])
    assert near_duplicates(ids, cosines, tokens, WIDTH) == {2: 0, 4: 0, 3: 1}
    below = np.full_like(cosines, 0.5, dtype=float)
    assert near_duplicates(ids, below, tokens, WIDTH) == {}
    assert near_duplicates(np.full((6, 1), -1), cosines, tokens, WIDTH) == {}


def texts(number, seed):
    """Returns documents of 160 words, each of a topic that others share."""
    rng = random.Random(seed)
    words = [f"{rng.choice('bcdfglmnprst')}{rng.choice('aeiou')}{i}" for i in range(800)]
    topics = [words[i * 40 : i * 40 + 80] for i in range(18)]
    return [" ".join(rng.choices(topics[i % 18], k=160)) for i in range(number)]


def copies(text, number, seed):
    """Returns a text and copies of it with a changed word or a suffix."""
    rng = random.Random(seed)
    made = [text]
    for i in range(1, number):
        words = text.split()
        words[rng.randrange(len(words))] = f"edit{i}"
        made.append(" ".join(words) + f" copy {i}")
    return made


FLAGS = [*SETTINGS, "--config.data.embedding_dim=32", "--config.data.num_neighbors=10"]


def test_five_copies_of_each_document(tmp_path):
    originals = texts(200, seed=0)
    records = [
        {"text": copy, "domain": "d", "source": f"s{i}"}
        for i, text in enumerate(originals)
        for copy in copies(text, 5, seed=i)
    ]
    random.Random(1).shuffle(records)
    source = write_records(tmp_path / "corpus.jsonl", records)
    prepare_here(source, tmp_path / "data", *FLAGS, "--workers=1")
    data = PreparedData.open(tmp_path / "data")
    kept = data.manifest.counts["train"]["domains"]["d"]["documents"]
    held_out = sum(
        data.manifest.counts[split]["domains"]["d"]["documents"] for split in ("validation", "test")
    )
    training_originals = (len(records) - held_out) // 5
    # At most one pair of consecutive documents in a hundred may be copies of each other.
    assert training_originals <= kept <= 1.01 * training_originals
    dropped = [line for line in read_drop_lists(tmp_path / "data") if "of" in line]
    assert len(dropped) == data.manifest.dropped["near duplicate"] == len(records) - held_out - kept
    assert all(line["reason"] == "near duplicate" for line in dropped)


def test_files_under_one_licence_header_are_kept(tmp_path):
    header = " ".join(texts(8, seed=9))
    records = [
        {"text": f"{header}\n\n{text}", "domain": "d", "source": f"s{i}"}
        for i, text in enumerate(texts(120, seed=0))
    ]
    source = write_records(tmp_path / "corpus.jsonl", records)
    prepare_here(source, tmp_path / "data", *FLAGS, "--workers=1")
    assert PreparedData.open(tmp_path / "data").manifest.dropped == {}


def test_near_duplicates_can_be_kept(tmp_path):
    records = [
        {"text": copy, "domain": "d", "source": f"s{i}"}
        for i, text in enumerate(texts(40, seed=0))
        for copy in copies(text, 2, seed=i)
    ]
    source = write_records(tmp_path / "corpus.jsonl", records)
    flag = "--config.data.drop_near_duplicates=false"
    prepare_here(source, tmp_path / "data", *FLAGS, flag, "--workers=1")
    assert PreparedData.open(tmp_path / "data").manifest.dropped == {}
