import numpy as np
import pytest

from lory_jax.data.instances import decode_record, read_instances, token_dtype
from lory_jax.errors import InputError
from lory_jax.preparation.packing import write_shards


@pytest.mark.parametrize(
    ("vocab_size", "name"), [(300, "<u2"), (65_536, "<u2"), (65_537, "<u4"), (200_000, "<u4")]
)
def test_token_type(vocab_size, name):
    assert token_dtype(vocab_size) == np.dtype(name)


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_a_record_is_the_little_endian_tokens(dtype):
    tokens = [0, 1, 255, 256, 65_535]
    size = np.dtype(dtype).itemsize
    record = b"".join(token.to_bytes(size, "little") for token in tokens)
    decoded = decode_record(record, len(tokens) - 1, np.dtype(dtype), "shard")
    assert decoded.dtype == np.int32 and decoded.tolist() == tokens


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_shards_hold_the_instances_in_order(tmp_path, dtype):
    instances = np.random.default_rng(0).integers(0, 60_000, (10, 9)).astype(dtype)
    paths = write_shards(tmp_path / "train", instances, per_shard=4)
    assert [path.name for path in paths] == [
        f"part-0000{i}-of-00003.array_record" for i in range(3)
    ]
    read = read_instances(tmp_path / "train", 8, np.dtype(dtype))
    assert read.dtype == np.int32 and np.array_equal(read, instances)


def test_faults_in_shards_name_the_file(tmp_path):
    instances = np.random.default_rng(0).integers(0, 999, (2000, 65)).astype("<u2")
    paths = write_shards(tmp_path / "train", instances, per_shard=1000)
    with pytest.raises(InputError, match="a record holds 130 bytes, but must hold 66"):
        read_instances(tmp_path / "train", 32, np.dtype("<u2"))
    whole = paths[1].read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:-7], b"", whole[:5000] + b"!" + whole[5001:]):
        paths[1].write_bytes(damaged)
        with pytest.raises(InputError, match=r"part-00001-of-00002.*truncated or damaged"):
            read_instances(tmp_path / "train", 64, np.dtype("<u2"))
    paths[1].unlink()
    with pytest.raises(InputError, match="found 1 shards, must be 2"):
        read_instances(tmp_path / "train", 64, np.dtype("<u2"))
    with pytest.raises(InputError, match="holds no part"):
        read_instances(tmp_path / "nothing", 64, np.dtype("<u2"))
