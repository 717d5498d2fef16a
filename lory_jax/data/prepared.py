"""`PreparedData`: what `prepare` wrote, opened once and passed to whatever reads it."""

import fcntl
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lory_jax.console import progress
from lory_jax.data.batches import Instances, Mixture, TrainingBatches, TrainingInstances
from lory_jax.data.instances import (
    INSTANCE_DOMAINS_NAME,
    read_instance_domains,
    read_instances,
)
from lory_jax.data.manifest import (
    MANIFEST_NAME,
    ORIGINS_NAME,
    TOKENIZER_NAME,
    Manifest,
    domain_directory,
    file_sha256,
)
from lory_jax.data.tokenizer import Tokenizer
from lory_jax.errors import InputError
from lory_jax.storage import cache_directory, fetch, is_remote, storage_path


class PreparedData:
    """A prepared directory, local or in an object store.

    `open` reads the manifest once; nothing else in the package reads it. Tokens are read on demand.
    Files in an object store are copied to the cache first.

    Attributes:
      directory: where it is.
      manifest: what it holds.
      digest: SHA-256 of the bytes of `manifest.json`, which identifies the data: a run stores it.
    """

    def __init__(self, directory: Path, manifest: Manifest, digest: str):
        """Use `open`."""
        self.directory = directory
        self.manifest = manifest
        self.digest = digest

    @classmethod
    def open(cls, directory: str | Path) -> "PreparedData":
        """Reads the manifest of a prepared directory.

        Args:
          directory: where it lies; "A,B" joins several, which must have one tokenizer and one
            sequence length (data/joined.py).

        Raises:
          InputError: the directory is missing or not prepared, or the manifest is malformed, of
            another version, or names a file outside the directory.
        """
        if len(directories := split_directories(directory)) > 1:
            from lory_jax.data.joined import JoinedData

            return JoinedData([cls.open(part) for part in directories])
        directory = storage_path(directory)
        if not is_remote(directory) and not directory.is_dir():
            raise InputError(
                f"{directory}: no such directory; make it with python -m lory_jax.prepare"
            )
        path = directory / MANIFEST_NAME
        try:
            contents = path.read_bytes()
        except FileNotFoundError:
            raise InputError(
                f"{directory}: has no {MANIFEST_NAME}: not prepared, or prepare was interrupted"
            ) from None
        manifest = Manifest.from_json(contents, path)
        return cls(directory, manifest, hashlib.sha256(contents).hexdigest())

    @property
    def is_remote(self) -> bool:
        """Whether the directory is in an object store."""
        return is_remote(self.directory)

    @property
    def address(self) -> str:
        """What `open` finds these data by, from any working directory."""
        return str(self.directory if self.is_remote else self.directory.resolve())

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the data; raises `InputError` unless it is the one in the manifest."""
        tokenizer = Tokenizer.load(self.local_files("tokenizer") / TOKENIZER_NAME)
        expected = self.manifest.files.get(TOKENIZER_NAME, {}).get("sha256")
        if tokenizer.sha256 != expected:
            raise InputError(
                f"{self.directory / TOKENIZER_NAME}: does not match {MANIFEST_NAME} "
                f"(SHA-256 {tokenizer.sha256[:12]}…, must be {str(expected)[:12]}…): "
                "the shards were made with another tokenizer"
            )
        return tokenizer

    def check_model_fits(self, *, sequence_length: int, vocab_size: int) -> None:
        """Raises `InputError` unless a model of these sizes can read the instances."""
        if sequence_length != self.manifest.sequence_length:
            raise InputError(
                f"config.model.sequence_length: got {sequence_length}, must be that of the "
                f"prepared instances ({self.manifest.sequence_length})"
            )
        if vocab_size < self.manifest.vocab_size:
            raise InputError(
                f"config.model.vocab_size: got {vocab_size}, must be at least that of the "
                f"prepared tokenizer ({self.manifest.vocab_size})"
            )

    def training_batches(
        self,
        *,
        sequence_length: int,
        vocab_size: int,
        global_batch_size: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
        mixture: str = "",
    ) -> TrainingBatches:
        """Opens the training shards.

        Args:
          sequence_length: L of the model; must be that of the instances.
          vocab_size: that of the model; must cover the tokenizer's.
          global_batch_size: instances per step over all processes.
          seed: decides the order of the instances.
          process_index, process_count: which rows of each global batch this process reads.
          mixture: `config.data.mixture`; "" draws each instance once per epoch.

        Raises:
          InputError: the shards are missing or damaged, there are too few instances for one batch,
            the model does not fit, the batch is not divisible by the number of processes, or the
            mixture does not fit the domains.
        """
        self.check_model_fits(sequence_length=sequence_length, vocab_size=vocab_size)
        return TrainingBatches(
            self.training_instances(),
            global_batch_size=global_batch_size,
            seed=seed,
            process_index=process_index,
            process_count=process_count,
            mixture=Mixture(mixture, *self.training_domains()) if mixture else None,
        )

    def training_instances(self) -> Instances:
        """The training instances by number; raises `InputError` if a shard is damaged."""
        return TrainingInstances(self.manifest, self.local_files("train/"))

    def training_domains(self) -> tuple[np.ndarray, list[str]]:
        """Returns the domain of each training instance, as an index into the names returned.

        Raises:
          InputError: the data do not say, because an earlier version prepared them.
        """
        if INSTANCE_DOMAINS_NAME not in self.manifest.files:
            raise InputError(
                f"config.data.mixture: {self.directory} does not say which domain its instances "
                "are of; prepare the documents again, or leave the field empty"
            )
        train = self.manifest.counts["train"]
        names = sorted(train["domains"])
        path = self.local_files(INSTANCE_DOMAINS_NAME) / INSTANCE_DOMAINS_NAME
        self.manifest.verify(path.parent, hashes=True, prefix=INSTANCE_DOMAINS_NAME)
        return read_instance_domains(path, train["instances"], len(names)), names

    def held_out(self, split: str) -> dict[str, np.ndarray]:
        """Returns the instances of each domain, int32 `[N, L + 1]`, domains sorted by name.

        Args:
          split: "validation" (for choices), "test" (for reports) or "confirmation".

        Raises:
          InputError: there is no such split, or a file is missing or damaged.
        """
        if split not in self.manifest.counts:
            raise InputError(
                f"{self.directory}: has no {split} split; prepare the documents with "
                f"config.data.{split}_fraction above 0"
            )
        local = self.local_files(f"{split}/")
        self.manifest.verify(local, hashes=False, prefix=f"{split}/")
        return {
            domain: read_instances(
                local / split / domain_directory(domain),
                self.manifest.sequence_length,
                self.manifest.dtype,
            )
            for domain in sorted(self.manifest.counts[split]["domains"])
        }

    def held_out_with_instances(self, split: str) -> dict[str, np.ndarray]:
        """Returns `held_out` without the domains that have no instance.

        Domains that are left out are named on standard error.

        Raises:
          InputError: no domain has an instance, or a file is missing or damaged.
        """
        sets = self.held_out(split)
        empty = [domain for domain, rows in sets.items() if not len(rows)]
        if len(empty) == len(sets):
            raise InputError(
                f"{self.directory}: no instance in the {split} split; prepare more documents"
            )
        if empty:
            print(
                f"left out, with too few tokens for one {split} instance: {', '.join(empty)}",
                file=sys.stderr,
            )
        return {domain: rows for domain, rows in sets.items() if len(rows)}

    def held_out_origins(self, split: str) -> dict[str, list[str]]:
        """Returns the origin of each instance of each domain, in the order of `held_out`.

        It is the origin of the document that holds most of the instance. Directories of earlier
        versions do not say it: there every instance has an origin of its own.

        Raises:
          InputError: a file is missing or damaged.
        """
        local = self.local_files(f"{split}/")
        found = {}
        for domain, counts in sorted(self.manifest.counts[split]["domains"].items()):
            name = f"{split}/{domain_directory(domain)}/{ORIGINS_NAME}"
            if name in self.manifest.files:
                self.manifest.verify(local, hashes=False, prefix=name)
                found[domain] = json.loads((local / name).read_text("utf-8"))
            else:
                found[domain] = [f"instance {i}" for i in range(counts["instances"])]
        return found

    def verify(self, *, hashes: bool, prefix: str = "") -> None:
        """Checks that files exist with the right size and, with `hashes`, the right SHA-256.

        Only files whose name begins with `prefix`, such as "train/", are checked. Remote ones are
        copied to the cache, which checks their hashes in any case.

        Raises:
          InputError: names the first file that is missing or differs.
        """
        self.manifest.verify(self.local_files(prefix), hashes=hashes, prefix=prefix)

    def local_files(self, prefix: str) -> Path:
        """Returns a local directory with the files whose name begins with `prefix`.

        ArrayRecord reads local files only. This is the directory itself or, if it is remote, a copy
        in the cache, which is shared by the processes of a host and kept for later runs. Files are
        checked by their SHA-256 when they are copied.

        Raises:
          InputError: a remote file is missing or damaged, or the disk of the cache is too small.
        """
        if not self.is_remote:
            return self.directory
        files = self.manifest.files
        key = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:16]
        copy = cache_directory() / "data" / key
        copy.mkdir(parents=True, exist_ok=True)
        with open(copy / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            names = self.manifest.names(prefix)
            missing = [name for name in names if not (copy / name).is_file()]
            _check_space(copy, sum(files[name]["bytes"] for name in missing))
            label = f"copying {self.directory}"
            for name in progress(missing, len(missing), label, "files") if missing else []:
                _fetch_verified(self.directory / name, copy / name, files[name])
        return copy


def split_directories(directory: str | Path) -> list[str]:
    """Returns the directories that "A,B" joins; a directory may have a comma in its name."""
    text = str(directory)
    if "," not in text or (not is_remote(text) and Path(text).is_dir()):
        return [text]
    # A path keeps one slash only of the second address.
    return [re.sub(r"^(gs|s3):/(?!/)", r"\1://", part) for part in text.split(",")]


def _check_space(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise InputError(
            f"{directory}: {free:,} bytes are free, the data require {needed:,}; set LORY_CACHE to "
            "a directory on a larger disk"
        )


def _fetch_verified(source: Path, target: Path, entry: Mapping[str, Any]) -> None:
    unverified = target.with_name(target.name + ".unverified")
    try:
        fetch(source, unverified)
    except FileNotFoundError:
        raise InputError(f"{source}: missing; copy the prepared directory again") from None
    if file_sha256(unverified) != entry["sha256"]:
        unverified.unlink()
        raise InputError(
            f"{source}: damaged (its SHA-256 is not the one in the manifest); copy it again"
        )
    unverified.replace(target)
