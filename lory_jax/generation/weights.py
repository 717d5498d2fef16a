"""The weights that decoding reads, made once from the trained parameters.

They are in the compute type and apart for every layer: a scan would copy the weights of every layer
out of their stacks in every step, which doubles the time of a step on a CPU.

Letters: Y layers, R rows that own an FFN, D model, F FFN, E experts.
"""

from typing import Any

import jax
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lory_jax.model.config import ModelConfig
from lory_jax.model.experts import DENSE_AXES, DENSE_BIAS_AXES
from lory_jax.model.layer_order import in_order
from lory_jax.model.routing_rules import ADAPTED
from lory_jax.model.transformer import Params, build
from lory_jax.parallel import partition_spec


def served_weights(
    config: ModelConfig, served: ModelConfig, mesh: Mesh | None, params: Params, ffn: Params
) -> Params:
    """The trained parameters with these FFNs, as `step` of programs.py reads them.

    Args:
      config: the trained model.
      served: the model that decodes: dense where experts were merged.
      mesh: the one that parameters are on.
      params: the trained parameters.
      ffn: the FFNs of `served`, `[Y, D, F]` or `[Y, E, D, F]`; merged ones are `[Y, R, D, F]`, of
        which R = 1 is dropped. Where only some layers hold experts, Y counts those.
    """
    _, axes = build(served)
    ffn_axes = axes["layers"]["ffn"]
    ffn = {name: ffn[name] for name in ffn_axes}
    if ffn["gate"].ndim > len(ffn_axes["gate"]):
        if ffn["gate"].shape[1] == 1:
            ffn = {name: w[:, 0] for name, w in ffn.items()}
        else:
            ffn_axes = {name: ("layers", "whole", *rest) for name, (_, *rest) in ffn_axes.items()}
    layer_axes = {**axes["layers"], "ffn": ffn_axes}
    found = _in_compute_type(served, {**params, "layers": {**params["layers"], "ffn": ffn}})
    of_dense = []
    if config.dense_layer_numbers:
        dense_axes = axes["dense_layers"] if "dense_layers" in axes else axes["layers"]
        stack = found.pop("dense_layers")
        of_dense = _apart(stack, dense_axes, len(config.dense_layer_numbers), mesh)
    of_layers = _apart(found["layers"], layer_axes, len(config.layer_numbers), mesh)
    return {**found, "layers": tuple(in_order(config, of_layers, of_dense))}


def _apart(stack: Params, axes: Params, count: int, mesh: Mesh | None) -> list[Params]:
    return [
        jax.tree.map(lambda w, names, y=y: pin(w[y], partition_spec(names[1:]), mesh), stack, axes)
        for y in range(count)
    ]


def ffns_of(config: ModelConfig, weights: Params) -> tuple[Params, ...]:
    """The FFN of every layer that holds experts in the trained model."""
    return tuple(weights["layers"][y]["ffn"] for y in config.layer_numbers)


def with_ffns(config: ModelConfig, weights: Params, ffns: tuple[Params, ...]) -> Params:
    """The weights with those FFNs replaced."""
    layers = list(weights["layers"])
    for y, ffn in zip(config.layer_numbers, ffns, strict=True):
        layers[y] = {**layers[y], "ffn": ffn}
    return {**weights, "layers": tuple(layers)}


def pin_merged(merged: Params, mesh: Mesh | None) -> Params:
    """Lays merged FFNs `[Y, R, ...]` out as `served_weights` does."""
    return {
        name: pin(
            w, partition_spec(("layers", "whole", *(DENSE_AXES | DENSE_BIAS_AXES)[name])), mesh
        )
        for name, w in merged.items()
    }


def pin(x: Array, spec: PartitionSpec, mesh: Mesh | None) -> Array:
    """Fixes the layout of an array on a mesh."""
    return x if mesh is None else jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def _in_compute_type(config: ModelConfig, params: Params) -> Params:
    """Casts matrices once to the compute type; norms and routers are used in float32."""

    def convert(path: Any, w: Array) -> Array:
        name = path[-1].key
        is_float32 = name.endswith("norm") or name == "router" or name in ADAPTED
        return w if is_float32 else w.astype(config.compute_dtype)

    return jax.tree_util.tree_map_with_path(convert, params)
