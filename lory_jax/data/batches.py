"""Batches for training, read with Grain from the shards of a prepared directory.

The batch at step s is a pure function of (seed, s, global batch size, mixture): the number of
processes that share it and the step at which a run starts or resumes do not matter, so the data
position of a run is one integer. B instances per batch and process, L + 1 tokens per instance.
"""

import bisect
import hashlib
import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol, SupportsIndex

import grain
import numpy as np
from grain.sources import ArrayRecordDataSource

from lory_jax.data.instances import decode_record
from lory_jax.data.manifest import Manifest
from lory_jax.data.mixture import FIELD, parse_mixture, whole_shares
from lory_jax.data.schedule import Schedule
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


class Instances(Protocol):
    """Instances by number."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: SupportsIndex) -> np.ndarray: ...


class JoinedInstances:
    """The instances of several sets, numbered one set after the other."""

    def __init__(self, sets: Sequence[Instances]):
        self._sets = sets
        self._starts = [0, *itertools.accumulate(map(len, sets))]

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: SupportsIndex) -> np.ndarray:
        number = int(index)
        which = bisect.bisect_right(self._starts, number) - 1
        return self._sets[which][number - self._starts[which]]


class TrainingBatches:
    """Training instances without end, in a new order in every epoch.

    With a mixture, every domain has its own epochs, and a schedule says which domain is next.

    Attributes:
      num_instances: instances in one epoch.
      batches_per_epoch: how many global batches an epoch fills (a fraction).
    """

    def __init__(
        self,
        instances: Instances,
        *,
        global_batch_size: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
        mixture: "Mixture | None" = None,
    ):
        """`PreparedData.training_batches` makes it.

        Args:
          instances: what to draw from.
          global_batch_size: instances per step over all processes.
          seed: decides the order of the instances.
          process_index, process_count: this process reads the rows
            `[index * B, (index + 1) * B)` of each global batch.
          mixture: how much of which domain is drawn; None draws each instance once per epoch.

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
        self.mixture = mixture
        self._ids = (
            _shuffled_ids(self.num_instances, seed) if mixture is None else mixture.ids(seed)
        )

    def iterate(self, start_step: int) -> Iterator[np.ndarray]:
        """Yields this process's batches, int32 `[B, L + 1]`, from `start_step` on, without end.

        Threads read ahead.
        """
        rows = self._global_batch_size // self._process_count
        batches = self._ids.map(self._instances.__getitem__).batch(rows)
        first = start_step * self._process_count + self._process_index
        mine = batches.slice(slice(first, None, self._process_count))
        options = grain.ReadOptions(
            num_threads=READ_THREADS, prefetch_buffer_size=PREFETCHED_BATCHES
        )
        yield from mine.to_iter_dataset(options)

    def record_ids(self, step: int) -> np.ndarray:
        """Returns which instances make the global batch of `step`, int64 `[global batch]`."""
        first = step * self._global_batch_size
        return np.array(
            [self._ids[first + row] for row in range(self._global_batch_size)], np.int64
        )


class Mixture:
    """How the instances of several domains are mixed.

    Attributes:
      shares: of the instances that are drawn, by domain.
      sizes: instances of each of these domains.
      left_out: domains that are not drawn from.
    """

    def __init__(self, text: str, domains_N: np.ndarray, names: Sequence[str]):
        """Reads `config.data.mixture`.

        Args:
          text: "name=weight,…".
          domains_N: the domain of each instance, as an index into `names`.
          names: the domains of the data.

        Raises:
          ConfigError: the text has another form.
          InputError: it names a domain that the data do not have, or that fills no instance.
        """
        counts = whole_shares(parse_mixture(text))
        self._schedule = Schedule(list(counts.values()))
        self._members: dict[str, np.ndarray] = {}
        for name in counts:
            if name not in names:
                raise InputError(
                    f"{FIELD}: got domain {name!r}, must be one of {', '.join(names)[:300]}"
                )
            self._members[name] = np.flatnonzero(domains_N == list(names).index(name))
            if not len(self._members[name]):
                raise InputError(f"{FIELD}: no training instance is mostly of domain {name!r}")
        total = sum(counts.values())
        self.shares = {name: count / total for name, count in counts.items()}
        self.sizes = {name: len(members) for name, members in self._members.items()}
        self.left_out = [name for name in names if name not in counts]

    def ids(self, seed: int) -> grain.MapDataset:
        """The numbers of the instances at all positions."""
        streams = [
            _shuffled(grain.MapDataset.source(members), _seed(seed, name))
            for name, members in self._members.items()
        ]

        def at(position: int) -> int:
            domain, index = self._schedule.at(position)
            return int(streams[domain][index])

        return grain.MapDataset.range(ENDLESS).map(at)

    def describe(self, num_instances: int) -> str:
        """Says how many epochs of each domain there are in a run of so many instances."""
        lines = [
            f"  {name}: {share:.2%} of the instances, "
            f"{num_instances * share / self.sizes[name]:.2f} epochs of {self.sizes[name]:,}"
            for name, share in self.shares.items()
        ]
        if self.left_out:
            lines.append(f"  left out: {', '.join(self.left_out)}")
        return "mixture:\n" + "\n".join(lines)


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


def _shuffled_ids(num_instances: int, seed: int) -> grain.MapDataset:
    # Neighbouring seeds share no epochs: Grain shuffles epoch n with seed + n.
    return _shuffled(
        grain.MapDataset.range(num_instances),
        int(np.random.SeedSequence(seed).generate_state(1)[0]),
    )


def _seed(seed: int, domain: str) -> int:
    """The seed of a domain, which other domains of the mixture do not change."""
    name = int.from_bytes(hashlib.sha256(domain.encode()).digest()[:8])
    return int(np.random.SeedSequence([seed, name]).generate_state(1)[0])


def _shuffled(elements: grain.MapDataset, seed: int) -> grain.MapDataset:
    epochs = ENDLESS // len(elements) + 1
    return elements.shuffle(seed=seed).repeat(epochs, reseed_each_epoch=True)
