"""Says what a recipe takes on a TPU slice, by compiling its training step for it; no TPU needed.

    python -m lory_jax.plan --config=configs/lory_0_3b.py:experts=32 --topology=v5e-256

For Lory and its dense baseline: bytes per device and whether they fit, bytes that collectives move,
and the compiler's own cycle estimates as a lower bound of the step's time and an upper bound of
MFU. Slices go by the cloud's names: v5e-N and v6e-N count chips, v5p-N and tpu7x-N TensorCores, two
a chip. Needs libtpu (pip install libtpu), except with --no_compile.

The bounds are as good as the estimates, which cover fusions and copies (and are pessimistic
about memory-bound ones, see docs/scaling.md). A Pallas kernel counts with its FLOPs at the peak of
the device; those that cannot be counted are named. Collectives are bounded by their bytes over all
links together, and taken to overlap with computing entirely.
"""

import copy
import json
import sys
from typing import Any

import jax
from ml_collections import ConfigDict

from lory_jax import cli
from lory_jax.errors import ConfigError
from lory_jax.model.config import ModelConfig
from lory_jax.model.flops import baselines, flops_per_token, parameter_counts
from lory_jax.parallel import MESH_AXES, make_mesh
from lory_jax.planning.estimate import default_mesh, plan_step
from lory_jax.planning.topology import Topology, parse_topology

Shape = tuple[int, int, int]


