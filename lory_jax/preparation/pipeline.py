"""The stages from documents to shards.

N documents, D dimensions, K neighbours, T tokens of a stream.
"""

import contextlib
import importlib.util
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from lory_jax.console import duration
from lory_jax.data.manifest import (
    TOKENIZER_NAME,
    Manifest,
    describe_files,
    domain_directory,
    write_manifest,
    write_origins,
)
from lory_jax.data.tokenizer import Tokenizer
from lory_jax.errors import InputError
from lory_jax.preparation.documents import Document
from lory_jax.preparation.embedding.lsa import Embedder
from lory_jax.preparation.neighbors import find_neighbors
from lory_jax.preparation.ordering import order_by_similarity
from lory_jax.preparation.packing import (
    TokenizedDocuments,
    cut_instances,
    instance_origins,
    tokenize,
    write_shards,
)
from lory_jax.preparation.sources.corpus import read_corpus
from lory_jax.preparation.split import split_by_origin
from lory_jax.preparation.statistics import corpus_table, order_similarity, split_counts
from lory_jax.preparation.tokenizer_training import train_tokenizer

TRAIN = "train"

Splits = dict[str, list[Document]]


@dataclass(frozen=True)
class Orders:
    """The orders of the training documents that could be computed.

    Attributes:
      by_name: `random` and, where there are neighbours to follow, `similar`; int64 `[N]` each.
      vectors_NxD: the embedding of the documents.
      method: how neighbours were found, in words.
    """

    by_name: dict[str, np.ndarray]
    vectors_NxD: np.ndarray
    method: str


def make_settings(
    config: ConfigDict, source: str, order: str, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """Returns everything that decides what the files hold, apart from the documents themselves.

    Args:
      config: the whole config.
      source: where the documents come from, as for `read_corpus`.
      order: order of the training documents, "similar" or "random".
      tokenizer: the one to use; None trains one.

    Raises:
      InputError: the vocabulary of `tokenizer` is larger than that of the model.
    """
    if tokenizer and tokenizer.vocab_size > config.model.vocab_size:
        raise InputError(
            f"tokenizer: has {tokenizer.vocab_size} tokens, must have at most "
            f"config.model.vocab_size ({config.model.vocab_size})"
        )
    is_path = source != "python" and Path(source).exists()
    return {
        "source": str(Path(source).resolve()) if is_path else source,
        "order": order,
        "seed": config.train.seed,
        "sequence_length": config.model.sequence_length,
        "vocab_size": config.model.vocab_size,
        "tokenizer": tokenizer.identity if tokenizer else "trained",
        "data": {k: v for k, v in config.data.to_dict().items() if k != "mixture"},
    }


def prepare(
    settings: dict[str, Any], config: ConfigDict, given: Tokenizer | None, out: Path
) -> Manifest:
    """Writes everything that a prepared directory holds.

    Args:
      settings: what `make_settings` returned.
      config: the whole config.
      given: the tokenizer to use; None trains one.
      out: an empty directory.

    Raises:
      InputError: the documents cannot be read, or are too few.
    """
    seed, length = settings["seed"], settings["sequence_length"]
    stages = Stages()

    with stages.stage("documents"):
        splits = _read_splits(settings["source"], config, seed)
    texts = [document.text for document in splits["train"]]
    with stages.stage("tokenizer"):
        tokenizer = given or _train_tokenizer(texts, config, seed)
        tokenizer.save(out / TOKENIZER_NAME)
    with stages.stage("tokens"):
        tokenized = {
            split: tokenize([d.text for d in members], tokenizer, f"tokenizing {split}")
            for split, members in splits.items()
        }
    counts = {
        split: split_counts(members, tokenized[split], length, by_domain=split != "train")
        for split, members in splits.items()
    }
    _check_sizes(counts, splits, config)

    orders = _find_orders(texts, config.data, seed, settings["order"] == "similar", stages)
    similarity: dict[str, Any] = {"method": orders.method}
    for name, order_N in orders.by_name.items() if len(texts) > 1 else ():
        similarity[name] = order_similarity(
            splits["train"], orders.vectors_NxD, tokenized["train"], order_N, length
        )

    with stages.stage("instances"):
        per_shard = config.data.instances_per_shard
        stream_T = tokenized["train"].stream(orders.by_name[settings["order"]])
        write_shards(out / "train", cut_instances(stream_T, length), per_shard)
        for split in _evaluation_splits(splits):
            _write_by_domain(out / split, splits[split], tokenized[split], length, per_shard)

    # The manifest comes last, because its presence marks the directory as complete. The timings
    # come after the files are listed, because they differ from run to run.
    manifest = Manifest(
        settings, length, tokenizer.vocab_size, counts, similarity, describe_files(out)
    )
    (out / "timings.json").write_text(json.dumps(stages.seconds, indent=1) + "\n")
    write_manifest(manifest, out)
    return manifest


class Stages:
    """Times the stages and reports each on standard error.

    Attributes:
      seconds: what every stage so far has taken, by name.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times what is done inside the `with` block."""
        start = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - start, 2)
        print(f"{name}: {duration(self.seconds[name])}", file=sys.stderr)


