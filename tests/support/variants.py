"""The models beyond the paper that every test of a model covers, as fields of `tiny_config`."""

VARIANTS = {
    "upper_half": {"expert_layers": "upper_half", "num_layers": 3},
    "every_second": {"expert_layers": "every_second"},
    "shared_expert": {"shared_expert": True, "mlp_bias": True, "merged_ffn": "einsum"},
    "token_deltas": {"token_deltas": 3, "mlp_dim": 32},
    "token_deltas_low_rank": {"token_deltas": 2, "expert_rank": 3, "expert_layers": "every_second"},
    "low_rank": {"expert_rank": 3, "mlp_bias": True},
    "source_cumulative": {"routing_source": "cumulative"},
    "source_average": {"routing_source": "average"},
    "source_attention": {"routing_source": "attention"},
}
