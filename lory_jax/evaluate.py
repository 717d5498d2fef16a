"""Perplexity and bits per byte of a trained model on held-out documents, domain by domain.

    python -m lory_jax.evaluate --workdir=W --out=F.json [--routing=segment|prompt]

The headline counts positions >= T, where no prediction has seen its future. Perplexity over all
positions is always routed as in training, like the paper's.
"""

import json
import math
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lory_jax import cli
from lory_jax.data.manifest import TOKENIZER_NAME
from lory_jax.data.tokenizer import Tokenizer
from lory_jax.errors import InputError
from lory_jax.evaluation.perplexity import summarize, token_losses
from lory_jax.evaluation.sets import batches_of, held_out_sets
from lory_jax.model.transformer import Params
from lory_jax.parallel import make_mesh, start_process
from lory_jax.progress import duration, progress
from lory_jax.training.step import make_loss_step
from lory_jax.training.workdir import data_directory, load_params, read_config, write_atomically

MEASURES = ("perplexity", "perplexity_all_positions", "bits_per_byte")


def main(argv: list[str]) -> None:
    parser = cli.Parser("evaluate", __doc__)
    parser.add_argument("--workdir", required=True, type=Path, help="a run of the verb train")
    parser.add_argument("--out", required=True, type=Path, metavar="F.json", help="file to write")
    parser.add_argument(
        "--routing",
        choices=("segment", "prompt"),
        help="how positions >= T are routed, with the first T tokens as the prompt (default: as "
        "the model was trained: segment, or prompt after prefix routing)",
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="where the prepared data are now")
    parser.add_argument(
        "--split", choices=("test", "validation"), default="test", help="default: test"
    )
    parser.add_argument(
        "--batch_size", type=int, help="instances at a time (default: as in training)"
    )
    args = parser.parse(argv)
    if args.batch_size is not None and args.batch_size < 1:
        parser.error(f"--batch_size: got {args.batch_size}, takes an integer of at least 1")
    start_process()
    result = evaluate(args.workdir, args.routing, args.data, args.split, args.batch_size)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(args.out, json.dumps(result, indent=1) + "\n")
    print(table(result))
    print(f"wrote {args.out}")


def evaluate(
    workdir: Path,
    routing: str | None = None,
    data: Path | None = None,
    split: str = "test",
    batch_size: int | None = None,
) -> dict[str, Any]:
    """Evaluates the newest intact checkpoint of a run.

    Args:
      workdir: of the run.
      routing: "segment" or "prompt"; None routes positions >= T as in training.
      data: where its prepared data are, if they were moved.
      split: "test" or "validation".
      batch_size: instances at a time over all devices.

    Returns:
      every one of `MEASURES` by domain, their geometric means, and what was evaluated how.
    """
    start = time.perf_counter()
    mesh = make_mesh(data=1, fsdp=0, tensor=1)
    config, params, step = load_params(workdir, mesh)
    batch_size = batch_size or read_config(workdir)["train"]["global_batch_size"]
    if batch_size % jax.device_count():
        raise InputError(
            f"--batch_size: got {batch_size}, takes a multiple of the {jax.device_count()} devices"
        )
    if config.sequence_length <= config.segment_length:
        raise InputError(
            f"{workdir}: instances of {config.sequence_length} tokens are one routing segment, so "
            "there are no positions >= T to score"
        )
    token_bytes_V = Tokenizer.load(workdir / TOKENIZER_NAME).token_bytes
    sets = held_out_sets(data_directory(workdir, data), split)
    as_trained = "prompt" if config.routing == "prefix" else "segment"
    routing = routing or as_trained

    def losses(label: str, kind: str | None) -> dict[str, np.ndarray]:
        loss_step = make_loss_step(config, mesh, kind, prompt_length=config.segment_length)
        with jax.set_mesh(mesh):
            return _losses(loss_step, params, sets, batch_size, mesh, label)

    training = losses("evaluating", None)
    # With the first segment as the prompt, routing as in training is training's own on
    # positions >= T: one pass serves both.
    same = routing == as_trained or not config.num_experts
    scored = training if same else losses(f"evaluating, routed by {routing}", routing)

    by_domain = {}
    for domain, rows in sets.items():
        T = config.segment_length
        summary = summarize(scored[domain], rows, token_bytes_V, T)
        everywhere = summarize(training[domain], rows, token_bytes_V, T)
        by_domain[domain] = summary | {
            "perplexity_all_positions": everywhere["perplexity_all_positions"]
        }
    result: dict[str, Any] = {
        measure: {domain: values[measure] for domain, values in by_domain.items()}
        for measure in MEASURES
    }
    result["tasks"] = {}
    result["geometric_mean"] = {
        measure: geometric_mean(list(result[measure].values())) for measure in MEASURES
    }
    return result | {
        "routing": routing if config.num_experts else None,
        "split": split,
        "instances": {domain: len(rows) for domain, rows in sets.items()},
        "step": step,
        "seconds": time.perf_counter() - start,
    }


def geometric_mean(values: list[float]) -> float:
    """The number whose power is the product of `values`, which are positive."""
    return math.exp(math.fsum(math.log(value) for value in values) / len(values))


def _losses(
    loss_step: Any,
    params: Params,
    sets: dict[str, np.ndarray],
    batch_size: int,
    mesh: jax.sharding.Mesh,
    label: str,
) -> dict[str, np.ndarray]:
    """Losses in nats of every domain, `[N, L]`, batch by batch under a progress line."""
    batches = batches_of(sets, batch_size)
    losses: dict[str, list[np.ndarray]] = {domain: [] for domain in sets}
    for domain, rows in progress(batches, len(batches), label, "batches"):
        losses[domain].append(token_losses(loss_step, params, rows, batch_size, mesh))
    return {domain: np.concatenate(parts) for domain, parts in losses.items()}


def table(result: dict[str, Any]) -> str:
    """The result as an aligned table, one line per domain and one for the geometric mean."""
    routed = f", routed by {result['routing']}" if result["routing"] else ""
    lines = [f"{result['split']} set, step {result['step']}{routed}"]
    names = ["geometric mean", *result["perplexity"]]
    width = max(len(name) for name in names)
    lines.append(f"{'':{width}}  perplexity  all positions  bits per byte")
    rows = {name: {m: result[m][name] for m in MEASURES} for name in result["perplexity"]}
    for name, row in (rows | {"geometric mean": result["geometric_mean"]}).items():
        lines.append(
            f"{name:{width}}  {row['perplexity']:10.3f}  {row['perplexity_all_positions']:13.3f}"
            f"  {row['bits_per_byte']:13.4f}"
        )
    lines.append(f"in {duration(result['seconds'])}")
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
