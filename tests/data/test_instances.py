import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lory_jax.data.instances import read_instances, token_dtype
from lory_jax.errors import InputError
from lory_jax.preparation.packing import (
    TokenizedDocuments,
    count_instances,
    cut_instances,
    same_domain_rate,
    tokenize,
    write_shards,
)
from lory_jax.preparation.tokenizer_training import train_tokenizer

DOCUMENTS = st.lists(st.lists(st.integers(2, 99), max_size=12), max_size=20)


def as_tokenized(documents):
    tokens = [token for document in documents for token in [0, *document, 1]]
    starts = np.cumsum([0] + [len(document) + 2 for document in documents])
    return TokenizedDocuments(np.array(tokens, np.uint16), starts.astype(np.int64))


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


@given(DOCUMENTS, st.integers(1, 15), st.data())
@settings(deadline=None, max_examples=300)
def test_same_domain_rate_equals_a_loop(documents, length, data):
    domains = [data.draw(st.sampled_from("xyz")) for _ in documents]
    lengths = as_tokenized(documents).lengths_N
    expected = domain_pairs_by_loop(documents, domains, length)
    found = same_domain_rate(lengths, np.array(domains, dtype=object), length)
    assert found == (expected if expected is None else pytest.approx(expected))


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


@pytest.mark.parametrize(
    ("vocab_size", "name"), [(300, "<u2"), (65_536, "<u2"), (65_537, "<u4"), (200_000, "<u4")]
)
def test_token_type(vocab_size, name):
    assert token_dtype(vocab_size) == np.dtype(name)


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_shards_hold_the_instances_in_order(tmp_path, dtype):
    instances = np.random.default_rng(0).integers(0, 60_000, (10, 9)).astype(dtype)
    paths = write_shards(tmp_path / "train", instances, per_shard=4)
    assert [path.name for path in paths] == [
        f"part-0000{i}-of-00003.array_record" for i in range(3)
    ]
    read = read_instances(tmp_path / "train", 8, np.dtype(dtype))
    assert read.dtype == np.int32 and np.array_equal(read, instances)


def test_shards_are_the_same_bytes_every_time(tmp_path):
    instances = np.random.default_rng(0).integers(0, 999, (10, 9)).astype("<u2")
    first = write_shards(tmp_path / "a", instances, per_shard=4)
    second = write_shards(tmp_path / "b", instances, per_shard=4)
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]


def test_faults_in_shards_name_the_file(tmp_path):
    instances = np.random.default_rng(0).integers(0, 999, (2000, 65)).astype("<u2")
    paths = write_shards(tmp_path / "train", instances, per_shard=1000)
    with pytest.raises(InputError, match="a record holds 130 bytes, takes 66"):
        read_instances(tmp_path / "train", 32, np.dtype("<u2"))
    whole = paths[1].read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:-7], b"", whole[:5000] + b"!" + whole[5001:]):
        paths[1].write_bytes(damaged)
        with pytest.raises(InputError, match=r"part-00001-of-00002.*truncated or damaged"):
            read_instances(tmp_path / "train", 64, np.dtype("<u2"))
    paths[1].unlink()
    with pytest.raises(InputError, match="found 1 shards of 00002"):
        read_instances(tmp_path / "train", 64, np.dtype("<u2"))
    with pytest.raises(InputError, match="holds no part"):
        read_instances(tmp_path / "nothing", 64, np.dtype("<u2"))
