"""A trained model in Python: logits, routing weights and text.

Letters: B batch, L sequence, N segments, E experts, V vocabulary, Y layers.
"""

import codecs
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from lory_jax.data.tokenizer import Tokenizer
from lory_jax.errors import InputError
from lory_jax.generation.loop import ROUTINGS, decode, mesh_of
from lory_jax.generation.sampling import check_settings, position_keys, sample
from lory_jax.model.config import ModelConfig
from lory_jax.model.routing import Routing
from lory_jax.model.transformer import Params, assemble, build
from lory_jax.parallel import make_mesh, start_process
from lory_jax.run.directory import RunDirectory
from lory_jax.run.step_choice import NEWEST, Step


class Model:
    """A Lory, or its dense baseline, with its tokenizer.

    Attributes:
      config: the fields of `config.model`; `num_experts` is 0 for a dense model.
      params: float32 parameters as a nested dict.
      tokenizer: text to token ids and back.
      step: the training step the parameters come from.
    """

    def __init__(self, config: ModelConfig, params: Params, tokenizer: Tokenizer, step: int = 0):
        self.config = config
        self.params = params
        self.tokenizer = tokenizer
        self.step = step

    def with_top_k_experts(self, k: int) -> "Model":
        """The same parameters, merging in every layer only the k experts of largest weight.

        Raises:
          InputError: the model has fewer than k experts.
        """
        E = 0 if self.config.is_sparse else self.config.num_experts
        if not 1 <= k <= E:
            takes = f"1 to {E}, the experts there are" if E else "a run with experts that merge"
            raise InputError(f"top_k_experts: got {k}, takes {takes}")
        config = dataclasses.replace(self.config, top_k_experts=k)
        return Model(config, self.params, self.tokenizer, self.step)

    def merged(self, text: str) -> "Model":
        """A dense model: the experts merged once, by this text as a prompt.

        Every prompt then shares that one merge, so a batch reads its weights once a step.

        Raises:
          InputError: the model is dense, or `text` is no valid text.
        """
        # Imported here: exporting needs what generation does not.
        from lory_jax.generation.merge import merged_params, text_routing

        if not self.config.num_experts or self.config.is_sparse:
            raise InputError(
                "merged: a dense or sparse model has nothing to merge; load a Lory with experts"
            )
        mesh = mesh_of(self.params) or make_mesh(1, 1, 1, jax.devices()[:1])
        r_YxE = text_routing(self.config, self.params, self.encode(text))
        params = merged_params(self.config, self.params, r_YxE, mesh)
        config = dataclasses.replace(self.config, num_experts=0, top_k_experts=0)
        return Model(config, params, self.tokenizer, self.step)

    def encode(self, text: str) -> list[int]:
        """The token ids of a prompt: BOS, which every text begins with, and its own.

        Raises:
          InputError: the text holds what is no character, such as bytes that are not UTF-8.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(
                f"prompt: got {text[error.start]!r} at character {error.start}, takes text (bytes "
                "on the command line must be UTF-8)"
            ) from None
        return [self.tokenizer.bos_id, *self.tokenizer.encode(text)]

    def logits(
        self,
        tokens_BxL: ArrayLike,
        routing: str = "training",
        prompt_lengths_B: ArrayLike | None = None,
    ) -> np.ndarray:
        """Logits of the token after every position, float32 `[B, L, V]`.

        Args:
          tokens_BxL: token ids; documents begin with `tokenizer.bos_id`.
          routing: "training" is exactly what the loss sees. "prompt" takes one decision per layer
            from each row's prompt, for every position. "segment" routes as in training, except that
            the first segment is routed by the prompt tokens in it. A dense model has no routing.
          prompt_lengths_B: for "prompt" and "segment", how many tokens of each row are its prompt;
            0 routes with 1/E for every expert. Only positions from the prompt's last on are free of
            leaks.

        Each token of a sparse baseline takes its own experts with "prompt" and "segment" alike,
        unless segments do; in "training", tokens compete for them (docs/baselines.md).

        Raises:
          InputError: tokens or prompt lengths of a wrong shape, type or range, or an unknown
            routing.
        """
        tokens = self._tokens(tokens_BxL)
        lengths = self._prompt_lengths(tokens.shape, routing, prompt_lengths_B)
        group = self.config.routing_group
        if routing == "training" and self.config.is_sparse and group and len(tokens) % group:
            raise InputError(
                f"tokens: got {len(tokens)} rows, takes a multiple of config.model.routing_group "
                f"({group}): in training, so many sequences compete for the experts"
            )
        kind = None if routing == "training" or not self.config.num_experts else routing
        return np.asarray(_forward(self.config, kind)(self.params, tokens, lengths)[0])

    def routing_weights(self, tokens_BxL: ArrayLike) -> np.ndarray:
        """The routing weights of every layer and segment as in training: float32 `[Y, B, N, E]`.

        Of a sparse baseline: the router's probabilities at evaluation, the mean over each segment
        where tokens are routed.

        Raises:
          InputError: the model is dense, or the tokens are of a wrong shape, type or range.
        """
        if not self.config.num_experts:
            raise InputError("routing_weights: a dense model has none; load a run with experts")
        tokens = self._tokens(tokens_BxL)
        kind = self.config.measured_routing
        lengths = np.full(len(tokens), self.config.segment_length, np.int32) if kind else None
        return np.asarray(_forward(self.config, kind)(self.params, tokens, lengths)[1])

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.8,
        top_k: int = 0,
        top_p: float = 0.95,
        routing: str = "prompt",
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> list[str]:
        """Continues each prompt; returns the continuations alone.

        A row's text depends on its prompt, the settings and the seed, not on the other prompts; the
        same prompt given twice is continued differently.

        Args:
          prompts: texts, each with BOS put in front; "" starts from BOS alone.
          max_new_tokens: at most so many; the end of the document ends it earlier.
          temperature: 0 takes the most likely token each time.
          top_k: only the k most likely tokens; 0 for all.
          top_p: only the most likely tokens that together reach this probability.
          routing: "prompt" (experts merged once) or "segment" (again at every segment border).
          seed: of the draws.
          stop: texts that end a continuation; they are cut off.

        Raises:
          InputError: a setting out of its range, or more tokens than the model reads.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        _check_stop(stop)
        rows: list[list[int]] = [[] for _ in prompts]
        running = set(range(len(prompts)))
        settings = self._settings(temperature, top_k, top_p, routing)
        for tokens_B in self._continue(prompts, max_new_tokens, settings, routing, seed):
            for row in sorted(running):
                if tokens_B[row] == self.tokenizer.eos_id:
                    running.discard(row)
                    continue
                rows[row].append(int(tokens_B[row]))
                if stop and _cut(self._text(rows[row]), stop) is not None:
                    running.discard(row)
            if not running:
                break
        texts = [self._text(row) for row in rows]
        return [text if (cut := _cut(text, stop)) is None else cut for text in texts]

    def stream(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.8,
        top_k: int = 0,
        top_p: float = 0.95,
        routing: str = "prompt",
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> Iterator[str]:
        """Yields the continuation of one prompt piece by piece; arguments as in `generate`."""
        _check_stop(stop)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        settings = self._settings(temperature, top_k, top_p, routing)
        held = ""  # what may turn out to be the beginning of a stop
        longest = max(map(len, stop), default=1)
        for tokens_B in self._continue([prompt], max_new_tokens, settings, routing, seed):
            if tokens_B[0] == self.tokenizer.eos_id:
                break
            held += decoder.decode(self.tokenizer.decode_bytes(tokens_B))
            if (cut := _cut(held, stop)) is not None:
                if cut:
                    yield cut
                return
            ready = len(held) - (longest - 1)
            if ready > 0:
                yield held[:ready]
                held = held[ready:]
        held += decoder.decode(b"", final=True)
        if held := held if (cut := _cut(held, stop)) is None else cut:
            yield held

    def _continue(
        self,
        prompts: list[str],
        max_new_tokens: int,
        draw: Callable[..., Array],
        routing: str,
        seed: int,
    ) -> Iterator[np.ndarray]:
        ids = [self.encode(prompt) for prompt in prompts]
        # A prompt's n-th occurrence is row n of its own stream of draws, whatever stands around it.
        occurrence_B = np.array([prompts[:row].count(text) for row, text in enumerate(prompts)])
        keys_B = position_keys(
            jnp.broadcast_to(jax.random.key(seed), len(prompts)), jnp.asarray(occurrence_B, int)
        )

        def choose(logits_BxV: Array, positions_B: np.ndarray) -> Array:
            # A model may have more ids than its tokenizer, whose size is what the corpus gave.
            known_BxV = logits_BxV[:, : self.tokenizer.vocab_size]
            return draw(known_BxV, position_keys(keys_B, positions_B))

        return decode(
            self.config,
            self.params,
            ids,
            choose,
            max_new_tokens=max_new_tokens,
            routing=routing,
        )

    def _settings(
        self, temperature: float, top_k: int, top_p: float, routing: str
    ) -> Callable[..., Array]:
        check_settings(temperature, top_k, top_p)
        if routing not in ROUTINGS:
            raise InputError(f"routing: got {routing!r}, takes {' or '.join(ROUTINGS)}")
        return functools.partial(sample, temperature=temperature, top_k=top_k, top_p=top_p)

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode_bytes(ids).decode("utf-8", "replace")

    def _tokens(self, tokens_BxL: ArrayLike) -> np.ndarray:
        try:
            tokens = np.asarray(tokens_BxL)
        except ValueError:
            raise InputError("tokens: got rows of different lengths, takes [B, L]") from None
        if tokens.ndim != 2 or 0 in tokens.shape or not np.issubdtype(tokens.dtype, np.integer):
            raise InputError(
                f"tokens: got {tokens.dtype} of shape {list(tokens.shape)}, takes integers [B, L] "
                "with at least one row and one token"
            )
        low, high, V = int(tokens.min()), int(tokens.max()), self.config.vocab_size
        if low < 0 or high >= V:
            raise InputError(f"tokens: got ids from {low} to {high}, takes 0 to {V - 1}")
        return tokens.astype(np.int32)

    def _prompt_lengths(
        self, shape: tuple[int, ...], routing: str, prompt_lengths_B: ArrayLike | None
    ) -> np.ndarray | None:
        if routing not in ("training", *ROUTINGS):
            raise InputError(f"routing: got {routing!r}, takes training, {', '.join(ROUTINGS)}")
        if routing == "training":
            if prompt_lengths_B is not None:
                raise InputError("prompt_lengths_B: only routing='prompt' or 'segment' takes it")
            return None
        if prompt_lengths_B is None:
            raise InputError(
                f"prompt_lengths_B: routing={routing!r} needs it, the number of prompt tokens of "
                "each row"
            )
        lengths = np.asarray(prompt_lengths_B)
        B, L = shape
        if (
            lengths.shape != (B,)
            or not np.issubdtype(lengths.dtype, np.integer)
            or not ((lengths >= 0) & (lengths <= L)).all()
        ):
            raise InputError(
                f"prompt_lengths_B: got {lengths.tolist()}, takes {B} integers from 0 to {L}"
            )
        return lengths.astype(np.int32)


def load(workdir: str | Path, step: Step = NEWEST) -> Model:
    """Loads the model of a run over all devices of this process.

    Args:
      workdir: the run directory.
      step: "newest" or "best" (the lowest validation loss) among the intact checkpoints, or the
        step of one of them.

    Raises:
      InputError: `workdir` holds no run, or no such checkpoint, or it is damaged.
      ConfigError: `step` is none of the above.
    """
    run = RunDirectory(workdir, step)
    start_process()
    trained = run.load_params(make_mesh(data=1, fsdp=0, tensor=1))
    return Model(trained.model_config, trained.params, run.tokenizer, trained.step)


@functools.lru_cache(maxsize=8)
def _forward(config: ModelConfig, kind: str | None) -> Callable[..., tuple[Array, Array | None]]:
    graph, _ = build(config)

    @jax.jit
    def forward(
        params: Params, tokens_BxL: Array, prompt_lengths_B: Array | None
    ) -> tuple[Array, Array | None]:
        routing = None if kind is None else Routing(kind, prompt_lengths_B)
        return assemble(graph, params)(tokens_BxL, routing)

    return forward


def _check_stop(stop: Sequence[str]) -> None:
    if isinstance(stop, str) or not all(stop):
        raise InputError(f"stop: got {stop!r}, takes a list of non-empty texts")


def _cut(text: str, stop: Sequence[str]) -> str | None:
    """The text before the first of the stops, or None if it holds none of them."""
    found = [text.index(end) for end in stop if end in text]
    return text[: min(found)] if found else None
