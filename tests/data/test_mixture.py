"""Mixtures: shares, schedules, which instances are drawn; several directories joined."""

import itertools
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lory_jax.data.manifest import MANIFEST_NAME
from lory_jax.data.mixture import LONGEST_CYCLE, is_mixture, parse_mixture, whole_shares
from lory_jax.data.prepared import PreparedData, split_directories
from lory_jax.data.schedule import Schedule
from lory_jax.errors import ConfigError, InputError
from tests.support.numbered import INSTANCES, LENGTH, write_numbered

BY_NUMBER = ["web", "books", "web", "code", "web"] * 5  # more than there are instances
DOMAIN_OF = dict(enumerate(BY_NUMBER[:INSTANCES]))
SIZES = Counter(DOMAIN_OF.values())


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("mixture") / "data"
    return write_numbered(path, domains=BY_NUMBER[:INSTANCES])


def batches(directory, mixture="", batch=4, seed=0, index=0, count=1):
    return PreparedData.open(directory).training_batches(
        sequence_length=LENGTH,
        vocab_size=400,
        global_batch_size=batch,
        seed=seed,
        process_index=index,
        process_count=count,
        mixture=mixture,
    )


def rows(data, start, steps):
    return [batch[:, 0].tolist() for batch in itertools.islice(data.iterate(start), steps)]


# ---------------------------------------------------------------- shares


def test_weights_become_shares():
    assert parse_mixture("web=3, a b=1,no=0") == {"a b": Fraction(1, 4), "web": Fraction(3, 4)}
    assert parse_mixture("b=.1,a=.3") == parse_mixture("a=3,b=1") == parse_mixture("a=3e5,b=1e5")
    assert parse_mixture("x=y=1") == {"x=y": Fraction(1)}


@pytest.mark.parametrize(
    "text", ["web", "web=", "=1", "web=-1", "web=x", "web=1,web=2", "web=1,", "web=0", "web=nan", 3]
)
def test_other_forms_are_refused(text):
    assert not is_mixture(text)
    if isinstance(text, str):
        with pytest.raises(ConfigError, match=r"config\.data\.mixture"):
            parse_mixture(text)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.decimals("0.001", 1000, places=3), min_size=1, max_size=6))
def test_a_cycle_has_the_shares(weights):
    shares = parse_mixture(",".join(f"d{i}={weight}" for i, weight in enumerate(weights)))
    try:
        counts = whole_shares(shares)
    except ConfigError:
        assert min(shares.values()) < Fraction(1, LONGEST_CYCLE)
        return
    total = sum(counts.values())
    assert total <= LONGEST_CYCLE
    for name, share in shares.items():
        off = abs(Fraction(counts[name], total) - share)
        assert off == 0 or (total == LONGEST_CYCLE and off < Fraction(1, LONGEST_CYCLE))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=5), st.integers(0, 50))
def test_a_schedule_gives_each_domain_its_instances_in_order(counts, start):
    schedule = Schedule(counts)
    total = sum(counts)
    drawn = [schedule.at(position) for position in range(3 * total + start)]
    for domain, count in enumerate(counts):
        keys = [key for d, key in drawn if d == domain]
        assert keys == list(range(len(keys)))
        window = [d for d, _ in drawn[start : start + 2 * total]]
        assert window.count(domain) == 2 * count
        for size in (1, 3, total):  # any stretch has its share, to within one or two instances
            assert abs(window[:size].count(domain) - size * count / total) <= len(counts)


# ---------------------------------------------------------------- batches

WEIGHTS = st.fixed_dictionaries(
    {name: st.integers(0, 9) for name in ("books", "code", "web")}
).filter(lambda weights: any(weights.values()))


@settings(max_examples=15, deadline=None)
@given(WEIGHTS, st.integers(0, 2**40), st.integers(0, 30))
def test_any_number_of_processes_sees_the_same_mixture(directory, weights, seed, start):
    mixture = ",".join(f"{name}={weight}" for name, weight in weights.items())
    data = batches(directory, mixture, seed=seed)
    expected = [data.record_ids(start + step).tolist() for step in range(3)]
    # The order in which the weights are named does not matter, nor do their units.
    other = ",".join(f"{name}={weight / 8}" for name, weight in reversed(weights.items()))
    assert batches(directory, other, seed=seed).record_ids(start).tolist() == expected[0]
    for count in (1, 2, 4):
        parts = [
            rows(batches(directory, mixture, seed=seed, index=index, count=count), start, 3)
            for index in range(count)
        ]
        assert [[row for part in parts for row in part[s]] for s in range(3)] == expected


@settings(max_examples=5, deadline=None)
@given(WEIGHTS, st.integers(0, 1000))
def test_the_shares_are_those_asked_for_and_epochs_are_whole(directory, weights, seed):
    mixture = ",".join(f"{name}={weight}" for name, weight in weights.items())
    total = sum(weights.values())
    data = batches(directory, mixture, seed=seed)
    drawn = np.concatenate([data.record_ids(step) for step in range(10 * total)]).tolist()
    for name, weight in weights.items():
        mine = [number for number in drawn if DOMAIN_OF[number] == name]
        assert len(mine) == 40 * weight
        size = SIZES[name]
        epochs = [mine[i : i + size] for i in range(0, len(mine) - size + 1, size)]
        assert all(len(set(epoch)) == size for epoch in epochs)
        if len(epochs) > 3 and size > 4:
            assert len({tuple(epoch) for epoch in epochs}) > 1


