"""Instances as they are stored in ArrayRecord shards: L + 1 tokens per record.

N instances, L tokens per instance.
"""

import re
from pathlib import Path

import numpy as np
from array_record.python import array_record_module

from lory_jax.errors import InputError

# The domain of each training instance, uint16 `[N]`: its place among the sorted names of the
# training split's domains. Directories of earlier versions have no such file.
INSTANCE_DOMAINS_NAME = "instance_domains.npy"
SHARD_NAME = re.compile(r"part-(\d{5})-of-(\d{5})\.array_record")


def token_dtype(vocab_size: int) -> np.dtype:
    """Returns the little-endian type, on disk, that holds every id below `vocab_size`."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def shard_paths(directory: Path) -> list[Path]:
    """Returns the shards of a directory in order; raises `InputError` if one is missing."""
    paths = sorted(p for p in directory.glob("*.array_record") if SHARD_NAME.fullmatch(p.name))
    if not paths:
        raise InputError(f"{directory}: holds no part-*-of-*.array_record file")
    expected = [f"part-{i:05d}-of-{len(paths):05d}.array_record" for i in range(len(paths))]
    if [path.name for path in paths] != expected:
        raise InputError(
            f"{directory}: found {len(paths)} shards, must be {int(paths[0].name[14:19])}"
        )
    return paths


def read_instances(directory: Path, sequence_length: int, dtype: np.dtype) -> np.ndarray:
    """Reads all instances of a small set, int32 `[N, L + 1]`.

    Raises:
      InputError: a shard is missing, damaged, or of another sequence length or token type.
    """
    records: list[np.ndarray] = []
    for path in shard_paths(directory):
        try:
            reader = array_record_module.ArrayRecordReader(str(path))
            raw = reader.read_all()
            reader.close()
        except RuntimeError as error:
            raise damaged_shard(path, error) from None
        records.extend(decode_record(record, sequence_length, dtype, path) for record in raw)
    return np.stack(records)


def read_instance_domains(path: Path, num_instances: int, num_domains: int) -> np.ndarray:
    """Reads the domain of each training instance, integers `[N]`.

    Raises:
      InputError: the file is damaged, or belongs to other instances.
    """
    try:
        domains_N = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise InputError(f"{path}: damaged ({error}); run prepare again") from None
    if domains_N.shape != (num_instances,) or (domains_N >= num_domains).any():
        raise InputError(
            f"{path}: got an array of shape {domains_N.shape}, must hold the domains (below "
            f"{num_domains}) of {num_instances} instances; run prepare again"
        )
    return domains_N


def decode_record(
    record: bytes, sequence_length: int, dtype: np.dtype, path: str | Path
) -> np.ndarray:
    """Returns the int32 tokens `[L + 1]` of a record; `path` is named in errors."""
    expected = (sequence_length + 1) * dtype.itemsize
    if len(record) != expected:
        raise InputError(
            f"{path}: a record holds {len(record)} bytes, but must hold {expected} "
            f"({sequence_length} + 1 tokens of {dtype.itemsize} bytes)"
        )
    return np.frombuffer(record, dtype).astype(np.int32)


def damaged_shard(path: str | Path, error: Exception) -> InputError:
    """Returns the error for a shard that ArrayRecord cannot read."""
    reason = str(error).split(";")[0]
    return InputError(f"{path}: truncated or damaged ({reason}); run prepare again")
