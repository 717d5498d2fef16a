"""LLaMA as Hugging Face stores it: the fields of its config.json, its tensors by name and shape.

Letters: V vocabulary, D model, H heads, G heads of keys and values, K head width, F FFN.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lory_jax.data.special_tokens import SpecialTokens
from lory_jax.errors import InputError
from lory_jax.model.config import ModelConfig

LLAMA_ARCHITECTURE = "LlamaForCausalLM"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

# Options of LLaMA's config that the model does not have, with the value that turns each off. A
# field that is not here (dropout, cache settings) does not change the logits.
PLAIN_VALUES: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}


@dataclass(frozen=True)
class Tensor:
    """One tensor of a LLaMA directory, and our parameter (of one layer) that it stores.

    Attributes:
      name: its name in the safetensors files.
      path: where our parameter is in the nested dict.
      layer: index into the first axis of our parameter; None where it has no layers.
      shape: of our parameter, without the axis of layers.
      inputs: how many axes of `shape`, from the first, are input axes. PyTorch stores matrices as
        [output, input]. 0 means that the tensor is not a matrix and is stored as it is.
    """

    name: str
    path: tuple[str, ...]
    layer: int | None
    shape: tuple[int, ...]
    inputs: int

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape in the safetensors files."""
        if not self.inputs:
            return self.shape
        return math.prod(self.shape[self.inputs :]), math.prod(self.shape[: self.inputs])

    def store(self, w: np.ndarray) -> np.ndarray:
        """Converts our parameter of one layer to the layout of the files."""
        # safetensors writes the buffer as it is: a transposed view would come out in wrong order.
        return np.ascontiguousarray(w.reshape(self.stored_shape[::-1]).T if self.inputs else w)

    def restore(self, stored: np.ndarray) -> np.ndarray:
        """The inverse of `store`."""
        return stored.T.reshape(self.shape) if self.inputs else stored


def llama_tensors(model_config: ModelConfig) -> list[Tensor]:
    """Every tensor of a dense model, in the order of the forward pass."""
    V, D, F = model_config.vocab_size, model_config.embed_dim, model_config.mlp_dim
    H, G = model_config.num_heads, model_config.kv_heads
    K = D // H
    layer = [
        ("input_layernorm", ("attention_norm",), (D,), 0),
        ("self_attn.q_proj", ("attention", "query"), (D, H, K), 1),
        ("self_attn.k_proj", ("attention", "key"), (D, G, K), 1),
        ("self_attn.v_proj", ("attention", "value"), (D, G, K), 1),
        ("self_attn.o_proj", ("attention", "output"), (H, K, D), 2),
        ("post_attention_layernorm", ("ffn_norm",), (D,), 0),
        ("mlp.gate_proj", ("ffn", "gate"), (D, F), 1),
        ("mlp.up_proj", ("ffn", "up"), (D, F), 1),
        ("mlp.down_proj", ("ffn", "down"), (F, D), 1),
    ]
    return [
        Tensor(EMBEDDING, ("embedding",), None, (V, D), 0),
        *(
            Tensor(f"model.layers.{y}.{name}.weight", ("layers", *path), y, shape, inputs)
            for y in range(model_config.num_layers)
            for name, path, shape, inputs in layer
        ),
        Tensor("model.norm.weight", ("final_norm",), None, (D,), 0),
        *([] if model_config.tie_embeddings else [Tensor(HEAD, ("head",), None, (D, V), 1)]),
    ]


def is_ignored(name: str) -> bool:
    """Whether a tensor is not a parameter: old directories store the rotary frequencies."""
    return name.endswith("rotary_emb.inv_freq")


# ---------------------------------------------------------------- config.json


