"""Multiple-choice questions per second inside lm-evaluation-harness: ours and transformers'.

    python benchmarks/evaluate.py [--questions=64] [--json=FILE]

A dense model of random weights is exported as a LLaMA directory. The harness's transformers
backend and ours then score the same continuations on this machine's CPU, in float32, with equal
batch sizes: four answers of one word each, or of several, to contexts of 20 to 400 words. Both are
run twice; the first time includes what is compiled. Also printed: the largest difference of a
log-likelihood, and how many of the questions are answered alike. Needs requirements-dev.txt.
"""

import argparse
import json
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TQDM_DISABLE", "1")

import jax
import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from lory_jax.api import Model
from lory_jax.config import base_config
from lory_jax.conversion.hf_directory import write_llama_directory
from lory_jax.evaluation.harness.model import LoryLM
from lory_jax.model.config import ModelConfig
from lory_jax.model.transformer import init_params
from lory_jax.preparation.tokenizer_training import train_tokenizer

WORDS = [a + b for a in ("ka", "lo", "mi", "ru", "te", "so") for b in ("na", "ri", "sta", "vel")]
ANSWERS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--embed_dim", type=int, default=256)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    model = make_model(args.layers, args.embed_dim)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "llama"
        write_llama_directory(
            path, model.config, model.params, model.tokenizer, "A benchmark's model."
        )
        theirs = HFLM(
            pretrained=str(path), device="cpu", dtype="float32", batch_size=args.batch_size
        )
        backends = {"transformers": theirs, "lory_jax": LoryLM(model, batch_size=args.batch_size)}
        result: dict[str, Any] = {"questions": args.questions, "batch_size": args.batch_size}
        for kind, words in (("one word", 1), ("eight words", 8)):
            requests = make_requests(args.questions, words)
            result[kind] = compare(backends, requests)
    print(table(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


def make_model(layers: int, embed_dim: int) -> Model:
    """A dense model with random parameters, reading 1,024 tokens."""
    tokenizer = train_tokenizer([text(random.Random(i), 300) for i in range(40)], 512)
    fields = base_config().model
    fields.update(
        vocab_size=tokenizer.vocab_size,
        num_layers=layers,
        embed_dim=embed_dim,
        num_heads=embed_dim // 64,
        mlp_dim=embed_dim * 11 // 4,
        num_experts=0,
        sequence_length=1024,
        segment_length=128,
        compute_dtype="float32",
    )
    config = ModelConfig.for_platform(fields, jax.default_backend())
    return Model(config, init_params(config, jax.random.key(0)), tokenizer)


def text(draw: random.Random, words: int) -> str:
    return " ".join(draw.choices(WORDS, k=words))


def make_requests(questions: int, answer_words: int) -> list[Instance]:
    """`ANSWERS` requests for each question, in order."""
    draw, requests = random.Random(0), []
    for _ in range(questions):
        context = text(draw, draw.randint(20, 400))
        for word in draw.sample(WORDS, ANSWERS):
            answer = " " + " ".join([word, *draw.choices(WORDS, k=answer_words - 1)])
            requests.append(
                Instance("loglikelihood", doc={}, arguments=(context, answer), idx=len(requests))
            )
    return requests


def compare(backends: dict[str, Any], requests: list[Instance]) -> dict[str, Any]:
    """Requests per second of both, the first time and again, and how they differ."""
    scores, rates = {}, {}
    for name, backend in backends.items():
        rates[name] = []
        for _ in range(2):
            start = time.perf_counter()
            found = backend.loglikelihood(requests, disable_tqdm=True)
            rates[name].append(len(requests) / (time.perf_counter() - start))
        scores[name] = np.array([score for score, _ in found]).reshape(-1, ANSWERS)
    ours, theirs = scores["lory_jax"], scores["transformers"]
    return {
        "requests_per_second": rates,
        "largest_difference": float(np.abs(ours - theirs).max()),
        "answered_alike": float(np.mean(ours.argmax(axis=1) == theirs.argmax(axis=1))),
    }


def table(result: dict[str, Any]) -> str:
    """The measurements, a line per kind of answer and backend."""
    lines = [f"{'answers of':14}{'backend':14}{'requests/s, first':>18}{'again':>9}"]
    for kind, found in result.items():
        if not isinstance(found, dict):
            continue
        for name, (first, again) in found["requests_per_second"].items():
            lines.append(f"{kind:14}{name:14}{first:18.1f}{again:9.1f}")
        lines.append(
            f"{'':14}largest difference {found['largest_difference']:.1e}, "
            f"answered alike {found['answered_alike']:.0%}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
