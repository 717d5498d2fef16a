"""Batches for training, read with Grain from the shards of a prepared directory.

The batch at step s is a pure function of (seed, s, global batch size): the number of processes
that share it and the step at which a run starts or resumes do not matter, so the data position of
a run is one integer. B instances per batch and process, L + 1 tokens per instance.
"""

from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import SupportsIndex

import grain
import numpy as np
from grain.sources import ArrayRecordDataSource

from lory_jax.data.instances import decode_record
from lory_jax.data.manifest import Manifest
from lory_jax.errors import InputError

READ_THREADS = 4
PREFETCHED_BATCHES = 8
# Counted in instances; Grain's own endless repeat overflows when it is batched by 1 and sliced.
ENDLESS = 2**40


class TrainingInstances:
    """The training instances by index; an error names the damaged file."""

    def __init__(self, manifest: Manifest, directory: Path):
        """Opens the shards of the local `directory`/train, which must be those of `manifest`."""
        manifest.verify(directory, hashes=False, prefix="train/")
        self._manifest, self._directory = manifest, directory
        expected = manifest.counts["train"]["instances"]
        paths = [str(directory / name) for name in manifest.names("train/")]
        try:
            self._records = ArrayRecordDataSource(paths)
        except RuntimeError:
            self._name_damaged_file()
            raise
        if len(self._records) != expected:
            raise InputError(
                f"{directory / 'train'}: holds {len(self._records)} instances, the manifest says "
                f"{expected}; run prepare again into a new directory"
            )

    def _name_damaged_file(self) -> None:
        self._manifest.verify(self._directory, hashes=True, prefix="train/")

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: SupportsIndex) -> np.ndarray:
        try:
            record = self._records[index]
        except RuntimeError as error:
            self._name_damaged_file()
            raise InputError(
                f"{self._directory / 'train'}: instance {index} could not be read, although the "
                f"files match the manifest ({error}); check the disk"
            ) from None
        return decode_record(
            record, self._manifest.sequence_length, self._manifest.dtype, self._directory / "train"
        )


class TrainingBatches:
    """Training instances without end, in a new order in every epoch.

    Attributes:
      num_instances: instances in one epoch.
      batches_per_epoch: how many global batches an epoch fills (a fraction).
    """

    def __init__(
        self,
        instances: TrainingInstances,
        *,
        global_batch_size: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
    ):
        """`PreparedData.training_batches` makes it.

        Args:
          instances: what to draw from.
          global_batch_size: instances per step over all processes.
          seed: decides the order of the instances.
          process_index, process_count: this process reads the rows
            `[index * B, (index + 1) * B)` of each global batch.

        Raises:
          InputError: there are too few instances for one batch, or the batch is not divisible by
            the number of processes.
        """
        if global_batch_size % process_count:
            raise InputError(
                f"config.train.global_batch_size: got {global_batch_size}, must be a multiple of "
                f"the number of processes ({process_count})"
            )
        if len(instances) < global_batch_size:
            raise InputError(
                f"config.train.global_batch_size: got {global_batch_size}, must be at most the "
                f"number of training instances ({len(instances)}); prepare more documents, or "
                "lower config.train.global_batch_size or config.model.sequence_length"
            )
        self.num_instances = len(instances)
        self.batches_per_epoch = self.num_instances / global_batch_size
        self._instances = instances
        self._global_batch_size = global_batch_size
        self._process_index, self._process_count = process_index, process_count
        # Neighbouring seeds share no epochs: Grain shuffles epoch n with seed + n.
        self._seed = int(np.random.SeedSequence(seed).generate_state(1)[0])

    def iterate(self, start_step: int) -> Iterator[np.ndarray]:
        """Yields this process's batches, int32 `[B, L + 1]`, from `start_step` on, without end.

        Threads read ahead.
        """
        rows = self._global_batch_size // self._process_count
        batches = _shuffled(grain.MapDataset.source(self._instances), self._seed).batch(rows)
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
    """Draws batches two steps ahead of their use.

    An unreadable batch is therefore known before any process needs it, and all processes can
    stop at the same step.

    Attributes:
      damage: what is wrong with a batch that was drawn ahead, or None.
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
        """Returns the next batch; after `damage`, the batches drawn before it."""
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
