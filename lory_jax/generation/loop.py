"""The one generation loop: token by token, row by row, until every row has ended.

`continue_prompts` is what the Python API, the command `generate` and the evaluation harness call
(text_batch.py is for prompts that come and go). It turns the tokens of `decode` into text, and ends
each row at a stop text, at the end of its document or at its limit. The compiled programs are in
`programs.py`; together they compute what `Transformer(tokens, Routing(kind, prompt_lengths_B))`
computes for the whole sequence at once.

Letters: B batch, P padded prompt length, V vocabulary.
"""

import codecs
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding

from lory_jax.data.tokenizer import Tokenizer
from lory_jax.errors import InputError
from lory_jax.generation.cost import choose_ffn
from lory_jax.generation.ffn import share
from lory_jax.generation.programs import make_decoder, spread
from lory_jax.generation.sampling import position_keys, sample
from lory_jax.generation.settings import Settings
from lory_jax.model.config import ModelConfig
from lory_jax.model.transformer import Params

SHAPE_MULTIPLE = 64  # prompts and caches are padded to it, so that few shapes are compiled


# ---------------------------------------------------------------- text


def continue_prompts(
    config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    settings: Settings,
    streams: Sequence[int],
    batch_size: int = 0,
) -> Iterator[list[str]]:
    """Continues a batch of prompts in text, until every row has ended.

    A row's text depends on its prompt, the settings and its stream, not on the other rows.

    Args:
      config, params, tokenizer: the model.
      prompts: token ids of each row, BOS included; at least one, of any lengths.
      settings: how they are continued.
      streams: for each row the number of its stream of random draws.
      batch_size: smaller batches are filled up to this size, so that only one size is compiled.

    Yields:
      after every step, the new text of each row that no later token can change, which may be empty.
      A row's pieces, joined, are its continuation.

    Raises:
      InputError: as `decode` does.
    """
    limits = [settings.new_tokens(len(prompt), config.sequence_length) for prompt in prompts]
    rows = [GrowingText(tokenizer, settings.stop, limit) for limit in limits]

    filling = max(0, batch_size - len(prompts))
    streams_B = jnp.asarray([*streams, *[0] * filling], int)
    keys_B = position_keys(
        jnp.broadcast_to(jax.random.key(settings.seed), len(streams_B)), streams_B
    )

    def choose(logits_BxV: Array, positions_B: np.ndarray) -> Array:
        # The model may have more ids than its tokenizer, whose size depends on the corpus.
        return sample(
            logits_BxV[:, : tokenizer.vocab_size],
            position_keys(keys_B, positions_B),
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
        )

    for tokens_B in decode(
        config,
        params,
        [*prompts, *[[tokenizer.bos_id]] * filling],
        choose,
        max_new_tokens=[*limits, *[1] * filling],
        routing=settings.routing,
        ffn=settings.ffn,
    ):
        yield [row.add(token) for row, token in zip(rows, tokens_B.tolist(), strict=False)]
        if all(row.is_done for row in rows):
            return


