"""The merged FFN over the dense FFN of the same active shape, implementation by implementation.

    python benchmarks/merged_ffn.py                        times it here
    python benchmarks/merged_ffn.py --topology=v5e-1       asks the TPU compiler; needs libtpu
    python benchmarks/merged_ffn.py --topology=h100-1      asks the GPU compiler; needs jax[cuda12]

Here: forward, and forward and backward, the implementations taking turns; the median of the ratios
to the dense FFN of the same turn, and the quartiles. With large pages of memory, as in launch/.

With --topology: forward and backward on one device, without one. For TPUs, cycles from the
compiler's estimates for its own operations and from the prices of the Pallas kernels, bytes to and
from HBM, and temporaries. For GPUs, the roofline of every operation instead of cycles. The name
only says which device: one layer on one device is compiled (lory_jax/planning).

Experts are in float32, [E, D, F], as the model stores them; with --gathered they arrive as they
leave the all-gather over `fsdp`: in the compute type and laid out, which each device did for its
own part, so that neither the conversion nor the transposition of whole matrices is in the layer.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--topology", help="such as v5e-1, v5p-8, v6e-1 or h100-1")
    parser.add_argument("--implementations", help="default: all that run there")
    parser.add_argument("--experts", default="8,32")
    parser.add_argument("--segments", help="per device (default: 32 here, 16,64,128 on TPUs)")
    parser.add_argument("--T", type=int, default=256, help="tokens per segment")
    parser.add_argument("--D", type=int, default=1024)
    parser.add_argument("--F", type=int, default=2816, help="per device, F / tensor")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: float32 on CPUs")
    parser.add_argument("--gathered", action="store_true", help="experts as after the all-gather")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    args = parser.parse_args()
    if args.topology:
        os.environ["JAX_PLATFORMS"] = "cpu"
    elif "GLIBC_TUNABLES" not in os.environ:  # read by glibc when a process starts
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.argv])
    segments = args.segments or ("16,64,128" if args.topology else "32")
    # Compiling takes long: what FILE already holds of it is not done again.
    rows = json.loads(args.json.read_text()) if args.topology and _exists(args.json) else []
    for E in map(int, args.experts.split(",")):
        for S in map(int, segments.split(",")):
            shape = {"S": S, "T": args.T, "D": args.D, "F": args.F, "E": E}
            if args.topology:
                compile_layers(args, shape, rows)
            else:
                rows += time_layers(args, shape)
    if args.json:
        write(args.json, json.dumps(rows, indent=1) + "\n")


def _exists(path: Path | None) -> bool:
    return path is not None and path.exists()


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def report(row: dict[str, Any]) -> None:
    shape = " ".join(f"{name}={row[name]}" for name in ("E", "S", "T", "D", "F"))
    figures = "  ".join(
        f"{name} {value:,.3f}" if isinstance(value, float) else f"{name} {value}"
        for name, value in row.items()
        if name not in ("E", "S", "T", "D", "F", "implementation", "kernels")
    )
    print(f"{row['implementation']:<7} {shape}  {figures}", flush=True)


# ---------------------------------------------------------------- the layer


def layer(implementation: str) -> Callable[..., Any]:
    """`(x, experts, r)` to y; the dense FFN takes no r, and matrices instead of experts."""
    from lory_jax.model.merged_ffn import merged_ffn, swiglu

    def dense(x: Any, matrices: Any, r: Any) -> Any:
        import jax

        with jax.named_scope("dense_ffn"):
            weights = [matrices[name].astype(x.dtype) for name in ("gate", "up", "down")]
            return swiglu(x, *weights)

    if implementation == "dense":
        return dense
    return lambda x, experts, r: merged_ffn(x, experts, r, implementation)


def shapes(shape: dict[str, int], implementation: str) -> tuple[Any, ...]:
    """Shapes of x, experts and r."""
    S, T, D, F, E = (shape[name] for name in "STDFE")
    experts = {"gate": (E, D, F), "up": (E, D, F), "down": (E, F, D)}
    if implementation == "dense":
        experts = {name: matrix[1:] for name, matrix in experts.items()}
    return (S, T, D), experts, (S, E)


def backward(run: Callable[..., Any], given: tuple[int, ...]) -> Callable[..., Any]:
    """`(dy, x, experts, r)` to y and the gradients."""
    import jax

    def both(dy: Any, *inputs: Any) -> Any:
        y, pull = jax.vjp(run, *inputs)
        return y, tuple(pull(dy)[i] for i in given)

    return both


def flops(shape: dict[str, int], implementation: str) -> int:
    """Of forward and backward: the products, and the merging where there is any."""
    S, T, D, F, E = (shape[name] for name in "STDFE")
    dense = 3 * 6 * S * T * D * F
    return dense if implementation == "dense" else dense + 3 * 6 * S * E * D * F


# ---------------------------------------------------------------- by the clock


def time_layers(args: argparse.Namespace, shape: dict[str, int]) -> list[dict[str, Any]]:
    import jax
    import jax.numpy as jnp

    backend = jax.default_backend()
    dtype = args.dtype or ("float32" if backend == "cpu" else "bfloat16")
    default = "einsum,whole,blocks" + (",kernel" if backend == "tpu" else "")
    names = ["dense", *(args.implementations or default).split(",")]
    programs = {}
    for name in names:
        x, experts, r = shapes(shape, name)
        keys = jax.random.split(jax.random.key(0), 6)
        arrays = (
            jax.random.normal(keys[0], x, dtype),
            {
                matrix: jax.random.normal(key, size) / size[-2] ** 0.5
                for key, (matrix, size) in zip(keys[1:4], experts.items(), strict=True)
            },
            jax.nn.softmax(jax.random.normal(keys[4], r)),
        )
        dy = jax.random.normal(keys[5], x, dtype)
        run = layer(name)
        given = (0, 1) if name == "dense" else (0, 1, 2)
        both = jax.jit(backward(run, given)).lower(dy, *arrays).compile()
        programs[name] = (jax.jit(run), both, dy, arrays)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for turn in range(args.rounds + 1):
        for name, (forward, both, dy, arrays) in programs.items():
            times = seconds_of(forward, *arrays), seconds_of(both, dy, *arrays)
            if turn:  # the first compiles and warms up
                seconds[name].append(times)
    rows = []
    for name in names:
        ratios = [
            [mine[k] / its[k] for mine, its in zip(seconds[name], seconds["dense"], strict=True)]
            for k in (0, 1)
        ]
        total = statistics.median(both for _, both in seconds[name])
        row: dict[str, Any] = {"implementation": name, **shape, "dtype": jnp.dtype(dtype).name}
        row |= {"device": jax.devices()[0].device_kind, "rounds": args.rounds}
        row["forward_over_dense"] = statistics.median(ratios[0])
        row["over_dense"] = statistics.median(ratios[1])
        row["quartiles"] = [round(q, 3) for q in statistics.quantiles(ratios[1])]
        row["fastest_over_dense"] = min(both for _, both in seconds[name]) / min(
            both for _, both in seconds["dense"]
        )
        row["seconds"] = total
        row["gflops_per_second"] = flops(shape, name) / total / 1e9
        memory = programs[name][1].memory_analysis()
        row["temporaries_MB"] = memory.temp_size_in_bytes / 1e6
        report(row)
        rows.append(row)
    return rows


def seconds_of(program: Callable[..., Any], *arguments: Any) -> float:
    """Of a call that follows one of its own, as in training: memory is as that one left it."""
    import jax

    jax.block_until_ready(program(*arguments))
    begin = time.perf_counter()
    jax.block_until_ready(program(*arguments))
    return time.perf_counter() - begin


# ---------------------------------------------------------------- by the TPU's compiler


def compile_layers(
    args: argparse.Namespace, shape: dict[str, int], rows: list[dict[str, Any]]
) -> None:
    """Adds to `rows` what they lack of this shape; the dense layer comes first."""
    from lory_jax.planning.topology import parse_topology

    topology = parse_topology(args.topology)
    dense: dict[str, Any] = {}
    default = "einsum,whole,blocks" + (",kernel" if topology.platform == "tpu" else "")
    for name in ["dense", *(args.implementations or default).split(",")]:
        # E and where experts come from are nothing to the dense layer.
        case: dict[str, Any] = {"implementation": name, **shape}
        case |= {"dtype": args.dtype or "bfloat16", "topology": args.topology}
        case["gathered"] = args.gathered and name != "dense"
        case["E"] = shape["E"] if name != "dense" else 1
        row = next((row for row in rows if case.items() <= row.items()), None)
        if row is None:
            row = case | compiled_figures(args, shape, name, topology)
            if dense:
                time_of = "cycles" if "cycles" in row else "roofline_seconds"
                row["over_dense"] = row[time_of] / dense[time_of]
                row["bytes_over_dense"] = row["hbm_GB"] / dense["hbm_GB"]
            rows.append(row)
            report(row)
            if args.json:
                write(args.json, json.dumps(rows, indent=1) + "\n")
        dense = dense or row


def compiled_figures(
    args: argparse.Namespace, shape: dict[str, int], name: str, topology: Any
) -> dict[str, Any]:
    import jax

    from lory_jax.parallel import make_mesh
    from lory_jax.planning.hlo import executions, parse
    from lory_jax.planning.program import program_text
    from lory_jax.planning.roofline import roofline
    from lory_jax.planning.traffic import hbm_bytes

    dtype = args.dtype or "bfloat16"
    begin = time.monotonic()
    device = topology.devices()[0]
    # The mesh tells what is traced which device it is for.
    with jax.set_mesh(make_mesh(1, 1, 1, [device])):
        compiled = (
            jax.jit(layer_program(name, args.gathered))
            .lower(*described(shape, name, dtype, args.gathered, device))
            .compile()
        )
    seconds = time.monotonic() - begin
    module = parse(program_text(compiled))
    runs = executions(module)
    assert not runs.unknown_loops
    figures: dict[str, Any]
    if topology.platform == "gpu":
        least = roofline(module, runs, topology.device)
        figures = {"roofline_seconds": least.total, "hbm_GB": least.bytes / 1e9}
        figures["tflop"] = least.flops / 1e12
    else:
        figures = on_tpu(module, runs, topology.device)
        figures["hbm_GB"] = hbm_bytes(module, runs) / 1e9
    return figures | {
        "temporaries_MB": compiled.memory_analysis().temp_size_in_bytes / 1e6,
        "compile_seconds": round(seconds, 1),
    }


def on_tpu(module: Any, runs: Any, device: Any) -> dict[str, Any]:
    """Cycles: XLA's by the compiler and kernels by their prices; both repriced; each kernel's."""
    from lory_jax.planning.cycles import count_cycles, estimated_cycles
    from lory_jax.planning.kernels import kernel_name, price_kernels

    prices = price_kernels(module, runs, device)
    cycles = count_cycles(module, runs, device, prices)
    xla = 0
    kernels: dict[str, Any] = {}
    for name, computation in module.computations.items():
        if name in runs.fused:
            continue
        for instruction in computation.instructions.values():
            xla += (estimated_cycles(instruction) or 0) * runs.times[name]
            if instruction.name not in prices:
                continue
            price = prices[instruction.name]
            assert not price.unread and not price.counted_always
            cost = kernels.setdefault(kernel_name(instruction), {"calls": 0})
            cost["calls"] += 1
            cost |= {"cycles": price.cycles, "bundles": price.bundles}
            cost |= {"matrix_unit": price.matrix_unit, "dma": price.dma}
            cost |= {"bound_by": price.bound_by, "busiest_slot": price.busiest_slot}
            cost["busy"] = dict(price.busy)
    return {
        "cycles": xla + sum(cycles.kernels.values()),
        "xla_cycles": float(xla),
        "repriced_cycles": cycles.repriced_total,
        "kernels": kernels,
    }


def layer_program(name: str, gathered: bool) -> Callable[..., Any]:
    """Forward and backward of one layer, with experts as stored or as gathered."""
    given = (0, 1) if name == "dense" else (0, 1, 2)
    if not (gathered and name == "kernel"):
        return backward(layer(name), given)
    import dataclasses

    from lory_jax.model.merged_ffn import vjp
    from lory_jax.model.merged_ffn.kernel_products import kernel_products

    # After the gather and before the scatter, in the layout of the kernels.
    products = dataclasses.replace(
        kernel_products(), lay_out=lambda w, _: w, take_back=lambda w, *_: w
    )

    def both(dy: Any, x: Any, experts: Any, r: Any) -> Any:
        y, gate, up = vjp.forward(products, x, experts, r)
        return y, vjp.backward(products, x, experts, r, gate, up, dy)

    return both


def described(
    shape: dict[str, int], name: str, dtype: str, gathered: bool, device: Any
) -> tuple[Any, ...]:
    """Shapes and types of dy, x, experts and r, on a device that is not there."""
    import jax

    from lory_jax.model.merged_ffn.tiling import LANES

    sharding = jax.sharding.SingleDeviceSharding(device)

    def describe(size: tuple[int, ...], kind: str) -> Any:
        return jax.ShapeDtypeStruct(size, kind, sharding=sharding)

    x, experts, r = shapes(shape, name)
    if gathered and name == "kernel":
        padded = shape["F"] + -shape["F"] % LANES
        experts = {matrix: (shape["D"] * shape["E"], padded) for matrix in experts}
    weights = dtype if gathered and name != "dense" else "float32"
    matrices = {matrix: describe(size, weights) for matrix, size in experts.items()}
    return describe(x, dtype), describe(x, dtype), matrices, describe(r, "float32")


if __name__ == "__main__":
    main()
