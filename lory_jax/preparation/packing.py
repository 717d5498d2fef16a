"""Documents as one stream of tokens, cut into instances and written as ArrayRecord shards.

N documents or instances, L tokens per instance, T tokens in all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from array_record.python import array_record_module

from lory_jax.console import progress
from lory_jax.data.instances import token_dtype
from lory_jax.data.tokenizer import Tokenizer
from lory_jax.errors import InputError
from lory_jax.schema import shorten

BATCH_CHARACTERS = 4_000_000


@dataclass(frozen=True)
class TokenizedDocuments:
    """Every document as BOS + tokens + EOS, end to end.

    Attributes:
      tokens_T: uint16 or uint32, by the size of the vocabulary.
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


def tokenize(texts: Sequence[str], tokenizer: Tokenizer, label: str) -> TokenizedDocuments:
    """Encodes documents in batches, so that the whole corpus is never held as Python integers.

    `label` is what the progress line says.

    Raises:
      InputError: the tokenizer has no tokens for some of the text.
    """
    dtype = token_dtype(tokenizer.vocab_size)
    pieces: list[np.ndarray] = [np.empty(0, dtype)]
    lengths = [0]
    batch: list[str] = []
    characters = lost = total = 0
    for i, text in enumerate(progress(texts, len(texts), label)):
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS or i == len(texts) - 1:
            encoded = tokenizer.encode_batch(batch)
            lost += tokenizer.lost_bytes(batch, encoded)
            total += sum(len(text.encode()) for text in batch)
            for ids in encoded:
                pieces.append(np.array([tokenizer.bos_id, *ids, tokenizer.eos_id], dtype))
                lengths.append(len(ids) + 2)
            batch, characters = [], 0
    if lost:
        raise InputError(
            f"tokenizer: has no token for {lost:,} of {total:,} bytes ({lost / total:.2%}), which "
            "would be lost; must encode every text (byte-level, or with byte fallback)"
        )
    return TokenizedDocuments(np.concatenate(pieces), np.cumsum(lengths, dtype=np.int64))


def count_instances(num_tokens: int, sequence_length: int) -> int:
    """Returns how many whole instances a stream gives; each uses L tokens and shares one."""
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


def write_shards(directory: Path, instances_NxL1: np.ndarray, per_shard: int) -> list[Path]:
    """Writes instances as `part-00000-of-00003.array_record`, ... into a new directory.

    A record is the raw little-endian tokens of one instance.

    Raises:
      InputError: a shard cannot be written, for instance because the disk is full.
    """
    directory.mkdir(parents=True)
    num_shards = -(-len(instances_NxL1) // per_shard)
    paths = []
    for shard in range(num_shards):
        path = directory / f"part-{shard:05d}-of-{num_shards:05d}.array_record"
        rows = instances_NxL1[shard * per_shard : (shard + 1) * per_shard]
        label = f"writing {directory.name}, shard {shard + 1} of {num_shards}"
        try:
            # Grain reads single records at random; of larger groups it would read and drop the
            # rest.
            writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
            for instance_L1 in progress(rows, len(rows), label, "instances"):
                writer.write(instance_L1.tobytes())
            writer.close()
        except RuntimeError as error:  # all that the library raises, whatever the disk said
            raise InputError(f"{path}: cannot be written ({shorten(str(error))})") from None
        paths.append(path)
    return paths
