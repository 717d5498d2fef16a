"""Log-likelihoods of continuations, in batches of similar length.

Letters: B rows, P padded length, K scored positions, C of them at a time, D model, V vocabulary.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from lory_jax.console import progress
from lory_jax.model.attention import Branches
from lory_jax.model.config import ModelConfig
from lory_jax.model.routing import Routing
from lory_jax.model.transformer import Params, assemble, build
from lory_jax.parallel import make_mesh, place_batch, replicated

TPU_MULTIPLE = 128  # TPU attention requires row lengths that are multiples of it
POSITIONS_AT_ONCE = 64  # how many positions' logits are in memory together


class Continuation(NamedTuple):
    """A text to be scored.

    Attributes:
      tokens: ids of the context and the continuation, at most L + 1.
      prompt_length: how many of the first tokens are the prompt that routes; 0 gives every expert
        the weight 1/E.
      scored: how many of the last tokens are scored, at least 1.
    """

    tokens: tuple[int, ...]
    prompt_length: int
    scored: int


class Score(NamedTuple):
    """Log-probability of the scored tokens in nats, and whether each was the most likely one."""

    log_likelihood: float
    is_greedy: bool


@dataclass(frozen=True)
class Row:
    """Several continuations sharing a prefix, packed in one row.

    Attributes:
      tokens: what the model reads: the prefix, then the tokens that each branch adds to it.
      positions, branch: the position and branch of each token, as `Branches` defines them.
      prompt_length: the length of the prompt that routes.
      at, targets: the positions whose next token is scored, and those tokens, continuation by
        continuation.
      members: the index of each continuation, and its number of entries in `at`.
    """

    tokens: list[int]
    positions: list[int]
    branch: list[int]
    prompt_length: int
    at: list[int]
    targets: list[int]
    members: list[tuple[int, int]]

    @classmethod
    def of(cls, prefix: tuple[int, ...], prompt_length: int) -> "Row":
        count = len(prefix)
        return cls(list(prefix), list(range(count)), [0] * count, prompt_length, [], [], [])

    def add(self, i: int, continuation: Continuation) -> None:
        """Adds continuation `i`, which begins with the row's prefix."""
        shared = self.branch.count(0)
        tokens, scored = continuation.tokens, continuation.scored
        added = tokens[shared:-1]
        offset = len(self.tokens) - shared
        self.tokens.extend(added)
        self.positions.extend(range(shared, shared + len(added)))
        self.branch.extend([len(self.members) + 1] * len(added))
        for position in range(len(tokens) - scored - 1, len(tokens) - 1):
            self.at.append(position + (offset if position >= shared else 0))
            self.targets.append(tokens[position + 1])
        self.members.append((i, scored))


