"""A running batch that prompts join and leave: continuous batching.

The batch has a fixed number of slots, each with room for a fixed number of positions, so that one
program is compiled and a row's tokens do not depend on its neighbours, bit for bit. A prompt is
read alone, and its cache, routing and logits are put into a free slot.

A caller repeats three calls in this order: `advance` reads the tokens that were drawn last, `join`
fills free slots, and `draw` draws the next token of every row.

Letters: S slots, M positions in the cache, V vocabulary, Y layers, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lory_jax.errors import InputError
from lory_jax.generation.cost import choose_ffn
from lory_jax.generation.loop import mesh_of, padded
from lory_jax.generation.programs import make_decoder
from lory_jax.generation.sampling import position_keys, sample
from lory_jax.generation.settings import Settings
from lory_jax.model.config import ModelConfig
from lory_jax.model.transformer import Params


@dataclass
class Row:
    """What a slot holds: how its tokens are drawn, and the position of the next one."""

    settings: Settings
    key: np.ndarray
    position: int


class ContinuousBatch:
    """The slots of a running batch.

    Attributes:
      cache_length: M, the most tokens of a prompt and its continuation together.
      ffn: "merged" or "experts", what a step computes with.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        *,
        slots: int,
        cache_length: int,
        routing: str = "prompt",
        ffn: str = "auto",
        vocab_size: int | None = None,
    ):
        """Compiles nothing yet; `vocab_size` is that of the tokenizer, if the model has more ids.

        Raises:
          InputError: a size is out of its range, or `routing` or `ffn` is unknown.
        """
        if slots < 1:
            raise InputError(f"slots: got {slots}, must be at least 1")
        if not 2 <= cache_length <= config.sequence_length:
            raise InputError(
                f"cache_length: got {cache_length}, must be 2 to {config.sequence_length}, the "
                "positions that the model reads"
            )
        self.cache_length = padded(cache_length, config.sequence_length)
        self.ffn = choose_ffn(
            ffn, config, rows=slots, ffns=slots, borders=slots if routing == "segment" else 0
        )
        self._config, self._params = config, params
        self._vocab_size = vocab_size or config.vocab_size
        self._decoder = make_decoder(config, routing, mesh_of(params), self.ffn)
        self._rows: list[Row | None] = [None] * slots
        self._drawn: np.ndarray | None = None  # tokens that `advance` has not read yet
        self._weights, self._logits_SxV, self._cache = self._empty(slots)

    @property
    def free(self) -> int:
        """The number of free slots."""
        return self._rows.count(None)

    @property
    def active(self) -> int:
        """The number of rows."""
        return len(self._rows) - self.free

    def advance(self) -> None:
        """Reads the tokens that `draw` returned last, if any row is left to need it."""
        if self._drawn is None or not self.active:
            self._drawn = None
            return
        T = self._config.segment_length
        positions = [row.position - 1 for row in self._rows if row is not None]
        if self._cache.segments is not None and any(position % T == 0 for position in positions):
            self._weights, self._cache = self._decoder.reroute(
                self._params, self._weights, self._cache
            )
        self._logits_SxV, self._cache = self._decoder.step(
            self._weights, self._cache, jnp.asarray(self._drawn)
        )
        self._drawn = None

    def join(
        self,
        prompt: Sequence[int],
        settings: Settings,
        stream: int = 0,
        given_YxE: np.ndarray | None = None,
    ) -> int:
        """Reads a prompt into a free slot, whose number it returns.

        Args:
          prompt: token ids, BOS included; fewer than `cache_length`.
          settings: how its tokens are drawn; its routing and `ffn` are those of the batch.
          stream: the number of its stream of random draws, given `settings.seed`.
          given_YxE: routing weights that replace those of the prompt.
        """
        assert self._drawn is None, "call advance before join"
        assert 0 < len(prompt) < self.cache_length
        slot = self._rows.index(None)
        tokens_1xP = np.zeros((1, padded(len(prompt), self.cache_length)), np.int32)
        tokens_1xP[0, : len(prompt)] = prompt
        logits_1xV, merged, cache = self._decoder.prefill(
            self._params,
            tokens_1xP,
            np.array([len(prompt)], np.int32),
            self.cache_length,
            None if given_YxE is None else jnp.asarray(given_YxE, jnp.float32),
        )
        self._weights, self._logits_SxV, self._cache = self._decoder.place(
            self._weights, self._logits_SxV, self._cache, slot, logits_1xV, merged, cache
        )
        key = np.asarray(jax.random.key_data(_stream_key(settings.seed, stream)))
        self._rows[slot] = Row(settings, key, len(prompt))
        return slot

    def draw(self) -> dict[int, int]:
        """Draws the next token of every row; returns it by slot."""
        rows = [row or _NOBODY for row in self._rows]
        tokens_S = _draw(
            self._logits_SxV[:, : self._vocab_size],
            np.stack([row.key for row in rows]),
            np.array([row.position for row in rows], np.int32),
            np.array([row.settings.temperature for row in rows], np.float32),
            np.array([row.settings.top_k for row in rows], np.int32),
            np.array([row.settings.top_p for row in rows], np.float32),
        )
        self._drawn = np.asarray(tokens_S)
        drawn = {}
        for slot, row in enumerate(self._rows):
            if row is not None:
                row.position += 1
                drawn[slot] = int(self._drawn[slot])
        return drawn

    def leave(self, slot: int) -> None:
        """Frees a slot; another row may take it after the next `advance`."""
        assert self._rows[slot] is not None
        self._rows[slot] = None

    def _empty(self, slots: int) -> tuple[Params, Array, Any]:
        """The state of a batch whose slots all hold the shortest prompt."""
        tokens_SxP = np.zeros((slots, 1), np.int32)
        logits_SxV, merged, cache = self._decoder.prefill(
            self._params, tokens_SxP, np.ones(slots, np.int32), self.cache_length, None
        )
        return self._decoder.weights(self._params, merged), logits_SxV, cache


def _stream_key(seed: int, stream: int) -> Array:
    return jax.random.fold_in(jax.random.key(seed), stream)


@jax.jit
def _draw(
    logits_SxV: Array,
    keys_Sx2: Array,
    positions_S: Array,
    temperature_S: Array,
    top_k_S: Array,
    top_p_S: Array,
) -> Array:
    keys_S = position_keys(jax.random.wrap_key_data(keys_Sx2), positions_S)
    return sample(logits_SxV, keys_S, temperature=temperature_S, top_k=top_k_S, top_p=top_p_S)


_NOBODY = Row(Settings(temperature=0.0), np.zeros(2, np.uint32), 0)
