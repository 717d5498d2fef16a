"""Bytes that the collectives of a compiled program move, by kind and mesh axis.

The bytes of a collective are those of the whole array that its group of devices works on, as one
device sees it: the output of an all-gather; the input of an all-reduce, a reduce-scatter, an
all-to-all or a collective-permute. `received` is the least that a device must receive for it: these
bytes times (n - 1) / n in a group of n, twice that for an all-reduce, all of them for a permute.
"""

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lory_jax.planning.hlo import Computation, Executions, Instruction, Module, shape_bytes

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
    "ragged-all-to-all",
)

# A TPU fuses an all-reduce with the slice that each device keeps of it.
_SCATTER_FUSION = "all-reduce-scatter"


@dataclass(frozen=True)
class Collective:
    """One collective; `times` is how often the program runs it."""

    kind: str
    axis: str
    bytes: int
    group_size: int
    times: int

    @property
    def received(self) -> float:
        if self.kind == "collective-permute":
            return float(self.bytes)
        share = self.bytes * (self.group_size - 1) / self.group_size
        return 2 * share if self.kind == "all-reduce" else share


def find_collectives(
    module: Module, runs: Executions, mesh_shape: Mapping[str, int]
) -> list[Collective]:
    """All collectives of the program; a pair of start and done, or a TPU's chain, counts once.

    Args:
      module: the parsed program.
      runs: how often its computations run.
      mesh_shape: sizes of the mesh axes, in the order of the mesh: device i of the program is the
        i-th of the mesh.
    """
    found = []
    for name, computation in module.computations.items():
        if not runs.times[name]:
            continue
        for instruction in computation.instructions.values():
            kind = instruction.opcode.removesuffix("-start")
            if kind not in KINDS or _is_repetition(instruction, computation):
                continue
            found.append(read_collective(instruction, computation, mesh_shape, runs.times[name]))
    return found


def read_collective(
    instruction: Instruction, computation: Computation, mesh_shape: Mapping[str, int], times: int
) -> Collective:
    """The collective that an instruction is or starts, which runs so many times."""
    kind = instruction.opcode.removesuffix("-start")
    groups = device_groups(instruction.attributes, math.prod(mesh_shape.values()))
    size = max(map(len, groups), default=1)
    count = sum(
        shape_bytes(computation.instructions[operand].shape) for operand in instruction.operands
    )
    if kind == "all-gather":
        count *= size
    if kind == "all-reduce" and computation.name.startswith(_SCATTER_FUSION):
        kind = "reduce-scatter"
    return Collective(kind, axes_of(groups, mesh_shape), count, size, times)


def part_of_collective(
    instruction: Instruction, computation: Computation, module: Module
) -> tuple[str, str, Instruction | None, Computation]:
    """What an instruction is of a collective, what names it, itself, and where it stands.

    That is "whole", or the "start", a "step" or the "done" of an asynchronous one; "" where it is
    neither. A TPU makes of an asynchronous collective a chain of fusions with a number; each of
    them repeats it.
    """
    kind, _, suffix = instruction.opcode.rpartition("-")
    if instruction.opcode in KINDS:
        return "whole", instruction.name, instruction, computation
    if kind in KINDS and suffix == "start":
        return "start", instruction.name, instruction, computation
    if kind in KINDS and suffix == "done":
        return "done", instruction.operands[0], None, computation
    inside = module.computations.get(instruction.attribute("calls") or "")
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


def _is_repetition(instruction: Instruction, computation: Computation) -> bool:
    """Whether this is not the first link of a chain of fusions that a TPU splits a collective into.

    Every link repeats the collective; the first feeds it to `AsyncCollectiveStart`.
    """
    if "chain_id=" not in instruction.attributes:
        return False
    return not any(
        '"AsyncCollectiveStart"' in user.attributes and instruction.name in user.operands
        for user in computation.instructions.values()
    )


def bytes_by_kind_and_axis(collectives: list[Collective]) -> dict[str, dict[str, int]]:
    """`{kind: {axis: bytes per device and execution}}`; axes joined by + are used together."""
    totals: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for collective in collectives:
        if collective.axis:
            totals[collective.kind][collective.axis] += collective.bytes * collective.times
    return {kind: dict(sorted(axes.items())) for kind, axes in sorted(totals.items())}


# ---------------------------------------------------------------- groups of devices


def axes_of(groups: list[list[int]], mesh_shape: Mapping[str, int]) -> str:
    """The mesh axes that a collective's groups span, joined by +; "" for groups of one device."""
    sizes = tuple(mesh_shape.values())
    crossed = np.zeros(len(sizes), bool)
    for group in groups:
        places = np.stack(np.unravel_index(np.array(group), sizes), axis=-1)
        crossed |= np.any(places != places[0], axis=0)
    return "+".join(
        axis for axis, is_crossed in zip(mesh_shape, crossed, strict=True) if is_crossed
    )


def device_groups(attributes: str, num_devices: int) -> list[list[int]]:
    """The devices of every group of a collective, from any of the notations of HLO.

    Raises:
      ValueError: the attributes name no groups.
    """
    lists = re.search(
        r"(?:source_target_pairs|replica_groups)=\{((?:\{[\d,]*\},?\s*)*)\}", attributes
    )
    if lists:
        groups = [_numbers(group) for group in re.findall(r"\{([\d,]*)\}", lists[1])]
        return [group for group in groups if group] or [list(range(num_devices))]
    iota = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"  # ids counted up in this shape, then transposed
    if found := re.search(rf"replica_groups=\[([\d,]+)\]<={iota}", attributes):
        return _counted(found[2], found[3]).reshape(_numbers(found[1])).tolist()
    named = rf"replica_groups=mesh\[(.*?)\](?:, device_ids=\({iota}\))? \{{(.*?)\}}"
    if found := re.search(named, attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found[1])}
        ids = _counted(found[2] or str(math.prod(sizes.values())), found[3])
        return _named_groups(ids, sizes, found[4])
    raise ValueError(f"no replica_groups or source_target_pairs in {attributes[:200]!r}")


def _named_groups(ids: np.ndarray, sizes: Mapping[str, int], joined: str) -> list[list[int]]:
    """Groups over named axes of `ids`; 'a':(m)k is the k in the middle of a = m x k x rest."""
    parts = {name: (1, size, 1) for name, size in sizes.items()}
    over = []
    for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", joined):
        if before:
            parts[name] = int(before), int(size), sizes[name] // int(before) // int(size)
        over.append(3 * list(sizes).index(name) + 1)
    cut = ids.reshape([size for axis in parts.values() for size in axis])
    rest = [axis for axis in range(cut.ndim) if axis not in over]
    group_size = math.prod(cut.shape[axis] for axis in over)
    return cut.transpose(rest + over).reshape(-1, group_size).tolist()


def _counted(shape: str, order: str | None) -> np.ndarray:
    sizes = _numbers(shape)
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    return ids.transpose(_numbers(order)) if order else ids


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]
