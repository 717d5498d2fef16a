"""How long a compiled TPU program computes, by part of the model: two sums of cycles.

The compiler's sum adds up its own estimates: every fusion of the optimised program has
`estimated_cycles`, and a loop body counts once per iteration. Two kinds of work have none.
Collectives are bounded by their bytes (`collectives.py`). A Pallas kernel counts with the FLOPs of
its cost estimate, and splash attention with those of causal attention, at the peak of the matrix
unit, which no kernel reaches.

The repriced sum corrects what is known to be wrong with that (docs/scaling.md has the figures):

- a matrix product, alone or in a fusion, counts with the compiler's estimate, which is good;
- elementwise work counts with the smaller of the estimate, which is up to 7 times too high, and the
  time that its bytes take: those to and from HBM at the vendor's bandwidth, in whole tiles, and all
  of them through the registers;
- a Pallas kernel counts with its own price (`kernels.py`).

Plans are ranked and bounded by the repriced sum.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from lory_jax.planning.collectives import KINDS, part_of_collective
from lory_jax.planning.hlo import Computation, Executions, Instruction, Module
from lory_jax.planning.kernels import Price, is_kernel, kernel_name
from lory_jax.planning.topology import Device
from lory_jax.planning.traffic import FREE, moved_bytes

# The first pattern found in an instruction's path of named scopes decides.
SCOPES = {
    "optimizer": r"\boptimizer\b",
    "merge": r"\bmerge\b",
    "expert_ffn": r"\b(?:expert_ffn|dense_ffn)\b",
    "attention": r"\battention\b",
    "head_and_loss": r"\b(?:head|loss)\b",
}
COPIES = "layout_copies"
OTHER = "other"

# Matrix products of [L, K] by [K, L] in each of splash's kernels; the fused backward pass computes
# the scores again.
SPLASH_PRODUCTS = {"splash_mha_fwd": 2, "splash_mha_dkv": 5, "splash_mha_dq": 3}
_LENGTH_LAST = 2  # splash's number for the layout [H, K, L] of queries

_PRODUCTS = ("convolution", "dot")


@dataclass(frozen=True)
class Cycles:
    """Cycles of one execution by scope, and of the kernels included in them.

    Attributes:
      compiler: the compiler's estimates, and kernels at the peak of the matrix unit.
      repriced: what the module's docstring describes.
      kernels: the repriced cycles of all calls of each kernel, by its name.
      uncounted: kernels that the compiler's sum leaves out, and how often each is called.
      hbm_bytes: bytes to and from HBM in whole tiles, transfers in the background included, but not
        those of collectives and of what is fused with a link of an asynchronous one.
    """

    compiler: Mapping[str, float]
    repriced: Mapping[str, float]
    kernels: Mapping[str, float]
    uncounted: Mapping[str, int]
    hbm_bytes: float

    @property
    def compiler_total(self) -> float:
        return sum(self.compiler.values())

    @property
    def repriced_total(self) -> float:
        return sum(self.repriced.values())


def count_cycles(
    module: Module, runs: Executions, device: Device, prices: Mapping[str, Price]
) -> Cycles:
    """Both sums of a program.

    Args:
      module: the parsed program, optimised for a TPU.
      runs: how often its computations run.
      device: the TPU.
      prices: the price of every kernel, by the name of its instruction (`price_kernels`).
    """
    scopes = (*SCOPES, COPIES, OTHER)
    compiler, repriced = dict.fromkeys(scopes, 0.0), dict.fromkeys(scopes, 0.0)
    kernels: dict[str, float] = defaultdict(float)
    uncounted: dict[str, int] = defaultdict(int)
    hbm = 0.0
    for name, computation in module.computations.items():
        if name in runs.fused or not runs.times[name]:
            continue  # the estimate of a fusion covers the computation inside it
        times = runs.times[name]
        for instruction in computation.instructions.values():
            scope = scope_of(instruction, module)
            if is_kernel(instruction):
                kernel = kernel_name(instruction)
                price = prices[instruction.name]
                kernels[kernel] += price.cycles * times
                repriced[scope] += price.cycles * times
                hbm += price.dma / device.clock * device.hbm_bandwidth * times
                flops = kernel_flops(instruction, computation)
                if flops is None:
                    uncounted[kernel] += times
                else:
                    compiler[scope] += flops / device.flops_per_cycle * times
                continue
            if not part_of_collective(instruction, computation, module)[0]:
                hbm += moved_bytes(instruction, computation, module).hbm * times
            estimate = estimated_cycles(instruction)
            compiler[scope] += (estimate or 0) * times
            repriced[scope] += reprice(instruction, computation, module, device) * times
    by_name = dict(sorted(kernels.items())), dict(sorted(uncounted.items()))
    return Cycles(compiler, repriced, *by_name, hbm)


def estimated_cycles(instruction: Instruction) -> int | None:
    """The compiler's estimate of one execution, if it made one."""
    found = re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes)
    return int(found[1]) if found else None


