"""Compares the TPU compiler's estimates with what is known about small programs.

    python tools/calibration.py [--again]

Compiles each program below for one device of each TPU (those missing in docs/calibration.json; with
--again all), and writes docs/calibration.json and the table between the two marks in
docs/scaling.md. Requires libtpu (requirements-plan.txt), and no TPU.

A matrix product takes at least its FLOPs at the peak, elementwise work at least its bytes at the
bandwidth of HBM. Two programs are also there as Pallas kernels, whose instructions are counted.
"""

import argparse
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from tables import ROOT, markdown, replace_marked, write

from lory_jax.model.attention.splash import splash_attention
from lory_jax.model.rope import Rope, rotate
from lory_jax.model.transformer import rms_norm
from lory_jax.planning.cycles import count_cycles
from lory_jax.planning.hlo import executions, parse
from lory_jax.planning.kernels import price_kernels
from lory_jax.planning.program import program_text
from lory_jax.planning.topology import DEVICES, Device, smallest_topology

FILE, PAGE = ROOT / "docs" / "calibration.json", ROOT / "docs" / "scaling.md"
GENERATIONS = ("v5e", "v5p", "v6e")
B, L, H, K, D, F = 4, 4096, 16, 64, 1024, 2816


def add_one(x: jax.Array) -> jax.Array:
    return x + 1


def add_one_kernel(x: jax.Array) -> jax.Array:
    """The same as a Pallas kernel, by blocks of 32 rows."""
    from jax.experimental import pallas as pl

    def body(x_ref: Any, y_ref: Any) -> None:
        y_ref[...] = x_ref[...] + 1

    block = pl.BlockSpec((32, x.shape[1]), lambda i: (i, 0))
    return pl.pallas_call(
        body,
        grid=(x.shape[0] // 32,),
        in_specs=[block],
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        name="add_one",
    )(x)


def rotary(x: jax.Array) -> jax.Array:
    positions = jnp.broadcast_to(jnp.arange(L), x.shape[:2])
    return rotate(x, positions, Rope(10_000.0, "none", 1.0, 1.0, 4.0, 8192))


def attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    return splash_attention(query, key, value, "batch", "heads")


def rows_normalised(x: jax.Array, scale: jax.Array) -> jax.Array:
    return rms_norm(x, scale, 1e-5)


# The function, its arrays, and its FLOPs, which are 0 for elementwise work.
PROGRAMS: dict[str, tuple[Callable[..., Any], list[tuple[tuple[int, ...], str]], float]] = {
    "product [16384, 1024] x [1024, 2816]": (
        jnp.matmul,
        [((B * L, D), "bfloat16"), ((D, F), "bfloat16")],
        2.0 * B * L * D * F,
    ),
    "product [8192, 8192] x [8192, 8192]": (
        jnp.matmul,
        [((8192, 8192), "bfloat16")] * 2,
        2.0 * 8192**3,
    ),
    "x + 1, bfloat16 [16384, 8192]": (add_one, [((B * L, 8192), "bfloat16")], 0),
    "x + 1, float32 [16384, 8192]": (add_one, [((B * L, 8192), "float32")], 0),
    "the same as a Pallas kernel": (add_one_kernel, [((B * L, 8192), "float32")], 0),
    "RMSNorm, bfloat16 [16384, 8192]": (
        rows_normalised,
        [((B * L, 8192), "bfloat16"), ((8192,), "float32")],
        0,
    ),
    "rotary embedding [16, 4096, 16, 64]": (
        rotary,
        [((16, L, H, K), "bfloat16")],
        0,
    ),
    "sum of 8 partial gradients [4, 8, 16, 4096, 64]": (
        lambda x: x.sum(1),
        [((B, 8, H, L, K), "bfloat16")],
        0,
    ),
    "splash attention, forward [4, 4096, 16, 64]": (
        attention,
        [((B, L, H, K), "bfloat16")] * 3,
        2 * 2.0 * B * H * L * L * K / 2,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--again", action="store_true", help="compile everything again")
    again = parser.parse_args().again
    jax.config.update("jax_platforms", "cpu")
    rows: list[dict[str, Any]] = json.loads(FILE.read_text()) if FILE.exists() and not again else []
    done = {(row["program"], row["device"]) for row in rows}
    missing = [(n, g) for g in GENERATIONS for n in PROGRAMS if (n, g) not in done]
    for i, (name, generation) in enumerate(missing):
        print(f"{i + 1} of {len(missing)}: {name}, {generation}", flush=True)
        rows.append({"program": name, "device": generation} | figures(name, DEVICES[generation]))
        write(FILE, json.dumps(rows, indent=1) + "\n")
    replace_marked(PAGE, "tools/calibration.py", table(rows))


def figures(name: str, device: Device) -> dict[str, Any]:
    """Cycles of one program: what the compiler says, what is the least, and what `plan` takes."""
    function, arrays, flops = PROGRAMS[name]
    sharding = jax.sharding.SingleDeviceSharding(smallest_topology(device).devices()[0])
    described = [jax.ShapeDtypeStruct(size, kind, sharding=sharding) for size, kind in arrays]
    compiled = jax.jit(function).lower(*described).compile()
    module = parse(program_text(compiled))
    runs = executions(module)
    prices = price_kernels(module, runs, device)
    cycles = count_cycles(module, runs, device, prices)
    result = jax.eval_shape(function, *described)
    moved = sum(x.size * x.dtype.itemsize for x in [*described, result])
    return {
        "at_peak": flops / device.flops_per_cycle,
        "at_bandwidth": moved / device.hbm_bandwidth * device.clock,
        "compiler": cycles.compiler_total,
        "repriced": cycles.repriced_total,
        "bundles": {name: price.bundles for name, price in prices.items()},
    }


def table(rows: list[dict[str, Any]]) -> str:
    header = ["over the least possible time", *(f"{g}: compiler / repriced" for g in GENERATIONS)]
    lines = []
    for name in PROGRAMS:
        cells = []
        for generation in GENERATIONS:
            row = next(r for r in rows if (r["program"], r["device"]) == (name, generation))
            least = max(row["at_peak"], row["at_bandwidth"])
            cells.append(f"{row['compiler'] / least:.2f} / {row['repriced'] / least:.2f}")
        lines.append([name, *cells])
    return markdown(header, lines)


if __name__ == "__main__":
    main()
