"""The results of finished runs: one small JSON file each, and the losses of its instances.

RUNS/ID.json         settings, seed, curve, losses by domain, seconds, FLOPs
RUNS/ID.npz          the loss of every held-out instance, float16, as SPLIT/DOMAIN, and mean
                     routing weights of every validation folder, as routing/DOMAIN, if measured
RUNS/held_out/CORPUS.json  the digest of the held-out sets, and the origin of every instance
"""

import io
import itertools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lory_jax.data.prepared import PreparedData
from lory_jax.errors import InputError
from lory_jax.storage import write_atomically

FIRST_CORPUS, SECOND_CORPUS = "packages", "debian"  # everything is tuned on the first
SPLITS = ("validation", "test", "confirmation")

Record = dict[str, Any]
Losses = dict[str, np.ndarray]  # by domain


class Results:
    """The directory of finished runs."""

    def __init__(self, directory: Path):
        self.directory = directory

    def read(self, run_id: str) -> Record | None:
        """The record of a finished run, or None."""
        path = self.directory / f"{run_id}.json"
        return json.loads(path.read_text("utf-8")) if path.is_file() else None

    def write(self, record: Record, instances: Mapping[str, Losses]) -> None:
        """Writes a finished run. Its JSON file comes last, because it marks the run as finished."""
        self.directory.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, Any] = {
            f"{split}/{domain}": loss_N.astype(np.float16)
            for split, losses in instances.items()
            for domain, loss_N in losses.items()
        }
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        path = self.directory / f"{record['id']}.json"
        write_atomically(path.with_suffix(".npz"), buffer.getvalue())
        write_atomically(path, json.dumps(record, indent=1) + "\n")

    def records(self, corpus: str = FIRST_CORPUS) -> list[Record]:
        """All finished runs on a corpus, by name."""
        found = [json.loads(p.read_text("utf-8")) for p in sorted(self.directory.glob("*.json"))]
        return [record for record in found if record["corpus"] == corpus]

    def instances(self, run_id: str, split: str) -> Losses:
        """The loss of every instance of a split, by domain; empty if it was not measured.

        Of the split "routing", mean weights of every folder: `[O, Y, E]`.
        """
        with np.load(self.directory / f"{run_id}.npz", allow_pickle=False) as arrays:
            names = [name for name in arrays.files if name.rpartition("/")[0] == split]
            return {name.rpartition("/")[2]: arrays[name].astype(np.float64) for name in names}

    def held_out(self, corpus: str = FIRST_CORPUS) -> dict[str, Any]:
        """What `bind` noted of a corpus: the digest of its held-out sets, and their origins."""
        path = self._held_out_file(corpus)
        if not path.is_file():
            raise InputError(f"{path}: missing; no run has been made yet")
        return json.loads(path.read_text("utf-8"))

    def _held_out_file(self, corpus: str) -> Path:
        return self.directory / "held_out" / f"{corpus}.json"

    def bind(self, data: PreparedData, corpus: str = FIRST_CORPUS) -> None:
        """Ties a corpus to the held-out sets of `data`, or checks that it is tied to them.

        Raises:
          InputError: the finished runs were measured on other documents, so no pair can be formed.
        """
        found = describe_held_out(data)
        path = self._held_out_file(corpus)
        noted = self.held_out(corpus) if path.is_file() else None
        if noted is not None and noted["digest"] != found["digest"]:
            raise InputError(
                f"out: the runs in {self.directory} were measured on other held-out documents than "
                f"those of {data.directory}; give another directory"
            )
        if noted != found:  # none yet, or origins numbered as earlier versions did
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(found) + "\n")


def describe_held_out(data: PreparedData) -> dict[str, Any]:
    """What identifies the held-out sets of prepared data, and where their instances come from.

    Origins are numbered by split, over all domains: one folder may hold documents of several.
    """
    digests, origins = {}, {}
    for split in SPLITS:
        if split not in data.manifest.counts:
            continue
        digests[split] = {
            name: data.manifest.files[name]["sha256"] for name in data.manifest.names(f"{split}/")
        }
        named = data.held_out_origins(split)
        numbers = {name: i for i, name in enumerate(sorted({*itertools.chain(*named.values())}))}
        origins[split] = {domain: [numbers[n] for n in names] for domain, names in named.items()}
    return {"digest": _digest(digests), "origins": origins}


def training_digest(data: Path) -> str:
    """What identifies the training instances of prepared data, and their order."""
    manifest = PreparedData.open(data).manifest
    names = manifest.names("train/")
    return _digest({name: manifest.files[name]["sha256"] for name in names})


def _digest(value: Any) -> str:
    import hashlib

    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def run_id(arm: str, seed: int, corpus: str = FIRST_CORPUS) -> str:
    """The name of a run of an arm."""
    prefix = "" if corpus == FIRST_CORPUS else f"{corpus}-"
    return f"{prefix}{arm}-s{seed}"


def mean_loss(record: Record, split: str = "validation") -> float:
    """The mean over the domains of a run's losses; infinite for a run that diverged."""
    if record["status"] == "diverged":
        return math.inf
    losses = record["losses"][split]
    return math.fsum(losses.values()) / len(losses)
