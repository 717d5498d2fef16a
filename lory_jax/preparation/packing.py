"""Documents as one stream of tokens, cut into instances and written as ArrayRecord shards.

N documents or instances, L tokens per instance, T tokens in all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from array_record.python import array_record_module

from lory_jax.console import progress
from lory_jax.data.instances import INSTANCE_DOMAINS_NAME, token_dtype
from lory_jax.data.tokenizer import Tokenizer
from lory_jax.errors import InputError, shorten
from lory_jax.preparation.engine.columns import write_array

BATCH_CHARACTERS = 4_000_000


@dataclass(frozen=True)
class TokenizedDocuments:
    """Every document as BOS + tokens + EOS, concatenated.

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
        """Returns the documents' tokens, concatenated in the order given, `[T]`."""
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


def majority_labels(
    lengths_N: np.ndarray, labels_N: np.ndarray, sequence_length: int
) -> np.ndarray:
    """Returns the label that most targets of each instance come from, int64 `[instances]`.

    Of labels with equally many targets, the lowest counts.

    Args:
      lengths_N: tokens of the documents, in the order of the stream that `cut_instances` cuts.
      labels_N: what each document belongs to, such as its domain, as a number from 0.
      sequence_length: L.
    """
    lengths_N, labels_N = np.asarray(lengths_N, np.int64), np.asarray(labels_N, np.int64)
    num_instances = count_instances(int(lengths_N.sum()), sequence_length)
    end = num_instances * sequence_length
    # Token 0 is no target, so target t is token t + 1. A piece lies in one document and one
    # instance; the pieces of an instance follow each other.
    document_ends_N = np.clip(np.cumsum(lengths_N) - 1, 0, end)
    borders = np.union1d(document_ends_N, np.arange(0, end + 1, sequence_length))
    starts_P, sizes_P = borders[:-1], np.diff(borders)
    documents_P = np.searchsorted(document_ends_N, starts_P, side="right")
    num_labels = int(labels_N.max(initial=0)) + 1
    keys_P = starts_P // sequence_length * num_labels + labels_N[documents_P]
    keys_K, positions_P = np.unique(keys_P, return_inverse=True)
    targets_K = np.bincount(positions_P, weights=sizes_P)
    # The last key of an instance in this order has the most targets and the lowest label.
    order_K = np.lexsort((-keys_K, targets_K, keys_K // num_labels))
    instances_K = keys_K[order_K] // num_labels
    is_last_K = np.append(instances_K[1:] != instances_K[:-1], True)[: len(instances_K)]
    return keys_K[order_K][is_last_K] % num_labels


def instance_domains(
    lengths_N: np.ndarray, domains_N: np.ndarray, sequence_length: int
) -> np.ndarray:
    """The domain of most targets of each instance, uint16; arguments as in `majority_labels`."""
    return majority_labels(lengths_N, domains_N, sequence_length).astype(np.uint16)


def instance_origins(
    lengths_N: np.ndarray, origins: Sequence[str], sequence_length: int
) -> list[str]:
    """The origin of most targets of each instance, of equals the first in alphabetical order."""
    names = sorted(set(origins))
    numbers_N = np.searchsorted(names, np.array(origins, dtype=str))
    return [names[label] for label in majority_labels(lengths_N, numbers_N, sequence_length)]


def write_instance_domains(directory: Path, domains_N: np.ndarray) -> Path:
    """Writes the domains of the training instances beside their shards, for `data.mixture`.

    Args:
      directory: of the prepared data; `train/` holds the instances.
      domains_N: for each instance in the order of the shards, its place among the sorted names of
        the domains of the training split.
    """
    path = directory / INSTANCE_DOMAINS_NAME
    write_array(directory, path.stem, domains_N.astype("<u2"))
    return path


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
            # Grain reads single records at random; of larger groups it would discard the rest.
            writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
            for instance_L1 in progress(rows, len(rows), label, "instances"):
                writer.write(instance_L1.tobytes())
            writer.close()
        except RuntimeError as error:  # all that the library raises, whatever the disk said
            raise InputError(f"{path}: cannot be written ({shorten(str(error))})") from None
        paths.append(path)
    return paths
