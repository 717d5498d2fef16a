"""Which collectives of a TPU program run beside its computing, and which the device waits for.

The text of a compiled program is a schedule: its instructions run in their order. A synchronous
collective is waited for at once. An asynchronous one is started by one instruction and awaited by a
later one, and what is computed between the two hides it. This module plays the schedule with two
clocks, that of computing and that of the links: asynchronous transfers follow one another, and a
synchronous one goes before them. Computing takes its repriced cycles (`cycles.py`), and a transfer
the bytes that a device receives, divided by the bandwidth of all its links. Both are lower bounds,
and so is the end of the schedule.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from lory_jax.planning.collectives import Collective, part_of_collective, read_collective
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
            part, key, inner, where = part_of_collective(instruction, computation, self.module)
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


def awaited_cycles(transfers: list[Transfer]) -> float:
    """Cycles of one execution of the program in which the device waits for its links."""
    return sum(t.awaited * t.collective.times for t in transfers)
