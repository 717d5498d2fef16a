"""What commit a8b7418 prepared still trains, and today's `prepare` writes the same instances.

The archive is what `prepare` of that commit wrote for `write_corpus`, with SETTINGS.
"""

import json
import math
import random
import tarfile
from pathlib import Path

import pytest

from lory_jax import prepare
from lory_jax.data.manifest import Manifest
from tests.support.tiny import verb, write_recipe

ARCHIVE = Path(__file__).parent / "earlier" / "prepared_by_a8b7418.tar.gz"
WORDS = {
    "code": ["def", "return", "self", "import", "class", "None", "while", "yield", "lambda"],
    "prose": ["the", "river", "was", "slow", "and", "quiet", "under", "an", "old", "bridge"],
}
SETTINGS = [
    "--config.model.vocab_size=300",
    "--config.model.sequence_length=24",
    "--config.model.segment_length=8",
    "--config.data.validation_fraction=0.1",
    "--config.data.test_fraction=0.1",
    "--config.data.embedding_dim=8",
    "--config.data.num_neighbors=5",
    "--config.data.min_document_bytes=1",
]
# What that commit did not do.
NEW = ["--config.data.drop_near_duplicates=false", "--config.data.confirmation_fraction=0"]


def write_corpus(path):
    rng = random.Random(0)
    with open(path, "w") as file:
        for domain, words in WORDS.items():
            for i in range(80):
                text = " ".join(rng.choices(words, k=30)) + f" {domain} {i}"
                record = {"text": text, "domain": domain, "source": f"{domain}-{i % 20}"}
                file.write(json.dumps(record) + "\n")


@pytest.fixture
def earlier(tmp_path):
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "prepared"


def test_data_of_an_earlier_version_train_and_are_evaluated(earlier, tmp_path):
    recipe, run, result = write_recipe(tmp_path), tmp_path / "run", tmp_path / "result.json"
    trained = verb("train", f"--config={recipe}", f"--data={earlier}", f"--workdir={run}")
    assert trained.returncode == 0, trained.stderr
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0] < 1.2 * math.log(300)
    evaluated = verb("evaluate", f"--workdir={run}", f"--out={result}")
    assert evaluated.returncode == 0, evaluated.stderr
    assert set(json.loads(result.read_text())["perplexity"]) >= {"code", "prose"}


def test_one_shard_has_the_instances_and_the_order_of_an_earlier_version(earlier, tmp_path):
    corpus, out = tmp_path / "corpus.jsonl", tmp_path / "today"
    write_corpus(corpus)
    prepare.main([f"--source={corpus}", f"--out={out}", *SETTINGS, *NEW])
    was, now = (
        Manifest.from_json((directory / "manifest.json").read_bytes(), directory).files
        for directory in (earlier, out)
    )
    assert len(was) == 6  # the tokenizer, train, and two domains of two sets
    assert {name: now[name] for name in was} == was
