"""Reads the text of an optimised HLO module: its computations, and how often each of them runs.

The text is that of `jax.stages.Compiled.as_text()`. A loop body counts once per iteration. The trip
count is the compiler's own note where it leaves one (on CPUs and GPUs); otherwise the counter of
the loop is evaluated (on TPUs).
"""

import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16}
BITS |= {
    "token": 0,
    "s32": 32,
    "u32": 32,
    "f32": 32,
    "s64": 64,
    "u64": 64,
    "f64": 64,
    "c64": 64,
    "c128": 128,
}

MAX_TURNS = 100_000  # iterations after which evaluating a loop's counter is given up

# Called computations, by attribute; reducers (`to_apply`) belong to their caller's cost.
_CALLED = re.compile(r"(?:calls|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_CALL_TARGET = re.compile(r"to_apply=%?([\w.\-]+)")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_START = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,<=]*)\]")


@dataclass(frozen=True)
class Instruction:
    """One instruction: `name = shape opcode(operands), attributes`."""

    name: str
    shape: str
    opcode: str
    arguments: str
    attributes: str

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.arguments)

    @property
    def op_name(self) -> str:
        """The path of JAX's named scopes and primitives that the instruction came from."""
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes)
        return found[1] if found else ""

    def attribute(self, name: str) -> str | None:
        """The computation that an attribute such as `body` names."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else None


@dataclass
class Computation:
    """Instructions by name, in order; `root` names the one that is the result."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)
    root: str = ""


@dataclass(frozen=True)
class Module:
    computations: Mapping[str, Computation]
    entry: str


def parse(text: str) -> Module:
    """Parses the text of a module.

    Raises:
      ValueError: the text has no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry, current = "", Computation("")
    for line in _logical_lines(text):
        if header := _HEADER.match(line):
            current = computations[header[2]] = Computation(header[2])
            entry = header[2] if header[1] else entry
        elif start := _START.match(line):
            instruction = _instruction(start[2], start[3])
            current.instructions[instruction.name] = instruction
            if start[1]:
                current.root = instruction.name
    if not entry:
        raise ValueError("not the text of an HLO module: no ENTRY computation")
    return Module(computations, entry)


def _logical_lines(text: str) -> Iterator[str]:
    """Lines, where those that were split by a line break inside a string are joined again."""
    pending = ""
    for line in text.splitlines():
        if pending and not (_START.match(line) or _HEADER.match(line) or line == "}"):
            pending += " " + line
            continue
        if pending:
            yield pending
        pending = line
    if pending:
        yield pending


def _instruction(name: str, rest: str) -> Instruction:
    shape_end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    opcode_end = rest.index("(", shape_end)
    close = _closing(rest, opcode_end)
    return Instruction(
        name,
        shape=rest[:shape_end],
        opcode=rest[shape_end:opcode_end].strip(),
        arguments=rest[opcode_end + 1 : close],
        attributes=rest[close + 1 :],
    )


def _closing(text: str, start: int) -> int:
    """The position of the parenthesis that closes the one at `start`."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, start):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.start()
    raise ValueError(f"unbalanced parentheses in {text[:80]!r}")


def shape_bytes(shape: str) -> int:
    """Bytes of an array or of all arrays of a tuple, without padding."""
    total = 0
    for dtype, dimensions in _ARRAY.findall(shape):
        count = 1
        for size in filter(None, dimensions.split(",")):
            count *= int(size.removeprefix("<="))
        total += count * BITS.get(dtype, 8) // 8  # not listed: the 8-bit floats
    return total


# ---------------------------------------------------------------- how often


@dataclass(frozen=True)
class Executions:
    """How often each computation runs in one execution of the module.

    `fused` are the computations inside fusions; their cost is part of the fusion's. `unknown_loops`
    are the loops whose trip count could not be found; their bodies count once.
    """

    times: Mapping[str, int]
    fused: frozenset[str]
    unknown_loops: tuple[str, ...]


