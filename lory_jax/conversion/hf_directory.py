"""A dense model as a Hugging Face LLaMA directory, and back.

A directory that is written appears complete or not at all: it is made under a temporary name, read
back, compared and moved. A directory that is read is checked as a whole before the first tensor is
used. Only safetensors are read: pickled weights can run code.
"""

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import tokenizers
from jax import Array
from jax.sharding import Mesh

from lory_jax.console import progress
from lory_jax.conversion.llama import (
    EMBEDDING,
    HEAD,
    Tensor,
    config_fields,
    ignored,
    model_fields,
    tensors,
)
from lory_jax.conversion.safetensors_files import (
    MAX_SHARD_BYTES,
    Entry,
    TensorFiles,
    read_object,
    write_object,
    write_shards,
)
from lory_jax.data.manifest import TOKENIZER_NAME
from lory_jax.data.tokenizer import Tokenizer
from lory_jax.errors import InputError
from lory_jax.model.config import ModelConfig
from lory_jax.model.transformer import Params, build
from lory_jax.parallel import shardings

CONFIG, GENERATION, CARD = "config.json", "generation_config.json", "README.md"
TOKENIZER_CONFIG = "tokenizer_config.json"

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}

DEFAULT_SEGMENT_LENGTH = 256  # the paper's


# ---------------------------------------------------------------- writing


