"""Log-likelihoods of continuations, in batches of similar length.

Letters: B rows, P padded length, K scored positions before the last, D model, V vocabulary.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from lory_jax.model.config import ModelConfig
from lory_jax.model.routing import Routing
from lory_jax.model.transformer import Params, build, merge_params
from lory_jax.parallel import make_mesh, place_batch, replicated
from lory_jax.progress import progress

TPU_MULTIPLE = 128  # of a row's length, which TPU attention takes
POSITIONS_AT_ONCE = 64  # whose logits are in memory together


class Continuation(NamedTuple):
    """A text to be scored.

    Attributes:
      tokens: ids of the context and the continuation, at most L + 1.
      prompt_length: how many of the first tokens are the prompt that routes; 0 routes with 1/E.
      scored: how many of the last tokens are scored, at least 1.
    """

    tokens: tuple[int, ...]
    prompt_length: int
    scored: int


class Score(NamedTuple):
    """Log-probability of the scored tokens in nats, and whether each was the most likely one."""

    log_likelihood: float
    is_greedy: bool


def score_continuations(
    config: ModelConfig,
    params: Params,
    continuations: Sequence[Continuation],
    *,
    routing: str,
    batch_size: int,
    known_tokens: int,
) -> list[Score]:
    """Scores every continuation under the routing of its own prompt.

    Continuations that differ in their last token alone share one row: the one-word answers to a
    question cost one forward pass.

    Args:
      config, params: the model, its parameters laid out over all devices or on one.
      continuations: in any order; the scores do not depend on it.
      routing: "prompt" or "segment"; a dense model ignores it.
      batch_size: rows at a time, a multiple of the number of devices.
      known_tokens: ids that the tokenizer has; only these can be the most likely.

    Returns:
      a score for each, in order.
    """
    sharing: dict[Continuation, list[int]] = {}
    for i, (tokens, prompt_length, scored) in enumerate(continuations):
        sharing.setdefault(Continuation(tokens[:-1], prompt_length, scored), []).append(i)
    # The longest first: what does not fit in memory shows at once.
    rows = sorted(sharing, key=lambda row: -len(row.tokens))
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]

    mesh = make_mesh(data=1, fsdp=0, tensor=1)
    forward = _make_forward(config, routing, known_tokens, mesh)
    scores: dict[int, Score] = {}
    for batch in progress(batches, len(batches), "scoring", "batches"):
        padded = batch + batch[-1:] * (batch_size - len(batch))
        before_BxK, best_BxK1, last_BxV = _run(forward, config, params, padded, mesh)
        for row, before_K, best_K1, last_V in zip(
            batch, before_BxK, best_BxK1, last_BxV, strict=False
        ):
            n = row.scored - 1
            head = math.fsum(before_K[len(before_K) - n :].tolist())
            expected = list(row.tokens[len(row.tokens) - n :])
            head_is_greedy = best_K1[len(best_K1) - 1 - n : -1].tolist() == expected
            for i in sharing[row]:
                end = continuations[i].tokens[-1]
                is_greedy = head_is_greedy and int(best_K1[-1]) == end
                scores[i] = Score(head + float(last_V[end]), is_greedy)
    return [scores[i] for i in range(len(continuations))]


def _run(
    forward: Callable[..., Any],
    config: ModelConfig,
    params: Params,
    rows: Sequence[Continuation],
    mesh: Mesh,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    lengths_B = np.array([len(row.tokens) for row in rows], np.int32)
    P = min(_padded_length(int(lengths_B.max())), config.sequence_length)
    tokens_BxP = np.zeros((len(rows), P), np.int32)
    for tokens_P, row in zip(tokens_BxP, rows, strict=True):
        tokens_P[: len(row.tokens)] = row.tokens
    K = _positions(max(row.scored for row in rows) - 1)
    prompt_lengths_B = np.array([row.prompt_length for row in rows], np.int32)
    # Every process scores the same rows; each places its own part of them.
    local = len(rows) // jax.process_count()
    offset = jax.process_index() * local
    with jax.set_mesh(mesh):
        placed = place_batch(tokens_BxP[offset : offset + local], mesh, config.batch_axis)
        return jax.device_get(forward(params, placed, prompt_lengths_B, lengths_B - 1, K))


def _padded_length(length: int) -> int:
    """Up to an eighth more, so that few shapes are compiled; on TPUs a multiple of 128."""
    multiple = max(32, 2 ** (length - 1).bit_length() // 8)
    if jax.default_backend() == "tpu":
        multiple = max(multiple, TPU_MULTIPLE)
    return -(-length // multiple) * multiple


def _positions(count: int) -> int:
    """K: 0, 8, or a multiple of `POSITIONS_AT_ONCE`, so that few shapes are compiled."""
    if count <= 8:
        return 8 if count else 0
    return -(-count // POSITIONS_AT_ONCE) * POSITIONS_AT_ONCE


@functools.lru_cache(maxsize=8)
def _make_forward(
    config: ModelConfig, kind: str, known_tokens: int, mesh: Mesh
) -> Callable[..., tuple[Array, Array, Array]]:
    """The jitted forward pass; its docstring says what it takes and returns."""
    graph, _ = build(config)

    @functools.partial(jax.jit, static_argnums=4, out_shardings=replicated(mesh))
    def forward(
        params: Params, tokens_BxP: Array, prompt_lengths_B: Array, ends_B: Array, K: int
    ) -> tuple[Array, Array, Array]:
        """Scores each row's last position, `ends_B`, and the K before it.

        Returns:
          log-probabilities of the tokens after those K, `[B, K]`; the most likely token after
          each and after the last, `[B, K + 1]`; the log-probabilities after the last, `[B, V]`.
          What lies before a row's first token is meaningless.
        """
        model = merge_params(graph, params)
        rule = Routing(kind, prompt_lengths_B) if config.num_experts else None
        x_BxPxD, _ = model.hidden(tokens_BxP, rule)
        at_BxK1 = jnp.maximum(ends_B[:, None] - jnp.arange(K, -1, -1), 0)
        x_BxK1xD = jnp.take_along_axis(x_BxPxD, at_BxK1[..., None], axis=1)
        next_BxK = jnp.take_along_axis(tokens_BxP, at_BxK1[:, :-1] + 1, axis=1)

        def predict(x_BxCxD: Array) -> tuple[Array, Array]:
            logits_BxCxV = model.unembed(x_BxCxD)
            best_BxC = jnp.argmax(logits_BxCxV[..., :known_tokens], axis=-1)
            return jax.nn.log_softmax(logits_BxCxV, axis=-1), best_BxC

        def score(inputs: tuple[Array, Array]) -> tuple[Array, Array]:
            x_BxCxD, next_BxC = inputs
            log_p_BxCxV, best_BxC = predict(x_BxCxD)
            return jnp.take_along_axis(log_p_BxCxV, next_BxC[..., None], axis=-1)[..., 0], best_BxC

        last_Bx1xV, best_Bx1 = predict(x_BxK1xD[:, -1:])
        if K == 0:
            return jnp.zeros(next_BxK.shape), best_Bx1, last_Bx1xV[:, 0]
        parts = jax.tree.map(
            functools.partial(_split, size=min(K, POSITIONS_AT_ONCE)),
            (x_BxK1xD[:, :-1], next_BxK),
        )
        before_BxK, best_BxK = jax.tree.map(_join, jax.lax.map(score, parts))
        return before_BxK, jnp.concatenate([best_BxK, best_Bx1], axis=1), last_Bx1xV[:, 0]

    return forward


def _split(x_BxKx: Array, size: int) -> Array:
    """`[B, K, ...]` to `[K / size, B, size, ...]`."""
    B, K = x_BxKx.shape[:2]
    return jnp.moveaxis(x_BxKx.reshape(B, K // size, size, *x_BxKx.shape[2:]), 1, 0)


def _join(x_NxBxC: Array) -> Array:
    """`[N, B, C]` to `[B, N * C]`."""
    return jnp.moveaxis(x_NxBxC, 0, 1).reshape(x_NxBxC.shape[1], -1)