def executions(module: Module) -> Executions:
    """Multiplies trip counts through the call graph; a computation called twice counts twice."""
    times = dict.fromkeys(module.computations, 0)
    fused: set[str] = set()
    unknown: list[str] = []

    def run(name: str, count: int, in_fusion: bool) -> None:
        times[name] += count
        if in_fusion:
            fused.add(name)
        for instruction in module.computations[name].instructions.values():
            turns = 1
            if instruction.opcode == "while":
                found = trip_count(module, module.computations[name], instruction)
                if found is None:
                    unknown.append(instruction.name)
                turns = 1 if found is None else found
            for inner in called(instruction):
                run(inner, count * turns, in_fusion or instruction.opcode == "fusion")

    run(module.entry, 1, False)
    return Executions(times, frozenset(fused), tuple(sorted(set(unknown))))


def called(instruction: Instruction) -> list[str]:
    """The computations that an instruction runs."""
    if instruction.opcode in ("async-done", "async-update"):
        return []  # the computation runs once, for its async-start
    found = _CALLED.findall(instruction.attributes)
    for names in _BRANCHES.findall(instruction.attributes):
        found += [name.strip().removeprefix("%") for name in names.split(",")]
    if instruction.opcode == "call":
        found += _CALL_TARGET.findall(instruction.attributes)
    return found


def trip_count(module: Module, caller: Computation, loop: Instruction) -> int | None:
    """The trip count of a `while` in `caller`, or None if the text does not determine it."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known[1])
    condition = module.computations[loop.attribute("condition") or ""]
    body = module.computations[loop.attribute("body") or ""]
    carried = caller.instructions[loop.operands[0]]
    if carried.opcode != "tuple":
        return None
    values: dict[tuple[int, int], int] = {}  # element k of the loop's tuple before iteration t

    def before(t: int) -> Callable[[int], int]:
        return lambda k: value(k, t)

    def value(k: int, t: int) -> int:
        if (k, t) not in values:
            if t == 0:
                values[k, t] = _evaluate(module, caller, carried.operands[k], _no_element)
            else:
                result = body.instructions[body.root].operands[k]
                values[k, t] = _evaluate(module, body, result, before(t - 1))
        return values[k, t]

    try:
        for t in itertools.count():
            if t > MAX_TURNS:
                return None
            if not _evaluate(module, condition, condition.root, before(t)):
                return t
    except _NotAConstant:
        return None
    raise AssertionError("unreachable")


class _NotAConstant(Exception):
    """The value depends on data."""


def _no_element(index: int) -> int:
    raise _NotAConstant


_ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
    "minimum": min,
    "maximum": max,
    "and": lambda a, b: a & b,
}
_DIRECTIONS: dict[str, Callable[[int, int], bool]] = {
    "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b,
    "NE": lambda a, b: a != b,
    "EQ": lambda a, b: a == b,
}


def _evaluate(
    module: Module, computation: Computation, name: str, element: Callable[[int], int]
) -> int:
    """An integer scalar of a computation.

    Args:
      module: the module.
      computation: where the instruction is.
      name: the instruction.
      element: the value of a parameter by its index. The condition and the body of a loop have one
        parameter, a tuple, and the index is that of its element.
    """
    instruction = computation.instructions[name]
    opcode = instruction.opcode

    def operands() -> list[int]:
        return [_evaluate(module, computation, o, element) for o in instruction.operands]

    if opcode == "constant":
        if re.fullmatch(r"-?\d+", instruction.arguments):
            return int(instruction.arguments)
        raise _NotAConstant
    if opcode == "parameter":
        return element(int(instruction.arguments))
    if opcode == "get-tuple-element":
        source: Any = computation.instructions[instruction.operands[0]]
        index = int(re.findall(r"\bindex=(\d+)", instruction.attributes)[0])
        if source.opcode == "parameter":
            return element(index)
        if source.opcode == "tuple":
            return _evaluate(module, computation, source.operands[index], element)
        raise _NotAConstant
    if opcode in ("copy", "bitcast", "convert", "reshape"):
        return operands()[0]
    if opcode in _ARITHMETIC:
        return _ARITHMETIC[opcode](*operands())
    if opcode == "compare":
        direction = re.findall(r"direction=(\w+)", instruction.attributes)[0]
        return int(_DIRECTIONS[direction](*operands()))
    if opcode in ("fusion", "call"):
        called = instruction.attribute("calls") or instruction.attribute("to_apply") or ""
        inner = module.computations[called]

        def parameter(i: int) -> int:
            return _evaluate(module, computation, instruction.operands[i], element)

        return _evaluate(module, inner, inner.root, parameter)
    raise _NotAConstant
