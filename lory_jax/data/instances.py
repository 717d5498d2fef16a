"""Training instances: documents as one stream of tokens, cut to length, kept in ArrayRecord shards.

N documents or instances, L tokens per instance, T tokens in all.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from array_record.python import array_record_module

from lory_jax.data.tokenizer import Tokenizer
from lory_jax.errors import InputError
from lory_jax.progress import progress

BATCH_CHARACTERS = 4_000_000
SHARD_NAME = re.compile(r"part-(\d{5})-of-(\d{5})\.array_record")


@dataclass(frozen=True)
class TokenizedDocuments:
    """Every document as BOS + tokens + EOS, end to end.

    Attributes:
      tokens_T: uint16 or uint32.
      starts_N1: int64 `[N + 1]`; document i is `tokens_T[starts_N1[i]:starts_N1[i + 1]]`.
    """

    tokens_T: np.ndarray
    starts_N1: np.ndarray

    @property
    def lengths_N(self) -> np.ndarray:
        """Tokens per document, BOS and EOS included."""
        return np.diff(self.starts_N1)

    def stream(self, order_N: np.ndarray) -> np.ndarray:
        """Returns the documents' tokens end to end in the order given, `[T]`."""
        pieces = [self.tokens_T[self.starts_N1[i] : self.starts_N1[i + 1]] for i in order_N]
        return np.concatenate(pieces) if pieces else self.tokens_T[:0]


def token_dtype(vocab_size: int) -> np.dtype:
    """Returns the little-endian type that holds every id below `vocab_size` on disk."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def tokenize(texts: Sequence[str], tokenizer: Tokenizer, label: str) -> TokenizedDocuments:
    """Encodes documents in batches, so that Python integers never hold the whole corpus."""
    dtype = token_dtype(tokenizer.vocab_size)
    pieces: list[np.ndarray] = [np.empty(0, dtype)]
    lengths = [0]
    batch: list[str] = []
    characters = 0
    for i, text in enumerate(progress(texts, len(texts), label)):
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS or i == len(texts) - 1:
            for ids in tokenizer.encode_batch(batch):
                pieces.append(np.array([tokenizer.bos_id, *ids, tokenizer.eos_id], dtype))
                lengths.append(len(ids) + 2)
            batch, characters = [], 0
    return TokenizedDocuments(np.concatenate(pieces), np.cumsum(lengths, dtype=np.int64))


def count_instances(num_tokens: int, sequence_length: int) -> int:
    """Returns how many whole instances a stream gives; each takes L tokens and shares one."""
    return max(num_tokens - 1, 0) // sequence_length


def cut_instances(tokens_T: np.ndarray, sequence_length: int) -> np.ndarray:
    """Cuts a stream into instances of L + 1 tokens.

    An instance begins with the last token of the one before, so every token but the first is a
    target exactly once. The remainder, `T - 1 - N * L` targets, is dropped.

    Returns:
      `[N, L + 1]`, a read-only view of `tokens_T`.
    """
    if count_instances(len(tokens_T), sequence_length) == 0:
        return np.empty((0, sequence_length + 1), tokens_T.dtype)
    windows = np.lib.stride_tricks.sliding_window_view(tokens_T, sequence_length + 1)
    return windows[::sequence_length]


def same_domain_rate(
    lengths_N: np.ndarray, domains_N: np.ndarray, sequence_length: int
) -> float | None:
    """Returns the share of neighbouring documents inside an instance that have the same domain.

    Two documents are neighbours inside an instance if it holds the last token of one and the
    first of the next.

    Args:
      lengths_N: tokens per document, in the order of the stream.
      domains_N: a number or name per document, in the same order.
      sequence_length: L.

    Returns:
      0 to 1, or None if no instance holds two documents.
    """
    borders = np.cumsum(lengths_N)[:-1]
    # Instances overlap by one token, so each border lies inside one of them; those in the
    # dropped remainder lie in none.
    used = count_instances(int(np.sum(lengths_N)), sequence_length) * sequence_length
    inside = borders <= used
    if not inside.any():
        return None
    return float(np.mean((domains_N[:-1] == domains_N[1:])[inside]))


def write_shards(directory: Path, instances_NxL1: np.ndarray, per_shard: int) -> list[Path]:
    """Writes instances as `part-00000-of-00003.array_record`, ... into a new directory.

    A record is the raw little-endian tokens of one instance.
    """
    directory.mkdir(parents=True)
    num_shards = -(-len(instances_NxL1) // per_shard)
    paths = []
    for shard in range(num_shards):
        path = directory / f"part-{shard:05d}-of-{num_shards:05d}.array_record"
        # Grain reads single records at random: groups would be read and dropped.
        writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
        rows = instances_NxL1[shard * per_shard : (shard + 1) * per_shard]
        label = f"writing {directory.name}, shard {shard + 1} of {num_shards}"
        for instance_L1 in progress(rows, len(rows), label, "instances"):
            writer.write(instance_L1.tobytes())
        writer.close()
        paths.append(path)
    return paths


def shard_paths(directory: Path) -> list[Path]:
    """Returns the shards of a directory in order; raises `InputError` unless all are there."""
    paths = sorted(p for p in directory.glob("*.array_record") if SHARD_NAME.fullmatch(p.name))
    if not paths:
        raise InputError(f"{directory}: holds no part-*-of-*.array_record")
    expected = [f"part-{i:05d}-of-{len(paths):05d}.array_record" for i in range(len(paths))]
    if [path.name for path in paths] != expected:
        raise InputError(f"{directory}: found {len(paths)} shards of {paths[0].name[14:19]}")
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


def decode_record(
    record: bytes, sequence_length: int, dtype: np.dtype, path: str | Path
) -> np.ndarray:
    """Returns the int32 tokens `[L + 1]` of a record; `path` is for the error."""
    expected = (sequence_length + 1) * dtype.itemsize
    if len(record) != expected:
        raise InputError(
            f"{path}: a record holds {len(record)} bytes, takes {expected} "
            f"({sequence_length} + 1 tokens of {dtype.itemsize} bytes)"
        )
    return np.frombuffer(record, dtype).astype(np.int32)


def damaged_shard(path: str | Path, error: Exception) -> InputError:
    """Returns the error for a shard that ArrayRecord cannot read."""
    reason = str(error).split(";")[0]
    return InputError(f"{path}: truncated or damaged ({reason}); run prepare again")
