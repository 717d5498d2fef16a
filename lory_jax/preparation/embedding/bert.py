"""The encoder of BERT, for sentence encoders such as Contriever: read from a directory, inference.

Shapes: B texts, L tokens, H heads, K head width, D model, F hidden width, N layers, V vocabulary.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from safetensors import SafetensorError, safe_open

from lory_jax.errors import InputError

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}
PREFIXES = ("", "bert.", "encoder_q.")  # of the names of tensors
LAYER_TENSORS = (
    *(f"attention.self.{name}" for name in ("query", "key", "value")),
    "attention.output.dense",
    "attention.output.LayerNorm",
    "intermediate.dense",
    "output.dense",
    "output.LayerNorm",
)


@dataclass(frozen=True)
class BertConfig:
    """The fields of `config.json` that decide what the encoder computes."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int
    layer_norm_eps: float
    hidden_act: str

    @classmethod
    def read(cls, path: Path) -> "BertConfig":
        """Reads `config.json`; raises `InputError` unless it describes a BERT that we compute."""
        found = read_json(path)
        if found.get("model_type") != "bert":
            raise InputError(f"{path}: got model_type {found.get('model_type')!r}, must be bert")
        missing = [field.name for field in fields(cls) if field.name not in found]
        if missing:
            raise InputError(f"{path}: has no {', '.join(missing)}")
        if found["hidden_act"] not in ACTIVATIONS:
            accepted = ", ".join(ACTIVATIONS)
            raise InputError(
                f"{path}: got hidden_act {found['hidden_act']!r}, must be one of {accepted}"
            )
        if found.get("position_embedding_type", "absolute") != "absolute":
            raise InputError(
                f"{path}: got position_embedding_type {found['position_embedding_type']!r}, must "
                "be absolute"
            )
        return cls(**{field.name: found[field.name] for field in fields(cls)})


