"""Predicts what a recipe needs on TPUs or GPUs by compiling its training step; requires neither.

    python -m lory_jax.plan --config=configs/lory_0_3b.py:experts=32 --topology=v5e-256
    python -m lory_jax.plan --config=configs/lory_0_3b.py:experts=8 --topology=h100-8
    python -m lory_jax.plan --config=configs/lory_0_3b.py:experts=32 --no_compile

For Lory and its dense baseline, it shows the bytes per device and whether they fit, the bytes that
collectives move, and two sums of cycles, the compiler's and the repriced one. From the latter follow
a lower bound of the step's time and an upper bound of MFU. Slices have the cloud's names: v5e-N and
v6e-N count chips; v5p-N and tpu7x-N count TensorCores, of which a chip has two. a100-N, h100-N and
h200-N are one host with N GPUs. Compiling for TPUs requires libtpu (requirements-plan.txt), and for
GPUs JAX's plug-in for CUDA (requirements-cuda.txt); --no_compile only counts parameters and FLOPs,
and requires neither of them nor --topology.

The compiler's sum adds up its own estimates, and counts Pallas kernels at the peak of the matrix
unit. It is wrong in both directions (docs/scaling.md). The repriced sum keeps the estimates of
matrix products, bounds elementwise work by the bytes it moves, and prices every Pallas kernel by
the instructions that it was compiled to. Collectives are bounded by their bytes over the bandwidth
of all links together, and assumed to overlap with computation entirely.

The compiler for GPUs estimates no times. There, every operation counts with the longer of its FLOPs
at the peak and its bytes at the bandwidth of the memory: a roofline, which no program reaches.
"""

import argparse
import json
from typing import Any

from lory_jax import cli
from lory_jax.errors import ConfigError
from lory_jax.planning.gpus import GpuTopology
from lory_jax.planning.topology import Topology, parse_topology


def main(argv: list[str]) -> None:
    parser = cli.Parser("plan", __doc__)
    parser.add_config_flag()
    add = parser.add_argument
    add("--topology", metavar="TOPOLOGY", help="what to compile for, such as v5e-256, v5p-128 or h100-8")
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
    add("--json", action="store_true", help="print one JSON object instead of a table")
    args = parser.parse(argv)
    if args.topology is None and not args.no_compile:
        parser.error("--topology: missing; required unless --no_compile is given")
    make_plan(
        args,
        parse_topology(args.topology) if args.topology else None,
        parse_mesh(args.mesh) if args.mesh else None,
    )


def make_plan(
    args: argparse.Namespace,
    topology: Topology | GpuTopology | None,
    mesh_shape: tuple[int, int, int] | None,
) -> None:
    """Counts parameters and FLOPs, compiles the step unless --no_compile is given, and prints."""
    # Imported here so that --help and flag errors do not wait for JAX.
    import jax

    from lory_jax.model.config import ModelConfig
    from lory_jax.model.flops import flops_per_token, parameter_counts
    from lory_jax.planning.recipe import plan_recipe
    from lory_jax.planning.report import baselines_table, plan_table

    jax.config.update("jax_platforms", "cpu")
    # A plan reports how long compiling takes, so the program must not come from the cache.
    jax.config.update("jax_enable_compilation_cache", False)
    model_config = ModelConfig.for_platform(
        args.config.model, topology.platform if topology else "tpu"
    )
    plan: dict[str, Any] = {
        "parameters": parameter_counts(model_config),
        "flops_per_token": flops_per_token(model_config),
    }
    if topology and not args.no_compile:
        plan |= plan_recipe(args.config, topology, mesh_shape)
    if args.json:
        print(json.dumps(plan, indent=2))
        return
    print(plan_table(plan))
    if model_config.num_experts:
        print("\n" + baselines_table(model_config))


def parse_mesh(text: str) -> tuple[int, int, int]:
    """Three positive integers, separated by commas."""
    parts = text.split(",")
    if len(parts) != 3 or not all(part.isdigit() and int(part) for part in parts):
        raise ConfigError(
            f"--mesh: got {text!r}, must be three positive integers DATA,FSDP,TENSOR such as 4,64,1"
        )
    data, fsdp, tensor = map(int, parts)
    return data, fsdp, tensor


if __name__ == "__main__":
    cli.run(main)
