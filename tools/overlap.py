"""Which collectives of a compiled step run while the device computes, and which it waits for.

    python tools/overlap.py --config=RECIPE --topology=v5e-64 [--mesh=D,F,T] [--hlo=FILE]

Compiles the training step for a TPU slice that this machine does not have, and prints, for every
collective of at least a megabyte in the loops over layers, the time that its bytes take at the
bandwidth of all links, and the repriced time of what is computed between its start and its end.
What is missing is waited for. --hlo names a file that keeps the program's text for the next time.
"""

import argparse
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

from tables import markdown

from lory_jax.config import load_config
from lory_jax.parallel import make_mesh
from lory_jax.planning.collectives import KINDS, Collective, device_groups
from lory_jax.planning.cycles import reprice
from lory_jax.planning.hlo import (
    Computation,
    Executions,
    Instruction,
    Module,
    executions,
    parse,
    shape_bytes,
)
from lory_jax.planning.kernels import Price, is_kernel, price_kernels
from lory_jax.planning.program import compile_lowered, lower_step
from lory_jax.planning.recipe import mesh_shape
from lory_jax.planning.topology import Device, Topology, parse_slice

LEAST_BYTES = 2**20


@dataclass
class Window:
    """A collective in a loop body.

    Attributes:
      kind: such as "all-gather".
      times: how often the loop runs.
      bytes: of the whole array.
      needed: cycles that its bytes take.
      computed: cycles of what is computed between its start and its end; 0 if it is synchronous.
    """

    kind: str
    times: int
    bytes: int
    needed: float
    computed: float = 0.0

    @property
    def awaited(self) -> float:
        return max(0.0, self.needed - self.computed)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="RECIPE")
    parser.add_argument("--topology", required=True, metavar="SLICE")
    parser.add_argument("--mesh", metavar="DATA,FSDP,TENSOR")
    parser.add_argument("--hlo", type=Path, metavar="FILE")
    args = parser.parse_args()
    topology = parse_slice(args.topology)
    if args.hlo and args.hlo.exists():
        text = args.hlo.read_text()
    else:
        text = compiled(args.config, topology, args.mesh)
        if args.hlo:
            args.hlo.write_text(text)
    module = parse(text)
    runs = executions(module)
    found = list(windows(module, runs, topology.device, len(topology.devices())))
    print(table(found, topology.device))


def compiled(recipe: str, topology: Topology, mesh: str | None) -> str:
    """The optimised program of the recipe's training step."""
    config, devices = load_config(recipe, []), topology.devices()
    shape = mesh_shape(config, len(devices), topology.platform)
    if mesh:
        data, fsdp, tensor = map(int, mesh.split(","))
        shape = (data, fsdp, tensor)
    return compile_lowered(lower_step(config, make_mesh(*shape, devices=devices))).text


def windows(module: Module, runs: Executions, device: Device, devices: int) -> Iterator[Window]:
    """The collectives in the bodies of loops that run more than once, in their order."""
    prices = price_kernels(module, runs, device)
    for name, computation in module.computations.items():
        if name in runs.fused or runs.times[name] < 2:
            continue
        open_windows: dict[str, Window] = {}
        for instruction in computation.instructions.values():
            part, chain, inner = collective_of(instruction, computation, module)
            if part in ("start", "whole") and inner is not None:
                window = window_of(inner, runs.times[name], device, devices)
                if part == "start":
                    open_windows[chain] = window
                if window.bytes >= LEAST_BYTES:
                    yield window
            if part == "done":
                open_windows.pop(chain, None)
            for window in open_windows.values():
                window.computed += cycles_of(instruction, computation, module, device, prices)


def collective_of(
    instruction: Instruction, computation: Computation, module: Module
) -> tuple[str, str, Instruction | None]:
    """Whether an instruction is a "whole" collective, or the "start", "step" or "done" of one.

    A TPU splits an asynchronous collective into a chain of fusions; the chain's number is second.
    """
    if instruction.opcode in KINDS:
        return "whole", "", instruction
    called = module.computations.get(instruction.attribute("calls") or "")
    held = list(called.instructions.values()) if called else []
    inner = next((i for i in held if i.opcode in KINDS), None)
    if inner is None:
        return "", "", None
    chain = re.search(r'chain_id"?[=:]"?(\d+)', inner.attributes)
    text = " ".join(i.attributes for i in held)
    part = next((p for p in ("Start", "Done") if f'"AsyncCollective{p}"' in text), "Step")
    return part.lower(), chain[1] if chain else "", inner


def window_of(inner: Instruction, times: int, device: Device, devices: int) -> Window:
    group = max(map(len, device_groups(inner.attributes, devices)))
    count = shape_bytes(inner.shape) * (group if inner.opcode == "reduce-scatter" else 1)
    received = Collective(inner.opcode, "", count, group, times).received
    return Window(inner.opcode, times, count, received / device.ici_bandwidth * device.clock)


def cycles_of(
    instruction: Instruction,
    computation: Computation,
    module: Module,
    device: Device,
    prices: dict[str, Price],
) -> float:
    if is_kernel(instruction):
        return prices[instruction.name].cycles
    return reprice(instruction, computation, module, device)


def table(found: list[Window], device: Device) -> str:
    """One line per collective, and what a step waits for."""

    def ms(cycles: float) -> str:
        return f"{1e3 * cycles / device.clock:.2f}"

    rows = [
        [w.kind, str(w.times), f"{w.bytes / 1e6:,.0f}", ms(w.needed), ms(w.computed), ms(w.awaited)]
        for w in found
    ]
    header = ["collective", "times", "MB", "takes, ms", "computed beside it, ms", "awaited, ms"]
    total = sum(w.awaited * w.times for w in found) / device.clock
    needed = sum(w.needed * w.times for w in found) / device.clock
    return f"{markdown(header, rows)}\n\nIn a step, {total:.3f} s of {needed:.3f} are waited for."


if __name__ == "__main__":
    main()
