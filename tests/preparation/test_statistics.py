import itertools
import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lory_jax.data.manifest import Manifest
from lory_jax.preparation.documents import Document
from lory_jax.preparation.statistics import (
    corpus_table,
    joined_figures,
    order_figures,
    preparation_summary,
    same_domain_rate,
    split_counts,
)
from tests.support.packed import DOCUMENTS, as_tokenized


def domain_pairs_by_loop(documents, domains, length):
    """Walks over every instance and collects the neighbouring documents it shows."""
    owners = [i for i, document in enumerate(documents) for _ in range(len(document) + 2)]
    same = pairs = 0
    for start in range(0, len(owners) - length, length):
        instance = owners[start : start + length + 1]
        for a, b in itertools.pairwise(instance):
            if a != b:
                pairs += 1
                same += domains[a] == domains[b]
    return same / pairs if pairs else None


@given(DOCUMENTS, st.integers(1, 15), st.data())
@settings(deadline=None, max_examples=300)
def test_same_domain_rate_equals_a_loop(documents, length, data):
    domains = [data.draw(st.sampled_from("xyz")) for _ in documents]
    lengths = as_tokenized(documents).lengths_N
    expected = domain_pairs_by_loop(documents, domains, length)
    found = same_domain_rate(lengths, np.array(domains, dtype=object), length)
    assert found == (expected if expected is None else pytest.approx(expected))


def documents_of(*fields):
    return [Document(text, domain, origin) for text, domain, origin in fields]


def test_the_table_counts_per_domain():
    documents = documents_of(*(("x" * size, "x", str(size % 2)) for size in (10, 20, 33)))
    header, row, note = corpus_table(documents).splitlines()
    assert header.split() == ["domain", "documents", "origins", "bytes", "median", "bytes"]
    assert row.split() == ["x", "3", "2", "63", "20"]
    assert "0 of 1 domains" in note
    big = documents_of(("y" * 1_000_000, "y", "a"))
    assert len(corpus_table(big).splitlines()) == 2  # no note


def instances_by_loop(num_tokens, length):
    """How often L + 1 tokens can be taken if the last one is used again."""
    count = 0
    while num_tokens > length:
        num_tokens -= length
        count += 1
    return count


@given(DOCUMENTS, st.integers(1, 15), st.booleans(), st.data())
@settings(deadline=None, max_examples=200)
def test_counts_equal_a_loop(tokens, length, by_domain, data):
    domains = [data.draw(st.sampled_from("xyz")) for _ in tokens]
    expected: dict = {}
    for document, domain in zip(tokens, domains, strict=True):
        found = expected.setdefault(domain, {"documents": 0, "tokens": 0, "bytes": 0})
        found["documents"] += 1
        found["tokens"] += len(document) + 2
        found["bytes"] += 2 * len(document)
    given_counts = {domain: dict(found) for domain, found in expected.items()}
    streams = [sum(found["tokens"] for found in expected.values())]
    if by_domain:
        streams = [found["tokens"] for found in expected.values()]
        for found in expected.values():
            found["instances"] = instances_by_loop(found["tokens"], length)
    halves = [[len(document) + 2 for document in tokens[i::2]] for i in range(2)]
    histograms = [[list(Counter(half)), list(Counter(half).values())] for half in halves]
    counts = split_counts(given_counts, histograms, streams, length, by_domain=by_domain)
    assert counts["domains"] == expected
    assert counts["instances"] == sum(instances_by_loop(n, length) for n in streams)
    assert counts["dropped_tokens"] == sum(
        max(n - 1 - instances_by_loop(n, length) * length, 0) for n in streams
    )
    lengths = sorted(len(document) + 2 for document in tokens)
    middle = lengths[(len(lengths) - 1) // 2 : len(lengths) // 2 + 1]
    assert counts["median_document_tokens"] == (sum(middle) / len(middle) if middle else 0)
    json.dumps(counts)  # plain numbers


def test_similarity_of_an_order():
    domains = np.array([0, 1, 0])
    vectors = np.array([[1, 0], [0, 1], [0.6, 0.8]], np.float32)
    lengths, order = np.array([3, 3, 3]), np.array([0, 2, 1])
    figures = order_figures(domains, vectors, lengths, order, 8)
    assert joined_figures([figures]) == {"mean_cosine": 0.7, "same_domain_rate": 0.5}
    no_borders = order_figures(domains, vectors, lengths, order, 20)
    assert joined_figures([no_borders]) == {"mean_cosine": 0.7, "same_domain_rate": None}
    pair = order_figures(domains[:2], vectors[:2], lengths[:2], np.array([0, 1]), 5)
    # Three pairs of cosines 0.6, 0.8 and 0; three borders, one inside a domain.
    assert joined_figures([figures, pair]) == {"mean_cosine": 0.4667, "same_domain_rate": 0.3333}


def test_the_summary_has_every_domain_and_order():
    domain = {"documents": 4, "tokens": 100, "bytes": 350}
    counts = {
        "train": {
            "instances": 2,
            "median_document_tokens": 25.5,
            "domains": {"x": domain, "y": domain},
        },
        "validation": {"instances": 1, "domains": {"x": domain | {"instances": 1}}},
    }
    similarity = {"method": "none", "random": {"mean_cosine": 0.25, "same_domain_rate": None}}
    lines = preparation_summary(Manifest({}, 50, 300, counts, similarity, {})).splitlines()
    assert [line.split()[0] for line in lines] == [
        *("tokens", "x", "y", "instances", "train:", "random")
    ]
    assert lines[1].split() == ["x", "100", "100", "3.50", "bytes/token"]
    assert lines[2].split() == ["y", "100", "0", "3.50", "bytes/token"]
    assert "4.0 documents per instance of 50 tokens" in lines[4] and "25.5" in lines[4]
    assert "0.25" in lines[5]
