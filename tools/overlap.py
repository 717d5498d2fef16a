"""Which collectives of a compiled step run while the device computes, and which it waits for.

    python tools/overlap.py --config=RECIPE --topology=v5e-64 [--mesh=D,F,T] [--config.X.Y=VALUE]

Compiles the training step for a TPU slice that this machine does not have, and prints every
collective of at least a megabyte (lory_jax/planning/overlap.py says how they are timed).
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"

from tables import markdown

from lory_jax import cli
from lory_jax.parallel import make_mesh
from lory_jax.plan import parse_mesh
from lory_jax.planning.hlo import executions, parse
from lory_jax.planning.kernels import price_kernels
from lory_jax.planning.overlap import Schedule, Transfer, awaited_cycles
from lory_jax.planning.program import compile_lowered, lower_step
from lory_jax.planning.recipe import mesh_shape
from lory_jax.planning.topology import Device, parse_slice

LEAST_BYTES = 2**20


def main(argv: list[str]) -> None:
    parser = cli.Parser("overlap", __doc__)
    parser.prog = "python tools/overlap.py"
    parser.add_config_flag()
    parser.add_argument("--topology", required=True, metavar="SLICE")
    parser.add_argument("--mesh", metavar="DATA,FSDP,TENSOR")
    args = parser.parse(argv)
    topology = parse_slice(args.topology)
    config, devices = args.config, topology.devices()
    shape = parse_mesh(args.mesh) if args.mesh else mesh_shape(config, len(devices), topology)
    mesh = make_mesh(*shape, devices=devices)
    module = parse(compile_lowered(lower_step(config, mesh)).text)
    runs = executions(module)
    prices = price_kernels(module, runs, topology.device)
    found = Schedule(module, runs, mesh.shape, topology.device, prices).transfers()
    print(table(found, topology.device))


def table(found: list[Transfer], device: Device) -> str:
    """One line per collective, and what a step waits for."""

    def ms(cycles: float) -> str:
        return f"{1e3 * cycles / device.clock:.2f}"

    rows = [
        [
            transfer.collective.kind,
            transfer.collective.axis,
            str(transfer.collective.times),
            f"{transfer.collective.bytes / 1e6:,.0f}",
            ms(transfer.needed),
            ms(transfer.awaited),
        ]
        for transfer in found
        if transfer.collective.bytes >= LEAST_BYTES
    ]
    total = awaited_cycles(found) / device.clock
    needed = sum(t.needed * t.collective.times for t in found) / device.clock
    header = ["collective", "over", "times", "MB", "takes, ms", "awaited, ms"]
    return f"{markdown(header, rows)}\n\nIn a step, {total:.3f} s of {needed:.3f} are waited for."


if __name__ == "__main__":
    cli.run(main)
