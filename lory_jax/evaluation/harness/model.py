"""A trained model inside lm-evaluation-harness.

    lory-eval --model lory --model_args workdir=RUN_DIR,routing=prompt --tasks lory_paper

Every text begins with BOS, as in training. The context is the prompt that routes: it merges one FFN
(or, with `routing=segment`, the first one). An empty context gives every expert the weight 1/E.
Contexts longer than the model reads lose their beginning.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import jax
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from lory_jax.api import Model, load
from lory_jax.console import progress
from lory_jax.errors import ConfigError, InputError
from lory_jax.evaluation.harness.scoring import Continuation, Score, score_continuations
from lory_jax.generation.loop import continue_prompts
from lory_jax.generation.sampling import check_settings
from lory_jax.generation.settings import Settings, check_routing

DEFAULT_BATCH_SIZE = 16
DEFAULT_NEW_TOKENS = 256
MODEL_ARGUMENTS = ("workdir", "routing", "batch_size", "tasks_data")


@dataclass(frozen=True)
class Generation:
    """A task's `generation_kwargs`.

    Attributes:
      until: texts that end a continuation; they are cut off.
      max_gen_toks: the most new tokens; None is 256, or half of L where that is less.
      do_sample: False always chooses the most likely token.
      temperature, top_k, top_p: how tokens are drawn.
    """

    until: tuple[str, ...] = ()
    max_gen_toks: int | None = None
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    @classmethod
    def parse(cls, settings: Mapping[str, Any]) -> "Generation":
        """Reads the settings; raises `InputError` for one that is unknown or out of its range."""
        known = [field.name for field in fields(cls)]
        unknown = sorted(settings.keys() - set(known))
        if unknown:
            raise InputError(f"generation_kwargs: got {unknown[0]}, must be {', '.join(known)}")
        until = settings.get("until") or ()
        until = (until,) if isinstance(until, str) else tuple(until)
        generation = cls(**{**settings, "until": tuple(filter(None, until))})
        check_settings(generation.temperature, generation.top_k, generation.top_p)
        return generation

    def settings(self, max_new_tokens: int, routing: str) -> Settings:
        """The same settings in the form that the generation loop reads."""
        temperature = self.temperature if self.do_sample else 0.0
        return Settings(
            max_new_tokens, temperature, self.top_k, self.top_p, routing, stop=self.until
        )


@register_model("lory")
class LoryLM(LM):
    """A Lory model, or its dense baseline, as a language model of the harness."""

    def __init__(self, model: Model, routing: str = "prompt", batch_size: int = DEFAULT_BATCH_SIZE):
        """Wraps a model.

        Args:
          model: as `lory_jax.load` returns it.
          routing: "prompt" merges the experts once per context, "segment" again at every segment
            border.
          batch_size: rows at a time over all devices; rounded up to a multiple of their number.

        Raises:
          InputError: an unknown routing, or a batch size below 1.
        """
        super().__init__()
        check_routing(routing)
        if isinstance(batch_size, bool) or not str(batch_size).isdigit() or int(batch_size) < 1:
            raise InputError(f"batch_size: got {batch_size!r}, must be an integer of at least 1")
        devices = jax.device_count()
        self.model, self.routing = model, routing
        self.batch_size = -(-int(batch_size) // devices) * devices

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> "LoryLM":
        """From the harness's `--model_args workdir=RUN_DIR,routing=segment` and its own flags."""
        for name in arg_dict:
            if name not in MODEL_ARGUMENTS:
                raise ConfigError(f"model_args: got {name}, must be {', '.join(MODEL_ARGUMENTS)}")
        if "workdir" not in arg_dict:
            raise ConfigError(
                "model_args: requires workdir=RUN_DIR, the directory of a training run"
            )
        flags = additional_config or {}
        batch_size = arg_dict.get("batch_size") or flags.get("batch_size") or DEFAULT_BATCH_SIZE
        return cls(load(Path(arg_dict["workdir"])), arg_dict.get("routing", "prompt"), batch_size)

    # ---------------------------------------------------------------- what the harness calls
    def loglikelihood(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """`(log-probability in nats, whether greedy decoding gives it)` of each continuation."""
        pairs = [self._encode_pair(*request.args) for request in requests]
        too_long = sum(len(context) + len(rest) > self._limit + 1 for context, rest in pairs)
        if too_long:
            self._warn_of_cuts(too_long, len(pairs))
        return list(self._score([self._continuation(context, rest) for context, rest in pairs]))

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probability of each whole text; longer ones are read in windows of L tokens.

        The first window has no prompt; the prompt of a later one is the tokens that it repeats.
        """
        texts = [self.model.encode(request.args[0]) for request in requests]
        windows = [list(self._windows(ids)) for ids in texts]
        scores = iter(self._score([window for mine in windows for window in mine]))
        return [sum(next(scores)[0] for _ in mine) for mine in windows]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continues each context until one of its stops, the end of the document or the limit.

        An empty context starts from BOS alone, which is then the prompt.
        """
        by_settings: dict[Generation, list[int]] = {}
        for i, request in enumerate(requests):
            by_settings.setdefault(Generation.parse(request.args[1]), []).append(i)
        texts: dict[int, str] = {}
        for generation, mine in by_settings.items():
            limit = self._new_tokens(generation)
            prompts = {i: self.model.encode(requests[i].args[0]) for i in mine}
            too_long = sum(len(prompt) > self._limit - limit for prompt in prompts.values())
            if too_long:
                self._warn_of_cuts(too_long, len(mine))
            batches = self._batches(prompts)
            for batch in progress(batches, len(batches), "generating", "batches"):
                rows = [prompts[i][-(self._limit - limit) :] for i in batch]
                found = self._generate(rows, batch, generation, limit)
                texts.update(zip(batch, found, strict=True))
        return [texts[i] for i in range(len(requests))]

    # ---------------------------------------------------------------- texts to tokens
    @property
    def _limit(self) -> int:
        return self.model.config.sequence_length

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of both, BOS included.

        Spaces at the end of the context go to the continuation, as tokenizers join them with the
        word that follows; both are encoded together for the same reason.
        """
        stripped = context.rstrip()
        continuation = context[len(stripped) :] + continuation
        before = self.model.encode(stripped)
        return before, self.model.encode(stripped + continuation)[len(before) :]

    def _continuation(self, context: list[int], rest: list[int]) -> Continuation | None:
        """None if there is nothing to score."""
        if len(rest) > self._limit:
            raise InputError(
                f"continuation: got {len(rest)} tokens, must be at most {self._limit}, the "
                "positions that the model reads"
            )
        tokens = tuple([*context, *rest][-(self._limit + 1) :])
        is_empty = len(context) == 1  # BOS
        prompt_length = 0 if is_empty else len(tokens) - len(rest)
        return Continuation(tokens, prompt_length, len(rest)) if rest else None

    def _windows(self, ids: list[int]) -> Iterator[Continuation]:
        """Windows over a text, BOS first, which together score every token but BOS once."""
        total = len(ids) - 1
        for start in range(0, total, self._limit):
            end = min(start + self._limit, total)
            first = max(0, end - self._limit) if start else 0
            tokens = tuple(ids[first : end + 1])
            yield Continuation(tokens, start - first + 1 if start else 0, end - start)

    def _warn_of_cuts(self, count: int, total: int) -> None:
        print(
            f"{count:,} of {total:,} requests are longer than the {self._limit} tokens that the "
            "model reads: the beginning of their contexts is cut off",
            file=sys.stderr,
        )

    # ---------------------------------------------------------------- tokens to answers
    def _score(self, continuations: Sequence[Continuation | None]) -> list[Score]:
        scores = iter(
            score_continuations(
                self.model.config,
                self.model.params,
                [continuation for continuation in continuations if continuation],
                routing=self.routing,
                batch_size=self.batch_size,
                known_tokens=self.model.tokenizer.vocab_size,
            )
        )
        return [next(scores) if c else Score(0.0, True) for c in continuations]

    def _batches(self, prompts: Mapping[int, list[int]]) -> list[list[int]]:
        """The keys of `prompts` in batches, longest prompts first."""
        order = sorted(prompts, key=lambda i: len(prompts[i]), reverse=True)
        size = self.batch_size
        return [order[start : start + size] for start in range(0, len(order), size)]

    def _new_tokens(self, generation: Generation) -> int:
        limit = generation.max_gen_toks
        if limit is None:
            return max(1, min(DEFAULT_NEW_TOKENS, self._limit // 2))
        if not 1 <= limit < self._limit:
            raise InputError(
                f"max_gen_toks: got {limit}, must be 1 to {self._limit - 1}: the model reads up to "
                f"{self._limit} positions, and requires one for the context"
            )
        return limit

    def _generate(
        self, prompts: list[list[int]], streams: list[int], generation: Generation, limit: int
    ) -> list[str]:
        """Continuations of a batch; what is drawn for a row depends on its stream alone."""
        steps = continue_prompts(
            self.model.config,
            self.model.params,
            self.model.tokenizer,
            prompts,
            generation.settings(limit, self.routing),
            streams,
            self.batch_size,
        )
        return ["".join(pieces) for pieces in zip(*steps, strict=True)]
