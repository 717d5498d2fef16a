"""Texts that one of the compared runs writes, for the report."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from lory_jax import api
from lory_jax.comparison.runs import FinishedRun
from lory_jax.data.prepared import PreparedData

MAX_NEW_TOKENS = 128
SAMPLING = {"temperature": 0.8, "top_p": 0.95}


def draw_samples(runs: Mapping[str, FinishedRun], data: PreparedData) -> dict[str, Any]:
    """One continuation per domain by the first run that has experts, or else by the first run.

    The prompt is the beginning of a test document, about T tokens long; experts are merged once, by
    the prompt.
    """
    with_experts = (name for name, run in runs.items() if run.model_config.num_experts)
    name = next(with_experts, next(iter(runs)))
    model = api.load(runs[name].directory.path, runs[name].evaluation["step"])
    T, L = model.config.segment_length, model.config.sequence_length
    prompts = {
        domain: model.tokenizer.decode_bytes(
            document_beginning(rows, model.tokenizer.bos_id, model.tokenizer.eos_id, min(T, L // 2))
        ).decode("utf-8", "ignore")
        for domain, rows in data.held_out_with_instances("test").items()
    }
    longest = max(len(model.tokenizer.encode(prompt)) for prompt in prompts.values())
    settings: dict[str, Any] = {"max_new_tokens": min(MAX_NEW_TOKENS, L - longest - 1)} | SAMPLING
    texts = model.generate(list(prompts.values()), routing="prompt", **settings)
    return {
        "run": name,
        "settings": settings,
        "texts": {
            domain: {"prompt": prompt, "continuation": text}
            for (domain, prompt), text in zip(prompts.items(), texts, strict=True)
        },
    }


def document_beginning(rows: np.ndarray, bos_id: int, eos_id: int, length: int) -> list[int]:
    """The first `length` tokens, without BOS, of the first document in `rows` that is long enough.

    If none is, it is the longest beginning of a document in `rows`; without any BOS, it is the
    beginning of the first row.
    """
    longest: list[int] = []
    for row in rows.tolist():
        starts = [i + 1 for i, token in enumerate(row) if token == bos_id]
        for start in starts:
            tokens = row[start : start + length]
            if eos_id in tokens:
                tokens = tokens[: tokens.index(eos_id)]
            if len(tokens) == length:
                return tokens
            longest = max(longest, tokens, key=len)
    return longest or rows[0, :length].tolist()
