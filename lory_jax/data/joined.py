"""Several prepared directories as one set of training data."""

import hashlib
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lory_jax.data.batches import Instances, JoinedInstances
from lory_jax.data.manifest import Manifest
from lory_jax.data.prepared import PreparedData
from lory_jax.data.tokenizer import Tokenizer
from lory_jax.errors import InputError


class JoinedData(PreparedData):
    """The instances of several prepared directories; domains of one name are one domain.

    Attributes:
      parts: the directories, in the order given, which numbers the instances.
    """

    def __init__(self, parts: Sequence[PreparedData]):
        """`PreparedData.open("A,B")` makes it.

        Raises:
          InputError: the sequence lengths or the tokenizers differ, or a directory is named twice.
        """
        self.parts = parts
        first = parts[0]
        for part in parts[1:]:
            if part.manifest.sequence_length != first.manifest.sequence_length:
                raise InputError(
                    f"data: {part.directory} has instances of {part.manifest.sequence_length} "
                    f"tokens, must have those of {first.directory} "
                    f"({first.manifest.sequence_length})"
                )
            if not part.tokenizer.same_ids(first.tokenizer):
                raise InputError(
                    f"data: {part.directory} was made with another tokenizer than "
                    f"{first.directory}; prepare it with tokenizer={first.directory}/tokenizer.json"
                )
        digests = [part.digest for part in parts]
        if len(set(digests)) < len(digests):
            raise InputError(f"data: {self._names()} holds the same data twice")
        digest = hashlib.sha256("\n".join(digests).encode()).hexdigest()
        super().__init__(Path(self._names()), _join_manifests(parts), digest)

    def _names(self) -> str:
        return ",".join(str(part.directory) for part in self.parts)

    @property
    def address(self) -> str:
        """The directories, from any working directory, with commas between them."""
        return ",".join(part.address for part in self.parts)

    @property
    def is_remote(self) -> bool:
        """Whether one of the directories is in an object store."""
        return any(part.is_remote for part in self.parts)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of all directories."""
        return self.parts[0].tokenizer

    def training_instances(self) -> Instances:
        """The training instances of all directories."""
        return JoinedInstances([part.training_instances() for part in self.parts])

    def training_domains(self) -> tuple[np.ndarray, list[str]]:
        """Returns the domain of each training instance, as an index into the names returned."""
        found = [part.training_domains() for part in self.parts]
        names = sorted({name for _, part_names in found for name in part_names})
        numbers = [
            np.array([names.index(name) for name in part_names], np.int64)[domains_N]
            for domains_N, part_names in found
        ]
        return np.concatenate(numbers), names

    def held_out(self, split: str) -> dict[str, np.ndarray]:
        """Returns the instances of each domain of all directories, int32 `[N, L + 1]`."""
        sets = [part.held_out(split) for part in self.parts]
        domains = sorted(set().union(*sets))
        return {
            domain: np.concatenate([rows[domain] for rows in sets if domain in rows])
            for domain in domains
        }

    def held_out_origins(self, split: str) -> dict[str, list[str]]:
        """Returns the origin of each instance of `held_out`; directories share no origins."""
        found: dict[str, list[str]] = {}
        for number, part in enumerate(self.parts):
            for domain, origins in part.held_out_origins(split).items():
                found.setdefault(domain, []).extend(f"{number}: {origin}" for origin in origins)
        return dict(sorted(found.items()))

    def verify(self, *, hashes: bool, prefix: str = "") -> None:
        """Checks the files of all directories."""
        for part in self.parts:
            part.verify(hashes=hashes, prefix=prefix)

    def local_files(self, prefix: str) -> Path:
        """Several directories have no single copy: ask the parts."""
        raise TypeError(f"{self._names()} are several directories")


def _join_manifests(parts: Sequence[PreparedData]) -> Manifest:
    """What the directories hold together; names of files begin with the number of the directory."""
    manifests = [part.manifest for part in parts]
    splits = sorted(set().union(*(manifest.counts for manifest in manifests)))
    return Manifest(
        settings={"joined": [part.digest for part in parts]},
        sequence_length=manifests[0].sequence_length,
        vocab_size=max(manifest.vocab_size for manifest in manifests),
        counts={split: _add(m.counts.get(split, {}) for m in manifests) for split in splits},
        similarity={},
        files={
            f"{i}/{name}": entry for i, m in enumerate(manifests) for name, entry in m.files.items()
        },
    )


def _add(counts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Adds nested counts."""
    total: dict[str, Any] = {}
    for part in counts:
        for name, value in part.items():
            if isinstance(value, dict):
                total[name] = _add([total.get(name, {}), value])
            elif isinstance(value, int):
                total[name] = total.get(name, 0) + value
    return total
