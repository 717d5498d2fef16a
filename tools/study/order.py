"""The order of the training documents, kept so that all machines train on the same one.

Neighbours are found in float32, and another processor may find others, so it may order the
documents differently. Runs on two orders differ as much as runs with two seeds. The first machine
keeps its order: which documents of the corpus were trained on, one after the other. On a machine
that prepared another order, the training instances are written again, in the order that was kept.
"""

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np

from lory_jax.data.instances import INSTANCE_DOMAINS_NAME
from lory_jax.data.manifest import file_sha256, write_manifest
from lory_jax.data.prepared import PreparedData
from lory_jax.errors import InputError
from lory_jax.preparation.documents import split_long
from lory_jax.preparation.engine.columns import write_array
from lory_jax.preparation.packing import cut_instances, instance_domains, tokenize, write_shards
from lory_jax.storage import write_atomically
from tools.study.results import training_digest


def use_kept_order(data: Path, corpus: Path, kept: Path) -> None:
    """Makes prepared data those of the order in `kept`, or keeps theirs if there is none yet.

    Args:
      data: the prepared directory; its training instances may be replaced.
      corpus: the documents that it was prepared from, in JSON lines.
      kept: an `.npz` file: the digest of the training instances, that of the corpus, and the
        numbers of the documents, of which long ones are cut as `prepare` cuts them.

    Raises:
      InputError: the corpus or the tokenizer is another one.
    """
    if not kept.is_file():
        _keep(data, corpus, kept)
    with np.load(kept, allow_pickle=False) as arrays:
        digest, corpus_digest = str(arrays["training_digest"]), str(arrays["corpus_sha256"])
        lines_N = arrays["lines_N"].astype(np.int64)
    if training_digest(data) == digest:
        return
    if file_sha256(corpus) != corpus_digest:
        raise InputError(f"{corpus}: is not the corpus whose order {kept} keeps")
    _write_in_order(data, corpus, lines_N)
    if training_digest(data) != digest:
        raise InputError(f"{data}: the order in {kept} does not give the instances that it is for")


def _keep(data: Path, corpus: Path, kept: Path) -> None:
    prepared = PreparedData.open(data)
    texts = [document["text"] for document in _documents(prepared, corpus)]
    tokenized = tokenize(texts, prepared.tokenizer, "tokenizing the corpus")
    # Of equal documents, the first line stands for all.
    line_of = {
        tokenized.stream(np.array([line])).tobytes(): line for line in reversed(range(len(texts)))
    }
    stream_T = _stream(prepared)
    starts = np.flatnonzero(stream_T == prepared.tokenizer.bos_id)
    pieces = np.split(stream_T, starts[1:])
    lines = [line_of.get(piece.tobytes(), -1) for piece in pieces[:-1]]
    if -1 in lines:
        raise InputError(f"{data}: document {lines.index(-1):,} is not a line of {corpus}")
    lines.append(_line_of_beginning(pieces[-1].tobytes(), line_of, set(lines)))
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        training_digest=training_digest(data),
        corpus_sha256=file_sha256(corpus),
        lines_N=np.array(lines, np.uint32),
    )
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(kept, buffer.getvalue())


def _line_of_beginning(beginning: bytes, line_of: dict[bytes, int], taken: set[int]) -> int:
    """The line of the last document, whose end may be missing: it does not fill an instance."""
    found = [
        line
        for tokens, line in line_of.items()
        if line not in taken and tokens.startswith(beginning)
    ]
    return min(found)


def _stream(prepared: PreparedData) -> np.ndarray:
    """All training tokens but those of the remainder; instances share their border."""
    instances = prepared.training_instances()
    rows_NxL1 = np.stack([np.asarray(instances[i]) for i in range(len(instances))])
    return np.append(rows_NxL1[:, :-1].reshape(-1), rows_NxL1[-1, -1]).astype(
        prepared.manifest.dtype
    )


def _write_in_order(data: Path, corpus: Path, lines_N: np.ndarray) -> None:
    """Replaces the training instances, their domains, and what the manifest says of both."""
    prepared = PreparedData.open(data)
    length = prepared.manifest.sequence_length
    per_shard = prepared.manifest.settings["data"]["instances_per_shard"]
    documents = _documents(prepared, corpus)
    chosen = [documents[line] for line in lines_N]
    tokenized = tokenize([d["text"] for d in chosen], prepared.tokenizer, "tokenizing the corpus")
    names = sorted(prepared.manifest.counts["train"]["domains"])
    domain_N = np.array([names.index(d["domain"]) for d in chosen])
    shutil.rmtree(data / "train", ignore_errors=True)  # gone, if this was killed before
    write_shards(data / "train", cut_instances(tokenized.tokens_T, length), per_shard)
    domains = instance_domains(tokenized.lengths_N, domain_N, length)
    write_array(data, INSTANCE_DOMAINS_NAME.removesuffix(".npy"), domains)

    manifest = prepared.manifest
    files = {name: e for name, e in manifest.files.items() if not name.startswith("train/")}
    for path in [*(data / "train").iterdir(), data / INSTANCE_DOMAINS_NAME]:
        entry = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        files[path.relative_to(data).as_posix()] = entry
    counts = {
        "domains": {
            name: {
                "bytes": sum(len(d["text"].encode()) for d in chosen if d["domain"] == name),
                "documents": int(np.sum(domain_N == i)),
                "tokens": int(tokenized.lengths_N[domain_N == i].sum()),
            }
            for i, name in enumerate(names)
        },
        "dropped_tokens": len(tokenized.tokens_T) - 1 - len(domains) * length,
        "instances": len(domains),
        "median_document_tokens": float(np.median(tokenized.lengths_N)),
    }
    all_counts = {**manifest.counts, "train": {**manifest.counts["train"], **counts}}
    write_manifest(replace(manifest, counts=all_counts, files=dict(sorted(files.items()))), data)


def _documents(prepared: PreparedData, corpus: Path) -> list[dict[str, str]]:
    """The documents of a corpus, long ones cut as `prepare` cuts them."""
    most = prepared.manifest.settings["data"]["max_document_bytes"]
    with corpus.open(encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    return [line | {"text": text} for line in lines for text in split_long(line["text"], most)]
