"""Makes training instances and evaluation sets from documents.

    python -m lory_jax.prepare --out=DIR [--config=local] [--source=python]

Writes DIR/train/*.array_record, DIR/validation/<domain>/, DIR/test/<domain>/, DIR/tokenizer.json
and DIR/manifest.json. The same command again says that it is done.
"""

import argparse
import contextlib
import fcntl
import importlib.util
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from lory_jax.cli import Parser, run
from lory_jax.console import duration
from lory_jax.data.manifest import (
    MANIFEST_NAME,
    TOKENIZER_NAME,
    Manifest,
    describe_files,
    differences,
    domain_directory,
    read_manifest,
    summary,
    verify_files,
    write_manifest,
)
from lory_jax.data.tokenizer import Tokenizer
from lory_jax.errors import InputError
from lory_jax.preparation.documents import Document
from lory_jax.preparation.embedding.lsa import Embedder
from lory_jax.preparation.neighbors import find_neighbors
from lory_jax.preparation.ordering import consecutive_similarity, order_by_similarity
from lory_jax.preparation.packing import (
    TokenizedDocuments,
    count_instances,
    cut_instances,
    same_domain_rate,
    tokenize,
    write_shards,
)
from lory_jax.preparation.sources.corpus import corpus_table, read_corpus
from lory_jax.preparation.split import split_by_origin
from lory_jax.preparation.tokenizer_training import train_tokenizer


def main(argv: list[str]) -> None:
    parser = Parser("prepare", __doc__)
    parser.add_argument("--out", required=True, metavar="DIR", help="directory to make")
    parser.add_config_flag(default="local")
    parser.add_argument(
        "--source",
        default="python",
        metavar="python|DIR|FILE.jsonl|tfds:NAME/config:split",
        help="documents: those of this Python installation (default), a directory of text files "
        "(domain = top folder), JSON lines, or a TFDS data set",
    )
    parser.add_argument(
        "--order",
        default="similar",
        choices=("similar", "random"),
        help="order of the training documents, on the same tokens (default: similar)",
    )
    parser.add_argument(
        "--tokenizer", metavar="FILE.json", help="use this tokenizer instead of training one"
    )
    args = parser.parse(argv)
    out = Path(args.out).resolve()
    given = Tokenizer.load(args.tokenizer) if args.tokenizer else None
    settings = _settings(args, given)
    if _is_done(out, settings):
        print(f"{out}: already prepared with these settings; nothing to do")
        return
    with _staging_directory(out) as staging:
        manifest = _prepare(settings, args.config, given, staging)
    print(summary(manifest))
    print(f"wrote {out}")


