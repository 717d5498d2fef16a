"""Splitting by origin: nothing of one origin on two sides, stable, near the asked-for shares."""

import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lory_jax.errors import InputError
from lory_jax.preparation.documents import Document
from lory_jax.preparation.split import split_by_origin

FRACTIONS = {"validation_fraction": 0.05, "test_fraction": 0.1, "seed": 3}


def split(documents, **changes):
    return split_by_origin(documents, **{**FRACTIONS, **changes})


def corpus(origins_of_domain, size=100):
    """`origins_of_domain` origins in each of the domains a and b, of a few documents each."""
    return [
        Document(f"{domain} {origin} {i} ".ljust(size, "x"), domain, f"{domain}/{origin}")
        for domain in "ab"
        for origin in range(origins_of_domain)
        for i in range(1 + origin % 3)
    ]


@st.composite
def corpora(draw):
    """Documents of up to three domains whose origins may span domains."""
    own = [
        Document(f"{domain}{origin}{i}" * draw(st.integers(1, 40)), domain, f"{domain}/{origin}")
        for domain in draw(st.sets(st.sampled_from("abc"), min_size=1))
        for origin in range(draw(st.integers(6, 20)))
        for i in range(draw(st.integers(1, 3)))
    ]
    shared = [
        Document(f"{document.text}!", document.domain, f"shared/{draw(st.integers(0, 3))}")
        for document in own
        if draw(st.integers(0, 5)) == 0
    ]
    return draw(st.permutations(own + shared))


@settings(max_examples=100, deadline=None)
@given(corpora(), st.integers(0, 5))
def test_every_document_is_on_one_side_with_its_origin(documents, seed):
    sides = split(documents, seed=seed)
    assert Counter(d for side in sides.values() for d in side) == Counter(documents)
    origins = [{document.origin for document in side} for side in sides.values()]
    assert sum(map(len, origins)) == len(set().union(*origins))
    for side in sides.values():
        assert {document.domain for document in side} == {d.domain for d in documents}
        positions = [documents.index(document) for document in side]
        assert positions == sorted(positions)


@settings(max_examples=50, deadline=None)
@given(st.randoms(use_true_random=False))
def test_the_order_of_the_documents_does_not_matter(random):
    documents = corpus(30)
    shuffled = random.sample(documents, len(documents))
    for side, members in split(documents).items():
        assert set(members) == set(split(shuffled)[side])


def test_shares_are_near_the_asked_for_ones():
    documents = corpus(400)
    sides = split(documents)
    for domain in "ab":
        total = sum(d.domain == domain for d in documents)
        for side, share in (("validation", 0.05), ("test", 0.1)):
            found = sum(d.domain == domain for d in sides[side]) / total
            assert share <= found < 1.5 * share


def test_a_grown_corpus_keeps_nearly_every_origin_on_its_side():
    small = corpus(300)
    grown = [*small, *(Document("new " * 20, "a", f"new/{i}") for i in range(15))]
    before = {d.origin: side for side, members in split(small).items() for d in members}
    after = {d.origin: side for side, members in split(grown).items() for d in members}
    moved = sum(before[origin] != after[origin] for origin in before)
    assert moved <= 0.02 * len(before)


def test_another_seed_splits_otherwise():
    documents = corpus(100)
    assert set(split(documents)["test"]) != set(split(documents, seed=4)["test"])


def test_no_validation_if_none_is_asked_for():
    sides = split(corpus(20), validation_fraction=0.0)
    assert not sides["validation"] and sides["test"]


def test_three_big_origins_give_one_to_each_side():
    documents = [Document("text " * size, "a", f"o{size}") for size in (10, 20, 70)]
    sides = split(documents)
    assert [len(sides[side]) for side in ("train", "validation", "test")] == [1, 1, 1]
    assert sides["train"][0].origin == "o70"


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_origins_name_the_domain(count):
    documents = [*corpus(10), *(Document("some text", "tiny", f"t{i}") for i in range(count))]
    with pytest.raises(InputError, match=f"'tiny': has {count} origins, .* 3 "):
        split(documents)


def test_origins_used_up_by_other_domains_are_named():
    # The smallest origins of a and b, which go to test, are two of the three that c has.
    documents = [Document("big " * 500, domain, f"{domain}{i}") for domain in "ab" for i in "123"]
    documents += [Document("small", domain, f"c{domain}") for domain in "ab"]
    documents += [Document(f"c {i}", "c", f"c{i}") for i in "abc"]
    with pytest.raises(InputError, match="'c': shares its origins with other domains"):
        split(documents)


def test_confirmation_takes_its_origins_from_training_alone():
    documents = corpus(100)
    before, after = split(documents), split(documents, confirmation_fraction=0.08)
    assert "confirmation" not in before
    assert [before[side] == after[side] for side in ("validation", "test")] == [True, True]
    assert Counter(before["train"]) == Counter(after["train"] + after["confirmation"])
    assert not {d.origin for d in after["train"]} & {d.origin for d in after["confirmation"]}
    for domain in "ab":
        share = sum(d.domain == domain for d in after["confirmation"]) / 200
        assert 0.08 <= share < 0.12


def test_confirmation_requires_one_origin_more():
    documents = [Document("text " * size, "a", f"o{size}") for size in (10, 20, 70)]
    with pytest.raises(InputError, match=r"'a': has 3 origins, .* 4 "):
        split(documents, confirmation_fraction=0.01)


def test_the_time_does_not_grow_with_domains_times_documents():
    def seconds(domains):
        rows = [Document("x" * 100, f"d{i % domains}", f"s{i}") for i in range(12_000)]
        started = time.process_time()
        split_by_origin(rows, validation_fraction=0.04, test_fraction=0.06, seed=0)
        return time.process_time() - started

    assert seconds(2000) < 4 * seconds(4) + 0.2
