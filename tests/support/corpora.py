"""Corpora of made-up words, and `prepare` on them in this process or in a process of its own."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from lory_jax import prepare
from lory_jax.preparation.stages import inputs
from tests.support.tiny import ROOT

TOPICS = 8
WORDS = [f"w{i}" for i in range(1000)]
SETTINGS = [
    "--config.model.vocab_size=300",
    "--config.model.sequence_length=64",
    "--config.model.segment_length=16",
    "--config.data.validation_fraction=0.1",
    "--config.data.test_fraction=0.1",
    "--config.data.confirmation_fraction=0",
    "--config.data.embedding_dim=8",
    "--config.data.num_neighbors=5",
]
SHARDED = [*SETTINGS, "--config.data.shard_documents=120"]
TASK_BYTES = 20_000  # instead of 64 MiB, so that a small corpus has several tasks


def write_corpus(directory: Path, documents: int = 480, files: int = 4, seed: int = 0) -> Path:
    """Writes documents of several topics, each of words of its own, in three domains."""
    rng = random.Random(seed)
    directory.mkdir(parents=True)
    for part in range(files):
        with (directory / f"part-{part}.jsonl").open("w") as file:
            for i in range(documents // files):
                topic = rng.randrange(TOPICS)
                words = WORDS[topic * 120 : topic * 120 + 150]
                record = {
                    "text": " ".join(rng.choices(words, k=50)) + f" {part} {i}",
                    "domain": f"domain{topic % 3}",
                    "source": f"source-{rng.randrange(40)}",
                }
                file.write(json.dumps(record) + "\n")
    return directory


def prepare_here(source: Path, out: Path, *flags: str) -> dict[str, bytes]:
    """Runs `prepare` in this process, with small tasks; returns the files of the result."""
    before, inputs.TASK_BYTES = inputs.TASK_BYTES, TASK_BYTES
    try:
        prepare.main([f"--source={source}", f"--out={out}", *flags])
    finally:
        inputs.TASK_BYTES = before
    return contents(out)


def start_prepare(
    source: Path, out: Path, *flags: str, python: str = sys.executable
) -> subprocess.Popen[str]:
    """Starts `prepare` with small tasks in a process of its own, the leader of a new group."""
    code = (
        "import sys; from lory_jax import cli, prepare\n"
        "from lory_jax.preparation.stages import inputs\n"
        f"inputs.TASK_BYTES = {TASK_BYTES}\n"
        "cli.run(prepare.main)\n"
    )
    return subprocess.Popen(
        [python, "-c", code, f"--source={source}", f"--out={out}", *flags],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def contents(directory: Path) -> dict[str, bytes]:
    """Returns the bytes of every file but the timings."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in files
        if path.name != "timings.json"
    }


def read_drop_lists(directory: Path) -> list[dict[str, str]]:
    """Returns the lines of all drop lists of a prepared directory."""
    lists = sorted((directory / "dropped").glob("*.jsonl"))
    return [json.loads(line) for path in lists for line in path.read_text().splitlines()]


def write_records(path: Path, records: Sequence[dict[str, str]]) -> Path:
    """Writes a JSON-lines file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
