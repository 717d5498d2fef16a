"""The whole training step, Lory over its dense baseline: same batch, same remat, any backend.

    python benchmarks/train_step.py                             a small model on a CPU
    python benchmarks/train_step.py --config=configs/lory_0_3b.py --batch=8

Forward, backward and AdamW on one batch of random tokens, on all devices (along `fsdp`).
The models take turns; the median of the ratios to the dense step of the same turn, the quartiles,
tokens per second and MFU.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lory_jax.config import base_config, load_config
from lory_jax.model.config import ModelConfig
from lory_jax.model.flops import flops_per_token, peak_flops
from lory_jax.parallel import make_mesh, place_batch
from lory_jax.training.optimizer import make_optimizer
from lory_jax.training.state import init_state
from lory_jax.training.step import make_train_step

ROOT = Path(__file__).resolve().parent.parent
SMALL = {"num_layers": 2, "embed_dim": 256, "mlp_dim": 704, "num_heads": 4, "segment_length": 128}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, help="a recipe (default: a small model)")
    parser.add_argument("--experts", default="8,32")
    parser.add_argument("--batch", type=int, default=4, help="sequences per step")
    parser.add_argument("--merged_ffn", default="auto", help="config.model.merged_ffn")
    parser.add_argument("--remat", help="config.model.remat (default: the recipe's)")
    parser.add_argument("--segment_length", type=int, help="T (default: the recipe's)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    args = parser.parse_args()
    experts = [0, *map(int, args.experts.split(","))]
    models = {E: model_config(args, E) for E in experts}
    seconds = measure(models, args)
    rows = [row(E, models[E], args, seconds) for E in experts]
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        temporary = args.json.with_name(args.json.name + ".tmp")
        temporary.write_text(json.dumps(rows, indent=1) + "\n")
        os.replace(temporary, args.json)


def model_config(args: argparse.Namespace, E: int) -> ModelConfig:
    config = load_config(str(args.config or ROOT / "configs" / "local.py"))
    if args.config is None:
        config.model.update(SMALL)
    config.model.update({"num_experts": E, "merged_ffn": args.merged_ffn})
    if args.remat:
        config.model.remat = args.remat
    if args.segment_length:
        config.model.segment_length = args.segment_length
    return ModelConfig.for_platform(config.model, jax.default_backend())


def measure(models: dict[int, ModelConfig], args: argparse.Namespace) -> dict[int, list[float]]:
    """Seconds of every step but the first, the models taking turns."""
    mesh = make_mesh(1, 0, 1)
    optimizer = make_optimizer(base_config().train)
    runs: dict[int, Any] = {}
    for E, model in models.items():
        step = make_train_step(model, optimizer, mesh)
        runs[E] = [init_state(model, optimizer, mesh, seed=0), step]
    model = next(iter(models.values()))
    tokens = np.random.default_rng(0).integers(
        0, model.vocab_size, (args.batch, model.sequence_length + 1), np.int32
    )
    seconds: dict[int, list[float]] = {E: [] for E in models}
    with jax.set_mesh(mesh):
        batch = place_batch(tokens, mesh, model.batch_axis)
        for turn in range(args.rounds + 1):
            for E, run in runs.items():
                begin = time.perf_counter()
                run[0], metrics = run[1](run[0], batch)
                jax.block_until_ready((run[0], metrics))
                if turn:  # the first compiles
                    seconds[E].append(time.perf_counter() - begin)
    return seconds


def row(
    E: int, model: ModelConfig, args: argparse.Namespace, seconds: dict[int, list[float]]
) -> dict[str, Any]:
    device = jax.devices()[0].device_kind
    ratios = [mine / dense for mine, dense in zip(seconds[E], seconds[0], strict=True)]
    step = statistics.median(seconds[E])
    rate = args.batch * model.sequence_length / step
    peak = peak_flops(device)
    result = {
        "experts": E,
        "merged_ffn": model.merged_ffn if E else None,
        "device": f"{jax.device_count()} x {device}",
        "remat": model.remat,
        "T": model.segment_length,
        "over_dense": statistics.median(ratios),
        "quartiles": [round(q, 3) for q in statistics.quantiles(ratios)],
        "seconds": step,
        "tokens_per_second": rate,
        "mfu": rate * flops_per_token(model) / (peak * jax.device_count()) if peak else None,
        "flops_over_dense": flops_per_token(model) / flops_per_token(model_config(args, 0)),
    }
    print(
        "  ".join(
            f"{k} {v:,.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in result.items()
        )
    )
    return result


if __name__ == "__main__":
    main()