def _prepare(
    settings: dict[str, Any], config: ConfigDict, given: Tokenizer | None, out: Path
) -> Manifest:
    data, seed, length = config.data, settings["seed"], settings["sequence_length"]
    seconds: dict[str, float] = {}

    # ---- Documents, split by where they come from --------------------------------------------
    with _stage("documents", seconds):
        documents = read_corpus(
            settings["source"],
            min_bytes=data.min_document_bytes,
            max_bytes=data.max_document_bytes,
            max_domain_bytes=data.max_domain_bytes,
            seed=seed,
        )
        print(corpus_table(documents))
        splits = split_by_origin(
            documents,
            validation_fraction=data.validation_fraction,
            test_fraction=data.test_fraction,
            seed=seed,
        )
    train = splits["train"]
    texts = [document.text for document in train]

    # ---- Tokens ------------------------------------------------------------------------------
    with _stage("tokenizer", seconds):
        tokenizer = given or _train_tokenizer(texts, config, seed)
        tokenizer.save(out / TOKENIZER_NAME)
    with _stage("tokens", seconds):
        tokenized = {
            split: tokenize([d.text for d in members], tokenizer, f"tokenizing {split}")
            for split, members in splits.items()
        }
    counts = {
        split: _counts(splits[split], tokenized[split], length, by_domain=split != "train")
        for split in splits
    }
    _check_sizes(counts, sorted({document.domain for document in documents}), config)

    # ---- Order of the training documents -----------------------------------------------------
    with _stage("embedding", seconds):
        vectors_NxD = Embedder.fit(texts, dim=data.embedding_dim, seed=seed).embed(texts)
    orders = {"random": np.random.default_rng(seed).permutation(len(train))}
    method = "none"
    if settings["order"] == "similar" or importlib.util.find_spec("scann") is not None:
        with _stage("neighbours", seconds):
            neighbors = find_neighbors(vectors_NxD, data.num_neighbors)
            method = neighbors.method
        print(f"neighbours found by {method}")
        with _stage("order", seconds):
            orders["similar"] = order_by_similarity(
                neighbors.ids_NxK, neighbors.similarities_NxK, seed=seed
            )
    else:
        print("scann is not installed: no figures for the similar order")
    similarity = {"method": method} | {
        name: _similarity(train, vectors_NxD, tokenized["train"], order_N, length)
        for name, order_N in orders.items()
    }

    # ---- Instances ---------------------------------------------------------------------------
    with _stage("instances", seconds):
        stream_T = tokenized["train"].stream(orders[settings["order"]])
        write_shards(out / "train", cut_instances(stream_T, length), data.instances_per_shard)
        for split in ("validation", "test"):
            for domain in counts[split]["domains"]:
                # Natural order: the units of one file, one after another, read as one long text.
                mine = [i for i, d in enumerate(splits[split]) if d.domain == domain]
                instances = cut_instances(tokenized[split].stream(np.array(mine)), length)
                directory = out / split / domain_directory(domain)
                write_shards(directory, instances, data.instances_per_shard)

    # ---- Manifest, last: it says that all the rest is there -----------------------------------
    manifest = Manifest(
        settings, length, tokenizer.vocab_size, counts, similarity, describe_files(out)
    )
    (out / "timings.json").write_text(json.dumps(seconds, indent=1) + "\n")
    write_manifest(manifest, out)
    return manifest


def _settings(args: argparse.Namespace, given: Tokenizer | None) -> dict[str, Any]:
    """Returns all that decides what the files hold, apart from the documents themselves."""
    config = args.config
    if given and given.vocab_size > config.model.vocab_size:
        raise InputError(
            f"{args.tokenizer}: has {given.vocab_size} tokens, takes at most "
            f"config.model.vocab_size ({config.model.vocab_size})"
        )
    is_path = args.source != "python" and Path(args.source).exists()
    return {
        "source": str(Path(args.source).resolve()) if is_path else args.source,
        "order": args.order,
        "seed": config.train.seed,
        "sequence_length": config.model.sequence_length,
        "vocab_size": config.model.vocab_size,
        "tokenizer": given.sha256 if given else "trained",
        "data": config.data.to_dict(),
    }


