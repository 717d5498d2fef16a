import numpy as np

from lory_jax.data.prepared import PreparedData
from tests.support.tiny import SEQUENCE_LENGTH, write_prepared
from tools.study.audit import SHINGLE, audit, overlaps, training_shingles


def test_overlaps_equal_sets_of_shingles():
    rng = np.random.default_rng(0)
    train, held_out = rng.integers(0, 5, (20, 60)), rng.integers(0, 5, (6, 60))
    held_out[0] = train[3]  # a duplicate
    held_out[1, :30] = train[4, 30:]  # half of one
    held_out[2] = np.where(np.arange(60) % 10 == 0, 9, train[5])  # no 13 tokens in a row

    def shingles(row):
        return [tuple(row[i : i + SHINGLE]) for i in range(len(row) - SHINGLE + 1)]

    known = {shingle for row in train for shingle in shingles(row)}
    expected = [np.mean([s in known for s in shingles(row)]) for row in held_out]
    got = overlaps(held_out, training_shingles(train))
    np.testing.assert_allclose(got, expected)
    assert got[0] == 1 and got[2] == 0 and 0.3 < got[1] < 0.5


def test_permuted_tokens_are_another_shingle():
    row = np.arange(SHINGLE)[None]
    assert overlaps(row[:, ::-1], training_shingles(row))[0] == 0


def test_audit_covers_every_held_out_instance(tmp_path):
    data = PreparedData.open(write_prepared(tmp_path / "data"))
    found = audit(data)
    assert set(found["overlap"]) == {"validation", "test"}
    for domains in found["overlap"].values():
        for shares in domains.values():
            assert len(shares) == 3 and SEQUENCE_LENGTH + 1 > SHINGLE
            # These documents count in steps: nearly every start was seen in training.
            assert max(shares) > 0.5
