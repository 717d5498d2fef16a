"""LLaMA as Hugging Face stores it: the fields of its config.json, its tensors by name and shape.

Letters: V vocabulary, D model, H heads, G heads of keys and values, K head width, F FFN.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lory_jax.conversion.hf_fields import flag, number, size
from lory_jax.conversion.rope import rope_fields, rope_parameters
from lory_jax.data.special_tokens import SpecialTokens
from lory_jax.errors import InputError
from lory_jax.model.config import ModelConfig

# The families that compute what LLaMA does, but for fields of `config.model`: by model_type, the
# architecture, and what transformers takes for fields that config.json leaves out.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {"max_position_embeddings": 2048}),
    "mistral": (
        "MistralForCausalLM",
        {"max_position_embeddings": 131_072, "num_key_value_heads": 8, "sliding_window": 4096},
    ),
    "qwen2": (
        "Qwen2ForCausalLM",
        {"max_position_embeddings": 32_768, "num_key_value_heads": 32, "sliding_window": 4096},
    ),
}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

# Options of their configs that the model does not have, with the value that turns each off. A
# field that is not here (dropout, cache settings) does not change the logits.
PLAIN_VALUES: dict[str, Any] = {
    "hidden_act": "silu",
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
      shape: the shape of our parameter, without the axis of layers.
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
            return (math.prod(self.shape),) if self.name.endswith(".bias") else self.shape
        return math.prod(self.shape[self.inputs :]), math.prod(self.shape[: self.inputs])

    def store(self, w: np.ndarray) -> np.ndarray:
        """Converts our parameter of one layer to the layout of the files."""
        # safetensors writes the buffer as it is: a transposed view would come out in wrong order.
        w = w.reshape(self.stored_shape[::-1]).T if self.inputs else w.reshape(self.stored_shape)
        return np.ascontiguousarray(w)

    def restore(self, stored: np.ndarray) -> np.ndarray:
        """The inverse of `store`."""
        return (stored.T if self.inputs else stored).reshape(self.shape)


def llama_tensors(model_config: ModelConfig) -> list[Tensor]:
    """Every tensor of a dense model, in the order of the forward pass."""
    V, D, F = model_config.vocab_size, model_config.embed_dim, model_config.mlp_dim
    H, G = model_config.num_heads, model_config.kv_heads
    K = model_config.head_width
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
        *(
            Tensor(f"model.layers.{y}.{name}.bias", path, y, shape, 0)
            for y in range(model_config.num_layers)
            for name, path, shape in _biases(model_config)
        ),
        Tensor("model.norm.weight", ("final_norm",), None, (D,), 0),
        *([] if model_config.tie_embeddings else [Tensor(HEAD, ("head",), None, (D, V), 1)]),
    ]


def _biases(
    model_config: ModelConfig,
) -> list[tuple[str, tuple[str, ...], tuple[int, ...]]]:
    """The biases of a layer: Hugging Face's name, our path and our shape."""
    D, F, K = model_config.embed_dim, model_config.mlp_dim, model_config.head_width
    H, G = model_config.num_heads, model_config.kv_heads
    attention: list[tuple[str, tuple[str, ...], tuple[int, ...]]] = [
        ("self_attn.q_proj", ("layers", "attention", "query_bias"), (H, K)),
        ("self_attn.k_proj", ("layers", "attention", "key_bias"), (G, K)),
        ("self_attn.v_proj", ("layers", "attention", "value_bias"), (G, K)),
        ("self_attn.o_proj", ("layers", "attention", "output_bias"), (D,)),
    ]
    ffn = [
        (f"mlp.{name}_proj", ("layers", "ffn", f"{name}_bias"), (size,))
        for name, size in (("gate", F), ("up", F), ("down", D))
    ]
    count = {"none": 0, "qkv": 3, "all": 4}[model_config.attention_bias]
    return attention[:count] + (ffn if model_config.mlp_bias else [])


def is_ignored(name: str) -> bool:
    """Whether a tensor is not a parameter: old directories store the rotary frequencies."""
    return name.endswith("rotary_emb.inv_freq")


# ---------------------------------------------------------------- config.json


