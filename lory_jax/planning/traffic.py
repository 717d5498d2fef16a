"""Bytes that a compiled TPU program moves, from its optimised HLO.

Every fusion, copy and product reads its operands and writes its result once. Arrays that the
compiler placed in on-chip memory (marked S(1)) do not move to or from HBM. An operand of which a
fusion reads only slices counts those slices, and an operand that is updated in place counts its
update. A Pallas kernel counts as much as its cost estimate says.

Arrays are stored in tiles, such as T(8,128): the last two dimensions in the order of the layout are
padded to multiples of these. A width of 64 therefore takes as much memory and time as one of 128.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from lory_jax.planning.hlo import BITS, Computation, Executions, Instruction, Module, shape_bytes

# These opcodes move nothing themselves.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call"}
FREE |= {"conditional", "after-all", "partition-id", "replica-id", "iota", "copy-done"}
FREE |= {"async-done", "slice-done", "opt-barrier", "custom-call-done"}
_SLICES = ("slice", "dynamic-slice")
_BACKGROUND = ("copy-start", "slice-start")
_ARRAY = re.compile(r"([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,<=]*)\](\{[^}]*\})?")


@dataclass(frozen=True)
class Moved:
    """Bytes of one execution of an instruction: to and from HBM, and wherever they are."""

    hbm: int
    everywhere: int


def hbm_bytes(module: Module, runs: Executions, is_padded: bool = False) -> int:
    """Bytes of one execution to and from HBM; a loop body counts once per iteration."""
    total = 0
    for name, computation in module.computations.items():
        if name in runs.fused or not runs.times[name]:
            continue
        total += runs.times[name] * sum(
            moved_bytes(instruction, computation, module, is_padded).hbm
            for instruction in computation.instructions.values()
        )
    return total


def moved_bytes(
    instruction: Instruction, computation: Computation, module: Module, is_padded: bool = True
) -> Moved:
    """Bytes that one execution of an instruction moves, by default in whole tiles."""
    if instruction.opcode in FREE:
        return Moved(0, 0)
    estimate = re.search(
        r'"cost_estimate":\{[^}]*?"bytes_accessed":"?(\d+)', instruction.attributes
    )
    if estimate:
        return Moved(int(estimate[1]), int(estimate[1]))
    size = padded_bytes if is_padded else shape_bytes
    if instruction.opcode in _BACKGROUND:
        return _moved_in_background(instruction, size)
    return Moved(
        _bytes(instruction, computation, module, size, False),
        _bytes(instruction, computation, module, size, True),
    )


def padded_bytes(shape: str) -> int:
    """Bytes of all arrays of a shape in whole tiles of their layouts."""
    total = 0
    for dtype, sizes, layout in _ARRAY.findall(shape):
        dimensions = [int(size.removeprefix("<=")) for size in filter(None, sizes.split(","))]
        found = re.match(r"\{([\d,]+):T\(([\d,]+)\)", layout)
        if found:
            minor_first = [int(axis) for axis in found[1].split(",")]
            tile = [int(size) for size in found[2].split(",")]
            for axis, multiple in zip(minor_first, reversed(tile), strict=False):
                dimensions[axis] = -(-dimensions[axis] // multiple) * multiple
        total += math.prod(dimensions) * BITS.get(dtype, 8) // 8
    return total


Size = Callable[[str], int]


def _bytes(
    instruction: Instruction, computation: Computation, module: Module, size: Size, on_chip: bool
) -> int:
    def counted(shape: str) -> int:
        arrays = (match[0] for match in _ARRAY.finditer(shape))
        return sum(size(array) for array in arrays if on_chip or "S(1)" not in array)

    called = module.computations.get(instruction.attribute("calls") or "")
    total = counted(instruction.shape)
    for i, operand in enumerate(instruction.operands):
        shape = computation.instructions[operand].shape
        part = None if called is None else _part_read(called, i, size)
        total += counted(shape) if part is None else min(counted(shape), part)
    if called is not None and (on_chip or "S(1)" not in instruction.shape):
        total -= _kept_in_place(called, size)
    return total


def _moved_in_background(instruction: Instruction, size: Size) -> Moved:
    """A copy or slice by DMA; its shape names source and destination, and the smaller one moves."""
    ends = [match[0] for match in _ARRAY.finditer(instruction.shape)][:2]
    moved = min(map(size, ends))
    return Moved(moved * sum("S(1)" not in end for end in ends), moved * len(ends))


def _part_read(called: Computation, index: int, size: Size) -> int | None:
    """Bytes of the slices that a fusion reads of a parameter; None if it reads all of it."""
    parameter = next(
        i
        for i in called.instructions.values()
        if i.opcode == "parameter" and i.arguments == str(index)
    )
    users = [i for i in called.instructions.values() if parameter.name in i.operands]
    total = 0
    for user in users:
        if user.opcode in _SLICES:
            total += size(user.shape)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == parameter.name:
            continue  # what is not updated stays where it is
        else:
            return None
    return total


def _kept_in_place(called: Computation, size: Size) -> int:
    """Bytes of a fusion's result that an update in place does not write."""
    root = called.instructions[called.root]
    if root.opcode != "dynamic-update-slice":
        return 0
    return size(root.shape) - size(called.instructions[root.operands[1]].shape)