def main(argv: list[str]) -> None:
    parser = cli.Parser("plan", __doc__)
    parser.add_config_flag()
    parser.add_argument("--topology", required=True, help="slice, such as v5e-256 or v5p-128")
    parser.add_argument(
        "--mesh",
        metavar="DATA,FSDP,TENSOR",
        help="devices on the three mesh axes (default: config.parallel if set, else as many on "
        "fsdp as leave each a multiple of 16 rows of D, the rest on data)",
    )
    parser.add_argument(
        "--no_compile", action="store_true", help="only parameters and FLOPs, without libtpu"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    args = parser.parse(argv)
    topology = parse_topology(args.topology)
    shape = parse_mesh(args.mesh) if args.mesh else None
    jax.config.update("jax_platforms", "cpu")
    # Only a compilation says how long it takes.
    jax.config.update("jax_enable_compilation_cache", False)
    model = ModelConfig.for_platform(args.config.model, "tpu")
    result: dict[str, Any] = {
        "parameters": parameter_counts(model),
        "flops_per_token": flops_per_token(model),
    }
    if not args.no_compile:
        result |= plan(args.config, topology, shape)
    if args.json:
        print(json.dumps(result, indent=2))
        return
    print(table(result))
    if model.num_experts:
        print("\n" + baselines_table(model))


def parse_mesh(text: str) -> Shape:
    """Three positive integers, comma-separated."""
    parts = text.split(",")
    if len(parts) != 3 or not all(part.isdigit() and int(part) for part in parts):
        raise ConfigError(
            f"--mesh: got {text!r}, takes three positive integers DATA,FSDP,TENSOR such as 4,64,1"
        )
    data, fsdp, tensor = map(int, parts)
    return data, fsdp, tensor


def plan(config: ConfigDict, topology: Topology, shape: Shape | None = None) -> dict[str, Any]:
    """Compiles a recipe, and its dense baseline if it has experts, for a topology.

    Returns:
      The plan's fields but `parameters` and `flops_per_token`; `dense` holds the baseline's.

    Raises:
      InputError: libtpu is missing, or the recipe does not fit the mesh.
    """
    devices = topology.devices()
    parallel = config.parallel
    if shape is None and (parallel.data, parallel.fsdp, parallel.tensor) != (1, 0, 1):
        shape = parallel.data, parallel.fsdp, parallel.tensor
    if shape is None:
        model = ModelConfig.for_platform(config.model, "tpu")
        sequences = config.train.global_batch_size // config.train.microbatches
        shape = default_mesh(model, sequences, len(devices))
    mesh = make_mesh(*shape, devices=devices)
    result = {
        "topology": topology.name,
        "device": devices[0].device_kind,
        "devices": len(devices),
        "mesh": dict(mesh.shape),
    }
    routing = config.model.routing
    name = "Lory" if routing == "causal" else routing
    versions = [(name if config.model.num_experts else "dense", config)]
    if config.model.num_experts:
        baseline = copy.deepcopy(config)
        baseline.model.num_experts = 0
        versions.append(("dense", baseline))
    plans = []
    for i, (name, version) in enumerate(versions):
        print(f"compiling {i + 1} of {len(versions)}: {name}", file=sys.stderr, flush=True)
        plans.append(plan_step(version, mesh, topology.device))
    result |= plans[0]
    result["dense"] = plans[1] if len(plans) > 1 else None
    return result


# ---------------------------------------------------------------- the table


def table(result: dict[str, Any]) -> str:
    """The plan for people, Lory and dense side by side."""
    counts = result["parameters"]
    lines = [
        f"parameters        {counts['total'] / 1e6:,.1f}M total, {counts['active'] / 1e6:,.1f}M "
        "active",
        f"FLOPs per token   {result['flops_per_token'] / 1e9:,.2f} G",
    ]
    if "topology" not in result:
        return "\n".join(lines)
    shape = " x ".join(f"{axis}={result['mesh'][axis]}" for axis in MESH_AXES)
    lines += [f"{result['topology']:<17} {result['devices']} of {result['device']}, mesh {shape}"]
    columns = [result] if result["dense"] is None else [result, result["dense"]]
    if len(columns) > 1:
        lines += ["", f"{'per device and step':<36}{'experts':>12}{'dense':>12}"]
    rows = [_rows(column) for column in columns]
    names = [name for row in rows for name in row]
    for name in dict.fromkeys(names):
        lines.append(f"{name:<36}" + "".join(f"{row.get(name, '-'):>12}" for row in rows))
    for column in columns:
        estimate = column["estimate"] or {"uncounted_kernels": {}, "loops_counted_once": []}
        for kernel, calls in estimate["uncounted_kernels"].items():
            lines.append(f"not counted: kernel {kernel}, {calls} calls")
        for loop in estimate["loops_counted_once"]:
            lines.append(f"counted once: loop {loop}, whose trip count is not known")
    return "\n".join(lines)


def baselines_table(model: ModelConfig) -> str:
    """Parameters and FLOPs of the recipe and of what it is compared with, side by side."""
    lines = [
        f"{f'with {model.num_experts} experts':<24}{'total':>12}{'active':>12}{'FLOPs/token':>14}"
    ]
    for name, config in baselines(model).items():
        counts, flops = parameter_counts(config), flops_per_token(config)
        lines.append(
            f"{name:<24}{counts['total'] / 1e6:>11,.1f}M{counts['active'] / 1e6:>11,.1f}M"
            f"{flops / 1e9:>12,.3f} G"
        )
    return "\n".join(lines)


def _rows(plan: dict[str, Any]) -> dict[str, str]:
    """Names and values of a column."""
    memory = plan["bytes_per_device"]
    rows = {
        f"{name}, GiB": f"{memory[name] / 2**30:.2f}"
        for name in ("arguments", "temporaries", "total", "limit")
    }
    rows["fits"] = "yes" if memory["fits"] else "NO"
    for kind, axes in (plan["collective_bytes"] or {}).items():
        rows |= {f"{kind} over {axis}, GB": f"{b / 1e9:.3f}" for axis, b in axes.items()}
    rows["compile, s"] = f"{plan['compile_seconds']:.0f}"
    estimate = plan["estimate"]
    if estimate is None:
        return rows
    for scope, cycles in estimate["cycles"].items():
        rows[f"{scope.replace('_', ' ')}, M cycles"] = f"{cycles / 1e6:,.1f}"
    for kernel, cycles in estimate["kernel_cycles"].items():
        rows[f"  of which {kernel}"] = f"{cycles / 1e6:,.1f}"
    rows["computing, s"] = f"{estimate['compute_seconds']:.4f}"
    rows["collectives, s"] = f"{estimate['collective_seconds']:.4f}"
    rows["step at least, s"] = f"{estimate['step_seconds_lower_bound']:.4f}"
    rate = estimate["tokens_per_second_per_device_upper_bound"]
    rows["tokens/s per device at most"] = f"{rate:,.0f}"
    mfu = estimate["mfu_upper_bound"]
    rows["MFU at most"] = "unknown" if mfu is None else f"{mfu:.1%}"
    return rows


if __name__ == "__main__":
    cli.run(main)
