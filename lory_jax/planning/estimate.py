"""The numbers of a plan from a compiled training step: memory, communication, bounds of time."""

import json
import math
import os
from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from lory_jax import tpu_flags
from lory_jax.model.config import ModelConfig
from lory_jax.model.flops import flops_per_token, parameter_counts, peak_flops
from lory_jax.planning import kernels, store
from lory_jax.planning.collectives import bytes_by_kind_and_axis, find_collectives
from lory_jax.planning.cycles import count_cycles
from lory_jax.planning.gpus import Gpu
from lory_jax.planning.hlo import Executions, Module, executions, parse
from lory_jax.planning.overlap import Schedule, awaited_cycles
from lory_jax.planning.program import compile_lowered, lower_step
from lory_jax.planning.roofline import roofline
from lory_jax.planning.topology import Device

# Each device should hold whole tiles of a matrix along D: a TPU's tile of bfloat16 is 16 x 128. If
# tiles are split, the compiler turns gathers and scatters into sums of whole matrices.
TILE_ROWS = 16

VERSION = 3  # of how a compiled step is read; another one makes kept results void


# Of a TPU's memory, what parameters and Adam's moments may take for a second replica of them.
REPLICA_SHARE = 0.25
STATE_BYTES = 12  # of a parameter: itself and two moments in float32


def default_mesh(
    model_config: ModelConfig, sequences: int, devices: int, tpu_memory: int = 0
) -> tuple[int, int, int]:
    """The mesh (data, fsdp, tensor) for a number of devices if the user chose none.

    `tensor` is 1 as long as every device gets a sequence. If there are more devices than sequences
    (and `attention_sharding=heads`), `tensor` is the number of devices per sequence. `fsdp` is the
    largest number of the remaining devices that leaves each a multiple of `TILE_ROWS` rows of a
    matrix along D; `data` is the rest.

    On TPUs, `fsdp` is at most half of a slice if the memory allows two replicas: over the whole of
    one, the compiler sums whole gradients where a device needs its part (docs/scaling.md).

    Args:
      model_config: the model.
      sequences: how many sequences a microbatch has.
      devices: how many devices there are.
      tpu_memory: bytes of memory of a TPU; 0 for other devices.
    """
    tensor = 1
    if model_config.attention_sharding == "heads" and devices > sequences:
        tensor = devices // math.gcd(devices, sequences)
    rest = devices // tensor
    embed_dim = model_config.embed_dim
    whole_tiles = [
        n for n in range(1, rest + 1) if rest % n == 0 and embed_dim % (n * TILE_ROWS) == 0
    ]
    fsdp = max(whole_tiles, default=1)
    state_bytes = STATE_BYTES * parameter_counts(model_config)["total"]
    if fsdp == devices and fsdp % 2 == 0 and 2 * state_bytes / fsdp <= REPLICA_SHARE * tpu_memory:
        fsdp //= 2
    return rest // fsdp, fsdp, tensor


def plan_step(
    config: ConfigDict, mesh: Mesh, device: Device | Gpu, is_kept: bool = False
) -> dict[str, Any]:
    """Compiles a recipe's training step for a mesh; returns the fields of a plan that it shows.

    Args:
      config: the recipe.
      mesh: the devices to compile for.
      device: what each of them can do.
      is_kept: read the result from the user's cache if the same program was compiled before, and
        keep it there (`store.py`).

    Raises:
      ConfigError: the recipe does not fit the mesh.
    """
    traced = lower_step(config, mesh)
    key = ""
    if is_kept:
        text = traced.lowered.as_text()
        # What a result depends on beside the program: who compiles, how, and who reads it.
        flags = os.environ.get(tpu_flags.VARIABLE)
        versions = [VERSION, kernels.VERSION, store.versions(), flags]
        key = json.dumps([text, repr(device), dict(mesh.shape), *versions])
        if (kept := store.load("steps", key)) is not None:
            return dict(kept)
    program = compile_lowered(traced)
    total = program.arguments + program.temporaries
    result: dict[str, Any] = {
        "bytes_per_device": {
            "arguments": program.arguments,
            "temporaries": program.temporaries,
            "total": total,
            "limit": device.memory_limit,
            "fits": bool(program.text) and total <= device.memory_limit,
        },
        "collective_bytes": None,
        "compile_seconds": round(program.seconds, 1),
        "estimate": None,
    }
    if program.text:
        result |= read_program(program.text, config, mesh, device)
    if is_kept:
        store.save("steps", key, result)
    return result