def config_json(model_config: ModelConfig, dtype: str, special: SpecialTokens) -> dict[str, Any]:
    """The contents of config.json for a model whose tensors are stored as `dtype`.

    The model is a LLaMA, unless its biases are those of Qwen2, which LLaMA does not have.

    Raises:
      InputError: no family has these biases.
    """
    rope = rope_parameters(model_config)
    family = "qwen2" if model_config.attention_bias == "qkv" else "llama"
    if family == "qwen2" and model_config.mlp_bias:
        raise InputError(
            "config.model.mlp_bias: got True, but with attention_bias=qkv the model is a Qwen2, "
            "whose FFN has no biases; cannot be exported"
        )
    own: dict[str, Any] = {"use_sliding_window": False}
    if family == "llama":
        own = {"mlp_bias": model_config.mlp_bias}
    return {
        "architectures": [FAMILIES[family][0]],
        "model_type": family,
        "vocab_size": model_config.vocab_size,
        "hidden_size": model_config.embed_dim,
        "intermediate_size": model_config.mlp_dim,
        "num_hidden_layers": model_config.num_layers,
        "num_attention_heads": model_config.num_heads,
        "num_key_value_heads": model_config.kv_heads,
        "head_dim": model_config.head_width,
        "hidden_act": "silu",
        "max_position_embeddings": model_config.sequence_length,
        "rms_norm_eps": model_config.norm_epsilon,
        # transformers 5 reads rope_parameters, everything older rope_theta.
        "rope_theta": model_config.rope_theta,
        "rope_parameters": rope | {"rope_theta": model_config.rope_theta},
        **({} if model_config.rope_scaling == "none" else {"rope_scaling": rope}),
        "attention_bias": model_config.attention_bias != "none",
        **own,
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
    family, contents = _with_defaults(contents, name)
    for field, plain in PLAIN_VALUES.items():
        value = contents.get(field)
        if value is not None and value != plain:
            raise InputError(f"{name}: {field}: got {value!r}; must be {plain!r}")
    embed_dim = size(contents, "hidden_size", name)
    num_heads = size(contents, "num_attention_heads", name)
    head_dim = _head_dim(contents, embed_dim, num_heads, name)
    kv_heads = size(contents, "num_key_value_heads", name, num_heads)
    if num_heads % kv_heads:
        raise InputError(
            f"{name}: num_key_value_heads: got {kv_heads}; must be a divisor of "
            f"num_attention_heads ({num_heads})"
        )
    length = size(contents, "max_position_embeddings", name)
    layers = size(contents, "num_hidden_layers", name)
    _check_window(contents, family, layers, length, name)
    mlp_bias = flag(contents, "mlp_bias", name)
    if mlp_bias and family != "llama":
        raise InputError(f"{name}: mlp_bias: got True; must be false with model_type {family!r}")
    bias = {"llama": "all" if flag(contents, "attention_bias", name) else "none", "qwen2": "qkv"}
    return {
        "vocab_size": size(contents, "vocab_size", name),
        "num_layers": layers,
        "embed_dim": embed_dim,
        "num_heads": num_heads,
        "num_kv_heads": 0 if kv_heads == num_heads else kv_heads,
        "head_dim": 0 if head_dim * num_heads == embed_dim else head_dim,
        "attention_bias": bias.get(family, "none"),
        "mlp_bias": mlp_bias,
        "tie_embeddings": flag(contents, "tie_word_embeddings", name),
        "mlp_dim": size(contents, "intermediate_size", name),
        "sequence_length": length,
        "norm_epsilon": number(contents, "rms_norm_eps", name, 1e-6),
        **rope_fields(contents, length, name),
    }


def _with_defaults(contents: Mapping[str, Any], name: str) -> tuple[str, dict[str, Any]]:
    """The family of a model, and its fields with what transformers takes for missing ones."""
    kind = contents.get("model_type")
    family = kind if isinstance(kind, str) else ""
    architecture, defaults = FAMILIES.get(family, ("", {}))
    architectures = contents.get("architectures") or [architecture]
    if not isinstance(architectures, list) or architecture not in architectures:
        accepted = ", ".join(f"{kind!r} [{name!r}]" for kind, (name, _) in FAMILIES.items())
        raise InputError(
            f"{name}: got model_type {kind!r}, architectures {architectures}; must be one of "
            f"{accepted}"
        )
    return family, {**defaults, **contents}


def _head_dim(contents: Mapping[str, Any], embed_dim: int, num_heads: int, name: str) -> int:
    if contents.get("head_dim") is None and embed_dim % num_heads:
        raise InputError(
            f"{name}: num_attention_heads: got {num_heads}; must be a divisor of hidden_size "
            f"({embed_dim}) where there is no head_dim"
        )
    head_dim = size(contents, "head_dim", name, embed_dim // num_heads)
    if head_dim % 2:
        raise InputError(f"{name}: head_dim: got {head_dim}; must be even")
    return head_dim


def _check_window(
    contents: Mapping[str, Any], family: str, layers: int, length: int, name: str
) -> None:
    """Raises `InputError` if a sliding window hides some of the `length` positions."""
    if family == "llama" or contents.get("sliding_window") is None:
        return
    if family == "qwen2" and not flag(contents, "use_sliding_window", name):
        return
    window = size(contents, "sliding_window", name)
    if window < length:
        raise InputError(
            f"{name}: sliding_window: got {window}; must be null or cover "
            f"max_position_embeddings ({length}): the model attends to all positions"
        )
