"""How the TPU kernels cut their work: what fits on the chip, and which of that is fastest.

Letters: S segments, G of them at a time, T tokens per segment, D model, F FFN, b columns of F at a
time, E experts, P rows of D in one product.
"""

import dataclasses
import math
from dataclasses import dataclass

import jax
from jax.experimental.pallas import tpu as pltpu

SUBLANES, LANES = 8, 128  # shape of a register of 32-bit numbers
ROWS = 2 * SUBLANES  # rows of D in a tile of bfloat16

MIB = 2**20
LOAD_ROWS = 40  # measured from the bundles of merging, with groups of 16 and of 32
MAX_GROUP = 64
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
      weights: how many matrices of the experts it reads.
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
      group: G, the segments processed at a time.
      rows: P, the rows of D in one product: 8 or 4.
      experts: E is padded to a multiple of it, so that P * E is whole tiles.
      columns: b, the columns of F processed at a time.
      parts: how many parts D is cut into; one is processed at a time.
      tokens: T is padded to a multiple of it.
      is_held: whether GRADIENTS keeps a part of x on the chip for all segments and all blocks of F,
        instead of fetching the group's again with every block.
    """

    group: int
    rows: int
    experts: int
    columns: int = LANES
    parts: int = 1
    tokens: int = ROWS
    is_held: bool = False


def smallest_tiling(E: int, side: int = 128) -> Tiling:
    """The fewest segments that fill whole tiles of `spread`'s matrix.

    P * E are contracted at once: they should fill the matrix unit, of `side` rows, not exceed it.
    """
    P = SUBLANES if side >= SUBLANES * E else SUBLANES // 2
    return Tiling(group=ROWS // P, rows=P, experts=ROWS // P)


@dataclass(frozen=True)
class Chip:
    """The properties of a TPU that decide the tiling.

    Attributes:
      vmem: bytes of on-chip memory of one core.
      cores: how many cores share a kernel's work.
      side: width of the matrix unit, which reads one row of this many numbers at a time.
      flops_per_byte: FLOPs of the matrix unit in the time that HBM moves one byte.
    """

    vmem: int = 128 * MIB
    cores: int = 1
    side: int = 128
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
    return Chip(info.vmem_capacity_bytes, info.num_cores, info.mxu_column_size, ratio)


def vmem_budget(capacity: int) -> int:
    """Bytes of on-chip memory that a kernel's blocks may use."""
    return min(capacity - 4 * MIB, 106 * MIB)


def vmem_limit(capacity: int) -> int:
    """Bytes of on-chip memory that the compiler may use for the blocks and all it adds to them."""
    return min(capacity - 2 * MIB, 112 * MIB)


def tile(problem: Problem, chip: Chip, most: int = MAX_GROUP) -> Tiling:
    """Returns the fastest of the tilings that fit on the chip, with at most so many segments at a
    time (always the fewest that are possible).

    That is the one with the smallest maximum of matrix-unit time and DMA time. There is work for
    every core, and padding adds no more than a quarter to S.

    Raises:
      ValueError: no tiling fits on the chip.
    """
    return min(fitting(problem, chip, most), key=lambda tiling: cost(problem, tiling, chip))


def fitting(problem: Problem, chip: Chip, most: int = MAX_GROUP) -> list[Tiling]:
    """The tilings that fit on the chip, of those with work for every core if there are any.

    Raises:
      ValueError: no tiling fits on the chip.
    """
    budget = vmem_budget(chip.vmem)
    found = [t for t in _tilings(problem, chip.side, most) if vmem_bytes(problem, t) <= budget]
    if not found:
        raise ValueError(f"{problem}: no tiling within {budget / MIB:.0f} MiB")
    return [t for t in found if max(shared(problem, t)) >= chip.cores] or found


def cost(problem: Problem, tiling: Tiling, chip: Chip) -> tuple[float, ...]:
    """What is least for the fastest tiling: the longer of two times, in FLOPs; if they tie, sums in
    float32 are read and written least often in wide blocks; then the sum of both times.
    """
    matrix_unit = flops(problem, tiling, chip.side, LOAD_ROWS)
    dma = moved_bytes(problem, tiling) * chip.flops_per_byte
    return max(matrix_unit, dma), -tiling.columns, matrix_unit + dma


def fits(problem: Problem, budget: int) -> bool:
    return any(vmem_bytes(problem, tiling) <= budget for tiling in _tilings(problem, side=128))


def shared(problem: Problem, tiling: Tiling) -> tuple[int, int]:
    """Steps of the outer two dimensions of a kernel's grid; 1 where cores cannot share them."""
    groups = math.ceil(problem.S / tiling.group)
    blocks = math.ceil(problem.F / tiling.columns)
    return {
        TO_HIDDEN: (groups, blocks),
        FROM_HIDDEN: (groups, tiling.parts),
        GRADIENTS: (tiling.parts, blocks),
    }[problem.kernel]