def _read_splits(source: str, config: ConfigDict, seed: int) -> Splits:
    data = config.data
    documents = read_corpus(
        source,
        min_bytes=data.min_document_bytes,
        max_bytes=data.max_document_bytes,
        max_domain_bytes=data.max_domain_bytes,
        seed=seed,
    )
    print(corpus_table(documents))
    return split_by_origin(
        documents,
        validation_fraction=data.validation_fraction,
        test_fraction=data.test_fraction,
        confirmation_fraction=data.confirmation_fraction,
        seed=seed,
    )


def _evaluation_splits(splits: Splits) -> list[str]:
    return [split for split in splits if split != TRAIN]


def _train_tokenizer(texts: Sequence[str], config: ConfigDict, seed: int) -> Tokenizer:
    """Trains a tokenizer on a sample of the texts that the seed picks."""
    sample, size = [], 0
    for i in np.random.default_rng(seed).permutation(len(texts)):
        if size >= config.data.tokenizer_sample_bytes:
            break
        sample.append(texts[i])
        size += len(texts[i].encode())
    tokenizer = train_tokenizer(sample, config.model.vocab_size)
    if tokenizer.vocab_size < config.model.vocab_size:
        print(
            f"tokenizer: {size:,} bytes of text give {tokenizer.vocab_size} tokens, fewer than "
            f"config.model.vocab_size ({config.model.vocab_size})"
        )
    return tokenizer


def _check_sizes(counts: dict[str, Any], splits: Splits, config: ConfigDict) -> None:
    """Raises `InputError` unless training and every evaluation set have at least one instance."""
    length = config.model.sequence_length
    train = counts["train"]
    tokens = sum(domain["tokens"] for domain in train["domains"].values())
    if train["instances"] < 1:
        raise InputError(
            f"corpus too small: {len(splits['train'])} training documents with {tokens} tokens, "
            f"requires at least {length + 1} tokens; give more text or lower "
            "config.model.sequence_length"
        )
    domains = sorted({document.domain for members in splits.values() for document in members})
    for split in _evaluation_splits(splits):
        fraction = config.data[f"{split}_fraction"]
        for domain in domains if fraction > 0 else ():
            found = counts[split]["domains"].get(domain, {"tokens": 0, "instances": 0})
            if found["instances"] < 1:
                raise InputError(
                    f"corpus too small: domain {domain!r} has {found['tokens']} {split} tokens, "
                    f"requires at least {length + 1}; give more text from more origins, raise "
                    f"config.data.{split}_fraction ({fraction:g}) or lower "
                    "config.model.sequence_length"
                )


def _find_orders(
    texts: Sequence[str], data: ConfigDict, seed: int, requires_similar: bool, stages: Stages
) -> Orders:
    """Finds the random order and, if required or if ScaNN is installed, the similarity order."""
    if len(texts) == 1:
        return Orders(dict.fromkeys(("random", "similar"), np.zeros(1, int)), np.empty(0), "none")
    with stages.stage("embedding"):
        vectors_NxD = Embedder.fit(texts, dim=data.embedding_dim, seed=seed).embed(texts)
    by_name = {"random": np.random.default_rng(seed).permutation(len(texts))}
    if not requires_similar and importlib.util.find_spec("scann") is None:
        print("scann is not installed: no figures for the similarity order")
        return Orders(by_name, vectors_NxD, "none")
    with stages.stage("neighbours"):
        neighbors = find_neighbors(vectors_NxD, data.num_neighbors)
    print(f"neighbours found by {neighbors.method}")
    with stages.stage("order"):
        by_name["similar"] = order_by_similarity(
            neighbors.ids_NxK, neighbors.similarities_NxK, seed=seed
        )
    return Orders(by_name, vectors_NxD, neighbors.method)


def _write_by_domain(
    directory: Path,
    documents: Sequence[Document],
    tokenized: TokenizedDocuments,
    sequence_length: int,
    per_shard: int,
) -> None:
    """Writes the instances of each domain of an evaluation split into a directory of its own."""
    for domain in sorted({document.domain for document in documents}):
        # In natural order, the units of one file follow each other and read as one long text.
        mine = [i for i, document in enumerate(documents) if document.domain == domain]
        instances = cut_instances(tokenized.stream(np.array(mine)), sequence_length)
        write_shards(directory / domain_directory(domain), instances, per_shard)
        origins = instance_origins(
            tokenized.lengths_N[mine], [documents[i].origin for i in mine], sequence_length
        )
        write_origins(directory / domain_directory(domain), origins)
