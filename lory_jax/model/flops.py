"""Parameters and FLOPs of a model by one stated convention, and the peak of known devices.

Training costs 6 FLOPs per token and parameter of a matrix product (2 forward, 4 backward), plus
12 * layers * H * K * L for attention over a whole sequence (PaLM's convention: causality is not
deducted), plus the merge: 6 * 3 * E * D * F per layer and segment (paper, appendix B), spread over
T tokens. With low-rank experts it is 6 FLOPs per token and parameter of theirs instead. The uniform
merge of full experts happens once per step and is left out.
Recomputation by remat is not counted. A token of a sparse baseline passes through k experts, or as
many as the capacity factor says where experts choose, or as `experts_per_token` says where tokens
have gates (which is what training aims at; on TPUs and GPUs, sparse/gated.py computes all experts);
dropped tokens are not deducted. A router of tokens costs 6 * D * E; one of segments is left out.
"""

import dataclasses

from lory_jax.model.config import ModelConfig
from lory_jax.model.routing_rules import EXPERT_CHOICE, GATED, MERGED, SPARSE
from lory_jax.segment_schedule import shares_of_lengths

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
    k, delta = config.token_deltas, 3 * D * config.delta_width
    outside = tables + D + Y * (_attention_parameters(config) + 2 * D)
    deltas, picked = Y * k * (delta + D), Y * min(k, 1) * delta
    ffn = 3 * D * F + (2 * F + D if config.mlp_bias else 0)
    outside += Y * ffn if config.shared_expert else 0
    experts = config.num_experts * (ffn + D) if config.num_experts else ffn
    if config.num_experts and config.expert_rank:
        experts = ffn + config.num_experts * D + _factors(config)
    if config.adapted_parameter:
        E = config.num_experts
        experts += {"l1_weight": 1, "choice_bias": E, "threshold": E + 1}[config.adapted_parameter]
    Y_e = len(config.layer_numbers)
    dense = (Y - Y_e) * ffn
    active = outside + dense + Y_e * ffn * _chosen(config) + picked
    return {"total": outside + dense + Y_e * experts + deltas, "active": round(active)}


def flops_per_token(config: ModelConfig) -> float:
    """Training FLOPs per token, embedding look-up excluded."""
    D, F, Y = config.embed_dim, config.mlp_dim, config.num_layers
    Y_e = len(config.layer_numbers)
    shared = Y if config.shared_expert else 0
    ffns = 3 * D * F * (shared + Y - Y_e + Y_e * _chosen(config))
    deltas = Y * config.token_deltas * (3 * D * config.delta_width + D)  # all are computed
    matmul = config.vocab_size * D + Y * _attention_parameters(config) + ffns + deltas
    attention = 12 * Y * config.num_heads * config.head_width * config.sequence_length
    if not config.is_sparse:
        is_free = config.routing == "uniform" and not config.expert_rank
        merge = 0 if is_free else _merge_flops(config)
        return 6 * matmul + attention + merge
    router = 6 * D * config.num_experts * Y_e if config.routes_tokens else 0
    return 6 * matmul + attention + router


def trained_flops_per_token(config: ModelConfig, segment_schedule: str) -> float:
    """The mean of `flops_per_token` over a run whose segment length follows a schedule."""
    return sum(
        share * flops_per_token(dataclasses.replace(config, segment_length=length))
        for length, share in shares_of_lengths(segment_schedule, config.segment_length).items()
    )


def baselines(config: ModelConfig) -> dict[str, ModelConfig]:
    """Lory, the dense models and every other baseline of the same shape, by name.

    "dense" has the parameters that a token of Lory passes through, "dense_total" those of all
    experts.
    """
    dense = dataclasses.replace(config, num_experts=0)
    total = dataclasses.replace(dense, mlp_dim=round(_ffns(config) * config.mlp_dim))
    others = (*MERGED, *SPARSE)
    routings = {"Lory": "causal"} | {name: name for name in others if name != "causal"}
    found = {"dense": dense, "dense_total": total}
    for name, routing in routings.items():
        rank = 0 if routing in SPARSE else config.expert_rank  # experts are chosen in full
        found[name] = dataclasses.replace(config, routing=routing, expert_rank=rank)
    return found


def _ffns(config: ModelConfig) -> float:
    """How many dense FFNs those of a layer are as large as, on average over the layers."""
    D, F, E, Y = config.embed_dim, config.mlp_dim, config.num_experts, config.num_layers
    of_layer = 1 + _factors(config) / (3 * D * F) if config.expert_rank else max(1, E)
    dense = len(config.dense_layer_numbers)
    return ((Y - dense) * of_layer + dense) / Y


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
    D, F, Y_e = config.embed_dim, config.mlp_dim, len(config.layer_numbers)
    if config.expert_rank:
        return 6 * Y_e * _factors(config)
    return 6 * 3 * config.num_experts * D * F * Y_e / config.segment_length


def _factors(config: ModelConfig) -> int:
    """Parameters of one layer's low-rank deltas."""
    return 3 * config.num_experts * config.expert_rank * (config.embed_dim + config.mlp_dim)


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
