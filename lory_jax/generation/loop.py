"""How Lory infers: merge the experts into one FFN per row, then decode like any dense model.

Token by token this computes what `Transformer(tokens, Routing(kind, prompt_lengths_B))` computes
for the whole sequence at once. The programs are in `decoder.py`.

Letters: B batch, P padded prompt length, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding

from lory_jax.errors import InputError
from lory_jax.generation.programs import ROUTINGS, make_decoder
from lory_jax.model.config import ModelConfig
from lory_jax.model.transformer import Params

__all__ = ["ROUTINGS", "decode"]

SHAPE_MULTIPLE = 64  # prompts and caches are padded to it, so that few shapes are compiled


def decode(
    config: ModelConfig,
    params: Params,
    prompts: Sequence[Sequence[int]],
    choose: Callable[[Array, np.ndarray], Array],
    *,
    max_new_tokens: int,
    routing: str = "prompt",
) -> Iterator[np.ndarray]:
    """Continues a batch of prompts, one token of every row at a time.

    Args:
      config, params: the model; parameters that lie on a mesh stay there.
      prompts: token ids of each row, BOS included; at least one, of any lengths.
      choose: `(logits_BxV, positions_B) -> tokens_B`, where positions are those of the new tokens.
      max_new_tokens: how many tokens to yield per row; stop iterating to stop earlier.
      routing: "prompt" or "segment"; a dense model ignores it.

    Yields:
      int32 `[B]`, the next token of every row.

    Raises:
      InputError: no prompt, an empty one, or more positions than the model was trained on.
    """
    lengths_B = _checked_lengths(prompts, max_new_tokens, config.sequence_length)
    longest, limit = int(lengths_B.max()), config.sequence_length
    tokens_BxP = np.zeros((len(prompts), _padded(longest, limit)), np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BxP[row, : len(prompt)] = prompt

    decoder = make_decoder(config, routing, mesh_of(params))
    cache_length = _padded(longest + max_new_tokens, limit)
    # The same prompt is routed alike in every row, until segments of their own route them.
    shared = (
        routing == "prompt"
        and not config.is_sparse
        and all(list(p) == list(prompts[0]) for p in prompts)
    )
    logits_BxV, weights, cache = decoder.prefill(
        params, tokens_BxP, lengths_B, cache_length, shared
    )
    tokens_B = choose(logits_BxV, lengths_B)
    yield np.asarray(tokens_B)
    for count in range(1, max_new_tokens):
        positions_B = lengths_B + count - 1  # of tokens_B, which the step reads
        if cache.totals is not None and (positions_B % config.segment_length == 0).any():
            weights, cache = decoder.remerge(params, weights, cache)
        logits_BxV, cache = decoder.step(weights, cache, tokens_B)
        tokens_B = choose(logits_BxV, positions_B + 1)
        yield np.asarray(tokens_B)


def mesh_of(params: Params) -> Mesh | None:
    """The mesh that parameters lie on; None for a single device."""
    sharding = getattr(jax.tree.leaves(params)[0], "sharding", None)
    if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1:
        assert isinstance(sharding.mesh, Mesh)
        return sharding.mesh
    return None


def _checked_lengths(
    prompts: Sequence[Sequence[int]], max_new_tokens: int, limit: int
) -> np.ndarray:
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise InputError("prompts: takes at least one, each of at least one token (its BOS)")
    lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
    longest = int(lengths_B.max())
    if longest >= limit:
        raise InputError(
            f"prompt: got {longest} tokens (BOS included), takes at most {limit - 1}: the model "
            f"reads up to {limit} positions"
        )
    if max_new_tokens < 1 or longest + max_new_tokens > limit:
        raise InputError(
            f"max_new_tokens: got {max_new_tokens} after a prompt of {longest} tokens (BOS "
            f"included), takes 1 to {limit - longest}: the model reads up to {limit} positions"
        )
    return lengths_B


def _padded(length: int, limit: int) -> int:
    return min(-(-length // SHAPE_MULTIPLE) * SHAPE_MULTIPLE, limit)
