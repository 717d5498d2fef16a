"""A prepared directory whose training instance i is filled with the number i."""

from pathlib import Path

import numpy as np

from lory_jax.data.manifest import Manifest, describe_files, domain_directory, write_manifest
from lory_jax.preparation.packing import write_shards
from lory_jax.preparation.tokenizer_training import train_tokenizer

LENGTH = 7
INSTANCES = 23
DOMAINS = ["c++", "man/1 pages", ".hidden"]  # domain d has d + 1 instances, filled with 100 + d


def write_numbered(directory: Path) -> Path:
    """Writes `INSTANCES` instances into three shards, and both evaluation splits."""
    tokenizer = train_tokenizer(["some text"], 300)
    train = np.repeat(np.arange(INSTANCES, dtype="<u2")[:, None], LENGTH + 1, axis=1)
    write_shards(directory / "train", train, per_shard=9)
    counts: dict = {"train": {"instances": INSTANCES, "domains": {}}}
    for split in ("validation", "test"):
        for d, domain in enumerate(DOMAINS):
            rows = np.full((d + 1, LENGTH + 1), 100 + d, "<u2")
            write_shards(directory / split / domain_directory(domain), rows, per_shard=9)
        counts[split] = {"domains": {domain: {} for domain in DOMAINS}}
    tokenizer.save(directory / "tokenizer.json")
    files = describe_files(directory)
    write_manifest(Manifest({}, LENGTH, tokenizer.vocab_size, counts, {}, files), directory)
    return directory