def make_rows(continuations: Sequence[Continuation], share: bool, limit: int) -> list[Row]:
    """Packs continuations into rows, so that a common prefix is read only once.

    Args:
      continuations: in any order.
      share: whether continuations may share the prefix before their scored tokens; if not, only
        those that differ only in their last token, which is not read, share a row.
      limit: the most tokens in a row, unless a single continuation has more.
    """
    rows: dict[tuple[tuple[int, ...], int, int], Row] = {}
    full = []
    for i, continuation in enumerate(continuations):
        tokens, prompt_length, scored = continuation
        prefix = tokens[: -scored if share else -1]
        added = len(tokens) - 1 - len(prefix)
        key = (prefix, prompt_length, 0 if share else scored)
        row = rows.get(key)
        if row is not None and len(row.tokens) + added > limit:
            full.append(rows.pop(key))
            row = None
        if row is None:
            row = rows[key] = Row.of(prefix, prompt_length)
        row.add(i, continuation)
    return [*full, *rows.values()]


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

    The answers to one question share a row, in which the question is read once. Where each segment
    routes the next, a token's routing depends on the tokens before it in the row; there, only
    answers of a single token share a row.

    Args:
      config, params: the model, its parameters laid out over all devices or on one.
      continuations: in any order; the scores do not depend on it.
      routing: "prompt" or "segment"; a dense model ignores it.
      batch_size: rows at a time, a multiple of the number of devices.
      known_tokens: the number of ids that the tokenizer has; only these can be the most likely.

    Returns:
      the scores, in the order of `continuations`.
    """
    share = routing == "prompt" or not config.num_experts
    rows = make_rows(continuations, share, config.sequence_length)
    # Longest first: rows that do not fit in memory fail at once.
    rows.sort(key=lambda row: -len(row.tokens))
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]

    mesh = make_mesh(data=1, fsdp=0, tensor=1)
    forward = _make_forward(config, routing, known_tokens, mesh)
    scores: dict[int, Score] = {}
    for batch in progress(batches, len(batches), "scoring", "batches"):
        padded = batch + batch[-1:] * (batch_size - len(batch))
        log_p_BxK, best_BxK = _run(forward, config, params, padded, mesh)
        for row, log_p_K, best_K in zip(batch, log_p_BxK, best_BxK, strict=False):
            start = 0
            for i, scored in row.members:
                mine = slice(start, start + scored)
                is_greedy = best_K[mine].tolist() == row.targets[mine]
                scores[i] = Score(math.fsum(log_p_K[mine].tolist()), is_greedy)
                start += scored
    return [scores[i] for i in range(len(continuations))]


def _run(
    forward: Callable[..., Any],
    config: ModelConfig,
    params: Params,
    rows: Sequence[Row],
    mesh: Mesh,
) -> tuple[np.ndarray, np.ndarray]:
    P = _padded_length(max(len(row.tokens) for row in rows))
    P = max(min(P, config.sequence_length), max(len(row.tokens) for row in rows))
    K = _positions(max(len(row.at) for row in rows))
    tokens_BxP = _table([row.tokens for row in rows], P)
    inputs = {
        "at": _table([row.at for row in rows], K),
        "targets": _table([row.targets for row in rows], K),
        "prompt_lengths": np.array([row.prompt_length for row in rows], np.int32),
    }
    if any(max(row.branch) for row in rows):
        inputs["positions"] = _table([row.positions for row in rows], P)
        inputs["branch"] = _table([row.branch for row in rows], P, filling=-1)
    # Every process scores the same rows; each places its own part of them.
    local = len(rows) // jax.process_count()
    offset = jax.process_index() * local
    with jax.set_mesh(mesh):
        placed = place_batch(tokens_BxP[offset : offset + local], mesh, config.batch_axis)
        return jax.device_get(forward(params, placed, inputs))


def _table(lists: Sequence[Sequence[int]], width: int, filling: int = 0) -> np.ndarray:
    """The lists as int32 `[len(lists), width]`, each padded at its end."""
    table = np.full((len(lists), width), filling, np.int32)
    for row, values in zip(table, lists, strict=True):
        row[: len(values)] = values
    return table


def _padded_length(length: int) -> int:
    """Rounds up by at most an eighth (to a multiple of 128 on TPUs): few shapes are compiled."""
    multiple = max(32, 2 ** (length - 1).bit_length() // 8)
    if jax.default_backend() == "tpu":
        multiple = max(multiple, TPU_MULTIPLE)
    return -(-length // multiple) * multiple


def _positions(count: int) -> int:
    """Rounds up to 1, 8 or a multiple of `POSITIONS_AT_ONCE`, so that few shapes are compiled."""
    if count <= 8:
        return 8 if count > 1 else 1
    return -(-count // POSITIONS_AT_ONCE) * POSITIONS_AT_ONCE


@functools.lru_cache(maxsize=8)
def _make_forward(
    config: ModelConfig, kind: str, known_tokens: int, mesh: Mesh
) -> Callable[..., tuple[Array, Array]]:
    """The jitted forward pass; its docstring describes its arguments and results."""
    graph, _ = build(config)

    @functools.partial(jax.jit, out_shardings=replicated(mesh))
    def forward(params: Params, tokens_BxP: Array, inputs: dict[str, Array]) -> tuple[Array, Array]:
        """Log-probabilities of `targets` at the positions `at`, and the likeliest ids: `[B, K]`."""
        model = assemble(graph, params)
        rule = Routing(kind, inputs["prompt_lengths"]) if config.num_experts else None
        branches = None
        if "branch" in inputs:
            branches = Branches(inputs["positions"], inputs["branch"])
        x_BxPxD, _ = model.hidden(tokens_BxP, rule, branches)
        x_BxKxD = jnp.take_along_axis(x_BxPxD, inputs["at"][..., None], axis=1)

        def score(of_part: tuple[Array, Array]) -> tuple[Array, Array]:
            x_BxCxD, target_BxC = of_part
            logits_BxCxV = model.unembed(x_BxCxD)
            best_BxC = jnp.argmax(logits_BxCxV[..., :known_tokens], axis=-1)
            log_p_BxCxV = jax.nn.log_softmax(logits_BxCxV, axis=-1)
            return jnp.take_along_axis(log_p_BxCxV, target_BxC[..., None], -1)[..., 0], best_BxC

        K = x_BxKxD.shape[1]
        split = functools.partial(_split, size=min(K, POSITIONS_AT_ONCE))
        parts = jax.tree.map(split, (x_BxKxD, inputs["targets"]))
        return jax.tree.map(_join, jax.lax.map(score, parts))

    return forward


def _split(x_BxKx: Array, size: int) -> Array:
    """`[B, K, ...]` to `[K / size, B, size, ...]`."""
    B, K = x_BxKx.shape[:2]
    return jnp.moveaxis(x_BxKx.reshape(B, K // size, size, *x_BxKx.shape[2:]), 1, 0)


def _join(x_NxBxC: Array) -> Array:
    """`[N, B, C]` to `[B, N * C]`."""
    return jnp.moveaxis(x_NxBxC, 0, 1).reshape(x_NxBxC.shape[1], -1)
