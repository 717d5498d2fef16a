"""Texts from a queue of prompts: they join a running batch in the order of their arrival.

`TextBatch` turns the tokens of a `ContinuousBatch` into texts; the server feeds it from its own
queue. `continue_queue` feeds it from a list.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lory_jax.data.tokenizer import Tokenizer
from lory_jax.generation.batch import ContinuousBatch
from lory_jax.generation.loop import GrowingText
from lory_jax.generation.settings import Settings


@dataclass(frozen=True)
class Request:
    """A prompt to continue.

    Attributes:
      number: what the caller knows it by.
      prompt: token ids, BOS included.
      settings: how it is continued.
      stream: the number of its stream of random draws, given `settings.seed`.
      given_YxE: routing weights that replace those of the prompt; None routes by the prompt.
    """

    number: int
    prompt: Sequence[int]
    settings: Settings
    stream: int = 0
    given_YxE: np.ndarray | None = None


@dataclass(frozen=True)
class Piece:
    """New text of a request that no later token can change; it may be empty.

    Attributes:
      number: that of the request.
      text: the new text.
      finish_reason: "stop" or "length" if this is the last piece, else "".
      tokens: how many tokens have been drawn for the request.
    """

    number: int
    text: str
    finish_reason: str
    tokens: int


class TextBatch:
    """A running batch of texts."""

    def __init__(self, batch: ContinuousBatch, tokenizer: Tokenizer):
        self._batch, self._tokenizer = batch, tokenizer
        self._by_slot: dict[int, tuple[int, GrowingText]] = {}

    @property
    def free(self) -> int:
        """How many requests may join."""
        return self._batch.free

    @property
    def active(self) -> int:
        """How many requests are being continued."""
        return self._batch.active

    def step(self, arriving: Iterator[Request]) -> list[Piece]:
        """Takes requests while slots are free, and continues every text by one token.

        Args:
          arriving: where requests come from; no more is taken than fits. Prompts must leave room
            for a token in the batch's cache.
        """
        self._batch.advance()
        while self._batch.free:
            request = next(arriving, None)
            if request is None:
                break
            self._join(request)
        if not self._by_slot:
            return []
        return [self._read(slot, token) for slot, token in self._batch.draw().items()]

    def cancel(self, number: int) -> None:
        """Ends a request that nobody waits for any more; nothing happens if it has ended."""
        for slot, (other, _) in list(self._by_slot.items()):
            if other == number:
                self._leave(slot)

    def _join(self, request: Request) -> None:
        batch, length = self._batch, len(request.prompt)
        limit = min(
            request.settings.new_tokens(length, batch.cache_length), batch.cache_length - length
        )
        slot = batch.join(request.prompt, request.settings, request.stream, request.given_YxE)
        text = GrowingText(self._tokenizer, request.settings.stop, limit)
        self._by_slot[slot] = request.number, text

    def _read(self, slot: int, token: int) -> Piece:
        number, text = self._by_slot[slot]
        new = text.add(token)
        if text.is_done:
            self._leave(slot)
        return Piece(number, new, text.finish_reason if text.is_done else "", text.num_tokens)

    def _leave(self, slot: int) -> None:
        self._batch.leave(slot)
        del self._by_slot[slot]


@dataclass(frozen=True)
class Continuation:
    """A finished text: the request's number, the text, why it ended, and its tokens."""

    number: int
    text: str
    finish_reason: str
    tokens: int


def continue_queue(
    batch: ContinuousBatch, tokenizer: Tokenizer, requests: Iterable[Request]
) -> Iterator[Continuation]:
    """Continues requests in the order of their arrival; yields them in the order of their end."""
    texts, arriving = TextBatch(batch, tokenizer), iter(requests)
    pieces: dict[int, list[str]] = {}
    while True:
        for piece in (found := texts.step(arriving)):
            parts = pieces.setdefault(piece.number, [])
            parts.append(piece.text)
            if piece.finish_reason:
                text = "".join(pieces.pop(piece.number))
                yield Continuation(piece.number, text, piece.finish_reason, piece.tokens)
        if not found:
            return
