import os
import subprocess
import sys

import numpy as np
import pytest

from lory_jax.errors import InputError
from lory_jax.preparation.embedding.lsa import FIT_SAMPLE, Embedder
from tests.support.tiny import ROOT

TOPICS = {
    "ocean": "wave tide salt reef coral shark whale current harbour anchor",
    "kitchen": "flour butter oven simmer garlic onion pepper knife recipe saucepan",
    "parser": "token lexer grammar syntaxTree parse_node emit shift reduce state_table",
    "music": "violin tempo chord sonata melody octave rhythm cello fugue overture",
}


def make_texts(num_docs, topics=tuple(TOPICS)):
    rng = np.random.default_rng(0)
    topic_N = rng.integers(0, len(topics), num_docs)
    words = [TOPICS[topic].split() for topic in topics]
    texts = [" ".join(rng.choice(words[topic], 12)) + " the of and to in" for topic in topic_N]
    return texts, topic_N


def check_unit_rows(vectors_NxD, num_docs, dim):
    assert vectors_NxD.shape == (num_docs, dim)
    assert vectors_NxD.dtype == np.float32
    assert np.isfinite(vectors_NxD).all()
    np.testing.assert_allclose(np.linalg.norm(vectors_NxD, axis=1), 1, atol=1e-5)


def test_nearest_documents_share_the_topic():
    texts, topics = make_texts(400)
    vectors_NxD = Embedder.fit(texts, dim=16, seed=0).embed(texts)
    check_unit_rows(vectors_NxD, 400, 16)
    cosines_NxN = vectors_NxD @ vectors_NxD.T
    np.fill_diagonal(cosines_NxN, -np.inf)
    assert np.mean(topics[cosines_NxN.argmax(axis=1)] == topics) > 0.99


def test_equals_dense_latent_semantic_analysis_at_full_rank():
    # With as many dimensions as documents the projection keeps every dot product of the sample.
    texts, _ = make_texts(12, topics=("ocean", "music"))
    tokens = [text.split() for text in texts]
    texts.append("a_b aB a-b 42 ==>\n    indentedWord")
    tokens.append(["a", "b", "a", "B", "a", "-", "b", "42", "==>", "\n    ", "indented", "Word"])
    vectors_NxD = Embedder.fit(texts, dim=40, seed=0).embed(texts)
    vocabulary = sorted({token for doc in tokens for token in doc})
    weights = np.zeros((len(texts), len(vocabulary)))
    for row, doc in enumerate(tokens):
        for column, token in enumerate(vocabulary):
            frequency = sum(token in other for other in tokens)
            if count := doc.count(token):
                idf = 1 + np.log((1 + len(texts)) / (1 + frequency))
                weights[row, column] = (1 + np.log(count)) * idf
    weights /= np.linalg.norm(weights, axis=1, keepdims=True)
    np.testing.assert_allclose(vectors_NxD @ vectors_NxD.T, weights @ weights.T, atol=2e-5)


def test_documents_without_a_known_token_get_the_last_axis():
    texts, _ = make_texts(100)
    embedder = Embedder.fit(texts, dim=8, seed=0)
    vectors_NxD = embedder.embed(["", "   ", "zyxwv", "漢字 ελληνικά", texts[0]])
    check_unit_rows(vectors_NxD, 5, 8)
    np.testing.assert_array_equal(vectors_NxD[:4], np.tile(np.eye(8, dtype=np.float32)[-1], (4, 1)))
    assert abs(vectors_NxD[4] @ vectors_NxD[0]) < 0.5


@pytest.mark.parametrize("texts", [["one"], ["", ""], ["same text"] * 30, ["a b", "a c", "b c"]])
def test_fewer_documents_or_a_lower_rank_than_dimensions(texts):
    embedder = Embedder.fit(texts, dim=16, seed=0)
    check_unit_rows(embedder.embed(texts), len(texts), 16)
    check_unit_rows(embedder.embed(["quite another"]), 1, 16)
    check_unit_rows(embedder.embed([]), 0, 16)


def test_letters_beyond_ascii_count():
    texts = ["ελληνικά κείμενο", "ελληνικά γράμματα", "русский текст", "русский язык"]
    vectors_NxD = Embedder.fit(texts, dim=4, seed=0).embed(texts)
    assert vectors_NxD[0] @ vectors_NxD[1] > 0.2 > abs(vectors_NxD[0] @ vectors_NxD[2])


def test_no_documents_raise():
    with pytest.raises(InputError, match="0 documents"):
        Embedder.fit([], dim=4, seed=0)


def test_fits_on_a_sample_drawn_by_the_seed():
    texts = [f"word{i % 977} number {i % 89}" for i in range(FIT_SAMPLE + 500)]
    first, again, other = (Embedder.fit(texts, dim=4, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.projection_VxD, again.projection_VxD)
    assert not np.array_equal(first.idf_V, other.idf_V)


def test_a_vector_does_not_depend_on_the_other_documents_of_the_call():
    texts, _ = make_texts(60)
    embedder = Embedder.fit(texts, dim=8, seed=0)
    np.testing.assert_array_equal(embedder.embed(texts)[17:19], embedder.embed(texts[17:19]))


DIGEST = """
import hashlib
from tests.preparation.test_embedding import Embedder, make_texts
texts, _ = make_texts(3_000)
print(hashlib.sha256(Embedder.fit(texts, dim=32, seed=0).embed(texts).tobytes()).hexdigest())
"""


def test_bits_do_not_depend_on_process_threads_or_hash_seed():
    digests = set()
    for threads, hash_seed in (("1", "0"), ("2", "1"), ("4", "2")):
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": threads,
            "OPENBLAS_NUM_THREADS": threads,
            "PYTHONHASHSEED": hash_seed,
        }
        command = [sys.executable, "-c", DIGEST]
        result = subprocess.run(
            command, capture_output=True, text=True, check=True, env=environment
        )
        digests.add(result.stdout)
    assert len(digests) == 1
    assert len(digests.pop().strip()) == 64
