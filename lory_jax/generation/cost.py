"""Whether a decoding step should read merged FFNs, one per row, or all experts, unmerged.

A step that reads R merged FFNs for B rows moves `3 R D F` weights per layer and computes
`6 B D F` FLOPs; one that leaves E experts unmerged moves `3 E D F` and computes `6 B E D F`. It
takes as long as the larger of bytes over the bandwidth and FLOPs over the peak. The ratio of the
two, the device's FLOPs per byte, decides; on CPUs the experts' thin products also reach less of
either limit. Where segments route, merged FFNs are merged again at every border, of all rows at
once.

Letters: B rows, R merged FFNs, E experts, D model, F FFN, T tokens per segment.
"""

import jax
import jax.numpy as jnp

from lory_jax.generation.ffn import EXPERTS, MERGED
from lory_jax.generation.settings import check_ffn
from lory_jax.model.config import ModelConfig
from lory_jax.model.flops import peak_bandwidth, peak_flops

# bfloat16 FLOPs per byte of devices that are not in the tables of flops.py. That of CPUs is for
# float32: on two x86 cores, XLA's product of 32 rows by [4096, 1408] reached 98 GFLOP/s, and that
# of one row 20 GB/s.
RIDGES = {"cpu": 5.0, "gpu": 200.0, "tpu": 240.0}

# How near to these limits unmerged experts come, as a share of how near merged FFNs come. On an x86
# core they make 0.73 of it with 32 rows, and less with fewer (docs/benchmarks.md).
UNMERGED_SHARES = {"cpu": 0.7, "gpu": 1.0, "tpu": 1.0}


def choose_ffn(ffn: str, config: ModelConfig, *, rows: int, ffns: int, borders: int = 0) -> str:
    """Resolves "auto" to "merged" or "experts" for the default device.

    Args:
      ffn: "auto", "merged" or "experts".
      config: the model.
      rows: B of a step.
      ffns: R, the FFNs that they own or share.
      borders: how many of T steps reach a segment border of some row; 0 if prompts route.

    Raises:
      InputError: `ffn` is none of the three.
    """
    check_ffn(ffn)
    if not config.num_experts or config.is_sparse:
        return MERGED
    if ffn != "auto":
        return ffn
    itemsize = jnp.dtype(config.compute_dtype).itemsize
    device = jax.devices()[0]
    merged, experts = step_costs(
        device_ridge(device),
        itemsize,
        rows=rows,
        ffns=ffns,
        experts=_unmerged_ffns(config),
        merges_per_step=borders / config.segment_length,
    )
    return MERGED if merged <= experts / UNMERGED_SHARES[device.platform] else EXPERTS


def step_costs(
    ridge: float, itemsize: int, *, rows: int, ffns: int, experts: float, merges_per_step: float
) -> tuple[float, float]:
    """What the FFNs of a step cost, merged and unmerged, in bytes (of one FFN's weights).

    FLOPs are converted to the bytes that the device moves in the same time.

    Args:
      ridge: the device's FLOPs per byte.
      itemsize: bytes of a weight.
      rows, ffns, experts: B, R and E.
      merges_per_step: how often a step merges anew; 0 if it never does.
    """

    def cost(weights: float, flops: float) -> float:
        return max(weights * itemsize, flops / ridge)

    merge = cost(experts + 2 * ffns, 2 * ffns * experts)
    merged = cost(ffns, 2 * rows) + merges_per_step * merge
    return merged, cost(experts, 2 * rows * experts)


def _unmerged_ffns(config: ModelConfig) -> float:
    """How many FFNs the experts of a layer are as large as."""
    if not config.expert_rank:
        return config.num_experts
    sizes = 1 / config.embed_dim + 1 / config.mlp_dim
    return 1 + config.num_experts * config.expert_rank * sizes


def device_ridge(device: jax.Device) -> float:
    """FLOPs that a device computes while it moves one byte."""
    flops, bandwidth = peak_flops(device.device_kind), peak_bandwidth(device.device_kind)
    if flops and bandwidth:
        return flops / bandwidth
    return RIDGES[device.platform]
