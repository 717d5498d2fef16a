"""What decoding costs: the merge of a prompt, and tokens per second against dense models.

    python benchmarks/decode.py [--json=FILE] [--batches=1,8,32] [--experts=8] [--rounds=3]

Ours with an FFN merged for each row, with unmerged experts, and merged once for all rows, against
our own dense model and against transformers' LLaMA of the same shape and weights, all in float32 on
this machine and in one run: rounds take turns, and the best median step of each counts, so that
other work on the machine disturbs all alike. transformers runs the leanest loop it has: its model
with a cache and an argmax. The machine's own limits are measured beside them, and with them the
least time that the FFNs of each mode take. Needs torch and transformers (requirements-dev.txt);
tools/decoding.py writes the table of docs/benchmarks.md.
"""

import argparse
import dataclasses
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lory_jax.config import base_config
from lory_jax.conversion.hf_directory import write_llama_directory
from lory_jax.generation.cost import choose_ffn, step_costs
from lory_jax.generation.loop import decode
from lory_jax.generation.programs import make_decoder
from lory_jax.model.config import ModelConfig
from lory_jax.model.transformer import init_params
from lory_jax.preparation.tokenizer_training import train_tokenizer

PROMPT, NEW = 32, 24  # tokens
FIELDS = dict(
    vocab_size=8192,
    num_layers=4,
    embed_dim=512,
    num_heads=8,
    mlp_dim=1408,
    num_experts=8,
    sequence_length=256,
    segment_length=32,
    compute_dtype="float32",
    merged_ffn="blocks",
)
SHAPE = ("num_layers", "embed_dim", "num_heads", "mlp_dim", "vocab_size")
MERGED, EXPERTS = "merged per row", "unmerged experts"
SHARED, DENSE, THEIRS = "one merge", "dense", "transformers"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    batches = [int(batch) for batch in args.batches.split(",")]
    fields = base_config().model
    fields.update(FIELDS, num_experts=args.experts)
    lory = ModelConfig.for_platform(fields, jax.default_backend())
    dense = dataclasses.replace(lory, num_experts=0)
    params = {config: init_params(config, jax.random.key(0)) for config in (lory, dense)}
    llama = load_llama(dense, params[dense])

    cores = len(os.sched_getaffinity(0))
    result: dict[str, Any] = {
        "model": {name: getattr(lory, name) for name in SHAPE},
        "experts": args.experts,
        "machine": f"{platform.processor() or platform.machine()}, {cores} cores",
        "device": jax.devices()[0].device_kind,
        "prefill_seconds": prefill_seconds(params, args.rounds),
        "limits": machine_limits(lory, args.rounds),
        "tokens_per_second": {},
        "ffn_bound": {},
        "chosen": {},
    }
    prompts = np.random.default_rng(0).integers(2, lory.vocab_size, (max(batches), PROMPT))
    for batch in batches:
        own, same = prompts[:batch].tolist(), [prompts[0].tolist()] * batch
        runs: dict[str, Callable[[], Iterator[Any]]] = {
            MERGED: lambda own=own: ours(lory, params[lory], own, "merged"),
            EXPERTS: lambda own=own: ours(lory, params[lory], own, "experts"),
            SHARED: lambda same=same: ours(lory, params[lory], same, "merged"),
            DENSE: lambda own=own: ours(dense, params[dense], own),
            THEIRS: lambda own=own: theirs(llama, own),
        }
        steps: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(args.rounds + 1):
            for name, run in runs.items():
                steps[name].append(median_step(run()))
        # The first round compiles, and is left out.
        result["tokens_per_second"][batch] = {
            name: batch / min(found[1:]) for name, found in steps.items()
        }
        result["ffn_bound"][batch] = ffn_bounds(lory, result["limits"], batch)
        result["chosen"][batch] = choose_ffn("auto", lory, rows=batch, ffns=batch)
        print(f"batch {batch} done", result["tokens_per_second"][batch], file=sys.stderr)
        if args.json:
            temporary = args.json.with_name(args.json.name + ".tmp")
            temporary.write_text(json.dumps(result, indent=1) + "\n")
            os.replace(temporary, args.json)
    print(table(result))


def ours(
    config: ModelConfig, params: Any, prompts: list[list[int]], ffn: str = "auto"
) -> Iterator[Any]:
    greedy = jax.jit(lambda logits_BxV, _: jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32))
    return decode(config, params, prompts, greedy, max_new_tokens=NEW, ffn=ffn)


