"""How the fields of a config fit together; each field by itself is checked by its schema."""

from ml_collections.config_dict import ConfigDict

from lory_jax.errors import ConfigError
from lory_jax.model.routing_rules import (
    EXPERT_CHOICE,
    GATED,
    MERGED,
    SPARSE,
    TOKEN_CHOICE,
    shortest_segment,
)
from lory_jax.segment_schedule import parse_schedule


def check_model(model: ConfigDict) -> None:
    """Sizes must divide, and settings of the rotary embedding must make sense together."""
    if model.segment_length > model.sequence_length:
        raise ConfigError(
            f"config.model.segment_length: got {model.segment_length}; must be at most "
            f"config.model.sequence_length ({model.sequence_length})"
        )
    if model.head_dim % 2:
        raise ConfigError(f"config.model.head_dim: got {model.head_dim}; must be even, or 0")
    divides = model.embed_dim % model.num_heads == 0
    if not model.head_dim and not (divides and model.embed_dim // model.num_heads % 2 == 0):
        raise ConfigError(
            f"config.model.num_heads: got {model.num_heads}; must be a divisor of "
            f"config.model.embed_dim ({model.embed_dim}) that leaves an even head width, unless "
            "config.model.head_dim gives one"
        )
    if model.num_kv_heads and model.num_heads % model.num_kv_heads:
        raise ConfigError(
            f"config.model.num_kv_heads: got {model.num_kv_heads}; must be a divisor of "
            f"config.model.num_heads ({model.num_heads}), or 0 for as many"
        )
    if model.rope_scaling == "yarn" and model.rope_theta == 1:
        raise ConfigError(
            "config.model.rope_theta: got 1.0; must be above 1 with rope_scaling=yarn"
        )
    if model.document_mask and model.bos_id >= model.vocab_size:
        raise ConfigError(
            f"config.model.bos_id: got {model.bos_id}; must be below config.model.vocab_size "
            f"({model.vocab_size})"
        )
    if model.rope_low_frequency_factor >= model.rope_high_frequency_factor:
        raise ConfigError(
            f"config.model.rope_low_frequency_factor: got {model.rope_low_frequency_factor}; must "
            "be less than config.model.rope_high_frequency_factor "
            f"({model.rope_high_frequency_factor})"
        )


def check_expert_layers(model: ConfigDict) -> None:
    """Layers with experts and others must both be there; a dense model ignores the field."""
    if not model.num_experts or model.expert_layers == "all":
        return
    if model.num_layers < 2:
        raise ConfigError(
            f"config.model.expert_layers: got {model.expert_layers!r}; must be all with "
            f"config.model.num_layers={model.num_layers}"
        )
    if model.expert_layers == "every_second" and model.num_layers % 2:
        raise ConfigError(
            "config.model.expert_layers: got 'every_second'; must be all or upper_half with an "
            f"odd config.model.num_layers ({model.num_layers})"
        )


def check_expert_rank(model: ConfigDict) -> None:
    """Deltas must be smaller than full experts; only merges have them."""
    if not (model.num_experts and model.expert_rank):
        return
    if model.routing not in MERGED:
        raise ConfigError(
            f"config.model.expert_rank: got {model.expert_rank}; must be 0 with "
            f"config.model.routing={model.routing}, whose experts are not merged"
        )
    if model.expert_rank >= min(model.embed_dim, model.mlp_dim):
        raise ConfigError(
            f"config.model.expert_rank: got {model.expert_rank}; must be less than "
            f"config.model.embed_dim and mlp_dim ({model.embed_dim}, {model.mlp_dim}), or 0 for "
            "full experts"
        )


def check_segments(model: ConfigDict) -> None:
    """Where segments are routed by earlier ones, there must be two."""
    needs_segments = model.routing in MERGED or model.routing == "expert_choice_segment"
    if model.num_experts and needs_segments and model.segment_length == model.sequence_length:
        raise ConfigError(
            f"config.model.segment_length: got {model.segment_length}; must be less than "
            f"config.model.sequence_length ({model.sequence_length}) with experts: a single "
            "segment is never routed by another"
        )


def check_segment_schedule(model: ConfigDict, train: ConfigDict) -> None:
    """Every length must leave two segments, and must mean something; a dense model ignores it."""
    pairs = parse_schedule(train.segment_schedule)
    if not (pairs and model.num_experts):
        return
    if model.routing not in MERGED or model.routing == "uniform":
        raise ConfigError(
            f"config.train.segment_schedule: got {train.segment_schedule!r}; must be empty with "
            f"config.model.routing={model.routing}, which does not merge by segments"
        )
    longest = max(length for length, _ in pairs)
    if longest >= model.sequence_length:
        raise ConfigError(
            f"config.train.segment_schedule: got {longest}; must be less than "
            f"config.model.sequence_length ({model.sequence_length})"
        )
    shortest = min(length for length, _ in pairs)
    if shortest < shortest_segment(model.routing_source):
        raise ConfigError(
            f"config.train.segment_schedule: got {shortest}; must be at least 2 with "
            f"config.model.routing_source={model.routing_source}: the first token attends to the "
            "others"
        )


def check_top_k(model: ConfigDict, train: ConfigDict) -> None:
    """Merges can keep as many experts as there are; a dense model (no experts) ignores it."""
    k, experts = model.top_k_experts, model.num_experts
    if not (k and experts):
        return
    if k > experts:
        raise ConfigError(
            f"config.model.top_k_experts: got {k}; must be at most config.model.num_experts "
            f"({experts}), or 0 for all"
        )
    if model.routing not in MERGED or model.routing == "uniform":
        raise ConfigError(
            f"config.model.top_k_experts: got {k}; must be 0 with config.model.routing="
            f"{model.routing}, which has no weights to merge by"
        )
    if train.top_k_anneal_start > train.top_k_anneal_end:
        raise ConfigError(
            f"config.train.top_k_anneal_start: got {train.top_k_anneal_start}; must be at most "
            f"config.train.top_k_anneal_end ({train.top_k_anneal_end})"
        )


def check_train(train: ConfigDict) -> None:
    """A batch is divided into microbatches; the moments of AdamW must fade."""
    if train.global_batch_size % train.microbatches:
        raise ConfigError(
            f"config.train.microbatches: got {train.microbatches}; must be a divisor of "
            f"config.train.global_batch_size ({train.global_batch_size})"
        )
    if train.beta1 >= 1 or train.beta2 >= 1:
        raise ConfigError(
            f"config.train.beta1, beta2: got {train.beta1}, {train.beta2}; must be below 1"
        )


def check_phases(train: ConfigDict) -> None:
    """The dense warm-up must end before the run does, or the experts are never made."""
    if round(train.dense_warmup_fraction * train.steps) >= train.steps:
        raise ConfigError(
            f"config.train.dense_warmup_fraction: got {train.dense_warmup_fraction}; must leave at "
            f"least one of config.train.steps ({train.steps}) to the experts"
        )


def check_routing_source(model: ConfigDict) -> None:
    """Only Lory's causal rule has a choice of what routes a segment."""
    if model.num_experts and model.routing_source != "last" and model.routing != "causal":
        raise ConfigError(
            f"config.model.routing_source: got {model.routing_source!r}; must be last with "
            f"config.model.routing={model.routing}"
        )
    if model.num_experts and model.segment_length < shortest_segment(model.routing_source):
        raise ConfigError(
            f"config.model.segment_length: got {model.segment_length}; must be at least 2 with "
            f"config.model.routing_source={model.routing_source}: the first token attends to the "
            "others"
        )


def check_sparse(model: ConfigDict, train: ConfigDict) -> None:
    """Checks what only the sparse baselines need; a dense model (no experts) ignores it."""
    if not model.num_experts:
        return
    if model.balancing == "loss_free" and model.routing not in TOKEN_CHOICE:
        raise ConfigError(
            "config.model.balancing: got 'loss_free'; must be auxiliary with "
            f"config.model.routing={model.routing}; loss_free requires one of "
            f"{', '.join(TOKEN_CHOICE)}"
        )
    if model.routing not in SPARSE:
        return
    if model.mlp_bias:
        raise ConfigError(
            "config.model.mlp_bias: got True; must be false with config.model.routing="
            f"{model.routing}: the sparse baselines have no biases"
        )
    factor, experts = model.capacity_factor, model.num_experts
    choices = TOKEN_CHOICE.get(model.routing, max(1, round(factor)))
    if model.routing in GATED:
        choices = model.experts_per_token
    if choices > experts:
        raise ConfigError(
            f"config.model.num_experts: got {experts}; must be at least {choices}, the experts per "
            f"token of config.model.routing={model.routing}"
        )
    if model.routing == "remoe" and not model.router_init_scale:
        raise ConfigError(
            "config.model.router_init_scale: got 0.0; must be above 0 with "
            "config.model.routing=remoe, whose gates would stay 0"
        )
    if not factor:
        raise ConfigError("config.model.capacity_factor: got 0.0; must be above 0")
    if model.routing in EXPERT_CHOICE and model.first_segment_routing == "uniform":
        raise ConfigError(
            "config.model.first_segment_routing: got 'uniform'; must be self with "
            f"config.model.routing={model.routing}: equal weights leave experts nothing to choose"
        )
    rows = train.global_batch_size // train.microbatches
    if model.routing_group and rows % model.routing_group:
        raise ConfigError(
            f"config.model.routing_group: got {model.routing_group}; must be a divisor of {rows}, "
            "the sequences of a microbatch, or 0"
        )
