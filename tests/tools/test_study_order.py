"""An order that one machine prepared, restored on one that prepared another."""

import json

import numpy as np
import pytest

from lory_jax.data.prepared import PreparedData
from lory_jax.errors import InputError
from tests.support.corpora import SETTINGS as COMMON
from tests.support.corpora import prepare_here, write_corpus
from tools.study.order import use_kept_order
from tools.study.results import training_digest

SETTINGS = [*COMMON, "--config.data.max_document_bytes=3000"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """One file of documents, a few of them twice, and a long one, which `prepare` cuts."""
    directory = write_corpus(tmp_path_factory.mktemp("corpus") / "c", documents=240, files=1)
    path = directory / "part-0.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    texts = [json.loads(line)["text"] for line in lines]
    long = {"text": "\n\n".join(sorted(texts)), "domain": "domain0", "source": "long"}
    path.write_text("".join([json.dumps(long) + "\n", *lines, *lines[:5]]))
    return path


def test_another_machine_trains_on_the_order_that_was_kept(corpus, tmp_path):
    """Two orders of one corpus stand for two machines."""
    first, second, kept = tmp_path / "first", tmp_path / "second", tmp_path / "kept.npz"
    prepare_here(corpus, first, *SETTINGS)
    prepare_here(corpus, second, *SETTINGS, "--order=random")
    manifest = (first / "manifest.json").read_bytes()
    use_kept_order(first, corpus, kept)
    assert (first / "manifest.json").read_bytes() == manifest and kept.is_file()
    assert training_digest(first) != training_digest(second)

    use_kept_order(second, corpus, kept)
    a, b = PreparedData.open(first), PreparedData.open(second)
    assert training_digest(first) == training_digest(second)
    b.manifest.verify(second, hashes=True)
    for split in ("train", "validation", "test"):
        assert a.manifest.counts[split] == b.manifest.counts[split]
    for x, y in zip(a.training_domains(), b.training_domains(), strict=True):
        np.testing.assert_array_equal(x, y)
    use_kept_order(second, corpus, kept)  # nothing is left to do


def test_another_corpus_is_refused(corpus, tmp_path):
    data, kept, other = tmp_path / "data", tmp_path / "kept.npz", tmp_path / "other.jsonl"
    prepare_here(corpus, data, *SETTINGS)
    use_kept_order(data, corpus, kept)
    other.write_text(corpus.read_text() + json.dumps({"text": "one more"}) + "\n")
    again = tmp_path / "again"
    prepare_here(corpus, again, *SETTINGS, "--order=random")
    with pytest.raises(InputError, match=r"other\.jsonl: is not the corpus"):
        use_kept_order(again, other, kept)