def machine_limits(config: ModelConfig, rounds: int) -> dict[str, float]:
    """What XLA's products of the experts' sizes reach: bytes per second with one row of input, and
    FLOP per second with 64."""
    w = jnp.ones((config.num_experts * config.embed_dim, config.mlp_dim))
    product = jax.jit(jnp.matmul)
    seconds = {}
    for rows in (1, 64):
        x, times = jnp.ones((rows, w.shape[0])), []
        for _ in range(10 * rounds):
            start = time.perf_counter()
            product(x, w).block_until_ready()
            times.append(time.perf_counter() - start)
        seconds[rows] = min(times)
    return {"bytes_per_second": w.nbytes / seconds[1], "flops": 2 * 64 * w.size / seconds[64]}


def ffn_bounds(config: ModelConfig, limits: dict[str, float], batch: int) -> dict[str, float]:
    """The most tokens per second that each mode's FFNs alone allow on a machine of these limits."""
    itemsize = jnp.dtype(config.compute_dtype).itemsize
    costs = step_costs(
        limits["flops"] / limits["bytes_per_second"],
        itemsize,
        rows=batch,
        ffns=batch,
        experts=config.num_experts,
        merges_per_step=0,
    )
    shared, _ = step_costs(
        limits["flops"] / limits["bytes_per_second"],
        itemsize,
        rows=batch,
        ffns=1,
        experts=config.num_experts,
        merges_per_step=0,
    )
    weights = 3 * config.embed_dim * config.mlp_dim * config.num_layers
    return {
        name: batch * limits["bytes_per_second"] / (cost * weights)
        for name, cost in zip((MERGED, EXPERTS, SHARED), (*costs, shared), strict=True)
    }


def theirs(llama: Any, prompts: list[list[int]]) -> Iterator[Any]:
    import torch

    with torch.inference_mode():
        tokens = torch.tensor(prompts)
        cache = None
        for _ in range(NEW):
            out = llama(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, tokens = out.past_key_values, out.logits[:, -1:].argmax(-1)
            yield tokens.numpy()


def load_llama(dense: ModelConfig, params: Any) -> Any:
    """The dense model as transformers loads what we export."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    tokenizer = train_tokenizer(["decoding in words and in numbers"] * 3, 300)
    with tempfile.TemporaryDirectory() as directory:
        write_llama_directory(Path(directory) / "hf", dense, params, tokenizer, "benchmark")
        return transformers.AutoModelForCausalLM.from_pretrained(Path(directory) / "hf").eval()


def median_step(tokens: Iterator[Any]) -> float:
    """Seconds of a step, the prompt's pass left out."""
    next(tokens)
    times = [time.perf_counter()]
    for _ in tokens:
        times.append(time.perf_counter())
    return statistics.median(np.diff(times))


def prefill_seconds(params: dict[ModelConfig, Any], rounds: int) -> dict[str, float]:
    """Reading one prompt with the merge of its experts, and without; the best of the rounds."""
    tokens, lengths = np.ones((1, PROMPT), np.int32), np.array([PROMPT], np.int32)
    found: dict[str, list[float]] = {"with merge": [], "dense": []}
    for _ in range(rounds + 1):
        for (config, mine), name in zip(params.items(), found, strict=True):
            start = time.perf_counter()
            decoder = make_decoder(config, "prompt")
            _, merged, _ = state = decoder.prefill(mine, tokens, lengths, 64, None)
            jax.block_until_ready((state, decoder.weights(mine, merged)))
            found[name].append(time.perf_counter() - start)
    return {name: min(times[1:]) for name, times in found.items()}


def table(result: dict[str, Any]) -> str:
    prefill = result["prefill_seconds"]
    lines = [
        f"{result['machine']}; {result['experts']} experts",
        f"prompt of {PROMPT} tokens: {1e3 * prefill['with merge']:.0f} ms with its merge, "
        f"{1e3 * prefill['dense']:.0f} ms dense",
        "",
        f"tokens per second (over {THEIRS})",
        "batch" + "".join(f"{name:>22}" for name in (MERGED, EXPERTS, SHARED, DENSE, THEIRS)),
    ]
    for batch, row in result["tokens_per_second"].items():
        cells = [f"{rate:.0f} ({rate / row[THEIRS]:.2f})" for rate in row.values()]
        lines.append(f"{batch:5}" + "".join(f"{cell:>22}" for cell in cells))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
