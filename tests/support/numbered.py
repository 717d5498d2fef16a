"""A prepared directory whose training instance i is filled with the number i."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lory_jax.data.manifest import Manifest, describe_files, domain_directory, write_manifest
from lory_jax.preparation.packing import write_instance_domains, write_shards
from lory_jax.preparation.tokenizer_training import train_tokenizer

LENGTH = 7
INSTANCES = 23
DOMAINS = ["c++", "man/1 pages", ".hidden"]  # domain d has d + 1 instances, filled with 100 + d


def write_numbered(
    directory: Path, domains: Sequence[str] = (), first: int = 0, text: str = "some text"
) -> Path:
    """Writes `INSTANCES` instances into three shards, and both evaluation splits.

    Args:
      directory: where to.
      domains: the domain of each training instance; if empty, the data do not say.
      first: the number in instance 0.
      text: what the tokenizer is trained on.
    """
    tokenizer = train_tokenizer([text], 300)
    numbers = np.arange(first, first + INSTANCES, dtype="<u2")
    write_shards(directory / "train", np.repeat(numbers[:, None], LENGTH + 1, axis=1), per_shard=9)
    names = sorted(set(domains))
    counts: dict = {
        "train": {"instances": INSTANCES, "domains": {name: {"documents": 1} for name in names}}
    }
    if names:
        write_instance_domains(directory, np.array([names.index(name) for name in domains]))
    for split in ("validation", "test"):
        for d, domain in enumerate(DOMAINS):
            rows = np.full((d + 1, LENGTH + 1), 100 + d, "<u2")
            write_shards(directory / split / domain_directory(domain), rows, per_shard=9)
        counts[split] = {"domains": {domain: {} for domain in DOMAINS}}
    tokenizer.save(directory / "tokenizer.json")
    files = describe_files(directory)
    write_manifest(Manifest({}, LENGTH, tokenizer.vocab_size, counts, {}, files), directory)
    return directory
