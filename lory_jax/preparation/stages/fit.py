"""Stage `fit`: the tokenizer, if none is given, and the embedder.

They are fitted on the training documents, or, if there are more than a shard holds, on as many of
lowest rank, which is a random sample.
"""

from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lory_jax.data.manifest import TOKENIZER_NAME
from lory_jax.data.special_tokens import SPECIAL_TOKENS_NAME, SpecialTokens
from lory_jax.data.tokenizer import Tokenizer
from lory_jax.errors import InputError
from lory_jax.preparation.embedding.lsa import Embedder
from lory_jax.preparation.engine.columns import read_array, read_ragged, write_array
from lory_jax.preparation.engine.work import Facts, Work
from lory_jax.preparation.stages import read, select
from lory_jax.preparation.stages.texts import Texts
from lory_jax.preparation.tokenizer_training import train_tokenizer

if TYPE_CHECKING:
    from lory_jax.preparation.embedding.sentence_encoder import SentenceEncoder

GIVEN_TOKENIZER_NAME = "given-tokenizer.json"


def count(work: Work) -> int:
    """One task."""
    return 1


def run(work: Work, task: int, out: Path) -> Facts:
    """Fits both; first of all, it checks the order, because what follows takes long.

    Raises:
      InputError: random order of several shards would keep near duplicates that similarity order
        leaves out.
    """
    _check_order(work)
    settings, say = work.settings, []
    texts = Texts(work, _sample(work))
    if settings["tokenizer"] == "trained":
        tokenizer, line = _train(work, texts)
        say += [line] if line else []
    else:
        tokenizer = _read_tokenizer(work.root / GIVEN_TOKENIZER_NAME)
    tokenizer.save(out / TOKENIZER_NAME)
    # A single document has no neighbours to find.
    if "encoder" not in settings and len(texts) > 1:
        embedder = Embedder.fit(texts, dim=work.data["embedding_dim"], seed=settings["seed"])
        for field in fields(embedder):
            write_array(out, field.name, getattr(embedder, field.name))
    texts.close()
    return Facts(values={"vocab_size": tokenizer.vocab_size, "sample": len(texts)}, say=say)


def _check_order(work: Work) -> None:
    data, documents = work.data, select.num_training_documents(work)
    is_sharded = documents > data["shard_documents"]
    if work.settings["order"] == "random" and is_sharded and data["drop_near_duplicates"]:
        raise InputError(
            "order: random cannot leave out near duplicates if there are more documents than "
            f"config.data.shard_documents ({documents:,}, {data['shard_documents']:,}), because "
            "they are found among similar documents; set config.data.drop_near_duplicates=false "
            "for both orders, so that they have the same tokens"
        )


def load_tokenizer(work: Work) -> Tokenizer:
    """Returns the tokenizer."""
    return _read_tokenizer(work.directory("fit") / TOKENIZER_NAME)


def _read_tokenizer(path: Path) -> Tokenizer:
    """Reads a tokenizer of the work directory, which may be in an object store."""
    declared = path.with_name(SPECIAL_TOKENS_NAME)
    special = declared.read_bytes().decode() if declared.exists() else ""
    return _tokenizer(path.read_bytes().decode(), str(path), special, str(declared))


@lru_cache(maxsize=1)
def _tokenizer(text: str, name: str, special: str, special_name: str) -> Tokenizer:
    """One tokenizer for all tasks of a process: making another leaves some memory behind."""
    declared = SpecialTokens.from_json(special, special_name) if special else None
    return Tokenizer(text, name, declared)


def load_embedder(work: Work) -> "Embedder | SentenceEncoder | None":
    """Returns the embedder: fitted, or a sentence encoder; None for a single document."""
    if work.values("fit")["sample"] < 2:
        return None
    if "encoder" in work.settings:
        from lory_jax.preparation.embedding.sentence_encoder import SentenceEncoder

        return SentenceEncoder.load(Path(work.settings["encoder"]))
    directory = work.directory("fit")
    return Embedder(*(read_array(directory, field.name) for field in fields(Embedder)))


def _sample(work: Work) -> list[tuple[int, int]]:
    """Returns the places of the sample in the order of domain, origin and place."""
    most = work.data["shard_documents"]
    places, ranks = np.empty((0, 2), np.int64), np.empty(0, np.uint64)
    for reader in range(read.count(work)):
        rows = np.flatnonzero(read_array(work.directory("select", reader), "side") == 0)
        places = np.concatenate([places, np.stack([np.full(len(rows), reader), rows], axis=1)])
        ranks = np.concatenate([ranks, read_array(work.directory("read", reader), "rank")[rows]])
        if len(ranks) > most:
            lowest = np.sort(np.argpartition(ranks, most)[:most])
            places, ranks = places[lowest], ranks[lowest]
    keys = []
    for reader in np.unique(places[:, 0]):
        directory, names = work.directory("read", reader), work.values("read", reader)["domains"]
        domain_N, origins = read_array(directory, "domain"), read_ragged(directory, "origin")
        for row in places[places[:, 0] == reader, 1]:
            keys.append((names[domain_N[row]], origins[row].tobytes().decode()))
    order = sorted(range(len(keys)), key=keys.__getitem__)
    return [(int(places[i, 0]), int(places[i, 1])) for i in order]


def _train(work: Work, texts: Texts) -> tuple[Tokenizer, str]:
    """Trains a tokenizer on a sample of the texts that the seed picks."""
    wanted = work.settings["vocab_size"]
    sample, size = [], 0
    for i in np.random.default_rng(work.settings["seed"]).permutation(len(texts)):
        if size >= work.data["tokenizer_sample_bytes"]:
            break
        sample.append(texts[int(i)])
        size += len(sample[-1].encode())
    tokenizer = train_tokenizer(sample, wanted)
    if tokenizer.vocab_size == wanted:
        return tokenizer, ""
    return tokenizer, (
        f"tokenizer: {size:,} bytes of text give {tokenizer.vocab_size} tokens, fewer than "
        f"config.model.vocab_size ({wanted})"
    )