def _is_done(out: Path, settings: dict[str, Any]) -> bool:
    """Whether `out` is complete and intact; raises `InputError` if it is anything but new."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not (out / MANIFEST_NAME).is_file():
        raise InputError(
            f"{out}: exists and has no {MANIFEST_NAME}; takes a new or empty directory, "
            "or one that prepare wrote"
        )
    manifest = read_manifest(out)
    if differs := differences(manifest.settings, settings):
        raise InputError(
            f"{out}: prepared with other settings ({'; '.join(differs)}); "
            "choose another --out or remove it"
        )
    verify_files(manifest, out, hashes=True)
    return True


@contextlib.contextmanager
def _staging_directory(out: Path) -> Iterator[Path]:
    """Gives an empty directory beside `out` that becomes `out` at the end, or nothing at all."""
    staging = out.with_name(out.name + ".tmp-prepare")
    try:
        staging.mkdir(parents=True, exist_ok=True)
        lock = os.open(staging, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"--out={out}: cannot write there ({error.strerror})") from None
    try:
        # The lock ends with the process, however it ends: what a killed one left can go.
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{out}: another prepare is writing it") from None
    for leftover in staging.iterdir():
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    try:
        yield staging
        staging.rename(out)
    except BaseException:
        shutil.rmtree(staging)
        raise
    finally:
        os.close(lock)


@contextlib.contextmanager
def _stage(name: str, seconds: dict[str, float]) -> Iterator[None]:
    start = time.monotonic()
    yield
    seconds[name] = round(time.monotonic() - start, 2)
    print(f"{name}: {duration(seconds[name])}", file=sys.stderr)


def _train_tokenizer(texts: Sequence[str], config: ConfigDict, seed: int) -> Tokenizer:
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


def _counts(
    documents: Sequence[Document], tokenized: TokenizedDocuments, length: int, by_domain: bool
) -> dict[str, Any]:
    """Returns what a split holds, and the instances of each domain or of all together."""
    of_document = np.array([document.domain for document in documents], dtype=object)
    bytes_N = np.array([len(document.text.encode()) for document in documents], np.int64)
    domains: dict[str, dict[str, int]] = {}
    for domain in sorted(set(of_document)):
        mine = of_document == domain
        tokens = int(tokenized.lengths_N[mine].sum())
        domains[domain] = {
            "documents": int(mine.sum()),
            "tokens": tokens,
            "bytes": int(bytes_N[mine].sum()),
        }
        if by_domain:
            domains[domain]["instances"] = count_instances(tokens, length)
    streams = [len(tokenized.tokens_T)]
    if by_domain:
        streams = [counts["tokens"] for counts in domains.values()]
    instances = sum(count_instances(tokens, length) for tokens in streams)
    return {
        "instances": instances,
        "dropped_tokens": sum(max(tokens - 1, 0) for tokens in streams) - instances * length,
        "median_document_tokens": float(np.median(tokenized.lengths_N)) if len(documents) else 0.0,
        "domains": domains,
    }


def _check_sizes(counts: dict[str, Any], domains: Sequence[str], config: ConfigDict) -> None:
    """Raises `InputError` unless training and every evaluation set have at least one instance."""
    length = config.model.sequence_length
    train = counts["train"]
    tokens = sum(domain["tokens"] for domain in train["domains"].values())
    num_documents = sum(domain["documents"] for domain in train["domains"].values())
    if train["instances"] < 1 or num_documents < 2:
        raise InputError(
            f"corpus too small: {num_documents} training documents with {tokens} tokens, takes at "
            f"least 2 documents and {length + 1} tokens; give more text or lower "
            "config.model.sequence_length"
        )
    for split in ("validation", "test"):
        fraction = config.data[f"{split}_fraction"]
        for domain in domains if fraction > 0 else ():
            found = counts[split]["domains"].get(domain, {"tokens": 0, "instances": 0})
            if found["instances"] < 1:
                raise InputError(
                    f"corpus too small: domain {domain!r} has {found['tokens']} {split} tokens, "
                    f"takes at least {length + 1}; give more text from more origins, raise "
                    f"config.data.{split}_fraction ({fraction:g}) or lower "
                    "config.model.sequence_length"
                )


def _similarity(
    documents: Sequence[Document],
    vectors_NxD: np.ndarray,
    tokenized: TokenizedDocuments,
    order_N: np.ndarray,
    length: int,
) -> dict[str, float | None]:
    """Returns how alike consecutive documents are in an order."""
    domains = np.array([document.domain for document in documents])[order_N]
    rate = same_domain_rate(tokenized.lengths_N[order_N], domains, length)
    return {
        "mean_cosine": round(consecutive_similarity(vectors_NxD, order_N), 4),
        "same_domain_rate": None if rate is None else round(rate, 4),
    }


if __name__ == "__main__":
    run(main)
