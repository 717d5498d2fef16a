"""What a Pallas kernel for TPUs does per call, from its own program: products, DMA, conditions.

`pallas_call` hands the compiler a module of MLIR (Mosaic's dialect): a body that runs once per step
of a grid, and per operand a function from the step to the block it needs. Scalars decide which
conditional parts run and which blocks are fetched. They depend on the step and on arrays that were
prefetched, so they are evaluated here for all steps at once, as NumPy arrays.

A scalar that depends on other data is unknown; what depends on it is counted as if it always ran.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

LANES, SUBLANE_BYTES = 128, 32  # a tile is 32 bytes of each of 128 lanes: 8 x 128 in float32
_SERIALIZED = "stable_mosaic.version"  # of modules that `pallas_call` wrote
_STORES = ("tpu.vector_store", "tpu.strided_store", "vector.store")


@dataclass(frozen=True)
class Product:
    """Matrix products `[m, k] @ [k, n]` of one place of the kernel; `times` per call."""

    m: int
    k: int
    n: int
    times: float
    passes: int  # over the matrix unit, which multiplies bfloat16


@dataclass(frozen=True)
class KernelWork:
    """What one call does.

    Attributes:
      steps: steps of the grid.
      conditions: of every conditional part that stores vectors, in the order of the program, how
        often it runs each time that it is reached; None if that depends on data.
      products: its matrix products.
      moved_bytes: bytes of the blocks that are moved between HBM and the chip, padded to tiles.
      is_shared: whether the cores of a chip may share the steps: a dimension of the grid is
        declared parallel.
    """

    steps: int
    conditions: tuple[float | None, ...]
    products: tuple[Product, ...]
    moved_bytes: int
    is_shared: bool = False

    def matrix_cycles(self, side: int, flops_per_cycle: int) -> float:
        """Cycles that the matrix unit, `side` numbers wide, needs at its peak.

        The right operand is held in the unit, padded to its width in both dimensions, and the rows
        of the left one stream through it.
        """

        def padded(size: int, multiple: int) -> int:
            return -(-size // multiple) * multiple

        total = sum(
            2 * padded(p.m, 8) * padded(p.k, side) * padded(p.n, side) * p.times * p.passes
            for p in self.products
        )
        return total / flops_per_cycle


def read_work(body: bytes, prefetched: Sequence[np.ndarray | None] = ()) -> KernelWork:
    """The work of one call of a kernel.

    Args:
      body: the serialised module, as in the `backend_config` of the call.
      prefetched: the values of the operands that come first (`num_scalar_prefetch`), where known.

    Raises:
      ValueError: the module has no kernel with a grid.
    """
    module = _parse(body)
    functions = {op.attributes["sym_name"].value: op for op in module.body.operations}
    kernel = next((f for f in functions.values() if "iteration_bounds" in f.attributes), None)
    if kernel is None:
        raise ValueError("the module has no function with iteration_bounds")
    grid = [int(size) for size in kernel.attributes["iteration_bounds"]]
    place = [axis.reshape(-1) for axis in np.indices(grid)]
    walk = _Walk()
    walk.run(kernel, [*place, *prefetched], np.ones(math.prod(grid), np.int64))
    moved = _moved_bytes(kernel, functions, place, prefetched)
    semantics = "dimension_semantics"
    return KernelWork(
        math.prod(grid),
        tuple(walk.conditions),
        tuple(walk.products),
        moved,
        semantics in kernel.attributes and "<parallel>" in str(kernel.attributes[semantics]),
    )


def text_of(body: bytes) -> str:
    """A kernel's program as text, without the places in the source that it came from."""
    return str(_parse(body).operation.get_asm(enable_debug_info=False))


