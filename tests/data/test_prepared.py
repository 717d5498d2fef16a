import hashlib
import itertools
import os
import shutil

import numpy as np
import pytest

from lory_jax.data.manifest import describe_files, write_manifest
from lory_jax.data.prepared import PreparedData
from lory_jax.data.tokenizer import Tokenizer
from lory_jax.errors import InputError
from lory_jax.preparation.tokenizer_training import train_tokenizer
from tests.support.numbered import DOMAINS, INSTANCES, LENGTH, write_numbered

SIZES = {"sequence_length": LENGTH, "vocab_size": 400, "global_batch_size": 4, "seed": 0}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_numbered(tmp_path_factory.mktemp("prepared") / "data")


@pytest.fixture
def copy(directory, tmp_path):
    return shutil.copytree(directory, tmp_path / "data")


def test_the_manifest_is_read_once(copy):
    """Everything still answers when the manifest is gone."""
    data = PreparedData.open(copy)
    manifest = (copy / "manifest.json").read_bytes()
    (copy / "manifest.json").unlink()
    assert data.digest == hashlib.sha256(manifest).hexdigest()
    assert data.tokenizer.sha256 == Tokenizer.load(copy / "tokenizer.json").sha256
    assert data.training_batches(**SIZES).num_instances == INSTANCES
    assert sorted(data.held_out("test")) == sorted(data.held_out_with_instances("validation"))
    data.check_model_fits(sequence_length=LENGTH, vocab_size=400)
    data.verify(hashes=True)
    with pytest.raises(InputError, match="not prepared"):
        PreparedData.open(copy)


def test_the_tokenizer_is_read_once(copy):
    data = PreparedData.open(copy)
    first = data.tokenizer
    (copy / "tokenizer.json").unlink()
    assert data.tokenizer is first


def test_another_tokenizer_is_refused(copy):
    train_tokenizer(["other words entirely"], 300).save(copy / "tokenizer.json")
    data = PreparedData.open(copy)
    with pytest.raises(InputError, match=r"tokenizer\.json: does not match manifest\.json"):
        _ = data.tokenizer


def test_batches_are_the_instances_of_the_shards_shuffled(directory):
    """The rows of a step are those that `record_ids` names, taken from the shards one by one."""
    data = PreparedData.open(directory)
    batches = data.training_batches(**SIZES)
    for step, batch in enumerate(itertools.islice(batches.iterate(0), 12)):
        expected = [[int(number)] * (LENGTH + 1) for number in batches.record_ids(step)]
        assert batch.dtype == np.int32 and batch.tolist() == expected


def test_processes_share_a_global_batch(directory):
    data = PreparedData.open(directory)
    whole = next(data.training_batches(**SIZES).iterate(5))
    parts = [
        next(data.training_batches(**SIZES, process_index=i, process_count=2).iterate(5))
        for i in range(2)
    ]
    assert np.array_equal(np.concatenate(parts), whole)


def test_held_out_sets_are_read_by_domain(directory):
    data = PreparedData.open(directory)
    for split in ("validation", "test"):
        sets = data.held_out(split)
        assert list(sets) == sorted(DOMAINS)
        for d, domain in enumerate(DOMAINS):
            assert sets[domain].dtype == np.int32
            assert sets[domain].tolist() == [[100 + d] * (LENGTH + 1)] * (d + 1)


def without_instances(directory, domains):
    """Makes the test sets of some domains empty, as those of domains too small for one."""
    data = PreparedData.open(directory)
    held_out = data.held_out("test")
    data.held_out = lambda split: {
        domain: rows[:0] if domain in domains else rows for domain, rows in held_out.items()
    }
    return data


def test_domains_without_instances_are_left_out_and_named(directory, capsys):
    data = without_instances(directory, {"c++"})
    assert sorted(data.held_out_with_instances("test")) == sorted({*DOMAINS} - {"c++"})
    assert "c++" in capsys.readouterr().err
    with pytest.raises(InputError, match="no instance in the test split"):
        without_instances(directory, set(DOMAINS)).held_out_with_instances("test")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"sequence_length": LENGTH + 1}, r"config\.model\.sequence_length: got 8"),
        ({"vocab_size": 100}, r"config\.model\.vocab_size: got 100"),
        ({"global_batch_size": INSTANCES + 1}, r"config\.train\.global_batch_size: got 24"),
        (
            {"global_batch_size": 6, "process_count": 4},
            r"config\.train\.global_batch_size: got 6, .*\(4\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused(directory, changes, field):
    with pytest.raises(InputError, match=field):
        PreparedData.open(directory).training_batches(**SIZES | changes)


def test_a_truncated_shard_is_named_at_the_start(copy):
    shard = copy / "train" / "part-00001-of-00003.array_record"
    os.truncate(shard, shard.stat().st_size // 2)
    with pytest.raises(InputError, match=r"part-00001-of-00003.*truncated or damaged"):
        PreparedData.open(copy).training_batches(**SIZES)


def test_a_shard_damaged_inside_is_named_when_it_is_read(copy):
    shard = copy / "train" / "part-00001-of-00003.array_record"
    contents = bytearray(shard.read_bytes())
    contents[150:400] = bytes(250)
    shard.write_bytes(contents)
    data = PreparedData.open(copy)
    with pytest.raises(InputError, match=r"part-00001-of-00003.*damaged"):
        list(itertools.islice(data.training_batches(**SIZES).iterate(0), 6))
    with pytest.raises(InputError, match=r"part-00001-of-00003.*damaged"):
        data.verify(hashes=True)
    data.verify(hashes=True, prefix="test/")


def test_shards_of_another_corpus_are_refused(copy):
    """The files match their hashes, but hold fewer instances than the manifest counts."""
    (copy / "train" / "part-00002-of-00003.array_record").unlink()
    manifest = PreparedData.open(copy).manifest
    (copy / "manifest.json").unlink()
    files = describe_files(copy)
    write_manifest(type(manifest)(**(vars(manifest) | {"files": files})), copy)
    with pytest.raises(InputError, match=r"train: holds 18 instances, .* 23"):
        PreparedData.open(copy).training_batches(**SIZES)


def test_a_missing_evaluation_file_is_named(copy):
    (copy / "test" / "c++" / "part-00000-of-00001.array_record").unlink()
    data = PreparedData.open(copy)
    with pytest.raises(InputError, match=r"test/c\+\+/part-00000-of-00001.*missing"):
        data.held_out("test")
    assert data.held_out("validation")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: shutil.rmtree(d), "no such directory"),
        (lambda d: (d / "manifest.json").unlink(), "not prepared, or prepare was interrupted"),
        (lambda d: (d / "manifest.json").write_text("{"), r"manifest\.json: malformed"),
    ],
)
def test_what_is_not_prepared_is_refused(copy, spoil, message):
    spoil(copy)
    with pytest.raises(InputError, match=message) as caught:
        PreparedData.open(copy)
    assert "\n" not in str(caught.value)
