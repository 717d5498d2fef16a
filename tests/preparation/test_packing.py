from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lory_jax.preparation.packing import (
    count_instances,
    cut_instances,
    instance_domains,
    instance_origins,
    tokenize,
    write_shards,
)
from lory_jax.preparation.tokenizer_training import train_tokenizer
from tests.support.packed import DOCUMENTS, as_tokenized


def packed_by_loop(documents, order, length):
    """Fills one instance at a time, token by token."""
    instances, current = [], []
    for i in order:
        for token in [0, *documents[i], 1]:
            current.append(token)
            if len(current) == length + 1:
                instances.append(current)
                current = [token]
    return instances


@given(DOCUMENTS, st.integers(1, 15), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=300)
def test_packing_equals_a_loop(documents, length, random):
    order = list(range(len(documents)))
    random.shuffle(order)
    tokenized = as_tokenized(documents)
    stream = tokenized.stream(np.array(order, np.int64))
    instances = cut_instances(stream, length)
    assert instances.tolist() == packed_by_loop(documents, order, length)
    assert len(instances) == count_instances(len(stream), length)
    # Every token but the first is a target once, up to the dropped remainder.
    assert instances[:, 1:].ravel().tolist() == stream[1 : 1 + len(instances) * length].tolist()
    assert len(stream) - 1 - instances[:, 1:].size < length


def test_a_document_is_bos_tokens_eos():
    texts = ["hello world", "x", "<s>"]
    tokenizer = train_tokenizer(texts, 300)
    tokenized = tokenize(texts, tokenizer, "tokenizing")
    assert tokenized.tokens_T.dtype == np.uint16
    for i, text in enumerate(texts):
        ids = tokenized.stream(np.array([i])).tolist()
        assert ids == [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
    assert tokenized.lengths_N.sum() == len(tokenized.tokens_T)
    assert len(tokenize([], tokenizer, "nothing").tokens_T) == 0


def test_shards_are_the_same_bytes_every_time(tmp_path):
    instances = np.random.default_rng(0).integers(0, 999, (10, 9)).astype("<u2")
    first = write_shards(tmp_path / "a", instances, per_shard=4)
    second = write_shards(tmp_path / "b", instances, per_shard=4)
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]


def test_the_origin_of_an_instance_holds_most_of_its_targets():
    lengths = [5, 4, 9, 3, 2]
    origins = ["b", "a", "b", "c", "a"]
    of_tokens = [o for o, n in zip(origins, lengths, strict=True) for _ in range(n)][1:]
    got = instance_origins(np.array(lengths), origins, 4)
    assert len(got) == 5
    for i, origin in enumerate(got):
        counts = {o: of_tokens[4 * i : 4 * i + 4].count(o) for o in "abc"}
        assert counts[origin] == max(counts.values())


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(2, 30), st.integers(0, 3)), max_size=20), st.integers(1, 20))
def test_the_domain_of_an_instance_is_that_of_most_of_its_targets(documents, sequence_length):
    stream = [domain for length, domain in documents for _ in range(length)]
    targets = stream[1:]
    found = instance_domains(
        np.array([length for length, _ in documents]),
        np.array([domain for _, domain in documents]),
        sequence_length,
    )
    expected = []
    for start in range(0, len(targets) - sequence_length + 1, sequence_length):
        counts = Counter(targets[start : start + sequence_length])
        expected.append(min(counts, key=lambda domain: (-counts[domain], domain)))
    assert found.dtype == np.uint16 and found.tolist() == expected
