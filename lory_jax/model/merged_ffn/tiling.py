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
LOAD_ROWS = 40  # read off the bundles of merging with groups of 16 and of 32
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


@dataclass(frozen=True)
class Chip:
    """What of a TPU decides tilings.

    Attributes:
      vmem: bytes of on-chip memory, of one core.
      cores: that share a kernel's groups.
      flops_per_byte: work of the matrix unit while HBM moves one byte.
    """

    vmem: int = 128 * MIB
    cores: int = 1
    flops_per_byte: float = 240.0


V5E = Chip()


def traced_chip() -> Chip:
    """The TPU that a program is traced for; without a TPU, a v5e."""
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    if (device.platform if device else jax.default_backend()) != "tpu":
        return V5E
    info = pltpu.get_tpu_info()
    ratio = info.bf16_ops_per_second / info.mem_bw_bytes_per_second
    return Chip(info.vmem_capacity_bytes, info.num_cores, ratio)


def vmem_budget(capacity: int) -> int:
    """What blocks may take."""
    return min(capacity * 7 // 8, 96 * MIB)


def vmem_limit(capacity: int) -> int:
    """What the compiler may take, with what it adds to the blocks."""
    return min(capacity - 2 * MIB, 112 * MIB)


def tile(problem: Problem, chip: Chip) -> Tiling:
    """Of the tilings that fit the chip, the fastest.

    That is the one whose longer resource, matrix unit or DMA, takes least. There is a group for
    every core, and padding adds no more than a quarter to S.

    Raises:
      ValueError: none fits.
    """
    budget = vmem_budget(chip.vmem)
    fitting = [t for t in _tilings(problem, chip.cores) if vmem_bytes(problem, t) <= budget]
    if not fitting:
        raise ValueError(f"{problem}: no tiling within {budget / MIB:.0f} MiB")

    def cost(tiling: Tiling) -> tuple[float, float]:
        matrix_unit = flops(problem, tiling, LOAD_ROWS)
        dma = moved_bytes(problem, tiling) * chip.flops_per_byte
        return max(matrix_unit, dma), matrix_unit + dma

    return min(fitting, key=cost)


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


def flops(problem: Problem, tiling: Tiling, load_rows: int = 0) -> int:
    """Of the matrix unit, rows that it works off half empty counted whole.

    Args:
      problem: the call.
      tiling: how it is cut.
      load_rows: what it costs to load a square of it, in rows.
    """
    D, E = problem.D, -(-problem.E // tiling.experts) * tiling.experts
    groups, blocks = math.ceil(problem.S / tiling.group), math.ceil(problem.F / MATRIX_ROWS)
    spread, contracted = tiling.group * tiling.rows, tiling.rows * E
    product = problem.S * problem.T * math.ceil(D / MATRIX_ROWS) * blocks
    # Each row of the block-diagonal matrix goes through the unit once per 128 contracted.
    steps = groups * math.ceil(D / tiling.rows) * blocks
    merging = steps * math.ceil(contracted / MATRIX_ROWS) * (spread + load_rows)
    if problem.kernel == GRADIENTS:
        merging += steps * math.ceil(spread / MATRIX_ROWS) * (contracted + load_rows)
    return 2 * MATRIX_ROWS**2 * problem.weights * (product + merging)
