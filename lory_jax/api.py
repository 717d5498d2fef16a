"""A trained model in Python: logits, routing weights and text.

Letters: B batch, L sequence, N segments, E experts, V vocabulary, Y layers.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from lory_jax.data.tokenizer import Tokenizer
from lory_jax.errors import InputError
from lory_jax.generation.loop import continue_prompts, mesh_of
from lory_jax.generation.settings import ROUTINGS, Settings
from lory_jax.model.config import ModelConfig
from lory_jax.model.routing import Routing
from lory_jax.model.routing_rules import shortest_segment
from lory_jax.model.transformer import Params, assemble, build
from lory_jax.parallel import make_mesh, start_process
from lory_jax.run.directory import RunDirectory
from lory_jax.run.step_choice import NEWEST, Step


class Model:
    """A Lory model, or its dense baseline, with its tokenizer.

    Attributes:
      config: the fields of `config.model`; `num_experts` is 0 in a dense model.
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
        """The same model, merging only the k experts of largest weight in every layer.

        Raises:
          InputError: the model has fewer than k experts.
        """
        E = 0 if self.config.is_sparse else self.config.num_experts
        if not 1 <= k <= E:
            accepted = f"must be 1 to {E}" if E else "requires a model whose experts are merged"
            raise InputError(f"top_k_experts: got {k}, {accepted}")
        config = dataclasses.replace(self.config, top_k_experts=k)
        return Model(config, self.params, self.tokenizer, self.step)

    def with_segment_length(self, T: int) -> "Model":
        """The same model with segments of another length, which no parameter depends on.

        Raises:
          InputError: the length does not leave two segments, so that none would route another, or
            leaves too few tokens in each to route by attention.
        """
        config = self.config
        least = shortest_segment(config.routing_source) if config.num_experts else 1
        if not least <= T < config.sequence_length:
            raise InputError(
                f"segment_length: got {T}, must be {least} to {config.sequence_length - 1}, less "
                "than the positions that the model reads"
            )
        # The kernels of a TPU may not hold the new length; what replaces them computes the same.
        ffn = "blocks" if config.merged_ffn == "kernel" else config.merged_ffn
        config = dataclasses.replace(config, segment_length=T, merged_ffn=ffn)
        return Model(config, self.params, self.tokenizer, self.step)

    def merged(self, text: str) -> "Model":
        """A dense model whose FFNs are the experts merged once, with this text as the prompt.

        All prompts then share that one merge, so each step reads the FFN weights only once.

        Raises:
          InputError: the model has no experts to merge, or `text` is not valid Unicode.
        """
        # Imported here: exporting needs what generation does not.
        from lory_jax.generation.merge import merged_params, text_routing

        if not self.config.num_experts or self.config.is_sparse:
            raise InputError(
                "merged: a dense or sparse model has nothing to merge; load a model with experts"
            )
        mesh = mesh_of(self.params) or make_mesh(1, 1, 1, jax.devices()[:1])
        r_YxE = text_routing(self.config, self.params, self.encode(text))
        params = merged_params(self.config, self.params, r_YxE, mesh)
        config = dataclasses.replace(self.config, num_experts=0, top_k_experts=0)
        return Model(config, params, self.tokenizer, self.step)

    def encode(self, text: str) -> list[int]:
        """The token ids of a prompt: BOS, which begins every document, and the text's own ids.

        Raises:
          InputError: the text holds a lone surrogate, which is how Python represents bytes that are
            not UTF-8.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(
                f"prompt: got {text[error.start]!r} at character {error.start}, must be valid "
                "Unicode (UTF-8 on the command line)"
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
          routing: "training" computes exactly what the loss sees. "prompt" makes one decision per
            layer, from each row's prompt, for all of its positions. "segment" routes as in
            training, except that the prompt tokens in the first segment route that segment. A
            dense model ignores it.
          prompt_lengths_B: for "prompt" and "segment", how many tokens of each row are its prompt;
            None is the whole row, and 0 gives every expert the weight 1/E. Logits before the
            prompt's last token have seen later tokens through the routing.

        In a sparse baseline that routes tokens, "prompt" and "segment" are the same: each token is
        routed to its own experts. In "training", tokens compete for experts (docs/baselines.md).

        Raises:
          InputError: tokens or prompt lengths have a wrong shape, type or range, or the routing is
            unknown.
        """
        tokens = self._tokens(tokens_BxL)
        lengths = self._prompt_lengths(tokens.shape, routing, prompt_lengths_B)
        group = self.config.routing_group
        if routing == "training" and self.config.is_sparse and group and len(tokens) % group:
            raise InputError(
                f"tokens: got {len(tokens)} rows, must be a multiple of "
                f"config.model.routing_group ({group}): in training, that many sequences compete "
                "for the experts"
            )
        kind = None if routing == "training" or not self.config.num_experts else routing
        return np.asarray(_forward(self.config, kind)(self.params, tokens, lengths)[0])

    def routing_weights(self, tokens_BxL: ArrayLike) -> np.ndarray:
        """The routing weights of every layer and segment as in training: float32 `[Y, B, N, E]`.

        For a sparse baseline these are the router's probabilities at evaluation; where tokens are
        routed, their mean over each segment.

        Raises:
          InputError: the model is dense, or the tokens have a wrong shape, type or range.
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
        max_new_tokens: int | None = None,
        temperature: float = 0.8,
        top_k: int = 0,
        top_p: float = 0.95,
        routing: str = "prompt",
        seed: int = 0,
        stop: Sequence[str] = (),
        ffn: str = "auto",
    ) -> list[str]:
        """Continues each prompt; returns the continuations alone.

        A row's text depends on its prompt, the settings and the seed, not on the other prompts. A
        prompt that is given twice is continued in two different ways.

        Args:
          prompts: texts, each of which is preceded by BOS; "" starts from BOS alone.
          max_new_tokens: the most tokens to add, unless the document ends earlier; None is 128, or
            fewer where the model cannot read that many.
          temperature: 0 always chooses the most likely token.
          top_k: draws among the k most likely tokens only; 0 is all.
          top_p: draws among the most likely tokens that together reach this probability.
          routing: "prompt" merges the experts once, "segment" again at every segment border.
          seed: decides the draws.
          stop: texts that end a continuation; they are cut off.
          ffn: "merged" merges an FFN for each prompt, "experts" leaves the experts unmerged, which
            computes the same up to rounding and reads E FFNs however many prompts there are; "auto"
            takes what the device does faster.

        Raises:
          InputError: a setting is out of its range, or the model cannot read that many tokens.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        settings = Settings(max_new_tokens, temperature, top_k, top_p, routing, seed, stop, ffn)
        steps = self._continue(texts, settings)
        return ["".join(pieces) for pieces in zip(*steps, strict=True)]

    def stream(
        self,
        prompt: str,
        *,
        max_new_tokens: int | None = None,
        temperature: float = 0.8,
        top_k: int = 0,
        top_p: float = 0.95,
        routing: str = "prompt",
        seed: int = 0,
        stop: Sequence[str] = (),
        ffn: str = "auto",
    ) -> Iterator[str]:
        """Yields the continuation of one prompt piece by piece; the arguments of `generate`."""
        settings = Settings(max_new_tokens, temperature, top_k, top_p, routing, seed, stop, ffn)
        for (piece,) in self._continue([prompt], settings):
            if piece:
                yield piece

    def _continue(self, prompts: list[str], settings: Settings) -> Iterator[list[str]]:
        # The n-th occurrence of a prompt has the n-th stream of draws, whatever surrounds it.
        occurrences = [prompts[:row].count(prompt) for row, prompt in enumerate(prompts)]
        ids = [self.encode(prompt) for prompt in prompts]
        return continue_prompts(
            self.config, self.params, self.tokenizer, ids, settings, occurrences
        )

    def _tokens(self, tokens_BxL: ArrayLike) -> np.ndarray:
        try:
            tokens = np.asarray(tokens_BxL)
        except ValueError:
            raise InputError("tokens: got rows of different lengths, must be [B, L]") from None
        if tokens.ndim != 2 or 0 in tokens.shape or not np.issubdtype(tokens.dtype, np.integer):
            raise InputError(
                f"tokens: got {tokens.dtype} of shape {list(tokens.shape)}, must be integers "
                "[B, L] with at least one row and one token"
            )
        low, high, V = int(tokens.min()), int(tokens.max()), self.config.vocab_size
        if low < 0 or high >= V:
            raise InputError(f"tokens: got ids from {low} to {high}, must be 0 to {V - 1}")
        return tokens.astype(np.int32)

    def _prompt_lengths(
        self, shape: tuple[int, ...], routing: str, prompt_lengths_B: ArrayLike | None
    ) -> np.ndarray | None:
        if routing not in ("training", *ROUTINGS):
            raise InputError(f"routing: got {routing!r}, must be training, {' or '.join(ROUTINGS)}")
        if routing == "training":
            if prompt_lengths_B is not None:
                raise InputError("prompt_lengths_B: requires routing='prompt' or 'segment'")
            return None
        B, L = shape
        lengths = np.full(B, L) if prompt_lengths_B is None else np.asarray(prompt_lengths_B)
        if (
            lengths.shape != (B,)
            or not np.issubdtype(lengths.dtype, np.integer)
            or not ((lengths >= 0) & (lengths <= L)).all()
        ):
            raise InputError(
                f"prompt_lengths_B: got {lengths.tolist()}, must be {B} integers from 0 to {L}"
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


def routed_by(
    model: Model, tokens_BxL: np.ndarray, routing: str, prompt_lengths_B: Sequence[int]
) -> np.ndarray:
    """The routing weights `[Y, B, N, E]` of inference, "prompt" or "segment", by these prompts."""
    lengths_B = np.asarray(prompt_lengths_B, np.int32)
    return np.asarray(_forward(model.config, routing)(model.params, tokens_BxL, lengths_B)[1])


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
