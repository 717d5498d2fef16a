"""Documents to vectors with a BERT sentence encoder, such as Contriever, which the paper uses.

    text -> up to 512 tokens, CLS and SEP included -> BERT -> mean over the tokens -> L2

N documents, B documents of a batch, L tokens, D dimensions.
"""

import hashlib
from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tokenizers import Tokenizer

from lory_jax.console import progress
from lory_jax.errors import InputError
from lory_jax.preparation.embedding.bert import Bert, BertConfig, read_json, read_tensors

LONGEST = 512  # tokens
LENGTH_STEP = 64  # lengths are padded to multiples of it, so that few programs are compiled
BATCH_TOKENS = 16_384
CHUNK = 8192  # documents that are sorted by length together
IN_FLIGHT = 2  # batches
DTYPES = ("float32", "bfloat16")


class SentenceEncoder:
    """A sentence encoder; cosine similarity is the dot product of two of its vectors.

    Attributes:
      dim: dimensions D of the vectors.
      max_length: tokens that are read of each document.
      pooling: "mean" over the tokens, or "cls", the first token.
      sha256: hash of the files that decide the vectors.
    """

    def __init__(self, bert: Bert, tokenizer: Tokenizer, pooling: str, max_length: int, sha: str):
        """Use `load`."""
        self.dim = bert.config.hidden_size
        self.pooling, self.max_length, self.sha256 = pooling, max_length, sha
        self._tokenizer = tokenizer
        tokenizer.no_padding()
        tokenizer.enable_truncation(max_length)
        devices = jax.local_devices()
        self._num_devices = len(devices)
        mesh = Mesh(np.array(devices), ("data",))
        self._split = NamedSharding(mesh, PartitionSpec("data"))
        graph, params = nnx.split(bert)
        self._params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
        self._program = jax.jit(partial(_encode, graph, pooling))

    @classmethod
    def load(cls, directory: str | Path, dtype: str = "float32") -> "SentenceEncoder":
        """Reads a directory: `config.json`, `model.safetensors` and `tokenizer.json`.

        The files of sentence-transformers, where there are any, say which pooling the encoder was
        trained with and how many tokens it reads; without them, it is the mean over at most 512.

        Args:
          directory: a local directory.
          dtype: type of the matrix products, "float32" or "bfloat16".

        Raises:
          InputError: a file is missing, damaged or of another kind of model.
        """
        if dtype not in DTYPES:
            raise InputError(f"dtype: got {dtype!r}, must be one of {', '.join(DTYPES)}")
        directory = Path(directory)
        if not directory.is_dir():
            raise InputError(f"{directory}: no such directory")
        config = BertConfig.read(directory / "config.json")
        tokenizer = _read_tokenizer(directory / "tokenizer.json", config)
        pooling, max_length = _read_sentence_files(directory, config)
        bert = Bert(config, read_tensors(directory, config, dtype), dtype)
        digest = hashlib.sha256(f"{pooling} {max_length} {dtype}".encode())
        for name in ("config.json", "tokenizer.json", "model.safetensors"):
            with open(directory / name, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return cls(bert, tokenizer, pooling, max_length, digest.hexdigest())

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Returns float32 `[N, D]` with rows of length 1."""
        vectors_NxD = np.zeros((len(texts), self.dim), np.float32)
        waiting: deque[tuple[np.ndarray, Array]] = deque()

        def collect() -> None:
            rows_B, vectors_BxD = waiting.popleft()
            vectors_NxD[rows_B] = np.asarray(vectors_BxD)[: len(rows_B)]

        starts = range(0, len(texts), CHUNK)
        for start in progress(starts, len(starts), "embedding", "chunks"):
            for rows_B, tokens_BxL, lengths_B in self._batches(texts[start : start + CHUNK]):
                inputs = jax.device_put((tokens_BxL, lengths_B), self._split)
                waiting.append((start + rows_B, self._program(self._params, *inputs)))
                if len(waiting) > IN_FLIGHT:
                    collect()
        while waiting:
            collect()
        return vectors_NxD

    def _batches(self, texts: Sequence[str]) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yields rows, tokens and lengths of batches of documents of about one length.

        Tokens and lengths may have more rows: their number is a power of two times the devices.
        """
        encodings = self._tokenizer.encode_batch_fast(list(texts))
        ids = [encoding.ids or [0] for encoding in encodings]
        lengths_N = np.array([len(tokens) for tokens in ids])
        padded_N = np.minimum(-(-lengths_N // LENGTH_STEP) * LENGTH_STEP, self.max_length)
        for length in np.unique(padded_N):
            members = np.flatnonzero(padded_N == length)
            most = self._round_up(max(1, BATCH_TOKENS // int(length)) // self._num_devices)
            for start in range(0, len(members), most):
                rows_B = members[start : start + most]
                size = min(most, self._round_up(-(-len(rows_B) // self._num_devices)))
                tokens_BxL = np.zeros((size, length), np.int32)
                lengths_B = np.ones(size, np.int32)
                for i, row in enumerate(rows_B):
                    tokens_BxL[i, : lengths_N[row]] = ids[row]
                lengths_B[: len(rows_B)] = lengths_N[rows_B]
                yield rows_B, tokens_BxL, lengths_B

    def _round_up(self, rows_per_device: int) -> int:
        return self._num_devices * 2 ** max(rows_per_device - 1, 0).bit_length()


def _encode(
    graph: nnx.GraphDef, pooling: str, params: nnx.State, tokens_BxL: Array, lengths_B: Array
) -> Array:
    """Returns float32 unit vectors `[B, D]`."""
    mask_BxL = jnp.arange(tokens_BxL.shape[1])[None] < lengths_B[:, None]
    hidden_BxLxD = nnx.merge(graph, params)(tokens_BxL, mask_BxL).astype(jnp.float32)
    if pooling == "cls":
        vectors_BxD = hidden_BxLxD[:, 0]
    else:
        total_BxD = jnp.where(mask_BxL[:, :, None], hidden_BxLxD, 0).sum(1)
        vectors_BxD = total_BxD / lengths_B[:, None].astype(jnp.float32)
    return vectors_BxD / jnp.linalg.norm(vectors_BxD, axis=-1, keepdims=True).clip(1e-12)


def _read_tokenizer(path: Path, config: BertConfig) -> Tokenizer:
    if not path.is_file():
        raise InputError(
            f"{path}: missing; transformers writes it with "
            "AutoTokenizer.from_pretrained(…).save_pretrained(…)"
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise InputError(f"{path}: not a tokenizer JSON ({error})") from None
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values())
    if largest >= config.vocab_size:
        raise InputError(
            f"{path}: has token id {largest}, must have ids below the vocab_size of config.json "
            f"({config.vocab_size})"
        )
    return tokenizer


def _read_sentence_files(directory: Path, config: BertConfig) -> tuple[str, int]:
    """Returns pooling and number of tokens by the files of sentence-transformers, if any."""
    pooling, max_length = "mean", min(LONGEST, config.max_position_embeddings)
    path = directory / "1_Pooling" / "config.json"
    if path.is_file():
        chosen = [k for k, v in read_json(path).items() if k.startswith("pooling_mode_") and v]
        names = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
        if len(chosen) != 1 or chosen[0] not in names:
            raise InputError(f"{path}: got {', '.join(chosen)}; must be one of {', '.join(names)}")
        pooling = names[chosen[0]]
    path = directory / "sentence_bert_config.json"
    if path.is_file() and (limit := read_json(path).get("max_seq_length")):
        max_length = min(max_length, int(limit))
    return pooling, max_length
