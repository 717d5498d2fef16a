"""What routes a segment: a summary of the segments before it.

The paper takes the mean of the last segment (section 3.1). The other sources are this project's:
the mean of all earlier segments, an average in which a segment counts half as much with every
segment that follows it, and the rest of the last segment as its first token attends to it. All are
strictly causal, because entry k summarises segments up to k and routes segment k+1.

While decoding, `Running` holds what the next border needs, so that no hidden state is kept.

Letters: B batch, L sequence, P prompt, T tokens per segment, N = ceil(L / T) segments, D model.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

NO_SCORE = -1e30  # below every score


def num_segments(length: int, segment_length: int) -> int:
    """N = ceil(L / T): the last segment may be shorter."""
    return -(-length // segment_length)


def segment_means(
    h_BxLxD: Array, segment_length: int, valid_lengths_B: Array | None = None
) -> Array:
    """Mean hidden state of every segment, float32 `[B, N, D]`.

    Only tokens before `valid_lengths_B` count (all, if None); a segment without any has mean 0.
    """
    h_BxNxTxD, is_valid_BxNxT = _split(h_BxLxD, segment_length, valid_lengths_B)
    total_BxNxD = jnp.sum(jnp.where(is_valid_BxNxT[..., None], h_BxNxTxD, 0.0), axis=2)
    return total_BxNxD / jnp.maximum(jnp.sum(is_valid_BxNxT, axis=2), 1)[..., None]


def attention_pools(
    h_BxLxD: Array, segment_length: int, valid_lengths_B: Array | None = None
) -> Array:
    """The other tokens of every segment as its first one attends to them: float32 `[B, N, D]`.

    Hidden states are queries, keys and values, so there are no parameters; scores are divided by
    sqrt(D). The first token does not attend to itself: hidden states are normalised, so its own
    score is about sqrt(D), and at large D it would take all the weight. Tokens are valid as in
    `segment_means`; a segment with one alone has summary 0.
    """
    h_BxNxTxD, is_valid_BxNxT = _split(h_BxLxD, segment_length, valid_lengths_B)
    weight_BxNxT, _ = _attention_weights(h_BxNxTxD, is_valid_BxNxT)
    mass_BxNx1 = jnp.sum(weight_BxNxT, axis=2)[..., None]
    total_BxNxD = jnp.einsum("bnt,bntd->bnd", weight_BxNxT, h_BxNxTxD)
    return total_BxNxD / jnp.where(mass_BxNx1 > 0, mass_BxNx1, 1.0)


def summaries(
    h_BxLxD: Array, segment_length: int, source: str, valid_lengths_B: Array | None = None
) -> Array:
    """What segments up to k hand on to segment k+1: float32 `[B, N, D]`."""
    pool = attention_pools if source == "attention" else segment_means
    own_BxNxD = pool(h_BxLxD, segment_length, valid_lengths_B)
    if source in ("last", "attention"):
        return own_BxNxD
    return jnp.einsum("kn,bnd->bkd", _shares(own_BxNxD.shape[1], source), own_BxNxD)


def _shares(N: int, source: str) -> Array:
    """`[k, n]`: how much segment n counts in the summary of segments up to k."""
    k_Nx1, n_1xN = jnp.arange(N)[:, None], jnp.arange(N)[None]
    if source == "cumulative":
        share_NxN = 1.0 / (k_Nx1 + 1)
    else:  # an average that halves: the first segment keeps what the others leave
        share_NxN = jnp.exp2(-(k_Nx1 - jnp.maximum(n_1xN, 1) + 1.0))
        share_NxN = jnp.where(n_1xN == 0, jnp.exp2(-k_Nx1 * 1.0), share_NxN)
    return jnp.where(n_1xN <= k_Nx1, share_NxN, 0.0)


def _split(
    h_BxLxD: Array, segment_length: int, valid_lengths_B: Array | None
) -> tuple[Array, Array]:
    """Float32 segments `[B, N, T, D]`, padded, and which of their tokens count `[B, N, T]`."""
    B, L, D = h_BxLxD.shape
    N = num_segments(L, segment_length)
    padding = N * segment_length - L
    h_BxLxD = jnp.pad(h_BxLxD.astype(jnp.float32), ((0, 0), (0, padding), (0, 0)))
    if valid_lengths_B is None:
        valid_lengths_B = jnp.full(B, L)
    is_valid_BxL = jnp.arange(N * segment_length)[None] < jnp.minimum(valid_lengths_B, L)[:, None]
    return (
        h_BxLxD.reshape(B, N, segment_length, D),
        is_valid_BxL.reshape(B, N, segment_length),
    )


def _attention_weights(h_xTxD: Array, is_valid_xT: Array) -> tuple[Array, Array]:
    """exp(score - largest score) of every token but the first, which is 0; the largest score."""
    query_x1xD = h_xTxD[..., :1, :]
    score_xT = jnp.sum(query_x1xD * h_xTxD, axis=-1) / h_xTxD.shape[-1] ** 0.5
    is_valid_xT = is_valid_xT.at[..., 0].set(False)
    # Masked before exp, whose gradient would be infinite for a score far above the largest.
    score_xT = jnp.where(is_valid_xT, score_xT, NO_SCORE)
    top_x = jnp.max(score_xT, axis=-1)
    return jnp.where(is_valid_xT, jnp.exp(score_xT - top_x[..., None]), 0.0), top_x


# ---------------------------------------------------------------- while decoding


class Running(NamedTuple):
    """The segment under way in one layer, and those before it; all float32.

    total_BxD, mass_B: the weighted sum of its hidden states so far, and of their weights.
    query_BxD, top_B: its first token and the largest score so far, by which weights are divided;
      None unless the source is attention.
    history_BxD: the summary of the segments before it; None where the source reads one alone.
    """

    total_BxD: Array
    mass_B: Array
    query_BxD: Array | None
    top_B: Array | None
    history_BxD: Array | None


def after_prompt(h_BxPxD: Array, lengths_B: Array, segment_length: int, source: str) -> Running:
    """The state after prompts, whose last segment may be full."""
    h_BxNxTxD, is_valid_BxNxT = _split(h_BxPxD, segment_length, lengths_B)
    rows, last_B = jnp.arange(len(lengths_B)), (lengths_B - 1) // segment_length
    h_BxTxD, weight_BxT = h_BxNxTxD[rows, last_B], is_valid_BxNxT[rows, last_B] * 1.0
    query_BxD = top_B = history_BxD = None
    if source == "attention":
        query_BxD = h_BxTxD[:, 0]
        weight_BxT, top_B = _attention_weights(h_BxTxD, weight_BxT > 0)
    if source in ("cumulative", "average"):
        # A segment before the last is full, so what the last one holds does not matter.
        history_BxD = summaries(h_BxPxD, segment_length, source)[rows, jnp.maximum(last_B - 1, 0)]
    total_BxD = jnp.einsum("bt,btd->bd", weight_BxT, h_BxTxD)
    return Running(total_BxD, jnp.sum(weight_BxT, axis=1), query_BxD, top_B, history_BxD)


def add_token(running: Running, h_BxD: Array, is_first_B: Array) -> Running:
    """The state after one more token of every row, which may be the first of its segment."""
    h_BxD = h_BxD.astype(jnp.float32)
    if running.query_BxD is None or running.top_B is None:
        return running._replace(total_BxD=running.total_BxD + h_BxD, mass_B=running.mass_B + 1.0)
    query_BxD = jnp.where(is_first_B[:, None], h_BxD, running.query_BxD)
    score_B = jnp.sum(query_BxD * h_BxD, axis=-1) / h_BxD.shape[-1] ** 0.5
    score_B = jnp.where(is_first_B, NO_SCORE, score_B)
    top_B = jnp.where(is_first_B, NO_SCORE, jnp.maximum(running.top_B, score_B))
    kept_B, weight_B = jnp.exp(running.top_B - top_B), jnp.exp(score_B - top_B)
    weight_B = jnp.where(is_first_B, 0.0, weight_B)
    kept_B = jnp.where(is_first_B, 0.0, kept_B)
    return running._replace(
        total_BxD=kept_B[:, None] * running.total_BxD + weight_B[:, None] * h_BxD,
        mass_B=kept_B * running.mass_B + weight_B,
        query_BxD=query_BxD,
        top_B=top_B,
    )


def at_border(
    running: Running, positions_B: Array, segment_length: int, source: str
) -> tuple[Array, Running]:
    """What routes the segment that begins at `positions_B`, `[B, D]`, and the state in it.

    Rows that are not at a border keep their state, and their summary means nothing.
    """
    summary_BxD = running.total_BxD / jnp.maximum(running.mass_B, 1e-30)[:, None]
    earlier_Bx1 = (positions_B // segment_length - 1)[:, None]
    if running.history_BxD is not None:
        share_Bx1 = 1.0 / (earlier_Bx1 + 1) if source == "cumulative" else 0.5
        mixed_BxD = running.history_BxD + share_Bx1 * (summary_BxD - running.history_BxD)
        summary_BxD = jnp.where(earlier_Bx1 > 0, mixed_BxD, summary_BxD)
    is_border_B = positions_B % segment_length == 0
    history_BxD = running.history_BxD
    if history_BxD is not None:
        history_BxD = jnp.where(is_border_B[:, None], summary_BxD, history_BxD)
    begun = running._replace(
        total_BxD=jnp.where(is_border_B[:, None], 0.0, running.total_BxD),
        mass_B=jnp.where(is_border_B, 0.0, running.mass_B),
        history_BxD=history_BxD,
    )
    return summary_BxD, begun
