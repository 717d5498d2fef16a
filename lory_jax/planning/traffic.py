"""Bytes that a compiled TPU program moves between HBM and the chip, from its optimised HLO.

Every fusion, copy and product reads its operands and writes its result once. Arrays that the
compiler placed in on-chip memory (marked S(1)) count nothing. An operand of which a fusion reads
only slices counts those slices, and an operand that is updated in place counts its update. A Pallas
kernel counts as much as its cost estimate says.
"""

import re

from lory_jax.planning.hlo import Computation, Executions, Instruction, Module, shape_bytes

# These opcodes move nothing themselves.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call"}
_FREE |= {"conditional", "after-all", "partition-id", "replica-id", "iota", "copy-done"}
_FREE |= {"async-done", "slice-done", "opt-barrier", "custom-call-done"}
_SLICES = ("slice", "dynamic-slice")


def hbm_bytes(module: Module, runs: Executions) -> int:
    """Bytes of one execution; a loop body counts once per iteration."""
    total = 0
    for name, computation in module.computations.items():
        if name in runs.fused or not runs.times[name]:
            continue
        total += runs.times[name] * sum(
            _bytes(instruction, computation, module)
            for instruction in computation.instructions.values()
        )
    return total


def _bytes(instruction: Instruction, computation: Computation, module: Module) -> int:
    if instruction.opcode in _FREE:
        return 0
    estimate = re.search(
        r'"cost_estimate":\{[^}]*?"bytes_accessed":"?(\d+)', instruction.attributes
    )
    if estimate:
        return int(estimate[1])
    called = module.computations.get(instruction.attribute("calls") or "")
    total = _off_chip(instruction.shape)
    for i, operand in enumerate(instruction.operands):
        shape = computation.instructions[operand].shape
        part = None if called is None else _part_read(called, i)
        total += _off_chip(shape) if part is None else min(_off_chip(shape), part)
    if called is not None:
        total -= _kept_in_place(called, instruction)
    return total


def _off_chip(shape: str) -> int:
    """Bytes of the arrays of a shape that are in HBM."""
    arrays = re.findall(r"[a-z]+\d*\[[\d,<=]*\](?:\{[^}]*\})?", shape)
    return sum(shape_bytes(array.split("{")[0]) for array in arrays if "S(1)" not in array)


def _part_read(called: Computation, index: int) -> int | None:
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
            total += shape_bytes(user.shape)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == parameter.name:
            continue  # what is not updated stays where it is
        else:
            return None
    return total


def _kept_in_place(called: Computation, fusion: Instruction) -> int:
    """Bytes of a fusion's result that an update in place does not write."""
    root = called.instructions[called.root]
    if root.opcode != "dynamic-update-slice" or "S(1)" in fusion.shape:
        return 0
    return shape_bytes(root.shape) - shape_bytes(called.instructions[root.operands[1]].shape)
