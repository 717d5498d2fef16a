"""How the TPU kernels cut their work: what fits the chip, and which of it moves least.

Letters: S segments, G of them at a time, T tokens per segment, D model, F FFN, b columns of F at a
time, E experts, P rows of D in one product.
"""

import dataclasses
import math
from dataclasses import dataclass

import jax
from jax.experimental.pallas import tpu as pltpu

SUBLANES, LANES = 8, 128  # of a register of 32 bits
ROWS = 2 * SUBLANES  # of D in a tile of bfloat16

MIB = 2**20
MATRIX_ROWS = 128  # of the matrix unit, which P * E should fill and not exceed
MAX_GROUP = 32
MAX_PARTS = 8

TO_HIDDEN, FROM_HIDDEN, GRADIENTS = "merged_to_hidden", "merged_from_hidden", "merged_gradients"

# A layer's calls, forward and backward: kernel, matrices, hidden activations.
CALLS = [
    (TO_HIDDEN, 2, 3),
    (FROM_HIDDEN, 1, 1),
    (TO_HIDDEN, 1, 5),
    (FROM_HIDDEN, 2, 2),
    (GRADIENTS, 1, 1),
]


@dataclass(frozen=True)
class Problem:
    """One call of a kernel, on one device.

    Attributes:
      kernel: TO_HIDDEN, FROM_HIDDEN or GRADIENTS.
      weights: how many matrices of the experts it takes.
      hidden: how many activations `[S, T, F]` go in and out.
      itemsize: bytes of the compute type.
    """

    kernel: str
    weights: int
    hidden: int
    S: int
    T: int
    D: int
    F: int
    E: int
    itemsize: int


@dataclass(frozen=True)
class Tiling:
    """How a kernel cuts its work; sizes are padded to multiples of these.

    Attributes:
      group: segments at a time, G.
      rows: of D in one product, P: 8 or 4.
      experts: E is padded to a multiple of it, so that P * E is whole tiles.
      columns: of F at a time, b.
      parts: of D, one at a time.
      tokens: T is padded to a multiple of it.
    """

    group: int
    rows: int
    experts: int
    columns: int = LANES
    parts: int = 1
    tokens: int = ROWS


def smallest_tiling(E: int) -> Tiling:
    """As few segments as whole tiles of `spread`'s matrix allow."""
    P = SUBLANES if SUBLANES * E <= MATRIX_ROWS else SUBLANES // 2
    return Tiling(group=ROWS // P, rows=P, experts=ROWS // P)


def vmem_capacity() -> int:
    """On-chip memory of the TPU that a program is traced for; without a TPU, a v5e's."""
    return pltpu.get_tpu_info().vmem_capacity_bytes if _is_for_tpu() else 128 * MIB


def num_cores() -> int:
    """Cores that share a kernel's groups, on the TPU that a program is traced for."""
    return pltpu.get_tpu_info().num_cores if _is_for_tpu() else 1


def _is_for_tpu() -> bool:
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    return device.platform == "tpu" if device else jax.default_backend() == "tpu"


def vmem_budget(capacity: int) -> int:
    """What blocks may take."""
    return min(capacity * 7 // 8, 96 * MIB)


def vmem_limit(capacity: int) -> int:
    """What the compiler may take, with what it adds to the blocks."""
    return min(capacity - 2 * MIB, 112 * MIB)


def tile(problem: Problem, budget: int, cores: int = 1) -> Tiling:
    """Of the tilings within the budget, the one that moves least through HBM.

    Equal ones are decided by the larger group, then by fewer parts of D. There is a group for every
    core, and padding adds no more than a quarter to S.

    Raises:
      ValueError: none is within the budget.
    """
    fitting = [t for t in _tilings(problem, cores) if vmem_bytes(problem, t) <= budget]
    if not fitting:
        raise ValueError(f"{problem}: no tiling within {budget / MIB:.0f} MiB")
    return min(fitting, key=lambda t: (moved_bytes(problem, t), -t.group, t.parts))


def fits(problem: Problem, budget: int) -> bool:
    return any(vmem_bytes(problem, tiling) <= budget for tiling in _tilings(problem, cores=1))


def _tilings(problem: Problem, cores: int) -> list[Tiling]:
    smallest = smallest_tiling(problem.E)
    groups = [smallest.group]
    while groups[-1] < MAX_GROUP:
        larger = 2 * groups[-1]
        if (
            cores * larger > max(problem.S, cores * groups[0])
            or -problem.S % larger > problem.S / 4
        ):
            break
        groups.append(larger)
    parts = [p for p in range(1, MAX_PARTS + 1) if p == 1 or problem.D % (p * LANES) == 0]
    # Only the gradients read something once per block of F that the other kernels hold.
    is_even = -(-problem.F // LANES) % 2 == 0
    columns = [LANES, 2 * LANES] if problem.kernel == GRADIENTS and is_even else [LANES]
    return [
        dataclasses.replace(smallest, group=G, parts=p, columns=b)
        for G in groups
        for p in parts
        for b in columns
    ]


def vmem_bytes(problem: Problem, tiling: Tiling) -> int:
    """What a kernel's blocks take; those in transit count twice."""
    size, T, D = problem.itemsize, problem.T, problem.D
    G, b = tiling.group, tiling.columns
    part = -(-D // tiling.parts)
    E = -(-problem.E // tiling.experts) * tiling.experts
    PE = max(LANES, tiling.rows * E)
    hidden = 2 * size * problem.hidden * G * T * b
    experts = 2 * size * problem.weights * part * E * b
    spread = 2 * size * G * tiling.rows * PE
    shared = hidden + experts + spread
    if problem.kernel == TO_HIDDEN:
        sums = 4 * problem.weights * G * T * b
        return shared + 2 * size * G * T * D + size * G * part * b + sums
    if problem.kernel == FROM_HIDDEN:
        return shared + (2 * size + 4) * G * T * D + size * G * part * b
    gradients = (2 * size + 4) * part * E * b + 2 * 4 * G * tiling.rows * PE
    return shared + 2 * size * G * T * part + 4 * G * part * b + gradients


def moved_bytes(problem: Problem, tiling: Tiling) -> int:
    """What a kernel's blocks make the DMA move to and from HBM."""
    S, T, D, F, size = problem.S, problem.T, problem.D, problem.F, problem.itemsize
    groups, blocks = math.ceil(S / tiling.group), math.ceil(F / tiling.columns)
    experts = problem.weights * D * problem.E * F
    hidden = problem.hidden * S * T * F
    if problem.kernel != GRADIENTS:
        return size * (S * T * D + hidden + groups * experts)
    activations = blocks * S * T * D + tiling.parts * hidden
    routing = blocks * tiling.parts * S * tiling.rows**2 * problem.E
    return size * (activations + 2 * experts) + 4 * routing


def flops(problem: Problem, tiling: Tiling) -> int:
    """Of the matrix unit, rows that it works off half empty counted whole."""
    S, D, F = problem.S, problem.D, problem.F
    product = 2 * S * problem.T * D * F
    # Each row of the block-diagonal matrix goes through the unit once per 128 contracted.
    filled = math.ceil(tiling.rows * problem.E / MATRIX_ROWS) * MATRIX_ROWS
    merging = 2 * S * D * F * filled * (2 if problem.kernel == GRADIENTS else 1)
    return problem.weights * (product + merging)