def _tilings(problem: Problem, side: int, most: int = MAX_GROUP) -> list[Tiling]:
    smallest = smallest_tiling(problem.E, side)
    groups = [smallest.group]
    while groups[-1] < MAX_GROUP:
        larger = 2 * groups[-1]
        if larger > min(most, problem.S) or -problem.S % larger > problem.S / 4:
            break
        groups.append(larger)
    # Parts of experts are rows; parts of x are lanes; parts of y are also the product's columns, of
    # which the matrix unit should get whole squares.
    step = {TO_HIDDEN: ROWS, FROM_HIDDEN: LANES if problem.D % side else side, GRADIENTS: LANES}
    parts = [
        p for p in range(1, MAX_PARTS + 1) if p == 1 or problem.D % (p * step[problem.kernel]) == 0
    ]
    is_even = -(-problem.F // LANES) % 2 == 0
    columns = [LANES, 2 * LANES] if is_even else [LANES]
    return [
        dataclasses.replace(smallest, group=G, parts=p, columns=b, is_held=held)
        for G in groups
        for p in parts
        for b in columns
        for held in ([False, True] if problem.kernel == GRADIENTS else [False])
    ]


def vmem_bytes(problem: Problem, tiling: Tiling) -> int:
    """Bytes of on-chip memory that a kernel's blocks use; those fetched ahead count twice."""
    size, T, D = problem.itemsize, problem.T, problem.D
    G, b = tiling.group, tiling.columns
    part = -(-D // tiling.parts)
    E = -(-problem.E // tiling.experts) * tiling.experts
    PE = max(LANES, tiling.rows * E)
    hidden = 2 * size * problem.hidden * G * T * b
    experts = 2 * size * problem.weights * part * E * b
    spread = 2 * size * G * tiling.rows * PE
    held = hidden + experts + spread
    if problem.kernel == TO_HIDDEN:
        products = 4 * (problem.weights - 1) * G * T * b
        return held + size * G * T * D + size * G * D * b + products
    if problem.kernel == FROM_HIDDEN:
        return held + (2 * size + 4) * G * T * part + size * problem.weights * G * part * b
    gradients = (2 * size + 4) * part * E * b + 2 * 4 * G * tiling.rows * PE
    x = 2 * size * (problem.S + -problem.S % G if tiling.is_held else G) * T * part
    return held + x + 4 * G * part * b + gradients


def moved_bytes(problem: Problem, tiling: Tiling) -> int:
    """Bytes that the DMA moves to and from HBM for a kernel's blocks."""
    S, T, D, F, size = problem.S, problem.T, problem.D, problem.F, problem.itemsize
    groups, blocks = math.ceil(S / tiling.group), math.ceil(F / tiling.columns)
    experts = problem.weights * D * problem.E * F
    hidden = problem.hidden * S * T * F
    if problem.kernel == TO_HIDDEN:
        return size * (S * T * D + hidden + groups * experts)
    if problem.kernel == FROM_HIDDEN:
        return size * (S * T * D + tiling.parts * hidden + groups * experts)
    activations = (1 if tiling.is_held else blocks) * S * T * D + tiling.parts * hidden
    routing = blocks * tiling.parts * S * tiling.rows**2 * problem.E
    return size * (activations + 2 * experts) + 4 * routing


def flops(problem: Problem, tiling: Tiling, side: int, load_rows: int = 0) -> int:
    """FLOPs that the matrix unit spends; rows that are only partly filled count in full.

    Args:
      problem: the call.
      tiling: how it is cut.
      side: width of the matrix unit.
      load_rows: what it costs to load one square of numbers into the unit, in rows.
    """

    def rows(count: int, contracted: int, columns: int, loads: int = 0) -> int:
        return (count + loads) * math.ceil(contracted / side) * math.ceil(columns / side)

    T, D, b = problem.T, problem.D, tiling.columns
    groups, blocks = math.ceil(problem.S / tiling.group), math.ceil(problem.F / b)
    spread = tiling.group * tiling.rows
    experts = tiling.rows * -(-problem.E // tiling.experts) * tiling.experts
    if problem.kernel == GRADIENTS:
        product = rows(D, T, b)
        merging = rows(experts, spread, b, load_rows) + rows(spread, b, experts, load_rows)
    else:
        parts = tiling.parts if problem.kernel == FROM_HIDDEN else 1
        product = parts * rows(T, -(-D // parts), b)
        merging = rows(spread, experts, b, load_rows)
    steps = groups * math.ceil(D / tiling.rows)
    return 2 * side**2 * problem.weights * blocks * (problem.S * product + steps * merging)