class GrowingText:
    """The text of one row as it grows.

    Attributes:
      is_done: whether it has ended, after which tokens are ignored.
      finish_reason: why it has ended: "stop" at EOS or a stop text, "length" at the limit.
      num_tokens: tokens that were read.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], limit: int):
        """Starts empty; the text ends before one of `stop`, at EOS or after `limit` tokens."""
        self.is_done = False
        self.finish_reason = "length"
        self.num_tokens = 0
        self._tokenizer, self._stop, self._tokens_left = tokenizer, stop, limit
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""  # text that may turn out to be the beginning of a stop
        self._longest_stop = max(map(len, stop), default=1)

    def add(self, token: int) -> str:
        """Reads the next token, and returns the new text that no later token can change."""
        if self.is_done:
            return ""
        self._tokens_left -= 1
        self.num_tokens += 1
        is_end = token in self._tokenizer.eos_ids
        if is_end:
            self.finish_reason = "stop"
        data = b"" if is_end else self._tokenizer.decode_bytes([token])
        self.is_done = is_end or self._tokens_left == 0
        text = self._held + self._decoder.decode(data, final=self.is_done)
        stops = [text.index(stop) for stop in self._stop if stop in text]
        if stops:
            self.is_done, self.finish_reason = True, "stop"
            return text[: min(stops)]
        certain = len(text) if self.is_done else max(0, len(text) - self._longest_stop + 1)
        self._held = text[certain:]
        return text[:certain]


# ---------------------------------------------------------------- tokens


def decode(
    config: ModelConfig,
    params: Params,
    prompts: Sequence[Sequence[int]],
    choose: Callable[[Array, np.ndarray], Array],
    *,
    max_new_tokens: int | Sequence[int],
    routing: str = "prompt",
    ffn: str = "auto",
) -> Iterator[np.ndarray]:
    """Continues a batch of prompts, one token of every row at a time.

    Args:
      config, params: the model; parameters on a mesh stay there.
      prompts: token ids of each row, BOS included; at least one, of any lengths. Equal ones are
        read once and, as long as the prompt routes them, share a merge.
      choose: `(logits_BxV, positions_B) -> tokens_B`, where positions are those of the new tokens.
      max_new_tokens: how many tokens to yield, for all rows or for each; stop iterating to stop
        earlier. Rows go on until the last has its tokens, and what they yield beyond their own
        number is meaningless.
      routing: "prompt" or "segment"; a dense model ignores it.
      ffn: "merged", "experts" or "auto", as in `Settings`; a dense or sparse model ignores it.

    Yields:
      int32 `[B]`: the next token of every row.

    Raises:
      InputError: there is no prompt, one is empty, or the model cannot read that many positions.
    """
    limit = config.sequence_length
    lengths_B, new_B = _checked_lengths(prompts, max_new_tokens, limit)
    numbers: dict[tuple[int, ...], int] = {}
    owner_B = np.array([numbers.setdefault(tuple(prompt), len(numbers)) for prompt in prompts])
    lengths_R = np.array([len(prompt) for prompt in numbers], np.int32)
    tokens_RxP = np.zeros((len(numbers), padded(int(lengths_R.max()), limit)), np.int32)
    for row, prompt in enumerate(numbers):
        tokens_RxP[row, : len(prompt)] = prompt

    reroutes = routing == "segment"
    mesh = mesh_of(params)
    borders = len(set((lengths_B % config.segment_length).tolist())) if reroutes else 0
    ffns = len(prompts) if reroutes else len(numbers)
    ffn = choose_ffn(ffn, config, rows=len(prompts), ffns=ffns, borders=borders)
    decoder = make_decoder(config, routing, mesh, ffn)
    # What a row writes beyond the cache, after its own last token, is dropped.
    cache_length = padded(int((lengths_B + new_B).max()), limit)
    logits_BxV, merged, cache = decoder.prefill(params, tokens_RxP, lengths_R, cache_length, None)
    if len(numbers) < len(prompts):
        logits_BxV, merged, cache = spread(owner_B, logits_BxV, merged, cache, reroutes)
        if merged is not None and len(numbers) > 1 and not reroutes:
            cache = cache._replace(sharing=share(owner_B))
    weights = decoder.weights(params, merged)
    del merged  # as large as all FFNs of the batch
    tokens_B = choose(logits_BxV, lengths_B)
    yield np.asarray(tokens_B)
    for count in range(1, int(new_B.max())):
        positions_B = lengths_B + count - 1  # positions of tokens_B, which the step reads
        if cache.segments is not None and (positions_B % config.segment_length == 0).any():
            weights, cache = decoder.reroute(params, weights, cache)
        logits_BxV, cache = decoder.step(weights, cache, tokens_B)
        tokens_B = choose(logits_BxV, positions_B + 1)
        yield np.asarray(tokens_B)


def mesh_of(params: Params) -> Mesh | None:
    """The mesh that parameters are on; None for a single device."""
    sharding = getattr(jax.tree.leaves(params)[0], "sharding", None)
    if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1:
        assert isinstance(sharding.mesh, Mesh)
        return sharding.mesh
    return None


def _checked_lengths(
    prompts: Sequence[Sequence[int]], max_new_tokens: int | Sequence[int], limit: int
) -> tuple[np.ndarray, np.ndarray]:
    """The length of every prompt and the number of tokens to add to it, int32 `[B]`."""
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise InputError("prompts: requires at least one, each of at least one token (its BOS)")
    lengths = [len(prompt) for prompt in prompts]
    if max(lengths) >= limit:
        raise InputError(
            f"prompt: got {max(lengths)} tokens (BOS included), must be at most {limit - 1}: the "
            f"model reads up to {limit} positions"
        )
    if isinstance(max_new_tokens, int):
        max_new_tokens = [max_new_tokens] * len(prompts)
    for length, count in sorted(zip(lengths, max_new_tokens, strict=True), reverse=True):
        if not 1 <= count <= limit - length:
            raise InputError(
                f"max_new_tokens: got {count} after a prompt of {length} tokens (BOS included), "
                f"must be 1 to {limit - length}: the model reads up to {limit} positions"
            )
    return np.array(lengths, np.int32), np.array(max_new_tokens, np.int32)


def padded(length: int, limit: int) -> int:
    """The length rounded up to one of few sizes, at most `limit`."""
    return min(-(-length // SHAPE_MULTIPLE) * SHAPE_MULTIPLE, limit)
