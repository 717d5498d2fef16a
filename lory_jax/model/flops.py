"""Parameters and FLOPs of a model by one stated convention, and the peak of known devices.

Training costs 6 FLOPs per token and parameter of a matrix product (2 forward, 4 backward), plus
12 * layers * H * K * L for attention over a whole sequence (PaLM's convention: causality is not
deducted), plus the merge: 6 * 3 * E * D * F per layer and segment (paper, appendix B), spread over
T tokens. The uniform merge happens once per step and is left out.
Recomputation by remat is not counted. A token of a sparse baseline passes through k experts, or as
many as the capacity factor says where experts choose, or as `experts_per_token` says where tokens
have gates (which is what training aims at, not what sparse/gated.py computes: all experts); dropped
tokens are not deducted. A router of tokens costs 6 * D * E; one of segments is left out.
"""

import dataclasses

from lory_jax.model.config import ModelConfig
from lory_jax.model.routing_rules import EXPERT_CHOICE, GATED, MERGED, SPARSE

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

# Bytes per second between memory and chip, from the same data sheets.
PEAK_BANDWIDTH = {
    "TPU v4": 1.2e12,
    "TPU v5 lite": 819e9,
    "TPU v5e": 819e9,
    "TPU v5": 2765e9,
    "TPU v5p": 2765e9,
    "TPU v6 lite": 1640e9,
    "TPU v6e": 1640e9,
    "NVIDIA A100-SXM4-40GB": 1555e9,
    "NVIDIA A100-SXM4-80GB": 2039e9,
    "NVIDIA H100 80GB HBM3": 3350e9,
    "NVIDIA H200": 4800e9,
}


def parameter_counts(config: ModelConfig) -> dict[str, int]:
    """The `total` number of parameters, and the `active` ones, which a token passes through.

    With merged experts, those of the dense model; with chosen experts, the average per token.
    """
    D, F, V, Y = config.embed_dim, config.mlp_dim, config.vocab_size, config.num_layers
    tables = (1 if config.tie_embeddings else 2) * V * D
    outside = tables + D + Y * (_attention_parameters(config) + 2 * D)
    ffn = 3 * D * F + (2 * F + D if config.mlp_bias else 0)
    experts = config.num_experts * (ffn + D) if config.num_experts else ffn
    if config.adapted_parameter:
        experts += 1 if config.adapted_parameter == "l1_weight" else config.num_experts
    return {"total": outside + Y * experts, "active": round(outside + Y * ffn * _chosen(config))}


def flops_per_token(config: ModelConfig) -> float:
    """Training FLOPs per token, embedding look-up excluded."""
    D, F, Y = config.embed_dim, config.mlp_dim, config.num_layers
    ffn = 3 * D * F * _chosen(config)
    matmul = config.vocab_size * D + Y * (_attention_parameters(config) + ffn)
    attention = 12 * Y * config.num_heads * config.head_width * config.sequence_length
    if not config.is_sparse:
        merge = 0 if config.routing == "uniform" else _merge_flops(config)
        return 6 * matmul + attention + merge
    router = 6 * D * config.num_experts * Y if config.routes_tokens else 0
    return 6 * matmul + attention + router


def baselines(config: ModelConfig) -> dict[str, ModelConfig]:
    """Lory, the dense models and every other baseline of the same shape, by name.

    "dense" has the parameters that a token of Lory passes through, "dense_total" those of all
    experts.
    """
    dense = dataclasses.replace(config, num_experts=0)
    total = dataclasses.replace(dense, mlp_dim=max(1, config.num_experts) * config.mlp_dim)
    others = (*MERGED, *SPARSE)
    routings = {"Lory": "causal"} | {name: name for name in others if name != "causal"}
    return {"dense": dense, "dense_total": total} | {
        name: dataclasses.replace(config, routing=routing) for name, routing in routings.items()
    }


def _chosen(config: ModelConfig) -> float:
    """Expert FFNs per token; 1 if the experts are merged or the model is dense."""
    if not config.is_sparse:
        return 1
    if config.routing in GATED:
        return config.experts_per_token
    if config.routing in EXPERT_CHOICE:
        return min(config.capacity_factor, config.num_experts)
    return config.choices


def _merge_flops(config: ModelConfig) -> float:
    D, F, Y = config.embed_dim, config.mlp_dim, config.num_layers
    return 6 * 3 * config.num_experts * D * F * Y / config.segment_length


def _attention_parameters(config: ModelConfig) -> int:
    """Attention parameters of one layer; keys and values have only their own number of heads."""
    D, H, G, K = config.embed_dim, config.num_heads, config.kv_heads, config.head_width
    biases = {"none": 0, "qkv": (H + 2 * G) * K, "all": (H + 2 * G) * K + D}
    return 2 * D * (H + G) * K + biases[config.attention_bias]


def peak_flops(device_kind: str) -> float | None:
    """bf16 FLOP/s of one device, or None where the kind is not in the table (CPUs)."""
    return PEAK_FLOPS.get(device_kind)


def peak_bandwidth(device_kind: str) -> float | None:
    """Bytes per second of one device's memory, or None where the kind is not in the table."""
    return PEAK_BANDWIDTH.get(device_kind)