def read_program(text: str, config: ConfigDict, mesh: Mesh, device: Device | Gpu) -> dict[str, Any]:
    """`collective_bytes` and `estimate`, which bounds the step's time.

    On TPUs by the repriced cycles and the collectives that are waited for (`overlap.py`), on GPUs
    by the roofline, as if it overlapped with all collectives.
    """
    module = parse(text)
    runs = executions(module)
    collectives = find_collectives(module, runs, mesh.shape)
    received = sum(c.received * c.times for c in collectives)
    if isinstance(device, Gpu):
        estimate = _on_gpus(module, runs, device)
        moving = received / device.link_bandwidth
    else:
        estimate = _on_tpus(module, runs, mesh.shape, device)
        moving = received / device.ici_bandwidth
    estimate |= {"loops_counted_once": list(runs.unknown_loops), "collective_seconds": moving}
    busy = estimate["compute_seconds"] + estimate.get("awaited_seconds", 0.0)
    seconds = max(busy, estimate["hbm_seconds"], moving)
    model_config = ModelConfig.for_platform(config.model, mesh.devices.flat[0].platform)
    tokens = config.train.global_batch_size * model_config.sequence_length
    peak = peak_flops(mesh.devices.flat[0].device_kind)
    rate = tokens / seconds / mesh.devices.size
    return {
        "collective_bytes": bytes_by_kind_and_axis(collectives),
        "estimate": estimate
        | {
            "step_seconds_lower_bound": seconds,
            "tokens_per_second_per_device_upper_bound": rate,
            "mfu_upper_bound": rate * flops_per_token(model_config) / peak if peak else None,
        },
    }


def _on_tpus(
    module: Module, runs: Executions, mesh_shape: Mapping[str, int], device: Device
) -> dict[str, Any]:
    prices = kernels.price_kernels(module, runs, device)
    transfers = Schedule(module, runs, mesh_shape, device, prices).transfers()
    cycles = count_cycles(module, runs, device, prices)
    return {
        "cycles": {**cycles.compiler, "total": cycles.compiler_total},
        "repriced_cycles": {**cycles.repriced, "total": cycles.repriced_total},
        "kernel_cycles": dict(cycles.kernels),
        "kernels": {name: described(price) for name, price in sorted(prices.items())},
        "uncounted_kernels": dict(cycles.uncounted),
        "hbm_bytes": cycles.hbm_bytes,
        "compute_seconds": cycles.repriced_total / device.clock,
        "awaited_seconds": awaited_cycles(transfers) / device.clock,
        "hbm_seconds": cycles.hbm_bytes / device.hbm_bandwidth,
    }


def _on_gpus(module: Module, runs: Executions, gpu: Gpu) -> dict[str, Any]:
    least = roofline(module, runs, gpu)
    return {
        "roofline_seconds": {**least.seconds, "total": least.total},
        "flops": least.flops,
        "hbm_bytes": least.bytes,
        "compute_seconds": least.total,
        "hbm_seconds": least.bytes / gpu.hbm_bandwidth,
    }


def described(price: kernels.Price) -> dict[str, Any]:
    """The price of one call of a kernel, as a plan holds it."""
    return {
        "cycles": price.cycles,
        "bound_by": price.bound_by,
        "bundles": price.bundles,
        "matrix_unit": price.matrix_unit,
        "dma": price.dma,
        "busiest_slot": price.busiest_slot,
        "counted_always": price.counted_always,
        "unread": price.unread,
    }
