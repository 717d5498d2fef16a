"""The price of every Pallas kernel of a compiled TPU program: cycles of one call.

Each kernel is taken out of the program's text and compiled alone, in a process of its own that
writes the kernel's final bundles (`bundles.py`). What it does per call, and how often its
conditional parts run, is read from its own program (`mosaic.py`). A call takes at least the longest
of three times: its bundles, its products on the matrix unit with padded widths, and the bytes of
its blocks at the bandwidth of HBM. Prices are kept by content in the user's cache directory.
"""

import base64
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lory_jax.errors import InputError
from lory_jax.planning import store
from lory_jax.planning.bundles import KernelCost, PartsDiffer, dump_arguments, read_kernel
from lory_jax.planning.hlo import Computation, Executions, Instruction, Module
from lory_jax.planning.mosaic import KernelWork, read_work, text_of
from lory_jax.planning.topology import Device

TARGET = 'custom_call_target="tpu_custom_call"'
ALONE = "ffi_call"  # what the compiler calls the call in a program that holds nothing else
VERSION = 3  # of how a price is made; another one makes the kept prices void

_ARRAY = re.compile(r"([a-z]+\d*)\[([\d,]*)\]")


@dataclass(frozen=True)
class Price:
    """Cycles of one call of a kernel on one device.

    Attributes:
      bundles, matrix_unit, dma: the three times.
      busiest_slot: the kind of slot that bundles use most.
      busy: the share of the slots of each kind that is used.
      counted_always: how many conditional parts count as if they always ran, because their
        conditions depend on data or are not found in the bundles.
      unread: why bundles could not be read, and count nothing; "" if they were.
    """

    bundles: float
    matrix_unit: float
    dma: float
    busiest_slot: str
    busy: Mapping[str, float]
    counted_always: int
    unread: str = ""

    @property
    def cycles(self) -> float:
        return max(self.bundles, self.matrix_unit, self.dma)

    @property
    def bound_by(self) -> str:
        parts = {"bundles": self.bundles, "matrix_unit": self.matrix_unit, "dma": self.dma}
        return max(parts, key=lambda name: parts[name])


def is_kernel(instruction: Instruction) -> bool:
    return TARGET in instruction.attributes


def kernel_name(instruction: Instruction) -> str:
    """The name that `pallas_call` was given."""
    return re.sub(r"(\.\d+|\.clone)*$", "", instruction.name)


def price_kernels(module: Module, runs: Executions, device: Device) -> dict[str, Price]:
    """The price of one call of every kernel that the program runs, by the instruction's name.

    Prints a line for every kernel that must be compiled, because that takes seconds.
    """
    calls = [
        (instruction, computation)
        for name, computation in module.computations.items()
        if runs.times[name] and name not in runs.fused
        for instruction in computation.instructions.values()
        if is_kernel(instruction)
    ]
    return {
        instruction.name: price_kernel(instruction, computation, module, device)
        for instruction, computation in calls
    }


def price_kernel(
    instruction: Instruction, computation: Computation, module: Module, device: Device
) -> Price:
    """The price of one call; compiles the kernel if its price is not kept.

    Raises:
      InputError: the compiler rejects the kernel alone.
    """
    request = request_of(instruction, computation, device)
    prefetched = prefetched_arrays(instruction, computation, module)
    # Without the places in the source that the kernel's program names: equal kernels price equal.
    body = base64.b64decode(request["config"]["custom_call_config"]["body"])
    content = {**request, "config": None, "program": text_of(body), "device": repr(device)}
    arrays = [None if a is None else a.tolist() for a in prefetched]
    key = json.dumps([content, arrays, VERSION, store.versions()])
    kept = store.load("kernels", key)
    if kept is None:
        name = kernel_name(instruction)
        print(f"compiling the kernel {name} alone, for its price", file=sys.stderr, flush=True)
        kept = asdict(_compile_and_price(request, prefetched, device, name))
        store.save("kernels", key, kept)
    return Price(**kept)


def request_of(
    instruction: Instruction, computation: Computation, device: Device
) -> dict[str, Any]:
    """What `compile_alone` needs, as JSON: shapes of operands and results, and the kernel."""
    config = json.loads(instruction.attributes.split("backend_config=", 1)[1])
    shapes = [computation.instructions[name].shape for name in instruction.operands]
    return {
        "operands": [_ARRAY.findall(shape)[0] for shape in shapes],
        "results": _ARRAY.findall(instruction.shape),
        "config": {
            key: config[key]
            for key in ("custom_call_config", "scoped_memory_configs", "flag_configs")
            if key in config
        },
        "generation": device.generation,
    }


