"""Choosing the next token: greedy, temperature, top-k and top-p.

Every row has its own key, so what is drawn for a row does not depend on its batch.

Letters: B batch, V vocabulary.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from lory_jax.errors import InputError


def check_settings(temperature: float, top_k: int, top_p: float) -> None:
    """Raises `InputError` for settings that `sample` cannot use."""
    if not (math.isfinite(temperature) and temperature >= 0):
        raise InputError(f"temperature: got {temperature}, must be at least 0 (greedy)")
    if top_k < 0:
        raise InputError(f"top_k: got {top_k}, must be a number of tokens, or 0 for all")
    if not 0 < top_p <= 1:
        raise InputError(f"top_p: got {top_p}, must be above 0 and at most 1 (all tokens)")


@jax.jit
def sample(
    logits_BxV: Array,
    keys_B: Array,
    *,
    temperature: ArrayLike = 1.0,
    top_k: ArrayLike = 0,
    top_p: ArrayLike = 1.0,
) -> Array:
    """Draws one token per row. The three settings are numbers, or arrays with one for each row.

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
    B, V = logits_BxV.shape
    temperature_B, top_k_B, top_p_B = (
        jnp.broadcast_to(setting, B) for setting in (temperature, top_k, top_p)
    )
    best_B = jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)
    is_greedy_B = temperature_B == 0

    def draw() -> Array:
        divisor_B = jnp.where(is_greedy_B, 1.0, temperature_B)
        order_BxV = jnp.argsort(logits_BxV, axis=-1, descending=True, stable=True)
        scores_BxV = jnp.take_along_axis(logits_BxV, order_BxV, axis=-1) / divisor_B[:, None]
        rank_1xV = jnp.arange(V)[None]
        is_kept_BxV = (rank_1xV < top_k_B[:, None]) | (top_k_B == 0)[:, None]
        scores_BxV = jnp.where(is_kept_BxV, scores_BxV, -jnp.inf)
        probability_BxV = jax.nn.softmax(scores_BxV, axis=-1)
        before_BxV = jnp.cumsum(probability_BxV, axis=-1) - probability_BxV
        # All are kept at 1, where the sum before a token may be rounded to 1. The first is always
        # kept, even if rounding makes the sum before it nonzero.
        is_kept_BxV = (before_BxV < top_p_B[:, None]) | (top_p_B >= 1)[:, None] | (rank_1xV == 0)
        scores_BxV = jnp.where(is_kept_BxV, scores_BxV, -jnp.inf)
        drawn_B = jax.vmap(jax.random.categorical)(keys_B, scores_BxV)
        token_B = jnp.take_along_axis(order_BxV, drawn_B[:, None], axis=-1)[:, 0]
        return jnp.where(is_greedy_B, best_B, token_B.astype(jnp.int32))

    # Sorting the vocabulary takes longer than a step of a small model.
    return jax.lax.cond(jnp.all(is_greedy_B), lambda: best_B, draw)


@jax.jit
def position_keys(keys_B: Array, positions_B: Array) -> Array:
    """Each row's key for one position of its own."""
    return jax.vmap(jax.random.fold_in)(keys_B, positions_B)
