"""Predicts what a recipe needs on TPUs or GPUs by compiling its training step; requires neither.

    python -m lory_jax.plan --config=configs/lory_0_3b.py:experts=32 --topology=v5e-256
    python -m lory_jax.plan --config=configs/lory_0_3b.py:experts=8 --topology=h100-8
    python -m lory_jax.plan --config=configs/lory_0_3b.py:experts=32 --no_compile
    python -m lory_jax.plan --config=configs/lory_0_3b.py:experts=8 --topology=v5e-64,v5p-128 \\
        --rank --budget=30 --price=v5e=1.20,v5p=4.20

For Lory and its dense baseline, it shows the bytes per device and whether they fit, the bytes that
collectives move, and two sums of cycles, the compiler's and the repriced one. From the latter
follow a lower bound of the step's time and an upper bound of MFU. Slices have the cloud's names:
v5e-N and v6e-N count chips; v5p-N and tpu7x-N count TensorCores, of which a chip has two. a100-N,
h100-N and h200-N are one host with N GPUs. Compiling for TPUs requires libtpu
(requirements-plan.txt), and for GPUs JAX's plug-in for CUDA (requirements-cuda.txt); --no_compile
only counts parameters and FLOPs, and requires neither of them nor --topology.

The compiler's sum adds up its own estimates, and counts Pallas kernels at the peak of the matrix
unit. It is wrong in both directions (docs/scaling.md). The repriced sum keeps the estimates of
matrix products, bounds elementwise work by the bytes it moves, and prices every Pallas kernel by
the instructions that it was compiled to. Collectives take their bytes over the bandwidth of all
links together; what the program computes between the start and the end of one hides it, and the
rest is waited for.

The compiler for GPUs estimates no times. There, every operation counts with the longer of its FLOPs
at the peak and its bytes at the bandwidth of the memory: a roofline, which no program reaches.

--rank varies one setting at a time and keeps the best: what is recomputed, the mesh, the number of
microbatches, the blocks of the merging kernels, and which kernels run. It compiles at most 12
programs per topology and prints the flags of the best.

What was found about a compiled program is kept in $LORY_PLAN_CACHE, by default lory_jax/plan in the
user's cache directory, and read from there if the same program is planned again.
"""

import argparse
import json
import re
import sys
from typing import Any

from lory_jax import cli
from lory_jax.errors import ConfigError
from lory_jax.planning.gpus import GPUS, GpuTopology
from lory_jax.planning.topology import DEVICES, Topology, parse_topology


def main(argv: list[str]) -> None:
    parser = cli.Parser("plan", __doc__)
    parser.add_config_flag()
    add = parser.add_argument
    add(
        "--topology",
        metavar="TOPOLOGY",
        help="what to compile for, such as v5e-256, v5p-128 or h100-8",
    )
    add(
        "--mesh",
        metavar="DATA,FSDP,TENSOR",
        help="devices on the three mesh axes (default: config.parallel if it is set; otherwise as "
        "many devices on fsdp as leave each a multiple of 16 rows of D, and the others on data)",
    )
    add(
        "--no_compile",
        action="store_true",
        help="only count parameters and FLOPs, without libtpu and --topology",
    )
    add(
        "--rank",
        action="store_true",
        help="search remat, mesh, microbatches and kernels by compiling, and rank what fits",
    )
    add(
        "--budget",
        type=float,
        default=30.0,
        metavar="MINUTES",
        help="--rank: how long to search for each topology (default: 30)",
    )
    add(
        "--price",
        metavar="CHIP=PRICE,...",
        help="--rank: price of a chip and hour, such as v5e=1.20,h100=2.99; adds the price of a "
        "million tokens",
    )
    add("--json", action="store_true", help="print one JSON object instead of a table")
    args = parser.parse(argv)
    if args.topology is None and not args.no_compile:
        parser.error("--topology: missing; required unless --no_compile is given")
    mesh_shape = parse_mesh(args.mesh) if args.mesh else None
    prices = parse_prices(args.price or "")
    if args.rank:
        if args.topology is None or args.no_compile:
            parser.error("--rank: requires --topology, and compiles")
        if args.budget <= 0:
            parser.error(f"--budget: got {args.budget}, must be above 0")
        rank(args, [parse_topology(name) for name in args.topology.split(",")], mesh_shape, prices)
        return
    if args.price:
        parser.error("--price: requires --rank")
    make_plan(args, parse_topology(args.topology) if args.topology else None, mesh_shape)


def make_plan(
    args: argparse.Namespace,
    topology: Topology | GpuTopology | None,
    mesh_shape: tuple[int, int, int] | None,
) -> None:
    """Counts parameters and FLOPs, compiles the step unless --no_compile is given, and prints."""
    # Imported here so that --help and flag errors do not wait for JAX.
    import jax

    from lory_jax.model.config import ModelConfig
    from lory_jax.model.flops import parameter_counts, trained_flops_per_token
    from lory_jax.planning.recipe import plan_recipe
    from lory_jax.planning.report import baselines_table, plan_table

    jax.config.update("jax_platforms", "cpu")
    # Plans are kept in a cache of their own, with the time that compiling took.
    jax.config.update("jax_enable_compilation_cache", False)
    model_config = ModelConfig.for_platform(
        args.config.model, topology.platform if topology else "tpu"
    )
    plan: dict[str, Any] = {
        "parameters": parameter_counts(model_config),
        "flops_per_token": trained_flops_per_token(
            model_config, args.config.train.segment_schedule
        ),
    }
    if topology and not args.no_compile:
        plan |= plan_recipe(args.config, topology, mesh_shape)
    if args.json:
        print(json.dumps(plan, indent=2))
        return
    print(plan_table(plan))
    if model_config.num_experts:
        print("\n" + baselines_table(model_config))


def rank(
    args: argparse.Namespace,
    topologies: list[Topology | GpuTopology],
    mesh_shape: tuple[int, int, int] | None,
    prices: dict[str, float],
) -> None:
    """Searches each topology, and prints the rankings as they are found."""
    import jax

    from lory_jax.planning import ranking

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)

    def report(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    rankings = []
    for topology in topologies:
        found = ranking.search(args.config, topology, mesh_shape, 60 * args.budget, report)
        rankings.append(ranking.as_json(found, topology))
        price = prices.get(topology.name.split("-")[0])
        if not args.json:
            print(ranking.table(found, topology, price) + "\n", flush=True)
    if args.json:
        print(json.dumps(rankings if len(rankings) > 1 else rankings[0], indent=2))


def parse_prices(text: str) -> dict[str, float]:
    """`v5e=1.20,h100=2.99` as numbers by chip."""
    prices = {}
    for item in filter(None, text.split(",")):
        found = re.fullmatch(r"([a-z0-9]+)=(\d+(?:\.\d+)?)", item)
        if not found or found[1] not in (*DEVICES, *GPUS):
            chips = ", ".join((*DEVICES, *GPUS))
            raise ConfigError(f"--price: got {item!r}, must be CHIP=PRICE with a chip of {chips}")
        prices[found[1]] = float(found[2])
    return prices


def parse_mesh(text: str) -> tuple[int, int, int]:
    """Three positive integers, separated by commas."""
    parts = text.split(",")
    if len(parts) != 3 or not all(re.fullmatch("0*[1-9][0-9]{0,8}", part) for part in parts):
        raise ConfigError(
            f"--mesh: got {text!r}, must be three positive integers DATA,FSDP,TENSOR such as 4,64,1"
        )
    data, fsdp, tensor = map(int, parts)
    return data, fsdp, tensor


if __name__ == "__main__":
    cli.run(main)