def _compile_and_price(
    request: Mapping[str, Any], prefetched: list[np.ndarray | None], device: Device, name: str
) -> Price:
    body = base64.b64decode(request["config"]["custom_call_config"]["body"])
    try:
        work = read_work(body, prefetched)
    except ValueError as error:
        raise InputError(
            f"kernel {name}: cannot be priced, because {error}; plan counts kernels that "
            "pallas_call wrote, and none that the compiler brings itself, as for "
            "config.model.grouped_product=ragged (--no_compile plans without cycles)"
        ) from None
    with tempfile.TemporaryDirectory(prefix="lory-kernel-") as scratch:
        directory = Path(scratch)
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "LIBTPU_INIT_ARGS": dump_arguments(directory),  # read when libtpu is loaded
        }
        done = subprocess.run(
            [sys.executable, "-m", "lory_jax.planning.compile_kernel"],
            input=json.dumps(request),
            env=environment,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise InputError(f"kernel {name}: the compiler rejects it alone: {last[:300]}")
        always = sum(share is None for share in work.conditions)
        try:
            cost = read_kernel(directory, ALONE, work.conditions)
        except PartsDiffer:
            # The compiler folded some of them; those that always run are counted as they are.
            always = sum(share != 1 for share in work.conditions)
            cost = read_kernel(directory, ALONE)
        except ValueError as error:
            return price_of(work, None, device, always, str(error))
    return price_of(work, cost, device, always)


def price_of(
    work: KernelWork, cost: KernelCost | None, device: Device, counted_always: int, unread: str = ""
) -> Price:
    """The three times of a call; cores that share the steps of its grid do so evenly."""
    busy = cost.busy if cost else {}
    cores = device.cores if work.is_shared else 1
    peak = device.flops_per_cycle * cores // device.cores
    return Price(
        bundles=cost.bundles / cores if cost else 0.0,
        matrix_unit=work.matrix_cycles(device.matrix_side, peak),
        dma=work.moved_bytes / device.hbm_bandwidth * device.clock,
        busiest_slot=cost.limiting_slot if cost else "",
        busy={kind: round(share, 3) for kind, share in busy.items() if share > 0.01},
        counted_always=counted_always,
        unread=unread,
    )


# ---------------------------------------------------------------- prefetched arrays


def prefetched_arrays(
    instruction: Instruction, computation: Computation, module: Module
) -> list[np.ndarray | None]:
    """The values of a call's small integer operands that come first, None where not constant."""
    arrays: list[np.ndarray | None] = []
    for operand in instruction.operands:
        shape = computation.instructions[operand].shape
        kind, sizes = _ARRAY.findall(shape)[0]
        if kind not in ("s8", "s32", "u8", "u32", "pred"):
            break
        text = _constant(module, computation, operand)
        numbers = re.findall(r"-?\d+|true|false", re.sub(r"/\*.*?\*/", "", text or ""))
        values = [{"true": 1, "false": 0}.get(n) if n[0] in "tf" else int(n) for n in numbers]
        dimensions = [int(size) for size in filter(None, sizes.split(","))]
        count = math.prod(dimensions)
        values = values * count if len(values) == 1 else values  # one for all elements
        arrays.append(np.array(values).reshape(dimensions) if len(values) == count else None)
    return arrays


def _constant(module: Module, computation: Computation, name: str) -> str | None:
    """The text of the constant that an operand is a copy of, also from outside of loops."""
    instruction = computation.instructions[name]
    opcode = instruction.opcode
    if opcode == "constant":
        return instruction.arguments
    if opcode in ("copy", "copy-start", "copy-done", "bitcast", "reshape", "broadcast"):
        return _constant(module, computation, instruction.operands[0])
    if opcode == "get-tuple-element":
        index = int(re.findall(r"\bindex=(\d+)", instruction.attributes)[0])
        source = computation.instructions[instruction.operands[0]]
        caller = computation
        if source.opcode == "parameter":
            caller, source = _loop_of(module, computation) or (computation, source)
        if source.opcode == "while":
            return _in_every_turn(module, caller, source, index, frozenset())
        if source.opcode == "tuple":
            return _constant(module, caller, source.operands[index])
    return None


def _loop_of(module: Module, body: Computation) -> tuple[Computation, Instruction] | None:
    """The loop with this body, and where it is."""
    for caller in module.computations.values():
        for instruction in caller.instructions.values():
            if instruction.opcode == "while" and instruction.attribute("body") == body.name:
                return caller, instruction
    return None


def _in_every_turn(
    module: Module, caller: Computation, loop: Instruction, index: int, seen: frozenset[int]
) -> str | None:
    """The constant that an element of a loop's tuple is in every turn, if it is one.

    The next turn may take it from another element, as where a copy runs ahead of its use; that
    element must then be the same constant in every turn.
    """
    start = caller.instructions[loop.operands[0]]
    text = None
    if start.opcode == "tuple":
        text = _constant(module, caller, start.operands[index])
    if text is None or index in seen:
        return text
    next_index = _handed_on(module, loop, index)
    if next_index is None:
        return None
    if next_index == index:
        return text
    same = _in_every_turn(module, caller, loop, next_index, seen | {index})
    return text if same == text else None


def _handed_on(module: Module, loop: Instruction, index: int) -> int | None:
    """Which element of its tuple a loop's body hands on, or copies, as this one."""
    body = module.computations[loop.attribute("body") or ""]
    result = body.instructions[body.instructions[body.root].operands[index]]
    while result.opcode in ("copy", "copy-start", "copy-done", "bitcast"):
        result = body.instructions[result.operands[0]]
    if result.opcode != "get-tuple-element":
        return None
    is_own = body.instructions[result.operands[0]].opcode == "parameter"
    return int(re.findall(r"\bindex=(\d+)", result.attributes)[0]) if is_own else None