class Bert(nnx.Module):
    """Token ids to hidden states. The layers are stacked, and scanned."""

    def __init__(self, config: BertConfig, tensors: dict[str, Any], dtype: str):
        """Takes the arrays that `read_tensors` returns; products are computed in `dtype`."""
        self.config = config
        self.dtype = jnp.dtype(dtype)
        # A GPU or TPU would shorten the factors of float32 products.
        self.precision = "highest" if dtype == "float32" else "default"
        self.embeddings = nnx.Dict({k: nnx.Param(v) for k, v in tensors["embeddings"].items()})
        self.layers = nnx.Dict({k: nnx.Param(v) for k, v in tensors["layers"].items()})

    def __call__(self, tokens_BxL: Array, mask_BxL: Array) -> Array:
        """Returns the last hidden states `[B, L, D]`; tokens outside the mask are not seen."""
        table = {name: param[...] for name, param in self.embeddings.items()}
        length = tokens_BxL.shape[1]
        x_BxLxD = table["word_embeddings.weight"][tokens_BxL].astype(jnp.float32)
        x_BxLxD += table["position_embeddings.weight"][None, :length].astype(jnp.float32)
        x_BxLxD += table["token_type_embeddings.weight"][None, None, 0].astype(jnp.float32)
        x_BxLxD = self._norm(x_BxLxD, table["LayerNorm.weight"], table["LayerNorm.bias"])

        def layer(x_BxLxD: Array, weights: dict[str, Array]) -> tuple[Array, None]:
            return self._layer(x_BxLxD, mask_BxL, weights), None

        stacked = {name: param[...] for name, param in self.layers.items()}
        x_BxLxD, _ = jax.lax.scan(layer, x_BxLxD, stacked)
        return x_BxLxD

    def _layer(self, x_BxLxD: Array, mask_BxL: Array, weights: dict[str, Array]) -> Array:
        def dense(x: Array, name: str) -> Array:
            w, b = weights[f"{name}.weight"], weights[f"{name}.bias"]
            return jnp.einsum("bld,fd->blf", x, w, precision=self.precision) + b[None, None]

        def norm(x: Array, name: str) -> Array:
            return self._norm(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

        B, L, D = x_BxLxD.shape
        H = self.config.num_attention_heads
        q, k, v = (
            dense(x_BxLxD, f"attention.self.{name}").reshape(B, L, H, D // H)
            for name in ("query", "key", "value")
        )
        scores_BxHxLxL = jnp.einsum(
            "blhk,bmhk->bhlm", q, k, precision=self.precision, preferred_element_type=jnp.float32
        )
        scores_BxHxLxL = jnp.where(
            mask_BxL[:, None, None, :], scores_BxHxLxL * (D // H) ** -0.5, -1e9
        )
        shares_BxHxLxL = jax.nn.softmax(scores_BxHxLxL, axis=-1).astype(self.dtype)
        seen_BxLxHxK = jnp.einsum("bhlm,bmhk->blhk", shares_BxHxLxL, v, precision=self.precision)
        attended = dense(seen_BxLxHxK.reshape(B, L, D), "attention.output.dense")
        x_BxLxD = norm(x_BxLxD + attended, "attention.output.LayerNorm")
        hidden_BxLxF = ACTIVATIONS[self.config.hidden_act](dense(x_BxLxD, "intermediate.dense"))
        return norm(x_BxLxD + dense(hidden_BxLxF, "output.dense"), "output.LayerNorm")

    def _norm(self, x_BxLxD: Array, scale_D: Array, bias_D: Array) -> Array:
        x = x_BxLxD.astype(jnp.float32)
        centred = x - x.mean(-1, keepdims=True)
        variance = jnp.square(centred).mean(-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(variance + self.config.layer_norm_eps)
        scaled = normed * scale_D.astype(jnp.float32)[None, None]
        return (scaled + bias_D.astype(jnp.float32)[None, None]).astype(self.dtype)


def read_tensors(directory: Path, config: BertConfig, dtype: str) -> dict[str, Any]:
    """Reads `model.safetensors`: `embeddings`, and `layers` stacked along a first axis.

    Raises:
      InputError: the file is missing or damaged, or a tensor is missing or has another shape.
    """
    path = directory / "model.safetensors"
    if not path.is_file():
        raise InputError(
            f"{directory}: has no model.safetensors; transformers writes it with "
            "AutoModel.from_pretrained(…).save_pretrained(…)"
        )
    try:
        with safe_open(path, framework="numpy") as file:
            names = set(file.keys())
            prefix = next((p for p in PREFIXES if f"{p}embeddings.LayerNorm.weight" in names), "")

            def read(name: str, *shape: int) -> np.ndarray:
                if prefix + name not in names:
                    raise InputError(f"{path}: has no tensor {prefix + name}")
                array = file.get_tensor(prefix + name)
                if array.shape != shape:
                    raise InputError(
                        f"{path}: {prefix + name} has shape {array.shape}, must have {shape}"
                    )
                return array.astype(jnp.dtype(dtype))

            return _read_all(read, config)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: damaged ({error})") from None


def _read_all(read: Callable[..., np.ndarray], config: BertConfig) -> dict[str, Any]:
    D, F = config.hidden_size, config.intermediate_size
    rows = {
        "word_embeddings.weight": (config.vocab_size, D),
        "position_embeddings.weight": (config.max_position_embeddings, D),
        "token_type_embeddings.weight": (config.type_vocab_size, D),
        "LayerNorm.weight": (D,),
        "LayerNorm.bias": (D,),
    }
    embeddings = {name: read(f"embeddings.{name}", *shape) for name, shape in rows.items()}
    layers = {}
    for name in LAYER_TENSORS:
        output = F if name == "intermediate.dense" else D
        width = F if name == "output.dense" else D
        shape = (D,) if name.endswith("LayerNorm") else (output, width)
        for kind, dimensions in (("weight", shape), ("bias", (output,))):
            layers[f"{name}.{kind}"] = np.stack(
                [
                    read(f"encoder.layer.{i}.{name}.{kind}", *dimensions)
                    for i in range(config.num_hidden_layers)
                ]
            )
    return {"embeddings": embeddings, "layers": layers}


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; raises `InputError` if the file is missing or is none."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: missing") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: got {type(found).__name__}, must be a JSON object")
    return found
