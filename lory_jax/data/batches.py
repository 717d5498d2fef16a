"""Batches for training and sets for evaluation, read from a prepared directory with Grain.

The batch at step s is a pure function of (seed, s, global batch size): the number of processes
that share it and the step at which a run (re)starts do not matter, so the data position of a run
is one integer. B instances per batch and process, L + 1 tokens per instance.
"""

from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import SupportsIndex

import grain
import numpy as np
from grain.sources import ArrayRecordDataSource

from lory_jax.data.instances import decode_record, read_instances
from lory_jax.data.manifest import (
    Manifest,
    check_model_fits,
    domain_directory,
    local_files,
    read_manifest,
    verify_files,
)
from lory_jax.errors import InputError

READ_THREADS = 4
PREFETCHED_BATCHES = 8
# Instances; Grain's own endless repeat overflows when it is batched by 1 and sliced.
ENDLESS = 2**40


class TrainingBatches:
    """The training instances of a prepared directory, shuffled anew in every epoch, without end.

    Attributes:
      num_instances: instances in one epoch.
      batches_per_epoch: how many global batches an epoch fills (a fraction).
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        sequence_length: int,
        vocab_size: int,
        global_batch_size: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
    ):
        """Opens the shards of `directory`/train.

        Args:
          directory: what `prepare` wrote; gs:// and s3:// are copied to the cache first.
          sequence_length: L of the model; must be that of the instances.
          vocab_size: of the model; must cover the tokenizer's.
          global_batch_size: instances per step over all processes.
          seed: of the order of the instances.
          process_index, process_count: this process reads the rows
            `[index * B, (index + 1) * B)` of each global batch.

        Raises:
          InputError: the directory is not prepared, damaged, too small for one batch or does not
            fit the model, or the batch does not divide by the processes.
        """
        if global_batch_size % process_count:
            raise InputError(
                f"config.train.global_batch_size: got {global_batch_size}, takes a multiple of "
                f"the number of processes ({process_count})"
            )
        manifest = read_manifest(directory)
        check_model_fits(manifest, sequence_length=sequence_length, vocab_size=vocab_size)
        local = local_files(manifest, directory, "train/")
        verify_files(manifest, local, hashes=False, prefix="train/")
        self.num_instances = manifest.counts["train"]["instances"]
        if self.num_instances < global_batch_size:
            raise InputError(
                f"{directory}: holds {self.num_instances} training instances, a batch takes "
                f"{global_batch_size}: prepare more documents, or lower "
                "config.train.global_batch_size or config.model.sequence_length"
            )
        self.batches_per_epoch = self.num_instances / global_batch_size
        self._source = _InstanceSource(manifest, local)
        self._global_batch_size = global_batch_size
        self._process_index, self._process_count = process_index, process_count
        # Neighbouring seeds share no epochs: Grain shuffles epoch n with seed + n.
        self._seed = int(np.random.SeedSequence(seed).generate_state(1)[0])

    def iterate(self, start_step: int) -> Iterator[np.ndarray]:
        """Yields this process's batches, int32 `[B, L + 1]`, from `start_step` on, without end.

        Threads read ahead.
        """
        rows = self._global_batch_size // self._process_count
        batches = _shuffled(grain.MapDataset.source(self._source), self._seed).batch(rows)
        first = start_step * self._process_count + self._process_index
        mine = batches.slice(slice(first, None, self._process_count))
        options = grain.ReadOptions(
            num_threads=READ_THREADS, prefetch_buffer_size=PREFETCHED_BATCHES
        )
        yield from mine.to_iter_dataset(options)

    def record_ids(self, step: int) -> np.ndarray:
        """Returns which instances make the global batch of `step`, int64 `[global batch]`."""
        ids = _shuffled(grain.MapDataset.range(self.num_instances), self._seed)
        first = step * self._global_batch_size
        return np.array([ids[first + row] for row in range(self._global_batch_size)], np.int64)


class Lookahead:
    """Draws batches two steps ahead of their use, so that one that cannot be read is known before
    any process needs it: all can then stop at the same step.

    Attributes:
      damage: what is wrong with a batch ahead, or None.
    """

    DEPTH = 2

    def __init__(self, batches: Iterator[np.ndarray]):
        """Raises `InputError` if one of the first batches cannot be read."""
        self._batches = batches
        self._ahead: deque[np.ndarray] = deque()
        self.damage: InputError | None = None
        self._fill()
        if self.damage is not None:
            raise self.damage

    def next(self) -> np.ndarray:
        """The next batch; after `damage`, those drawn before it."""
        batch = self._ahead.popleft()
        self._fill()
        return batch

    def _fill(self) -> None:
        try:
            while self.damage is None and len(self._ahead) < self.DEPTH:
                self._ahead.append(next(self._batches))
        except InputError as error:
            self.damage = error


def _shuffled(instances: grain.MapDataset, seed: int) -> grain.MapDataset:
    epochs = ENDLESS // len(instances) + 1
    return instances.shuffle(seed=seed).repeat(epochs, reseed_each_epoch=True)


class _InstanceSource:
    """The training instances by number; a damaged file is named in the error."""

    def __init__(self, manifest: Manifest, directory: Path):
        self._manifest, self._directory = manifest, directory
        expected = manifest.counts["train"]["instances"]
        paths = manifest.shards(directory, "train/")
        try:
            self._records = ArrayRecordDataSource([str(path) for path in paths])
        except RuntimeError:
            self._name_damaged_file()
            raise
        if len(self._records) != expected:
            raise InputError(
                f"{directory / 'train'}: holds {len(self._records)} instances, the manifest says "
                f"{expected}; run prepare again into a new directory"
            )

    def _name_damaged_file(self) -> None:
        verify_files(self._manifest, self._directory, hashes=True, prefix="train/")

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: SupportsIndex) -> np.ndarray:
        try:
            record = self._records[index]
        except RuntimeError as error:
            self._name_damaged_file()
            raise InputError(
                f"{self._directory / 'train'}: instance {index} could not be read, though the "
                f"files are as the manifest says ({error}); is the disk well?"
            ) from None
        return decode_record(
            record, self._manifest.sequence_length, self._manifest.dtype, self._directory / "train"
        )


def evaluation_sets(directory: str | Path, split: str) -> dict[str, np.ndarray]:
    """Returns the instances of each domain, int32 `[N, L + 1]`, domains sorted by name.

    Args:
      directory: what `prepare` wrote; gs:// and s3:// are copied to the cache first.
      split: "validation" (for choices) or "test" (for reports).

    Raises:
      InputError: the directory is not prepared, or a file of it is missing or damaged.
    """
    manifest = read_manifest(directory)
    local = local_files(manifest, directory, f"{split}/")
    verify_files(manifest, local, hashes=False, prefix=f"{split}/")
    return {
        domain: read_instances(
            local / split / domain_directory(domain),
            manifest.sequence_length,
            manifest.dtype,
        )
        for domain in sorted(manifest.counts[split]["domains"])
    }
