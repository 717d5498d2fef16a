"""The least time that a program compiled for GPUs can take: FLOPs and bytes of every operation.

The compiler for GPUs tells no times. Every operation takes at least the longer of two: its FLOPs at
the peak of bfloat16 products, and its bytes at the bandwidth of the memory, where a fusion reads
its operands and writes its result once, and slices count as slices (`traffic.py`). The sum of these
is what is called the roofline. Cached reads and the latency of launches are left out.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from lory_jax.planning.collectives import KINDS
from lory_jax.planning.cycles import COPIES, OTHER, SCOPES, scope_of
from lory_jax.planning.gpus import Gpu
from lory_jax.planning.hlo import Computation, Executions, Instruction, Module
from lory_jax.planning.traffic import moved_bytes

_GEMM = re.compile(r'custom_call_target="__cublas')
_ATTENTION = re.compile(r'custom_call_target="__cudnn\$fmhaSoftmax(Backward)?')
_ARRAY = re.compile(r"[a-z]+\d*\[([\d,]*)\]")


@dataclass(frozen=True)
class Roofline:
    """Of one execution on one GPU.

    Attributes:
      seconds: the roofline by scope.
      flops: FLOPs of matrix products, those of causal attention counted half.
      bytes: bytes to and from memory.
    """

    seconds: Mapping[str, float]
    flops: float
    bytes: float

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def roofline(module: Module, runs: Executions, gpu: Gpu) -> Roofline:
    """The roofline of a program; a loop body counts once per iteration."""
    seconds = dict.fromkeys((*SCOPES, COPIES, OTHER), 0.0)
    all_flops = all_bytes = 0.0
    for name, computation in module.computations.items():
        if name in runs.fused or not runs.times[name]:
            continue
        for instruction in computation.instructions.values():
            if _is_communication(instruction):
                continue
            flops = product_flops(instruction, computation, module)
            moved = _bytes(instruction, computation, module)
            least = max(flops / gpu.peak_flops, moved / gpu.hbm_bandwidth)
            seconds[scope_of(instruction, module)] += least * runs.times[name]
            all_flops += flops * runs.times[name]
            all_bytes += moved * runs.times[name]
    return Roofline(seconds, all_flops, all_bytes)


def _is_communication(instruction: Instruction) -> bool:
    opcode = instruction.opcode
    return opcode.removesuffix("-start").removesuffix("-done") in KINDS


def _bytes(instruction: Instruction, computation: Computation, module: Module) -> int:
    moved = moved_bytes(instruction, computation, module, is_padded=False).hbm
    if instruction.opcode == "custom-call":  # the last result may be workspace, which is scratch
        last = re.findall(r"[su]8\[(\d+)\]\{0\}\)$", instruction.shape)
        moved -= int(last[0]) if last else 0
    return moved


def product_flops(instruction: Instruction, computation: Computation, module: Module) -> float:
    """FLOPs of the matrix products of an instruction: its own, or those of a fusion."""
    if instruction.opcode == "dot":
        return _dot_flops(instruction, computation, r"lhs_contracting_dims=\{([\d,]*)\}")
    if _GEMM.search(instruction.attributes):
        return _dot_flops(instruction, computation, r'"lhs_contracting_dimensions":\["([\d",]*)"\]')
    attention = _ATTENTION.search(instruction.attributes)
    if attention:
        sizes = re.findall(
            r'"intermediate_tensor_shape":.*?"dimensions": ?\[([^\]]*)\]', instruction.attributes
        )
        scores = math.prod(int(size) for size in re.findall(r"\d+", sizes[0]))
        width = _sizes(computation.instructions[instruction.operands[0]].shape)[-1]
        products = 5 if attention[1] else 2
        causal = 2 if '"CAUSAL"' in instruction.attributes else 1
        return products * 2.0 * scores * width / causal
    called = module.computations.get(instruction.attribute("calls") or "")
    if called is None:
        return 0.0
    return sum(product_flops(inner, called, module) for inner in called.instructions.values())


def _dot_flops(instruction: Instruction, computation: Computation, contracted: str) -> float:
    """2 times the size of the result times the sizes that are summed over."""
    left = _sizes(computation.instructions[instruction.operands[0]].shape)
    axes = re.findall(r"\d+", re.findall(contracted, instruction.attributes)[0])
    return 2.0 * math.prod(_sizes(instruction.shape)) * math.prod(left[int(a)] for a in axes)


def _sizes(shape: str) -> list[int]:
    """The sizes of the first array of a shape."""
    found = _ARRAY.search(shape)
    assert found is not None
    return [int(size) for size in filter(None, found[1].split(","))]
