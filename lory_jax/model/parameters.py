"""One declaration per parameter: shape, logical axes (see parallel.py) and initialisation."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array


class Initializer:
    """Declares the parameters of a module, each from its own key, all float32.

    `stack` is a shape put in front of every parameter: `(num_layers,)` makes the parameters of all
    layers at once, for `jax.lax.scan`.
    """

    def __init__(self, key: Array, stack: tuple[int, ...] = ()):
        self._key = key
        self._count = 0
        self._stack = stack

    def stacked(self, num_layers: int) -> "Initializer":
        """An initializer for a stack of layers, with keys of its own."""
        return Initializer(self._next_key(), (num_layers,))

    def matrix(
        self, shape: tuple[int, ...], axes: tuple[str, ...], *, fan_in: int, scale: float = 1.0
    ) -> nnx.Param:
        """Normal with standard deviation scale / sqrt(fan_in)."""
        values = jax.random.normal(self._next_key(), self._stack + shape, jnp.float32)
        return self._declare(values * (scale / math.sqrt(fan_in)), axes)

    def ones(self, shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
        """All ones, for norms."""
        return self._declare(jnp.ones(self._stack + shape, jnp.float32), axes)

    def constant(self, shape: tuple[int, ...], axes: tuple[str, ...], value: float) -> nnx.Param:
        """The same value everywhere."""
        return self._declare(jnp.full(self._stack + shape, value, jnp.float32), axes)

    def _declare(self, values: Array, axes: tuple[str, ...]) -> nnx.Param:
        axes = ("layers",) * len(self._stack) + axes
        if values.ndim != len(axes):
            raise ValueError(
                f"a parameter of shape {values.shape} needs {values.ndim} axis names, got {axes}"
            )
        return nnx.Param(values, axes=axes)

    def _next_key(self) -> Array:
        self._count += 1
        return jax.random.fold_in(self._key, self._count)
