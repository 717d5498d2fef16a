import itertools
import json
import os
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lory_jax.data.batches import TrainingBatches, evaluation_sets
from lory_jax.data.manifest import (
    Manifest,
    describe_files,
    domain_directory,
    load_tokenizer,
    read_manifest,
    verify_files,
    write_manifest,
)
from lory_jax.errors import InputError
from lory_jax.preparation.packing import write_shards
from lory_jax.preparation.tokenizer_training import train_tokenizer

LENGTH = 7
DOMAINS = ["c++", "man/1 pages", ".hidden"]


def write_prepared(directory, num_instances=23, per_shard=9):
    """Writes a prepared directory whose instance i is filled with i."""
    tokenizer = train_tokenizer(["some text"], 300)
    train = np.repeat(np.arange(num_instances, dtype="<u2")[:, None], LENGTH + 1, axis=1)
    write_shards(directory / "train", train, per_shard)
    counts = {"train": {"instances": num_instances, "domains": {}}}
    for split in ("validation", "test"):
        for d, domain in enumerate(DOMAINS):
            rows = np.full((d + 1, LENGTH + 1), 100 + d, "<u2")
            write_shards(directory / split / domain_directory(domain), rows, per_shard)
        counts[split] = {"domains": {domain: {} for domain in DOMAINS}}
    tokenizer.save(directory / "tokenizer.json")
    files = describe_files(directory)
    write_manifest(Manifest({}, LENGTH, tokenizer.vocab_size, counts, {}, files), directory)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    directory = tmp_path_factory.mktemp("prepared") / "data"
    write_prepared(directory)
    return directory


def batches(directory, batch=4, seed=0, index=0, count=1, **changes):
    sizes = {"sequence_length": LENGTH, "vocab_size": 400} | changes
    return TrainingBatches(
        directory,
        global_batch_size=batch,
        seed=seed,
        process_index=index,
        process_count=count,
        **sizes,
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


@given(st.integers(0, 1000), st.sampled_from([1, 4, 5, 23]))
@settings(deadline=None, max_examples=20)
def test_every_epoch_holds_every_record_once_in_another_order(prepared, seed, batch):
    data = batches(prepared, batch=batch, seed=seed)
    stream = np.concatenate([data.record_ids(s) for s in range(-(-3 * 23 // batch))])
    epochs = stream[: 3 * 23].reshape(3, 23)
    assert (np.sort(epochs, axis=1) == np.arange(23)).all()
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_seeds_differ(prepared):
    assert batches(prepared, seed=0).record_ids(0).tolist() != (
        batches(prepared, seed=1).record_ids(0).tolist()
    )


def test_evaluation_sets_are_read_by_domain(prepared):
    for split in ("validation", "test"):
        sets = evaluation_sets(prepared, split)
        assert list(sets) == sorted(DOMAINS)
        for d, domain in enumerate(DOMAINS):
            assert sets[domain].dtype == np.int32
            assert sets[domain].tolist() == [[100 + d] * (LENGTH + 1)] * (d + 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 24}, "holds 23 training instances, a batch takes 24"),
        ({"batch": 6, "count": 4}, "got 6, takes a multiple of the number of processes"),
        ({"sequence_length": 8}, r"sequence_length: got 8, the prepared instances take 7"),
        ({"vocab_size": 100}, "vocab_size: got 100, the prepared tokenizer takes at least"),
    ],
)
def test_what_does_not_fit_is_refused(prepared, changes, message):
    with pytest.raises(InputError, match=message):
        batches(prepared, **changes)


@pytest.fixture
def copy(prepared, tmp_path):
    return shutil.copytree(prepared, tmp_path / "data")


def test_a_truncated_shard_is_named_at_the_start(copy):
    shard = copy / "train" / "part-00001-of-00003.array_record"
    os.truncate(shard, shard.stat().st_size // 2)
    with pytest.raises(InputError, match=r"part-00001-of-00003.*truncated or damaged"):
        batches(copy)


def test_a_shard_damaged_inside_is_named_when_it_is_read(copy):
    shard = copy / "train" / "part-00001-of-00003.array_record"
    contents = bytearray(shard.read_bytes())
    contents[150:400] = bytes(250)
    shard.write_bytes(contents)
    with pytest.raises(InputError, match=r"part-00001-of-00003.*damaged"):
        first_rows(batches(copy), 0, 6)
    with pytest.raises(InputError, match=r"part-00001-of-00003.*damaged"):
        verify_files(read_manifest(copy), copy, hashes=True)


def test_a_missing_evaluation_file_is_named(copy):
    (copy / "test" / "c++" / "part-00000-of-00001.array_record").unlink()
    with pytest.raises(InputError, match=r"test/c\+\+/part-00000-of-00001.*missing"):
        evaluation_sets(copy, "test")


def test_another_tokenizer_is_refused(copy):
    assert load_tokenizer(read_manifest(copy), copy).vocab_size == read_manifest(copy).vocab_size
    train_tokenizer(["other words entirely"], 300).save(copy / "tokenizer.json")
    with pytest.raises(InputError, match=r"tokenizer\.json: does not match manifest\.json"):
        load_tokenizer(read_manifest(copy), copy)


def edited(directory, **changes):
    path = directory / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: shutil.rmtree(d), "no such directory"),
        (lambda d: (d / "manifest.json").unlink(), "not prepared, or prepare was interrupted"),
        (lambda d: (d / "manifest.json").write_text("{"), "malformed"),
        (lambda d: (d / "manifest.json").write_text("[]"), "malformed"),
        (lambda d: (d / "manifest.json").write_text("{}"), "malformed"),
        (lambda d: (d / "manifest.json").write_bytes(b"\xff\xfe"), "malformed"),
        (lambda d: edited(d, files={"train/x": 3}), "malformed"),
        (lambda d: edited(d, files={"train/x": {}}), "malformed"),
        (lambda d: edited(d, sequence_length="7"), "malformed"),
        (lambda d: edited(d, surprise=1), "malformed"),
        (lambda d: edited(d, format_version=99), "format version 99, takes 1"),
        (lambda d: edited(d, files={"../x": {"sha256": "", "bytes": 1}}), "outside the directory"),
        (lambda d: edited(d, files={"/etc/x": {"sha256": "", "bytes": 1}}), "outside"),
    ],
)
def test_faults_of_a_manifest(copy, spoil, message):
    spoil(copy)
    with pytest.raises(InputError, match=message) as caught:
        read_manifest(copy)
    assert "\n" not in str(caught.value)


@given(st.text(min_size=1, max_size=20))
@settings(deadline=None, max_examples=200)
def test_a_domain_directory_is_one_safe_name(domain):
    name = domain_directory(domain)
    assert "/" not in name and "\0" not in name and not name.startswith(".") and name.isascii()


def test_domain_directories_differ_and_have_a_limit():
    names = ["a/b", "a b", "a%2Fb", "..", ".", "A", "a"]
    assert len({domain_directory(name) for name in names}) == len(names)
    for name in ("", "x" * 201):
        with pytest.raises(InputError, match="takes 1 to 200"):
            domain_directory(name)
