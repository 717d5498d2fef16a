"""Writes a dense model as a Hugging Face LLaMA directory, and reads one.

A written directory appears complete or not at all: it is made under a temporary name, read back,
compared and moved. A directory is checked as a whole before the first of its tensors is used. Only
safetensors are read: pickled weights can run code.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import tokenizers
from jax import Array
from jax.sharding import Mesh

from lory_jax.config import section_defaults
from lory_jax.console import progress
from lory_jax.conversion.llama import (
    EMBEDDING,
    HEAD,
    Tensor,
    config_json,
    is_ignored,
    llama_tensors,
    model_fields,
    special_ids,
)
from lory_jax.conversion.safetensors_files import (
    MAX_SHARD_BYTES,
    Entry,
    TensorFiles,
    read_object,
    write_object,
    write_safetensors,
)
from lory_jax.data.manifest import TOKENIZER_NAME
from lory_jax.data.special_tokens import SpecialTokens
from lory_jax.data.tokenizer import Tokenizer
from lory_jax.errors import InputError
from lory_jax.model.config import ModelConfig
from lory_jax.model.transformer import Params, build
from lory_jax.parallel import shardings
from lory_jax.storage import naming

CONFIG, GENERATION, CARD = "config.json", "generation_config.json", "README.md"
TOKENIZER_CONFIG = "tokenizer_config.json"

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}

DEFAULT_SEGMENT_LENGTH = 256  # the paper's


# ---------------------------------------------------------------- writing


def write_llama_directory(
    out: Path,
    model_config: ModelConfig,
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
      model_config, params: the model, which must not have experts.
      tokenizer: its tokenizer.
      card: the text of README.md.
      dtype: type of the stored tensors, "float32" (exact) or "bfloat16".
      max_shard_bytes: largest size of one safetensors file.

    Raises:
      InputError: `out` is not empty, or what was written reads back differently.
    """
    check_absent(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_sibling(out)
    temporary.mkdir()
    try:
        with naming(out):
            write_object(temporary / CONFIG, config_json(model_config, dtype, tokenizer.special))
            write_object(temporary / GENERATION, _generation_fields(tokenizer))
            (temporary / CARD).write_text(card, encoding="utf-8")
            _write_tokenizer(temporary, tokenizer, model_config.sequence_length)
            entries = _entries(model_config, params, DTYPES[dtype])
            write_safetensors(temporary, entries, max_shard_bytes)
            _check_written(temporary, model_config, tokenizer)
            temporary.replace(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_absent(directory: Path) -> None:
    """Raises `InputError` unless a directory is absent or empty."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise InputError(f"{directory}: already exists; must be a new or empty directory")


def temporary_sibling(directory: Path) -> Path:
    """A name next to `directory`, on the same file system; removes what an earlier attempt left."""
    temporary = directory.with_name(f".{directory.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    return temporary


def _entries(model_config: ModelConfig, params: Params, dtype: np.dtype) -> list[Entry]:
    def entry(tensor: Tensor) -> Entry:
        def load() -> np.ndarray:
            leaf = _leaf(params, tensor)
            w = jax.device_get(leaf if tensor.layer is None else leaf[tensor.layer])
            return tensor.store(np.asarray(w).astype(dtype))

        return Entry(tensor.name, int(np.prod(tensor.shape)) * dtype.itemsize, load)

    return [entry(tensor) for tensor in llama_tensors(model_config)]


def _leaf(params: Params, tensor: Tensor) -> Array:
    node: Any = params
    for key in tensor.path:
        node = node[key]
    return node


def _generation_fields(tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        **special_ids(tokenizer.special),
        "do_sample": True,
        "temperature": 0.8,
        "top_p": 0.95,
    }


def _write_tokenizer(directory: Path, tokenizer: Tokenizer, sequence_length: int) -> None:
    """Writes tokenizer.json, which adds BOS to every text, and the settings transformers needs.

    Our own tokenizer never asks for special tokens, so its encoding stays the same.
    """
    theirs = tokenizers.Tokenizer.from_str(tokenizer.json_text)
    begin, end = theirs.id_to_token(tokenizer.bos_id), theirs.id_to_token(tokenizer.eos_id)
    json_text = tokenizer.json_text
    if theirs.encode("a").ids != [tokenizer.bos_id, *tokenizer.encode("a")]:
        theirs.post_processor = tokenizers.processors.TemplateProcessing(
            single=[begin, "$A"],
            pair=[begin, "$A", begin, "$B:1"],
            special_tokens=[(begin, tokenizer.bos_id)],
        )
        json_text = theirs.to_str(pretty=True)
    (directory / TOKENIZER_NAME).write_bytes(json_text.encode())
    pad_id, template = tokenizer.special.pad_id, tokenizer.special.chat_template
    write_object(
        directory / TOKENIZER_CONFIG,
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": begin,
            "eos_token": end,
            "pad_token": end if pad_id is None else theirs.id_to_token(pad_id),
            # Without it, transformers 4 gives generate() token_type_ids, which a LLaMA refuses.
            "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": sequence_length,
            "clean_up_tokenization_spaces": False,
            **({} if template is None else {"chat_template": template}),
        },
    )


def _check_written(directory: Path, model_config: ModelConfig, tokenizer: Tokenizer) -> None:
    """Re-reads the directory like external input; tensors were compared when written."""
    found = read_llama_directory(directory)
    if _llama_fields(found.model_config) != _llama_fields(model_config):
        raise InputError(f"{directory / CONFIG}: reads back as another model")
    if not np.array_equal(found.tokenizer.token_bytes, tokenizer.token_bytes):
        raise InputError(f"{directory / TOKENIZER_NAME}: reads back as another tokenizer")


def _llama_fields(model_config: ModelConfig) -> dict[str, Any]:
    """The fields of a model config that a LLaMA directory determines."""
    fields = model_fields(config_json(model_config, "float32", SpecialTokens(0, (0,))), CONFIG)
    return {name: getattr(model_config, name) for name in fields}


# ---------------------------------------------------------------- reading


@dataclass(frozen=True)
class LlamaDirectory:
    """A LLaMA directory that was checked: every tensor is there, of the right shape and type.

    Attributes:
      fields: the fields of `config.model` that it determines; the compute type is that of the
        stored tensors.
      tokenizer: the one in tokenizer.json.
      files: the tensors, not read yet.
    """

    fields: Mapping[str, Any]
    tokenizer: Tokenizer
    files: TensorFiles

    @property
    def model_config(self) -> ModelConfig:
        """The dense model. No program runs on it here, so the platform does not matter."""
        fields = {**section_defaults("model"), **self.fields, "num_experts": 0}
        return ModelConfig.for_platform(fields, "cpu")

    def params(self, mesh: Mesh) -> Params:
        """Float32 parameters on the mesh; the host holds one of them at a time."""
        by_path: dict[tuple[str, ...], list[Tensor]] = {}
        for tensor in llama_tensors(self.model_config):
            by_path.setdefault(tensor.path, []).append(tensor)
        on_mesh = shardings(build(self.model_config)[1], mesh)
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


def read_llama_directory(
    directory: Path, bos_id: int | None = None, eos_id: int | None = None
) -> LlamaDirectory:
    """Checks a LLaMA directory; its tensors are read by `LlamaDirectory.params`.

    `bos_id` and `eos_id` override the special tokens that its files declare.

    Raises:
      InputError: it is not a LLaMA, lacks a file or a tensor, has a tensor of a wrong shape, uses
        an option that the model does not have, or holds only pickled weights.
    """
    if not directory.is_dir():
        raise InputError(f"{directory}: no such directory")
    fields = model_fields(read_object(directory / CONFIG), str(directory / CONFIG))
    files = TensorFiles(directory)
    is_float32 = set(files.types.values()) == {"float32"}
    fields |= {
        # At least two segments: a single one is never routed by another.
        "segment_length": min(DEFAULT_SEGMENT_LENGTH, max(1, fields["sequence_length"] // 2)),
        "compute_dtype": "float32" if is_float32 else "bfloat16",
    }
    tokenizer = Tokenizer.load_foreign(directory / TOKENIZER_NAME, bos_id, eos_id)
    found = LlamaDirectory(fields | {"bos_id": tokenizer.bos_id}, tokenizer, files)
    _check_tensors(directory, found.model_config, files)
    if found.tokenizer.vocab_size > found.model_config.vocab_size:
        raise InputError(
            f"{directory / TOKENIZER_NAME}: got {found.tokenizer.vocab_size} tokens; must be at "
            f"most vocab_size of {CONFIG} ({found.model_config.vocab_size})"
        )
    return found


def _check_tensors(directory: Path, model_config: ModelConfig, files: TensorFiles) -> None:
    expected = {tensor.name: tensor.stored_shape for tensor in llama_tensors(model_config)}
    for name, shape in expected.items():
        if name not in files.shapes:
            raise InputError(
                f"{directory}: tensor {name} is missing; its shape must be {list(shape)}"
            )
        if files.shapes[name] != shape:
            raise InputError(
                f"{directory}: tensor {name}: got shape {list(files.shapes[name])}; must be "
                f"{list(shape)} according to {CONFIG}"
            )
    if model_config.tie_embeddings and HEAD in files.shapes:
        # Some tools store the embedding twice. A separate head would be lost.
        if not np.array_equal(files.read(HEAD), files.read(EMBEDDING)):
            raise InputError(
                f"{directory}: tensor {HEAD} differs from {EMBEDDING}, but {CONFIG} ties them "
                "(tie_word_embeddings)"
            )
        expected[HEAD] = files.shapes[HEAD]
    for name in files.shapes:
        if name not in expected and not is_ignored(name):
            raise InputError(f"{directory}: tensor {name} is not one of LLaMA's")


def _insert(params: Params, path: tuple[str, ...], values: np.ndarray, on_mesh: Any) -> None:
    """Puts an array into a nested dict at `path`, with its sharding on the mesh."""
    for key in path[:-1]:
        params, on_mesh = params.setdefault(key, {}), on_mesh[key]
    params[path[-1]] = jax.device_put(values, on_mesh[path[-1]])