def config_json(model_config: ModelConfig, dtype: str, special: SpecialTokens) -> dict[str, Any]:
    """The contents of config.json for a model whose tensors are stored as `dtype`."""
    rope = rope_parameters(model_config)
    return {
        "architectures": [LLAMA_ARCHITECTURE],
        "model_type": "llama",
        "vocab_size": model_config.vocab_size,
        "hidden_size": model_config.embed_dim,
        "intermediate_size": model_config.mlp_dim,
        "num_hidden_layers": model_config.num_layers,
        "num_attention_heads": model_config.num_heads,
        "num_key_value_heads": model_config.kv_heads,
        "head_dim": model_config.embed_dim // model_config.num_heads,
        "hidden_act": "silu",
        "max_position_embeddings": model_config.sequence_length,
        "rms_norm_eps": model_config.norm_epsilon,
        # transformers 5 reads rope_parameters, everything older rope_theta.
        "rope_theta": model_config.rope_theta,
        "rope_parameters": rope | {"rope_theta": model_config.rope_theta},
        **({} if model_config.rope_scaling == "none" else {"rope_scaling": rope}),
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": model_config.tie_embeddings,
        **special_ids(special),
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def special_ids(special: SpecialTokens) -> dict[str, Any]:
    """The special tokens by Hugging Face's names; without a token of its own, EOS pads."""
    eos_ids = special.eos_ids
    return {
        "bos_token_id": special.bos_id,
        "eos_token_id": eos_ids[0] if len(eos_ids) == 1 else list(eos_ids),
        "pad_token_id": eos_ids[0] if special.pad_id is None else special.pad_id,
    }


def model_fields(contents: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The fields of `ModelConfig` that a LLaMA's config.json decides; `name` is for messages.

    A field that config.json leaves out has the default of transformers.

    Raises:
      InputError: the architecture is not LLaMA, or uses an option that the model does not have.
    """
    _check_architecture(contents, name)
    for field, plain in PLAIN_VALUES.items():
        if contents.get(field, plain) != plain:
            raise InputError(f"{name}: {field}: got {contents[field]!r}; must be {plain!r}")
    embed_dim = _size(contents, "hidden_size", name)
    num_heads = _size(contents, "num_attention_heads", name)
    if embed_dim % num_heads:
        raise InputError(
            f"{name}: num_attention_heads: got {num_heads}; must be a divisor of hidden_size "
            f"({embed_dim})"
        )
    head_dim = embed_dim // num_heads
    if _size(contents, "head_dim", name, head_dim) != head_dim:
        raise InputError(f"{name}: head_dim: got {contents['head_dim']}; must be {head_dim}")
    kv_heads = _size(contents, "num_key_value_heads", name, num_heads)
    if num_heads % kv_heads:
        raise InputError(
            f"{name}: num_key_value_heads: got {kv_heads}; must be a divisor of "
            f"num_attention_heads ({num_heads})"
        )
    tied = contents.get("tie_word_embeddings") or False
    if not isinstance(tied, bool):
        raise InputError(f"{name}: tie_word_embeddings: got {tied!r}; must be true or false")
    return {
        "vocab_size": _size(contents, "vocab_size", name),
        "num_layers": _size(contents, "num_hidden_layers", name),
        "embed_dim": embed_dim,
        "num_heads": num_heads,
        "num_kv_heads": 0 if kv_heads == num_heads else kv_heads,
        "tie_embeddings": tied,
        "mlp_dim": _size(contents, "intermediate_size", name),
        "sequence_length": _size(contents, "max_position_embeddings", name, 2048),
        "norm_epsilon": _number(contents, "rms_norm_eps", name, 1e-6),
        **_rope_fields(contents, name),
    }


def _check_architecture(contents: Mapping[str, Any], name: str) -> None:
    architectures = contents.get("architectures") or [LLAMA_ARCHITECTURE]
    if contents.get("model_type") != "llama" or LLAMA_ARCHITECTURE not in architectures:
        raise InputError(
            f"{name}: got model_type {contents.get('model_type')!r}, architectures "
            f"{architectures}; must be 'llama', [{LLAMA_ARCHITECTURE!r}]"
        )


# Hugging Face's names for the fields of rope scaling, our names, and the rope types that read them.
ROPE_SCALING = {
    "factor": ("rope_factor", ("linear", "llama3")),
    "low_freq_factor": ("rope_low_frequency_factor", ("llama3",)),
    "high_freq_factor": ("rope_high_frequency_factor", ("llama3",)),
    "original_max_position_embeddings": ("rope_original_length", ("llama3",)),
}


def rope_parameters(model_config: ModelConfig) -> dict[str, Any]:
    """The rope type and what it reads, under Hugging Face's names."""
    kind = model_config.rope_scaling
    if kind == "none":
        return {"rope_type": "default"}
    read = {theirs: ours for theirs, (ours, kinds) in ROPE_SCALING.items() if kind in kinds}
    values = {theirs: getattr(model_config, ours) for theirs, ours in read.items()}
    return {"rope_type": kind} | values


def _rope_fields(contents: Mapping[str, Any], name: str) -> dict[str, Any]:
    # As in transformers 5, rope_scaling (the older name) wins; either may hold the base or omit it.
    field = "rope_scaling" if contents.get("rope_scaling") else "rope_parameters"
    rope = contents.get(field) or {}
    if not isinstance(rope, Mapping):
        raise InputError(f"{name}: {field}: got {rope!r}; must be an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise InputError(
            f"{name}: {field}: got rope_type {kind!r}; must be 'default', 'linear' or 'llama3'"
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise InputError(
            f"{name}: {field}.partial_rotary_factor: got {rope['partial_rotary_factor']}; must be "
            "1.0"
        )
    theta = _number(contents, "rope_theta", name, 10_000.0)
    fields: dict[str, Any] = {"rope_theta": _number(rope, "rope_theta", name, theta)}
    if kind == "default":
        return fields
    inside = f"{name}: {field}"
    for theirs, (ours, kinds) in ROPE_SCALING.items():
        if kind not in kinds:
            continue
        if ours == "rope_original_length":
            fields[ours] = _size(rope, theirs, inside)
        else:
            fields[ours] = _number(rope, theirs, inside)
    return fields | {"rope_scaling": kind}


def _size(contents: Mapping[str, Any], field: str, name: str, default: int | None = None) -> int:
    value = contents.get(field)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{name}: {field}: got {value!r}; must be a positive integer")
    return value


def _number(
    contents: Mapping[str, Any], field: str, name: str, default: float | None = None
) -> float:
    value = contents.get(field)
    value = default if value is None else value
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise InputError(f"{name}: {field}: got {value!r}; must be a positive number")
    return float(value)