def test_starting_later_equals_continuing(directory):
    data = batches(directory, "web=5,code=1")
    whole = rows(data, 0, 12)
    assert whole == [data.record_ids(step).tolist() for step in range(12)]
    assert rows(batches(directory, "web=5,code=1"), 7, 5) == whole[7:]


def test_the_order_of_a_mixture_never_changes(directory):
    """A run that resumes with a later version must see the instances it has not seen yet."""
    data = batches(directory, "web=3,books=1,code=2")
    expected = [[19, 8, 11, 5], [3, 0, 15, 13], [13, 10, 4, 18]]
    assert [data.record_ids(step).tolist() for step in (0, 1, 1000)] == expected


def test_no_mixture_is_what_it_was(directory, tmp_path):
    plain = write_numbered(tmp_path / "plain")
    assert batches(directory).record_ids(5).tolist() == batches(plain).record_ids(5).tolist()


def test_epochs_are_reported(directory):
    text = batches(directory, "web=3,books=1").mixture.describe(100)
    assert f"books: 25.00% of the instances, {25 / SIZES['books']:.2f} epochs of 5" in text
    assert "left out: code" in text


def test_a_mixture_that_does_not_fit_the_data_is_refused(directory, tmp_path):
    with pytest.raises(InputError, match=r"config\.data\.mixture: got domain 'wiki'"):
        batches(directory, "wiki=1")
    with pytest.raises(InputError, match=r"config\.data\.mixture: .*does not say which domain"):
        batches(write_numbered(tmp_path / "plain"), "web=1")
    damaged = write_numbered(tmp_path / "damaged", domains=BY_NUMBER[:INSTANCES])
    contents = (damaged / "instance_domains.npy").read_bytes()
    (damaged / "instance_domains.npy").write_bytes(contents[:-2] + b"\7\0")
    with pytest.raises(InputError, match="instance_domains"):
        batches(damaged, "web=1")


# ---------------------------------------------------------------- several directories


@pytest.fixture(scope="module")
def joined(directory, tmp_path_factory):
    second = tmp_path_factory.mktemp("second") / "data"
    write_numbered(second, domains=["code", "wiki"] * 11 + ["wiki"], first=INSTANCES)
    return f"{directory},{second}"


def test_joined_directories_are_one_set(joined, directory):
    data = PreparedData.open(joined)
    assert data.address == joined
    instances = data.training_instances()
    assert [int(instances[i][0]) for i in range(2 * INSTANCES)] == list(range(2 * INSTANCES))
    drawn = batches(joined)
    assert rows(drawn, 0, 3) == [drawn.record_ids(step).tolist() for step in range(3)]
    assert sorted(i for step in range(23) for i in batches(joined, batch=2).record_ids(step)) == (
        list(range(2 * INSTANCES))
    )
    one = PreparedData.open(directory).held_out("test")
    two = data.held_out("test")
    assert {name: 2 * len(found) for name, found in one.items()} == {
        name: len(found) for name, found in two.items()
    }
    assert data.digest != PreparedData.open(",".join(reversed(joined.split(",")))).digest
    data.verify(hashes=True)


def test_a_mixture_of_joined_directories_joins_domains_by_name(joined):
    data = batches(joined, "wiki=1,code=1")
    drawn = Counter(int(i) for step in range(20) for i in data.record_ids(step))
    code = {i for i, name in DOMAIN_OF.items() if name == "code"}
    code |= {INSTANCES + i for i in range(0, 22, 2)}
    assert sum(count for i, count in drawn.items() if i in code) == 40
    assert set(drawn) >= code
    assert rows(data, 3, 1) == [data.record_ids(3).tolist()]


def test_directories_that_do_not_belong_together_are_refused(directory, tmp_path):
    other = write_numbered(tmp_path / "other", text="a longer text of other words")
    with pytest.raises(InputError, match=r"^data: .* another tokenizer"):
        PreparedData.open(f"{directory},{other}")
    with pytest.raises(InputError, match=r"^data: .* twice"):
        PreparedData.open(f"{directory},{directory}")
    contents = (other / MANIFEST_NAME).read_text()
    length = f'"sequence_length": {LENGTH}'
    assert length in contents
    (other / MANIFEST_NAME).write_text(contents.replace(length, '"sequence_length": 9'))
    with pytest.raises(InputError, match=r"^data: .* instances of 9 tokens"):
        PreparedData.open(f"{directory},{other}")


def test_commas_divide_addresses_unless_a_directory_has_that_name(tmp_path):
    assert split_directories("a,b/c") == ["a", "b/c"]
    assert split_directories("gs://x/a,gs:/y/b") == ["gs://x/a", "gs://y/b"]
    (tmp_path / "a,b").mkdir()
    assert split_directories(tmp_path / "a,b") == [f"{tmp_path}/a,b"]
