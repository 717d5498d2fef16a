"""How layers of two kinds, with experts and without, run in order (`config.model.expert_layers`).

The parameters of each kind are one stack: `layers` holds the layers with experts (in a dense model,
all), `dense_layers` the others, if there are any. A stack is scanned as it is stored, so neither
way of mixing kinds copies parameters:

    upper_half    two scans, one after the other
    every_second  one scan over pairs, a dense layer and one with experts
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from lory_jax.model.config import ModelConfig

# `(x, a layer of a stack, whether the stack is dense_layers) -> (x, what the layer returns)`
RunLayer = Callable[[Array, Any, bool], tuple[Array, Any]]


def run_layers(
    config: ModelConfig, run: RunLayer, x: Array, layers: Any, dense_layers: Any | None
) -> tuple[Array, Any, Any]:
    """Runs every layer in order.

    Args:
      config: the model; `scan_layers` says whether to scan or to unroll.
      run: runs one layer.
      x: what the first layer reads.
      layers, dense_layers: the stacks, trees of arrays whose first axis counts layers.

    Returns:
      What the last layer leaves, and what the layers of each stack return, stacked; None for
      `dense_layers` if there are none.
    """
    if not config.scan_layers:
        return _unrolled(config, run, x, layers, dense_layers)

    def run_dense(x: Array, layer: Any) -> tuple[Array, Any]:
        return run(x, layer, True)

    def run_other(x: Array, layer: Any) -> tuple[Array, Any]:
        return run(x, layer, False)

    def run_pair(x: Array, pair: tuple[Any, Any]) -> tuple[Array, tuple[Any, Any]]:
        x, of_dense = run_dense(x, pair[0])
        x, of_other = run_other(x, pair[1])
        return x, (of_dense, of_other)

    if dense_layers is None:
        x, of_layers = jax.lax.scan(run_other, x, layers)
        return x, of_layers, None
    if config.expert_layers == "every_second":
        x, (of_dense, of_layers) = jax.lax.scan(run_pair, x, (dense_layers, layers))
        return x, of_layers, of_dense
    x, of_dense = jax.lax.scan(run_dense, x, dense_layers)
    x, of_layers = jax.lax.scan(run_other, x, layers)
    return x, of_layers, of_dense


def _unrolled(
    config: ModelConfig, run: RunLayer, x: Array, layers: Any, dense_layers: Any | None
) -> tuple[Array, Any, Any]:
    found: dict[bool, list[Any]] = {False: [], True: []}
    for y in range(config.num_layers):
        is_dense = y in config.dense_layer_numbers
        stack, place = (dense_layers if is_dense else layers), len(found[is_dense])
        x, of_layer = run(x, jax.tree.map(lambda w, p=place: w[p], stack), is_dense)
        found[is_dense].append(of_layer)
    of_layers, of_dense = (
        jax.tree.map(lambda *parts: jnp.stack(parts), *parts) if parts else None
        for parts in (found[False], found[True])
    )
    return x, of_layers, of_dense


def in_order(config: ModelConfig, of_layers: Sequence[Any], of_dense: Sequence[Any]) -> list[Any]:
    """One entry per layer, from those of the two stacks."""
    entries = dict(zip(config.layer_numbers, of_layers, strict=True))
    entries |= dict(zip(config.dense_layer_numbers, of_dense, strict=True))
    return [entries[y] for y in range(config.num_layers)]


def split_stack(config: ModelConfig, stack: Any) -> tuple[Any, Any | None]:
    """The layers of one stack of all, apart: those of `layers`, and of `dense_layers` or None."""
    if not config.dense_layer_numbers:
        return stack, None
    of_layers, of_dense = (
        jax.tree.map(lambda w, kept=numbers: w[jnp.array(kept)], stack)
        for numbers in (config.layer_numbers, config.dense_layer_numbers)
    )
    return of_layers, of_dense


def join_stacks(config: ModelConfig, layers: Any, dense_layers: Any | None) -> Any:
    """One stack of all layers in order, from two of the same structure."""
    if dense_layers is None:
        return layers
    places = jnp.argsort(jnp.array((*config.layer_numbers, *config.dense_layer_numbers)))
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b])[places], layers, dense_layers)
