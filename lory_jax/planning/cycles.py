"""The TPU compiler's own estimates of how long a program computes, by part of the model.

Every fusion of the optimised program has `estimated_cycles`; they are summed, a loop body once per
iteration. Two kinds of work have none: collectives, which are bounded by their bytes
(`lory_jax.planning.collectives`), and Pallas kernels. A kernel counts the FLOPs of its own cost
estimate if it has one, and splash attention those of causal attention, both at the peak of the
matrix unit. All other kernels are listed as uncounted, so that the sum is not taken for the total.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from lory_jax.planning.hlo import Computation, Executions, Instruction, Module

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


@dataclass(frozen=True)
class Cycles:
    """Estimated cycles of one execution by scope and, included in them, by kernel.

    `uncounted` holds the kernels without an estimate, and how often each is called.
    """

    by_scope: Mapping[str, float]
    kernels: Mapping[str, float]
    uncounted: Mapping[str, int]

    @property
    def total(self) -> float:
        return sum(self.by_scope.values())


def count_cycles(module: Module, runs: Executions, flops_per_cycle: float) -> Cycles:
    """Sums the compiler's estimates, and adds the least that Pallas kernels can take.

    Args:
      module: the parsed program, optimised for a TPU.
      runs: how often its computations run.
      flops_per_cycle: the device's peak, for kernels.
    """
    by_scope: dict[str, float] = {scope: 0.0 for scope in (*SCOPES, COPIES, OTHER)}
    kernels: dict[str, float] = defaultdict(float)
    uncounted: dict[str, int] = defaultdict(int)
    for name, computation in module.computations.items():
        if name in runs.fused or not runs.times[name]:
            continue  # the estimate of a fusion covers the computation inside it
        for instruction in computation.instructions.values():
            estimate = re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes)
            if estimate:
                by_scope[scope_of(instruction, module)] += int(estimate[1]) * runs.times[name]
            elif 'custom_call_target="tpu_custom_call"' in instruction.attributes:
                kernel = re.sub(r"(\.\d+|\.clone)*$", "", instruction.name)
                flops = kernel_flops(instruction, computation)
                if flops is None:
                    uncounted[kernel] += runs.times[name]
                    continue
                kernels[kernel] += flops / flops_per_cycle * runs.times[name]
                by_scope[scope_of(instruction, module)] += (
                    flops / flops_per_cycle * runs.times[name]
                )
    return Cycles(by_scope, dict(sorted(kernels.items())), dict(sorted(uncounted.items())))


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
            # [..., H, L, K] in 16 or 32 bits.
            shapes = (computation.instructions[name].shape for name in instruction.operands)
            found = (re.match(r"(?:bf16|f32)\[([\d,]+)\]", shape) for shape in shapes)
            query = next(shape[1] for shape in found if shape)
            *heads, length, width = (int(size) for size in query.split(","))
            count = 1
            for size in heads:
                count *= size
            return products * 2.0 * count * length * length * width / 2  # causal: half
    return None
