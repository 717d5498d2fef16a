"""A tiny prepared directory and a tiny recipe for tests that train for real."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from lory_jax.data.manifest import Manifest, describe_files, write_manifest
from lory_jax.preparation.packing import write_instance_domains, write_shards
from lory_jax.preparation.tokenizer_training import train_tokenizer

ROOT = Path(__file__).resolve().parent.parent.parent
SEQUENCE_LENGTH = 24
VOCAB_SIZE = 300

RECIPE = f"""
from lory_jax.config import base_config, parse_argument

def get_config(argument=None):
    config = base_config()
    config.model.num_experts = parse_argument(argument, experts=4)["experts"]
    config.model.vocab_size = {VOCAB_SIZE}
    config.model.num_layers = 2
    config.model.embed_dim = 16
    config.model.num_heads = 2
    config.model.mlp_dim = 24
    config.model.sequence_length = {SEQUENCE_LENGTH}
    config.model.segment_length = 8
    config.model.compute_dtype = "float32"
    config.train.steps = 12
    config.train.global_batch_size = 4
    config.train.learning_rate = 1e-2
    config.train.dense_warmup_fraction = 0.25
    config.train.log_every_steps = 4
    config.train.validate_every_steps = 6
    config.train.validation_batches = 1
    config.checkpoint.every_steps = 3
    return config
"""


def write_recipe(directory: Path) -> Path:
    """Writes the recipe to `directory`/tiny.py."""
    path = directory / "tiny.py"
    path.write_text(RECIPE)
    return path


def write_prepared(
    directory: Path,
    instances: int = 64,
    seed: int = 0,
    with_domains: bool = False,
    with_confirmation: bool = False,
) -> Path:
    """A prepared directory of learnable noise: each domain counts in steps of its own.

    `with_domains` adds the domain of each training instance, for mixtures; `with_confirmation` adds
    the fourth split.
    """
    directory.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    tokenizer = train_tokenizer(["counting by steps, in words and in numbers"] * 3, VOCAB_SIZE)
    tokenizer.save(directory / "tokenizer.json")
    counts: dict = {}
    held_out = ("validation", "test", *(("confirmation",) if with_confirmation else ()))
    for split, size in (("train", instances), *((split, 6) for split in held_out)):
        counts[split] = {"domains": {}, "instances": 0, "dropped_tokens": 0}
        rows = {}
        for stride, domain in ((1, "ones"), (3, "threes")):
            start = rng.integers(2, 256, (size // 2, 1))
            rows[domain] = (2 + (start + stride * np.arange(SEQUENCE_LENGTH + 1)) % 254).astype(
                np.uint16
            )
            counts[split]["domains"][domain] = {
                "documents": size // 2,
                "tokens": rows[domain].size,
                "bytes": rows[domain].size,
                "instances": size // 2,
            }
            counts[split]["instances"] += size // 2
            if split != "train":
                write_shards(directory / split / domain, rows[domain], 8192)
        if split == "train":
            write_shards(directory / split, np.concatenate(list(rows.values())), 8192)
            if with_domains:
                write_instance_domains(directory, np.repeat([0, 1], size // 2))
    manifest = Manifest(
        settings={"seed": seed},
        sequence_length=SEQUENCE_LENGTH,
        vocab_size=tokenizer.vocab_size,
        counts=counts,
        similarity={},
        files=describe_files(directory),
    )
    write_manifest(manifest, directory)
    return directory


def metric_line(step: int) -> dict[str, Any]:
    """A line of metrics.jsonl with what every line has that is read again."""
    return {"step": step, "tokens": 9 * step, "loss": 1.0, "step_seconds": 0.1} | {
        "experts_active": None
    }


def verb(name: str, *arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Runs `python -m lory_jax.NAME` as a user would, and returns what it printed."""
    return subprocess.run(
        verb_command(name, *arguments),
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=ROOT,
        env=verb_environment(),
    )


def verb_command(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", f"lory_jax.{name}", *arguments]


def verb_environment() -> dict[str, str]:
    return {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUMPY_RANK_PROMOTION": "raise"}


def run_worker(name: str, *arguments: str) -> Any:
    """The JSON that a script of tests/ prints, in a process with fake devices of its own."""
    result = subprocess.run(
        [sys.executable, "-m", f"tests.support.{name}", *arguments],
        capture_output=True,
        text=True,
        timeout=1800,
        env=verb_environment() | {"PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def assert_one_line_error(
    result: subprocess.CompletedProcess[str], status: int, *words: str
) -> None:
    """The process ended with this status and one line on standard error that holds the words."""
    assert result.returncode == status, result.stderr
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    for word in words:
        assert word in lines[0], lines[0]
