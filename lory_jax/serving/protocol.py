"""The bodies of OpenAI's completions protocol: what is accepted, and what is answered.

Every field is checked here. Fields that would change the result and are not supported are refused
by name rather than ignored.
"""

import json
import math
import secrets
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lory_jax.errors import InputError, shorten
from lory_jax.generation.settings import Settings
from lory_jax.generation.text_batch import Piece, Request
from lory_jax.serving.engine import Engine
from lory_jax.serving.models import NAME

DEFAULT_TOKENS = 16  # OpenAI's
MOST_CHOICES, MOST_STOPS = 128, 16


class ApiError(Exception):
    """What a client did wrong, or the server cannot do, with its HTTP status."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str = ""):
        super().__init__(message)
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.status = status
        self.body = {
            "error": {"message": message, "type": kind, "param": param, "code": code or None}
        }


@dataclass(frozen=True)
class Completion:
    """A checked request for completions.

    Attributes:
      model: the name that was asked for.
      requests: one for every choice, in the order of the answer.
      prompt_tokens: tokens of all prompts.
      stream: whether pieces are sent as they are generated.
      include_usage: whether a stream ends with the number of tokens.
    """

    model: str
    requests: list[Request]
    prompt_tokens: int
    stream: bool
    include_usage: bool


# ---------------------------------------------------------------- reading


def _is_number(low: float, high: float) -> Callable[[Any], bool]:
    def check(value: Any) -> bool:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and math.isfinite(value) and low <= value <= high

    return check


def _is_integer(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and low <= value <= high


def _is_stop(value: Any) -> bool:
    texts = [value] if isinstance(value, str) else value
    is_list = isinstance(texts, list) and len(texts) <= MOST_STOPS
    return is_list and all(isinstance(text, str) and text for text in texts)


# name: (default, check, what is accepted); null stands for the default.
FIELDS: dict[str, tuple[Any, Callable[[Any], bool], str]] = {
    "max_tokens": (DEFAULT_TOKENS, _is_integer(1, 2**31 - 1), "an integer of at least 1"),
    "temperature": (1.0, _is_number(0, 2), "a number from 0 to 2"),
    "top_p": (1.0, _is_number(1e-9, 1), "a number above 0 and at most 1"),
    "n": (1, _is_integer(1, MOST_CHOICES), f"an integer from 1 to {MOST_CHOICES}"),
    "seed": (None, _is_integer(-(2**63), 2**63 - 1), "an integer"),
    "stop": ([], _is_stop, f"a text, or a list of at most {MOST_STOPS}, none of them empty"),
    "stream": (False, lambda value: isinstance(value, bool), "true or false"),
    "stream_options": (
        {},
        lambda value: isinstance(value, dict) and set(value) <= {"include_usage"},
        'an object with the field "include_usage"',
    ),
}
# What would change the answer and is not supported, with the value that changes nothing.
UNSUPPORTED: dict[str, Any] = {
    "best_of": 1,
    "echo": False,
    "frequency_penalty": 0,
    "logit_bias": {},
    "logprobs": None,
    "presence_penalty": 0,
    "suffix": None,
}
IGNORED = {"user"}


def read_body(data: bytes) -> dict[str, Any]:
    """The JSON object of a body."""
    try:
        body = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON ({shorten(str(error))})") from None
    if not isinstance(body, dict):
        raise ApiError(400, f"the body must be a JSON object; got {type(body).__name__}")
    return body


def read_completion(engine: Engine, body: Mapping[str, Any]) -> Completion:
    """Checks the body of a request for completions.

    Raises:
      ApiError: a field is unknown, unsupported, or out of its range, or the prompt and the tokens
        asked for do not fit into the context.
    """
    name = model_name(engine, body.get("model"))
    for field, value in body.items():
        if field in UNSUPPORTED and value not in (None, UNSUPPORTED[field]):
            raise ApiError(400, f"{field} is not supported", field)
        if field not in {"model", "prompt", *FIELDS, *UNSUPPORTED, *IGNORED}:
            raise ApiError(400, f"unknown field {shorten(field, 80)!r}", shorten(field, 80))
    values = {field: _value(field, body.get(field)) for field in FIELDS}
    prompts = _prompts(engine, body.get("prompt"))
    if len(prompts) * values["n"] > MOST_CHOICES:
        message = f"{len(prompts)} prompts with n={values['n']}: at most {MOST_CHOICES} choices"
        raise ApiError(400, message, "n")
    for prompt in prompts:
        _check_length(engine, len(prompt), values["max_tokens"])
    seed, stop = values["seed"], values["stop"]
    settings = Settings(
        max_new_tokens=values["max_tokens"],
        temperature=float(values["temperature"]),
        top_p=float(values["top_p"]),
        seed=secrets.randbits(31) if seed is None else seed % 2**32,
        stop=[stop] if isinstance(stop, str) else stop,
    )
    given_YxE = None if name == NAME else engine.domains[name.removeprefix(f"{NAME}:")]
    requests = [
        Request(0, prompt, settings, stream, given_YxE)
        for prompt in prompts
        for stream in range(values["n"])
    ]
    return Completion(
        name,
        requests,
        sum(map(len, prompts)),
        values["stream"],
        bool(values["stream_options"].get("include_usage")),
    )


def model_name(engine: Engine, value: Any) -> str:
    """The model that a request names."""
    if value not in engine.names:
        known = ", ".join(engine.names)
        message = f"model: got {shorten(repr(value), 80)}; must be one of {known}"
        raise ApiError(404, message, "model", "model_not_found")
    return value


def _value(field: str, value: Any) -> Any:
    default, check, accepts = FIELDS[field]
    if value is None:
        return default
    if not check(value):
        raise ApiError(400, f"{field}: got {shorten(repr(value), 80)}; must be {accepts}", field)
    return value


def _prompts(engine: Engine, value: Any) -> list[list[int]]:
    """Texts, or token ids as they are: one prompt or a list of them."""
    vocab_size = engine.model.tokenizer.vocab_size
    is_token = _is_integer(0, vocab_size - 1)
    if isinstance(value, str) or (isinstance(value, list) and value and all(map(is_token, value))):
        value = [value]
    if not isinstance(value, list) or not value or len(value) > MOST_CHOICES:
        accepts = f"a text, token ids below {vocab_size}, or a list of up to {MOST_CHOICES} of them"
        raise ApiError(400, f"prompt: must be {accepts}", "prompt")
    return [_prompt(engine, part, is_token) for part in value]


def _prompt(engine: Engine, part: Any, is_token: Callable[[Any], bool]) -> list[int]:
    if isinstance(part, str):
        try:
            return engine.model.encode(part)
        except InputError as error:  # a lone surrogate
            raise ApiError(400, str(error), "prompt") from None
    if isinstance(part, list) and part and all(map(is_token, part)):
        return part
    got = shorten(repr(part), 80)
    raise ApiError(400, f"prompt: got {got}; must be a text or a list of token ids", "prompt")


def _check_length(engine: Engine, length: int, max_tokens: int) -> None:
    if length + max_tokens > engine.context:
        raise ApiError(
            400,
            f"the prompt has {length} tokens (BOS included) and max_tokens is {max_tokens}; "
            f"together they must be at most {engine.context}",
            "prompt" if length >= engine.context else "max_tokens",
            "context_length_exceeded",
        )


# ---------------------------------------------------------------- answering


class Answer:
    """The bodies of one answer, whole or in pieces."""

    def __init__(self, completion: Completion):
        self._completion = completion
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": completion.model,
        }
        self._texts = [""] * len(completion.requests)
        self._reasons: list[str] = [""] * len(completion.requests)
        self._tokens = [0] * len(completion.requests)

    @property
    def tokens(self) -> int:
        """Tokens of all choices so far."""
        return sum(self._tokens)

    @property
    def is_done(self) -> bool:
        """Whether every choice has ended."""
        return all(self._reasons)

    def add(self, choice: int, piece: Piece) -> dict[str, Any] | None:
        """Takes a piece in; returns what a stream sends of it, if there is something to say."""
        self._tokens[choice] = piece.tokens
        self._reasons[choice] = piece.finish_reason
        if not self._completion.stream:
            self._texts[choice] += piece.text
        if not piece.text and not piece.finish_reason:
            return None
        found = self._head | {"choices": [_choice(choice, piece.text, piece.finish_reason)]}
        return found | {"usage": None} if self._completion.include_usage else found

    def whole(self) -> dict[str, Any]:
        """The answer in one body."""
        choices = zip(self._texts, self._reasons, strict=True)
        listed = [_choice(index, *choice) for index, choice in enumerate(choices)]
        return self._head | {"choices": listed, "usage": self.usage()}

    def last(self) -> dict[str, Any]:
        """What a stream with `include_usage` ends with."""
        return self._head | {"choices": [], "usage": self.usage()}

    def usage(self) -> dict[str, int]:
        """The number of tokens."""
        prompt = self._completion.prompt_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.tokens,
            "total_tokens": prompt + self.tokens,
        }


def _choice(index: int, text: str, reason: str) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": reason or None}


def model_card(engine: Engine, name: str) -> dict[str, Any]:
    """What `/v1/models` says about a model."""
    return {"id": name, "object": "model", "created": engine.started, "owned_by": "lory_jax"}
