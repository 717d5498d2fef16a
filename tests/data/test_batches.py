import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lory_jax.data.prepared import PreparedData
from tests.support.numbered import INSTANCES, LENGTH, write_numbered


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return PreparedData.open(write_numbered(tmp_path_factory.mktemp("prepared") / "data"))


def batches(prepared, batch=4, seed=0, index=0, count=1):
    return prepared.training_batches(
        sequence_length=LENGTH,
        vocab_size=400,
        global_batch_size=batch,
        seed=seed,
        process_index=index,
        process_count=count,
    )


def first_rows(data, start, steps):
    """Returns the instance numbers of the batches of some steps."""
    found = list(itertools.islice(data.iterate(start), steps))
    assert all(batch.dtype == np.int32 and batch.shape[1] == LENGTH + 1 for batch in found)
    return [batch[:, 0].tolist() for batch in found]


@given(st.integers(0, 2**40), st.integers(0, 30))
@settings(deadline=None, max_examples=15)
def test_any_number_of_processes_sees_the_same_global_batches(prepared, seed, start):
    expected = [batches(prepared, seed=seed).record_ids(start + s).tolist() for s in range(3)]
    for count in (1, 2, 4):
        parts = [
            first_rows(batches(prepared, seed=seed, index=index, count=count), start, 3)
            for index in range(count)
        ]
        joined = [[row for part in parts for row in part[s]] for s in range(3)]
        assert joined == expected


def test_starting_later_equals_continuing(prepared):
    data = batches(prepared)
    whole = first_rows(data, 0, 20)
    for start in (1, 5, 6, 17):
        assert first_rows(data, start, 20 - start) == whole[start:]
        assert first_rows(batches(prepared), start, 1) == whole[start : start + 1]


@given(st.integers(0, 1000), st.sampled_from([1, 4, 5, INSTANCES]))
@settings(deadline=None, max_examples=20)
def test_every_epoch_holds_every_record_once_in_another_order(prepared, seed, batch):
    data = batches(prepared, batch=batch, seed=seed)
    stream = np.concatenate([data.record_ids(s) for s in range(-(-3 * INSTANCES // batch))])
    epochs = stream[: 3 * INSTANCES].reshape(3, INSTANCES)
    assert (np.sort(epochs, axis=1) == np.arange(INSTANCES)).all()
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_seeds_differ(prepared):
    assert batches(prepared, seed=0).record_ids(0).tolist() != (
        batches(prepared, seed=1).record_ids(0).tolist()
    )


def test_the_order_of_instances_never_changes(prepared):
    """A run that resumes with a later version must see the instances it has not seen yet."""
    data = batches(prepared)
    expected = [[18, 8, 16, 7], [4, 5, 22, 6], [20, 4, 13, 0], [7, 9, 2, 21]]
    assert [data.record_ids(step).tolist() for step in (0, 5, 6, 1000)] == expected
