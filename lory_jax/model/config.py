"""The settings of a model, as its modules read them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from lory_jax.model.attention import AttentionShape, resolve_attention
from lory_jax.model.merged_ffn import resolve_merged_ffn
from lory_jax.model.rope import Rope
from lory_jax.model.routing_rules import SPARSE, TOKEN_CHOICE
from lory_jax.model.sparse.dropless import resolve_grouped_product

GATED_PARAMETERS = {"remoe": "l1_weight", "expert_threshold": "threshold"}


@dataclass(frozen=True)
class ModelConfig:
    """The fields of `config.model`; `lory_jax.schema` declares their meaning and defaults.

    `top_k_experts` may also be set for a model that was trained with all experts; training itself
    reaches it step by step (`training/top_k.py`).
    """

    vocab_size: int
    num_layers: int
    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    attention_bias: str
    mlp_bias: bool
    mlp_dim: int
    num_experts: int
    expert_layers: str
    expert_rank: int
    shared_expert: bool
    token_deltas: int
    sequence_length: int
    segment_length: int
    routing: str
    routing_source: str
    first_segment_routing: str
    capacity_factor: float
    experts_per_token: int
    routing_group: int
    balancing: str
    load_balancing_weight: float
    balancing_rate: float
    top_k_experts: int
    router_init_scale: float
    ffn_init_scale: float
    expert_init_scale: float
    tie_embeddings: bool
    rope_theta: float
    rope_scaling: str
    rope_factor: float
    rope_low_frequency_factor: float
    rope_high_frequency_factor: float
    rope_original_length: int
    rope_beta_fast: float
    rope_beta_slow: float
    rope_attention_factor: float
    rope_truncate: bool
    norm_epsilon: float
    compute_dtype: str
    remat: str
    attention: str
    merged_ffn: str
    merged_ffn_group: int
    grouped_product: str
    attention_sharding: str
    document_mask: bool
    bos_id: int
    scan_layers: bool

    @classmethod
    def for_platform(cls, fields: Mapping[str, Any], platform: str) -> "ModelConfig":
        """`config.model` with "auto" resolved for the platform it will run on (cpu, gpu or tpu).

        Raises:
          ConfigError: the platform cannot run the requested implementation.
        """
        shape = AttentionShape(
            heads=fields["num_heads"],
            kv_heads=fields["num_kv_heads"] or fields["num_heads"],
            head_width=fields["head_dim"] or fields["embed_dim"] // fields["num_heads"],
            length=fields["sequence_length"],
            sharding=fields["attention_sharding"],
        )
        attention = resolve_attention(
            fields["attention"], platform, fields["compute_dtype"], shape, fields["document_mask"]
        )
        # 0 stands for a default that could be spelled out, so that equal models have equal configs.
        grouped, width = fields["num_kv_heads"], fields["head_dim"]
        num_kv_heads = 0 if grouped == fields["num_heads"] else grouped
        head_dim = 0 if width * fields["num_heads"] == fields["embed_dim"] else width
        ffn = fields["merged_ffn"]
        if fields["num_experts"] and not fields["expert_rank"]:
            ffn = resolve_merged_ffn(
                ffn,
                platform,
                fields["segment_length"],
                fields["embed_dim"],
                fields["num_experts"],
                jnp.dtype(fields["compute_dtype"]).itemsize,
                fields["mlp_bias"],
            )
        grouped_product = resolve_grouped_product(fields["grouped_product"], platform)
        resolved = {"attention": attention, "merged_ffn": ffn, "grouped_product": grouped_product}
        resolved |= {"num_kv_heads": num_kv_heads, "head_dim": head_dim}
        return cls(**{**fields, **resolved})

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values G."""
        return self.num_kv_heads or self.num_heads

    @property
    def head_width(self) -> int:
        """The width K of a head."""
        return self.head_dim or self.embed_dim // self.num_heads

    @property
    def rope(self) -> Rope:
        """The settings of the rotary embedding."""
        return Rope(
            self.rope_theta,
            self.rope_scaling,
            self.rope_factor,
            self.rope_low_frequency_factor,
            self.rope_high_frequency_factor,
            self.rope_original_length,
            self.rope_beta_fast,
            self.rope_beta_slow,
            self.rope_attention_factor,
            self.rope_truncate,
        )

    @property
    def delta_width(self) -> int:
        """Hidden units of a delta that tokens pick (token_deltas.py)."""
        return max(1, self.mlp_dim // 16)

    @property
    def layer_numbers(self) -> tuple[int, ...]:
        """The layers, from 0, whose parameters are `layers`: with experts or, if dense, all."""
        return tuple(y for y in range(self.num_layers) if y not in self.dense_layer_numbers)

    @property
    def dense_layer_numbers(self) -> tuple[int, ...]:
        """The layers, from 0, that hold a dense FFN between layers with experts."""
        if not self.num_experts or self.expert_layers == "all":
            return ()
        if self.expert_layers == "every_second":
            return tuple(range(0, self.num_layers, 2))
        return tuple(range(self.num_layers // 2))

    @property
    def batch_axis(self) -> str:
        """The logical axis of the batch outside the FFN and the head."""
        return "batch" if self.attention_sharding == "batch" else "moe_batch"

    @property
    def is_sparse(self) -> bool:
        """Whether experts are chosen (see sparse/capacity.py) rather than merged."""
        return self.num_experts > 0 and self.routing in SPARSE

    @property
    def routes_tokens(self) -> bool:
        """Whether every token is routed by itself, rather than with its segment or prompt."""
        return self.is_sparse and self.routing != "expert_choice_segment"

    @property
    def adapted_parameter(self) -> str | None:
        """The router's parameter that is adjusted without a gradient (sparse/adaptation.py)."""
        if not self.is_sparse:
            return None
        is_loss_free = self.balancing == "loss_free" and self.routing in TOKEN_CHOICE
        return "choice_bias" if is_loss_free else GATED_PARAMETERS.get(self.routing)

    @property
    def choices(self) -> int:
        """Experts per token: what it chooses, or what expert choice gives it on average."""
        return TOKEN_CHOICE.get(self.routing) or max(1, round(self.capacity_factor))

    @property
    def measured_routing(self) -> str | None:
        """The routing that losses are measured with; None is that of training.

        A sparse baseline's training routing leaks: a token competes with later ones.
        """
        return "segment" if self.is_sparse else None