def _parse(body: bytes) -> Any:
    # Private parts of the pinned JAX: no public reader of Mosaic's dialect exists.
    from jax._src.interpreters import mlir
    from jax._src.lib import tpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.passmanager import PassManager

    context = mlir.make_ir_context()
    tpu.register_dialect(context)
    with context, ir.Location.unknown():
        context.allow_unregistered_dialects = True
        module = ir.Module.parse(body)
        # Kernels that the compiler brings itself, as for `ragged_dot`, are in the dialect already.
        if _SERIALIZED in module.operation.attributes:
            pipeline = "builtin.module(mosaic-serde{serialize=false})"
            PassManager.parse(pipeline).run(module.operation)
    return module


def _moved_bytes(
    kernel: Any, functions: dict[str, Any], place: list[np.ndarray], prefetched: Sequence[Any]
) -> int:
    """Bytes of all blocks; a block is moved when its place differs from that of the step before."""
    total = 0
    arguments = kernel.regions[0].blocks[0].arguments
    first = len(place) + int(kernel.attributes["scalar_prefetch"].value)
    for argument, window in zip(
        list(arguments)[first:], kernel.attributes["window_params"], strict=False
    ):
        if "transform_indices" not in window:
            continue  # the kernel moves it itself
        transform = functions[window["transform_indices"].value]
        walk = _Walk()
        indices = walk.run(transform, [*place, *prefetched], np.ones(len(place[0]), np.int64))
        moves = len(place[0])
        if all(index is not None for index in indices):
            stacked = np.stack([np.broadcast_to(i, place[0].shape) for i in indices])
            moves = 1 + int(np.any(stacked[:, 1:] != stacked[:, :-1], axis=0).sum())
        total += moves * _tiled_bytes(str(argument.type))
    return total