def write_directory(
    out: Path,
    config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer,
    card: str,
    *,
    dtype: str = "float32",
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes a dense model as a directory that `transformers` and others load as it is.

    Args:
      out: the directory to make; it must not exist yet, or be empty.
      config, params: the model, which has no experts.
      tokenizer: its tokenizer.
      card: the text of README.md.
      dtype: of the stored tensors, "float32" (exact) or "bfloat16".
      max_shard_bytes: of one safetensors file.

    Raises:
      InputError: `out` holds something, or what was written reads back differently.
    """
    check_absent(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_sibling(out)
    temporary.mkdir()
    try:
        write_object(
            temporary / CONFIG, config_fields(config, dtype, tokenizer.bos_id, tokenizer.eos_id)
        )
        write_object(temporary / GENERATION, _generation_fields(tokenizer))
        (temporary / CARD).write_text(card, encoding="utf-8")
        _write_tokenizer(temporary, tokenizer, config.sequence_length)
        write_shards(temporary, _entries(config, params, DTYPES[dtype]), max_shard_bytes)
        _check_written(temporary, config, tokenizer)
        temporary.replace(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_absent(directory: Path) -> None:
    """Raises `InputError` where there is something already."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise InputError(f"{directory}: exists already; takes the name of a new directory")


def temporary_sibling(directory: Path) -> Path:
    """A name beside `directory`, on the same file system; what an earlier try left is removed."""
    temporary = directory.with_name(f".{directory.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    return temporary


def _entries(config: ModelConfig, params: Params, dtype: np.dtype) -> list[Entry]:
    def entry(tensor: Tensor) -> Entry:
        def load() -> np.ndarray:
            leaf = _leaf(params, tensor)
            w = jax.device_get(leaf if tensor.layer is None else leaf[tensor.layer])
            return tensor.store(np.asarray(w).astype(dtype))

        return Entry(tensor.name, int(np.prod(tensor.shape)) * dtype.itemsize, load)

    return [entry(tensor) for tensor in tensors(config)]


def _leaf(params: Params, tensor: Tensor) -> Array:
    node: Any = params
    for key in tensor.path:
        node = node[key]
    return node


def _generation_fields(tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "do_sample": True,
        "temperature": 0.8,
        "top_p": 0.95,
    }


def _write_tokenizer(directory: Path, tokenizer: Tokenizer, sequence_length: int) -> None:
    """tokenizer.json, made to put BOS in front of every text, and what transformers wants to know.

    Ours never asks for special tokens, so what it encodes stays the same.
    """
    tokenizer.save(directory / TOKENIZER_NAME)
    theirs = tokenizers.Tokenizer.from_file(str(directory / TOKENIZER_NAME))
    begin, end = theirs.id_to_token(tokenizer.bos_id), theirs.id_to_token(tokenizer.eos_id)
    if theirs.encode("a").ids != [tokenizer.bos_id, *tokenizer.encode("a")]:
        theirs.post_processor = tokenizers.processors.TemplateProcessing(
            single=[begin, "$A"],
            pair=[begin, "$A", begin, "$B:1"],
            special_tokens=[(begin, tokenizer.bos_id)],
        )
        theirs.save(str(directory / TOKENIZER_NAME))
    write_object(
        directory / TOKENIZER_CONFIG,
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": begin,
            "eos_token": end,
            "model_max_length": sequence_length,
            "clean_up_tokenization_spaces": False,
        },
    )


def _check_written(directory: Path, config: ModelConfig, tokenizer: Tokenizer) -> None:
    """Reads the directory as a stranger's; its tensors were compared when they were written."""
    found = read_directory(directory)
    if _architecture(found.config) != _architecture(config):
        raise InputError(f"{directory / CONFIG}: reads back as another model")
    if not np.array_equal(found.tokenizer.token_bytes, tokenizer.token_bytes):
        raise InputError(f"{directory / TOKENIZER_NAME}: reads back as another tokenizer")


def _architecture(config: ModelConfig) -> dict[str, Any]:
    fields = model_fields(config_fields(config, "float32", 0, 0), CONFIG)
    return {name: getattr(config, name) for name in fields}


# ---------------------------------------------------------------- reading


@dataclass(frozen=True)
class LlamaDirectory:
    """A LLaMA directory that was checked: every tensor is there, of the right shape and type.

    Attributes:
      config: of the dense model; its compute type is that of the stored tensors.
      tokenizer: of tokenizer.json.
    """

    config: ModelConfig
    tokenizer: Tokenizer
    files: TensorFiles

    def params(self, mesh: Mesh) -> Params:
        """Float32 parameters on the mesh; the host holds one of them at a time."""
        by_path: dict[tuple[str, ...], list[Tensor]] = {}
        for tensor in tensors(self.config):
            by_path.setdefault(tensor.path, []).append(tensor)
        on_mesh = shardings(build(self.config)[1], mesh)
        params: Params = {}
        for path, parts in progress(
            by_path.items(), total=len(by_path), label="reading", unit="parameters"
        ):
            _insert(params, path, self._parameter(parts), on_mesh)
        return params

    def _parameter(self, parts: list[Tensor]) -> np.ndarray:
        if parts[0].layer is None:
            return parts[0].restore(self.files.read(parts[0].name))
        stacked = np.empty((len(parts), *parts[0].shape), np.float32)
        for tensor in parts:
            stacked[tensor.layer] = tensor.restore(self.files.read(tensor.name))
        return stacked


def read_directory(directory: Path) -> LlamaDirectory:
    """Checks a LLaMA directory; its tensors are read by `LlamaDirectory.params`.

    Raises:
      InputError: it is no LLaMA, lacks a file or a tensor, has one of a wrong shape, asks for
        something the model does not have, or holds pickled weights only.
    """
    if not directory.is_dir():
        raise InputError(f"{directory}: no such directory")
    fields = model_fields(read_object(directory / CONFIG), str(directory / CONFIG))
    files = TensorFiles(directory)
    config = ModelConfig(
        **fields,
        num_experts=0,
        # At least two segments: a single one is routed by nothing.
        segment_length=min(DEFAULT_SEGMENT_LENGTH, max(1, fields["sequence_length"] // 2)),
    )
    _check_tensors(directory, config, files)
    tokenizer = Tokenizer.load(directory / TOKENIZER_NAME)
    if tokenizer.vocab_size > config.vocab_size:
        raise InputError(
            f"{directory / TOKENIZER_NAME}: got {tokenizer.vocab_size} tokens, takes at most "
            f"vocab_size of {CONFIG} ({config.vocab_size})"
        )
    is_float32 = set(files.types.values()) == {"float32"}
    config = dataclasses.replace(config, compute_dtype="float32" if is_float32 else "bfloat16")
    return LlamaDirectory(config, tokenizer, files)


def _check_tensors(directory: Path, config: ModelConfig, files: TensorFiles) -> None:
    expected = {tensor.name: tensor.stored_shape for tensor in tensors(config)}
    for name, shape in expected.items():
        if name not in files.shapes:
            raise InputError(f"{directory}: tensor {name} is missing, of shape {list(shape)}")
        if files.shapes[name] != shape:
            raise InputError(
                f"{directory}: tensor {name}: got shape {list(files.shapes[name])}, takes "
                f"{list(shape)} by {CONFIG}"
            )
    if config.tie_embeddings and HEAD in files.shapes:
        # Some tools store the embedding twice. A head of its own would be lost.
        if not np.array_equal(files.read(HEAD), files.read(EMBEDDING)):
            raise InputError(
                f"{directory}: tensor {HEAD} differs from {EMBEDDING}, which {CONFIG} ties it to "
                "(tie_word_embeddings)"
            )
        expected[HEAD] = files.shapes[HEAD]
    for name in files.shapes:
        if name not in expected and not ignored(name):
            raise InputError(f"{directory}: tensor {name} is unknown: LLaMA has none of that name")


def _insert(params: Params, path: tuple[str, ...], values: np.ndarray, on_mesh: Any) -> None:
    """Puts an array into a nested dict, at a path, on its place on the mesh."""
    for key in path[:-1]:
        params, on_mesh = params.setdefault(key, {}), on_mesh[key]
    params[path[-1]] = jax.device_put(values, on_mesh[path[-1]])