def reprice(
    instruction: Instruction, computation: Computation, module: Module, device: Device
) -> float:
    """Repriced cycles of one execution of an instruction that is no Pallas kernel.

    Copies and slices that run in the background, and collectives, count nothing here.
    """
    estimate = estimated_cycles(instruction)
    if estimate is None and _is_elsewhere(instruction):
        return 0.0
    if estimate is not None and holds_product(instruction, module):
        return float(estimate)
    moved = moved_bytes(instruction, computation, module)
    hbm = moved.hbm / device.hbm_bandwidth * device.clock
    by_bytes = max(hbm, moved.everywhere / device.register_bytes)
    return by_bytes if estimate is None else min(float(estimate), by_bytes)


def holds_product(instruction: Instruction, module: Module) -> bool:
    """Whether an instruction is a matrix product or a fusion with one inside."""
    if instruction.opcode in _PRODUCTS:
        return True
    called = module.computations.get(instruction.attribute("calls") or "")
    return called is not None and any(
        holds_product(inner, module) for inner in called.instructions.values()
    )


def _is_elsewhere(instruction: Instruction) -> bool:
    """Whether an instruction without an estimate moves nothing, or is accounted for elsewhere."""
    opcode = instruction.opcode
    is_background = opcode.endswith(("-start", "-update", "-done"))
    is_call = opcode in ("fusion", "custom-call")  # of what starts and awaits collectives
    return opcode in FREE or is_background or is_call or opcode in KINDS


def scope_of(instruction: Instruction, module: Module) -> str:
    """The part of the model that an instruction belongs to; copies are a part of their own.

    A fusion whose own path names no part belongs where most of its instructions belong.
    """
    if instruction.opcode == "copy" or re.match(r"(?:copy|transpose)\b", instruction.name):
        return COPIES
    scope = _scope_of_path(instruction.op_name)
    called = instruction.attribute("calls")
    if scope == OTHER and called:
        held = module.computations[called].instructions.values()
        scopes = Counter(_scope_of_path(inner.op_name) for inner in held)
        del scopes[OTHER]
        scope = max(scopes, key=lambda name: (scopes[name], name), default=OTHER)
    return scope


def _scope_of_path(op_name: str) -> str:
    return next((s for s, pattern in SCOPES.items() if re.search(pattern, op_name)), OTHER)


def kernel_flops(instruction: Instruction, computation: Computation) -> float | None:
    """FLOPs of a Pallas kernel from its cost estimate, or of splash attention; otherwise None."""
    estimate = re.search(r'"cost_estimate":\{[^}]*?"flops":"?(\d+)', instruction.attributes)
    if estimate:
        return float(estimate[1])
    for prefix, products in SPLASH_PRODUCTS.items():
        if instruction.name.startswith(prefix):
            # Queries, keys and values come first, the queries before the others, and only they are
            # [..., H, L, K] or [..., H, K, L] in 16 or 32 bits; the kernel's metadata says which.
            shapes = (computation.instructions[name].shape for name in instruction.operands)
            found = (re.match(r"(?:bf16|f32)\[([\d,]+)\]", shape) for shape in shapes)
            query = next(shape[1] for shape in found if shape)
            *heads, length, width = (int(size) for size in query.split(","))
            if f'\\"q_layout\\": {_LENGTH_LAST}' in instruction.attributes:
                length, width = width, length
            count = 1
            for size in heads:
                count *= size
            return products * 2.0 * count * length * length * width / 2  # causal: half
    return None