def _tiled_bytes(memref: str) -> int:
    """Bytes of a block such as `memref<1x512x64xbf16, ...>`, in whole tiles."""
    *sizes, kind = re.findall(r"memref<([^,>]*)", memref)[0].split("x")
    itemsize = max(1, int(re.findall(r"\d+", kind)[0]) // 8)
    *outer, rows, columns = [1, 1, *map(int, sizes)]
    tile_rows = SUBLANE_BYTES // itemsize
    padded = -(-rows // tile_rows) * tile_rows if rows > 1 else 1
    return math.prod(outer) * padded * -(-columns // LANES) * LANES * itemsize


# ---------------------------------------------------------------- evaluating scalars

_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "arith.addi": np.add,
    "arith.subi": np.subtract,
    "arith.muli": np.multiply,
    "arith.divsi": lambda a, b: np.trunc(a / b).astype(np.int64),
    "arith.floordivsi": np.floor_divide,
    "arith.remsi": np.fmod,
    "arith.maxsi": np.maximum,
    "arith.minsi": np.minimum,
    "arith.andi": np.bitwise_and,
    "arith.ori": np.bitwise_or,
    "arith.xori": np.bitwise_xor,
    "arith.shli": np.left_shift,
    "arith.shrsi": np.right_shift,
}
_COMPARE = [np.equal, np.not_equal, np.less, np.less_equal, np.greater, np.greater_equal]
_SAME = ("arith.extsi", "arith.extui", "arith.trunci", "arith.index_cast", "tpu.assume_multiple")


@dataclass
class _Walk:
    """Runs a function for all steps of the grid at once; a scalar is an array over the steps.

    `values` lacks what is not a known scalar. In `run`, `runs` says how often each step gets there.
    """

    values: dict[Any, Any] = field(default_factory=dict)
    conditions: list[float | None] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)

    def run(self, function: Any, arguments: Sequence[Any], runs: np.ndarray) -> list[Any]:
        """Runs a function; what it returns, None for what is unknown."""
        block = function.regions[0].blocks[0]
        known = zip(block.arguments, arguments, strict=False)
        self.values.update({name: value for name, value in known if value is not None})
        return self._block(block, runs)

    def _block(self, block: Any, runs: np.ndarray) -> list[Any]:
        results: list[Any] = []
        for op in block.operations:
            operation = op.operation
            operands = [self.values.get(operand) for operand in operation.operands]
            if operation.name in ("func.return", "scf.yield"):
                results = operands
            elif operation.name == "scf.if":
                self._condition(operation, operands[0], runs)
            elif operation.name == "scf.for":
                self._loop(operation, operands, runs)
            elif operation.name == "tpu.matmul":
                self.products.append(_product(operation, float(runs.sum())))
            elif operation.regions:
                for region in operation.regions:
                    for inner in region.blocks:
                        self._block(inner, runs)
            else:
                value = _evaluate(operation, operands)
                if value is not None:
                    self.values[operation.results[0]] = value
        return results

    def _condition(self, operation: Any, holds: Any, runs: np.ndarray) -> None:
        yields = []
        for i, region in enumerate(operation.regions):
            if not len(region.blocks):
                continue
            inside = runs
            if holds is not None:
                inside = runs * (np.asarray(holds) != 0 if i == 0 else np.asarray(holds) == 0)
            if _stores(region):
                share = float(inside.sum() / max(1, runs.sum()))
                self.conditions.append(None if holds is None else share)
            yields.append(self._block(region.blocks[0], inside))
        if holds is not None and len(yields) == 2:
            for result, yes, no in zip(operation.results, *yields, strict=True):
                if yes is not None and no is not None:
                    self.values[result] = np.where(np.asarray(holds) != 0, yes, no)

    def _loop(self, operation: Any, operands: list[Any], runs: np.ndarray) -> None:
        lower, upper, step = operands[:3]
        turns: Any = 1
        if lower is not None and upper is not None and step is not None:
            turns = np.maximum(0, -((lower - upper) // step))
        self._block(operation.regions[0].blocks[0], runs * turns)


def _stores(region: Any) -> bool:
    return any(
        op.operation.name in _STORES or any(_stores(inner) for inner in op.operation.regions)
        for block in region.blocks
        for op in block.operations
    )


def _evaluate(operation: Any, operands: list[Any]) -> Any:
    """The value of a scalar operation; None if it is no such operation or an operand is unknown."""
    name = operation.name
    if name == "arith.constant":
        value = operation.attributes["value"]
        text = str(value).split(":")[0].strip()
        if text in ("true", "false"):
            return np.int64(text == "true")
        return np.int64(int(text)) if re.fullmatch(r"-?\d+", text) else None
    if not operands or any(operand is None for operand in operands):
        return None
    if name in _BINARY:
        return _BINARY[name](*operands)
    if name in _SAME:
        return operands[0]
    if name == "arith.cmpi":
        predicate = int(operation.attributes["predicate"].value)
        # The unsigned orders follow the signed ones; indices are never negative.
        function = _COMPARE[predicate if predicate < 6 else predicate - 4]
        return function(*operands).astype(np.int64)
    if name == "arith.select":
        return np.where(operands[0] != 0, operands[1], operands[2])
    if name == "memref.load":
        array, *indices = operands
        return array[tuple(np.asarray(i) for i in indices)].astype(np.int64)
    return None


def _product(operation: Any, times: float) -> Product:
    """The sizes of a `tpu.matmul`, from the types and its dimension numbers."""
    left, right = (_vector(str(operand.type)) for operand in list(operation.operands)[:2])
    numbers = str(operation.attributes["dimension_numbers"])
    lists = [
        [int(i) for i in found.split(",") if i.strip()]
        for found in re.findall(r"\[([\d, ]*)\]", numbers)
    ]
    contracted, _, left_rest, right_rest, _, batch = lists[:6]
    precision = (
        str(operation.attributes["precision"]) if "precision" in operation.attributes else ""
    )
    return Product(
        m=math.prod(left[i] for i in left_rest),
        k=math.prod(left[i] for i in contracted),
        n=math.prod(right[i] for i in right_rest),
        times=times * math.prod(left[i] for i in batch),
        passes=6 if "fp32" in precision else 1,
    )


def _vector(kind: str) -> list[int]:
    return [int(size) for size in re.findall(r"(\d+)x", kind)]
