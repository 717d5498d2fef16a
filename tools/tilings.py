"""Prices every way to cut a merging kernel's work, by the TPU compiler, without a TPU.

    python tools/tilings.py --topology=v5e-1 [--experts=8,32] [--segments=64] [--json=FILE]

Compiles the five kernel calls of a layer's forward and backward pass alone, once with every tiling
that fits on the chip and is not far from the best by the model of
lory_jax/model/merged_ffn/tiling.py. It shows whether `tile` chooses well, because that model knows
the matrix unit's work and the bytes, but not how many bundles the compiler needs.
"""

import argparse
import functools
import json
import os
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
from tables import write

from lory_jax.model.merged_ffn import tiling as tilings
from lory_jax.model.merged_ffn.kernel_products import kernel_products
from lory_jax.model.merged_ffn.tiling import FROM_HIDDEN, TO_HIDDEN, Problem, Tiling
from lory_jax.model.merged_ffn.vjp import activate, activate_backward
from lory_jax.parallel import make_mesh
from lory_jax.planning.hlo import executions, parse
from lory_jax.planning.kernels import Price, price_kernels
from lory_jax.planning.program import program_text
from lory_jax.planning.topology import Topology, parse_slice

NEAR = 1.25  # times the model's best: what is compiled


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--topology", default="v5e-1", help="which TPU, such as v5p-8")
    parser.add_argument("--experts", default="8,32")
    parser.add_argument("--segments", type=int, default=64, help="per device")
    parser.add_argument("--T", type=int, default=256, help="tokens per segment")
    parser.add_argument("--D", type=int, default=1024)
    parser.add_argument("--F", type=int, default=2816, help="per device")
    parser.add_argument("--kernels", default="", help="only those whose name contains this")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    args = parser.parse_args()
    topology = parse_slice(args.topology)
    rows = []
    for E in map(int, args.experts.split(",")):
        for kernel, weights, hidden in tilings.CALLS:
            shape = (args.segments, args.T, args.D, args.F, E)
            if args.kernels in kernel:
                rows += price_call(Problem(kernel, weights, hidden, *shape, 2), topology)
    if args.json:
        write(args.json, json.dumps(rows, indent=1) + "\n")


def price_call(problem: Problem, topology: Topology) -> list[dict[str, Any]]:
    """Prices of a call by tiling, those near the model's best, the model's choice marked."""
    with jax.set_mesh(make_mesh(1, 1, 1, topology.devices()[:1])):
        chip = tilings.traced_chip()
    chosen = tilings.tile(problem, chip)
    near = [
        tiling
        for tiling in tilings.fitting(problem, chip)
        if tilings.cost(problem, tiling, chip)[0] <= NEAR * tilings.cost(problem, chosen, chip)[0]
    ]
    rows = []
    for tiling in sorted(near, key=lambda t: tilings.cost(problem, t, chip)):
        price = compiled_price(problem, tiling, topology)
        row = {
            "kernel": problem.kernel,
            "weights": problem.weights,
            **{name: getattr(problem, name) for name in "STDFE"},
            **{name: getattr(tiling, name) for name in ("group", "columns", "parts", "is_held")},
            "chosen": tiling == chosen,
            "vmem_MiB": round(tilings.vmem_bytes(problem, tiling) / 2**20, 1),
            "bundles": price.bundles,
            "matrix_unit": price.matrix_unit,
            "dma": price.dma,
            "cycles": price.cycles,
        }
        rows.append(row)
        figures = (f"{n} {v:,.0f}" if isinstance(v, float) else f"{n} {v}" for n, v in row.items())
        print("  ".join(figures), flush=True)
    return rows


def compiled_price(problem: Problem, tiling: Tiling, topology: Topology) -> Price:
    """The price of the compiled call, its work cut in this way."""
    device = topology.devices()[0]
    sharding = jax.sharding.SingleDeviceSharding(device)

    def array(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    S, T, D, F, E = (getattr(problem, name) for name in "STDFE")
    x, h, w = array(S, T, D), array(S, T, F), array(D * E, F)
    r = array(S, E, dtype=jnp.float32)
    names = ("gate", "up")[: problem.weights] if problem.weights > 1 else ("down",)
    weights = {name: w for name in names}
    products = kernel_products()
    call: Any
    if problem.kernel == TO_HIDDEN:
        combine = activate if problem.weights > 1 else activate_backward
        given = [h] * (problem.hidden - 3)
        call, arguments = functools.partial(_to_hidden, products, combine), [x, weights, r, *given]
    elif problem.kernel == FROM_HIDDEN:
        call, arguments = products.from_hidden, [{name: h for name in names}, weights, r]
    else:
        call = functools.partial(products.gradients, name="up")
        arguments = [x, h, w, r]
    with jax.set_mesh(make_mesh(1, 1, 1, [device])), mock.patch.object(tilings, "tile") as tile:
        tile.return_value = tiling
        # A function of its own: what was traced with another tiling must not be found again.
        compiled = jax.jit(lambda *given: call(*given)).lower(*arguments).compile()
    module = parse(program_text(compiled))
    (price,) = price_kernels(module, executions(module), topology.device).values()
    return price


def _to_hidden(products: Any, combine: Any, x: Any, weights: Any, r: Any, *given: Any) -> Any:
    return products.to_hidden(x, weights, r, combine, *given)


if __name__ == "__main__":
    main()
