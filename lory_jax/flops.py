"""Parameters and FLOPs of a model by one stated convention, and the peak of known devices.

Training costs 6 FLOPs per token and parameter of a matrix product (2 forward, 4 backward), plus
12 * layers * D * L for attention over a whole sequence (PaLM's convention: causality not deducted),
plus the merge: 6 * 3 * E * D * F per layer and segment (paper, appendix B), spread over T tokens.
Recomputation by remat is not counted.
"""

from lory_jax.model.transformer import ModelConfig

# Dense bf16 FLOP/s per chip, from the vendors' data sheets; keys are `jax.Device.device_kind`.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


def parameter_counts(config: ModelConfig) -> dict[str, int]:
    """`total` parameters, and `active` ones: the dense model that a token passes through."""
    D, F, V, Y = config.embed_dim, config.mlp_dim, config.vocab_size, config.num_layers
    outside = 2 * V * D + D + Y * (4 * D * D + 2 * D)
    ffn = 3 * D * F
    experts = config.num_experts * (ffn + D) if config.num_experts else ffn
    return {"total": outside + Y * experts, "active": outside + Y * ffn}


def flops_per_token(config: ModelConfig) -> float:
    """Training FLOPs per token, embedding look-up excluded."""
    D, F, Y = config.embed_dim, config.mlp_dim, config.num_layers
    matmul = parameter_counts(config)["active"] - config.vocab_size * D - (2 * Y + 1) * D
    attention = 12 * Y * D * config.sequence_length
    merge = 6 * 3 * config.num_experts * D * F * Y / config.segment_length
    return 6 * matmul + attention + merge


def peak_flops(device_kind: str) -> float | None:
    """bf16 FLOP/s of one device, or None where the kind is not in the table (CPUs)."""
    return PEAK_FLOPS.get(device_kind)
