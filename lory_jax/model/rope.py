"""Rotary position embeddings, scaled as transformers scales them.

Letters: B batch, L sequence, H heads, K head width, K2 = K / 2 pairs.
"""

import math
from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array


@dataclass(frozen=True)
class Rope:
    """The rotary embedding's settings; `lory_jax.schema` declares the meaning of each."""

    theta: float
    scaling: str
    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 0.0
    truncate: bool = True

    @property
    def amplitude(self) -> float:
        """What queries and keys are multiplied by, beside being rotated; YaRN's is above 1."""
        if self.scaling != "yarn":
            return 1.0
        return self.attention_factor or 0.1 * math.log(self.factor) + 1.0

    def frequencies(self, head_width: int) -> Array:
        """Radians per position of each of the K/2 pairs, float32.

        "linear" divides all of them by `factor`. "llama3" (Llama 3.1) divides those with a
        wavelength above original_length / low_frequency_factor, keeps those with a wavelength below
        original_length / high_frequency_factor, and interpolates in between. "yarn" (Peng et al.
        2023, arXiv 2309.00071) does the same with borders in turns within original_length, and
        interpolates by the index of the pair. "dynamic" scales nothing up to sequence_length.
        """
        frequency_K2 = self.theta ** (-jnp.arange(0, head_width, 2, dtype=jnp.float32) / head_width)
        if self.scaling in ("none", "dynamic"):
            return frequency_K2
        if self.scaling == "linear":
            return frequency_K2 / self.factor
        if self.scaling == "yarn":
            first, last = (
                self._yarn_border(self.beta_fast, head_width),
                self._yarn_border(self.beta_slow, head_width),
            )
            if self.truncate:
                first, last = math.floor(first), math.ceil(last)
            first, last = max(first, 0), min(last, head_width - 1)
            pair_K2 = jnp.arange(head_width // 2, dtype=jnp.float32)
            scaled_K2 = jnp.clip((pair_K2 - first) / (last - first or 1e-3), 0.0, 1.0)
            return frequency_K2 * (1 - scaled_K2) + frequency_K2 / self.factor * scaled_K2
        if self.scaling != "llama3":
            raise ValueError(
                f"scaling: got {self.scaling!r}; must be none, linear, llama3, yarn or dynamic"
            )
        low, high = self.low_frequency_factor, self.high_frequency_factor
        turns_K2 = self.original_length * frequency_K2 / (2 * math.pi)
        kept_K2 = jnp.clip((turns_K2 - low) / (high - low), 0.0, 1.0)
        return frequency_K2 * (kept_K2 + (1 - kept_K2) / self.factor)

    def rotation(self, positions_xL: Array, head_width: int) -> tuple[Array, Array]:
        """Cosines and sines of the angles of all pairs, times the amplitude: `[..., L, K/2]`."""
        frequency_K2 = self.frequencies(head_width)
        angle_xLxK2 = positions_xL.astype(jnp.float32)[..., None] * jnp.broadcast_to(
            frequency_K2, (*positions_xL.shape, head_width // 2)
        )
        cos, sin = jnp.cos(angle_xLxK2), jnp.sin(angle_xLxK2)
        if self.amplitude != 1.0:
            cos, sin = cos * self.amplitude, sin * self.amplitude
        return cos, sin

    def _yarn_border(self, turns: float, head_width: int) -> float:
        """The index of the pair that turns so often within `original_length`."""
        pairs = head_width * math.log(self.original_length / (turns * 2 * math.pi))
        return pairs / (2 * math.log(self.theta))


def rotate(x_BxLxHxK: Array, positions_BxL: Array, rope: Rope) -> Array:
    """Rotary embedding in the half-rotation form; `positions_BxL` are integers from 0."""
    cos_BxLxK2, sin_BxLxK2 = rope.rotation(positions_BxL, x_BxLxHxK.shape[-1])
    return rotate_halves(x_BxLxHxK, cos_BxLxK2[:, :, None], sin_BxLxK2[:, :, None], axis=-1)


def rotate_halves(x: Array, cos: Array, sin: Array, axis: int) -> Array:
    """Rotates the pairs (k, k + K/2) of an axis, in float32; returns x's type."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=axis)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=axis)
    return rotated.astype(x.dtype)
