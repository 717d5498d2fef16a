"""Choosing the next token: greedy, temperature, top-k and top-p.

Every row has its own key, so what is drawn for a row does not depend on its batch.

Letters: B batch, V vocabulary.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array

from lory_jax.errors import InputError


def check_settings(temperature: float, top_k: int, top_p: float) -> None:
    """Raises `InputError` for settings that `sample` cannot use."""
    if not (math.isfinite(temperature) and temperature >= 0):
        raise InputError(f"temperature: got {temperature}, must be at least 0 (greedy)")
    if top_k < 0:
        raise InputError(f"top_k: got {top_k}, must be a number of tokens, or 0 for all")
    if not 0 < top_p <= 1:
        raise InputError(f"top_p: got {top_p}, must be above 0 and at most 1 (all tokens)")


@functools.partial(jax.jit, static_argnames=("temperature", "top_k", "top_p"))
def sample(
    logits_BxV: Array,
    keys_B: Array,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Array:
    """Draws one token per row.

    Args:
      logits_BxV: unnormalised log-probabilities.
      keys_B: a random key per row.
      temperature: divides the logits; 0 chooses the most likely token.
      top_k: draws among the k most likely tokens only; 0 is all.
      top_p: among those, keeps the smallest set of most likely tokens that together reach this
        probability; it has at least one token.

    Returns:
      int32 `[B]`.
    """
    if temperature == 0:
        return jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)
    V = logits_BxV.shape[-1]
    order_BxV = jnp.argsort(logits_BxV, axis=-1, descending=True, stable=True)
    scores_BxV = jnp.take_along_axis(logits_BxV, order_BxV, axis=-1) / temperature
    if top_k:
        scores_BxV = jnp.where(jnp.arange(V)[None] < min(top_k, V), scores_BxV, -jnp.inf)
    if top_p < 1:
        probability_BxV = jax.nn.softmax(scores_BxV, axis=-1)
        before_BxV = jnp.cumsum(probability_BxV, axis=-1) - probability_BxV
        # The first is always kept, even if rounding makes the sum before it nonzero.
        is_kept_BxV = (before_BxV < top_p) | (jnp.arange(V)[None] == 0)
        scores_BxV = jnp.where(is_kept_BxV, scores_BxV, -jnp.inf)
    rank_B = jax.vmap(jax.random.categorical)(keys_B, scores_BxV)
    return jnp.take_along_axis(order_BxV, rank_B[:, None], axis=-1)[:, 0].astype(jnp.int32)


@jax.jit
def position_keys(keys_B: Array, positions_B: Array) -> Array:
    """Each row's key for one position of its own."""
    return jax.vmap(jax.random.fold_in)(keys_B, positions_B)
