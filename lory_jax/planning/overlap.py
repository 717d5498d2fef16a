"""Which collectives of a TPU program run beside its computing, and which the device waits for.

The text of a compiled program is a schedule: its instructions run in their order. A synchronous
collective is waited for at once. An asynchronous one is started by one instruction and awaited by a
later one, and what is computed between the two hides it. This module plays the schedule with two
clocks, that of computing and that of the links: asynchronous transfers follow one another, and a
synchronous one goes before them. Computing takes its repriced cycles (`cycles.py`), and a transfer
the bytes that a device receives, divided by the bandwidth of all its links. Both are lower bounds,
and so is the end of the schedule.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from lory_jax.planning.collectives import KINDS, Collective, read_collective
from lory_jax.planning.cycles import reprice
from lory_jax.planning.hlo import Computation, Executions, Instruction, Module, called, trip_count
from lory_jax.planning.kernels import Price, is_kernel
from lory_jax.planning.topology import Device


@dataclass(frozen=True)
class Transfer:
    """A collective of a computation.

    Attributes:
      collective: what is moved, and how often the computation runs.
      needed: cycles that the transfer takes, each time.
      awaited: cycles in which the device does nothing else, each time.
    """

    collective: Collective
    needed: float
    awaited: float


@dataclass(frozen=True)
class _Pending:
    collective: Collective
    needed: float
    end: float  # on the clock of its computation


@dataclass(frozen=True)
class Schedule:
    """Plays a program; `transfers` are all its collectives, in the order of the text."""

    module: Module
    runs: Executions
    mesh_shape: Mapping[str, int]
    device: Device
    prices: Mapping[str, Price]

    def transfers(self) -> list[Transfer]:
        found: list[Transfer] = []
        for name, computation in self.module.computations.items():
            if self.runs.times[name] and name not in self.runs.fused:
                found += self._play(computation)[1]
        return found

    def _play(self, computation: Computation) -> tuple[float, list[Transfer]]:
        """The cycles that a computation takes, waiting included, and its own transfers."""
        clock, links_free_at = 0.0, 0.0
        pending: dict[str, _Pending] = {}
        found: list[Transfer] = []
        for instruction in computation.instructions.values():
            part, key, inner, where = self._collective_of(instruction, computation)
            if part == "done":
                one = pending.pop(key)
                awaited = max(0.0, one.end - clock)
                found.append(Transfer(one.collective, one.needed, awaited))
                clock += awaited
            elif inner is not None and part != "step":
                times = self.runs.times[computation.name]
                collective = read_collective(inner, where, self.mesh_shape, times)
                needed = collective.received / self.device.ici_bandwidth * self.device.clock
                if part == "start":
                    links_free_at = max(clock, links_free_at) + needed
                    pending[key] = _Pending(collective, needed, links_free_at)
                else:
                    found.append(Transfer(collective, needed, needed))
                    clock += needed
                    links_free_at += needed  # what is under way is held up
                    pending = {k: replace(p, end=p.end + needed) for k, p in pending.items()}
            clock += self._cycles(instruction, computation)
        for one in pending.values():  # what nothing awaits, ends with its computation
            awaited = max(0.0, one.end - clock)
            found.append(Transfer(one.collective, one.needed, awaited))
            clock += awaited
        return clock, found

    def _cycles(self, instruction: Instruction, computation: Computation) -> float:
        """What an instruction takes: a loop, all its turns with what they wait for."""
        if is_kernel(instruction):
            return self.prices[instruction.name].cycles
        if instruction.opcode == "fusion":
            return reprice(instruction, computation, self.module, self.device)
        inner = sum(self._play(self.module.computations[name])[0] for name in called(instruction))
        if instruction.opcode == "while":
            inner *= trip_count(self.module, computation, instruction) or 1
        return inner + reprice(instruction, computation, self.module, self.device)

    def _collective_of(
        self, instruction: Instruction, computation: Computation
    ) -> tuple[str, str, Instruction | None, Computation]:
        """What an instruction is of a collective, what names it, itself, and where it stands.

        That is "whole", or the "start", a "step" or the "done" of an asynchronous one; "" where it
        is neither. A TPU makes of an asynchronous collective a chain of fusions with a number; each
        of them repeats it.
        """
        kind, _, suffix = instruction.opcode.rpartition("-")
        if instruction.opcode in KINDS:
            return "whole", instruction.name, instruction, computation
        if kind in KINDS and suffix == "start":
            return "start", instruction.name, instruction, computation
        if kind in KINDS and suffix == "done":
            return "done", instruction.operands[0], None, computation
        inside = self.module.computations.get(instruction.attribute("calls") or "")
        held = list(inside.instructions.values()) if inside else []
        inner = next((i for i in held if i.opcode in KINDS), None)
        if inside is None or inner is None:
            return "", "", None, computation
        chain = re.search(r'chain_id"?[=:]"?(\d+)', inner.attributes)
        if chain is None:
            return "whole", instruction.name, inner, inside
        marks = " ".join(i.attributes for i in held)
        part = next((p for p in ("Start", "Done") if f'"AsyncCollective{p}"' in marks), "Step")
        return part.lower(), chain[1], inner, inside


def awaited_cycles(transfers: list[Transfer]) -> float:
    """Cycles of one execution of the program in which the device waits for its links."""
    return sum(t.awaited * t.collective.times for t in transfers)
