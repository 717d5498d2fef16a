"""Every config field, declared once: default, meaning, check, and what a change of it does.

Only this file, running_fields.py and variant_fields.py list fields. Other code asks:
`find_field`, `fields_where`, `section_defaults`, `may_change`. It imports nothing heavy, so that
`--help` is fast.
"""

import difflib
from typing import Any

from lory_jax.errors import ConfigError, shorten
from lory_jax.fields import Field, bool_field, choice_field, float_field, int_field
from lory_jax.model.routing_rules import MERGED, SPARSE
from lory_jax.running_fields import CHECKPOINT, DATA, PARALLEL
from lory_jax.variant_fields import MODEL_VARIANTS, TRAINING_VARIANTS

SCHEMA: dict[str, dict[str, Field]] = {
    "model": {
        "vocab_size": int_field(
            32_000, "tokens in the vocabulary", 259, is_architecture=True, is_size=True
        ),
        "num_layers": int_field(24, "transformer layers", 1, is_architecture=True, is_size=True),
        "embed_dim": int_field(1024, "model width D", 2, is_architecture=True, is_size=True),
        "num_heads": int_field(16, "attention heads H", 1, is_architecture=True, is_size=True),
        "num_kv_heads": int_field(
            0,
            "heads of keys and values G; 0 means as many as num_heads",
            0,
            is_architecture=True,
        ),
        "head_dim": int_field(
            0, "width K of a head; 0 means embed_dim / num_heads", 0, is_architecture=True
        ),
        "attention_bias": choice_field(
            "biases of attention: none, of queries, keys and values (Qwen2), or all four",
            "none",
            "qkv",
            "all",
            is_architecture=True,
        ),
        "mlp_bias": bool_field(
            False, "the FFN, and each expert, has biases, merged alike", is_architecture=True
        ),
        "mlp_dim": int_field(
            2816,
            "hidden width F of the FFN, and of each expert",
            1,
            is_architecture=True,
            is_size=True,
        ),
        # Not architecture: a run with experts may start from the parameters of a dense model.
        "num_experts": int_field(
            8, "expert FFNs per layer E; 0 is the dense baseline", 0, is_size=True
        ),
        "sequence_length": int_field(4096, "tokens per training instance L", 1, is_size=True),
        "segment_length": int_field(256, "tokens per routing segment T", 1, is_size=True),
        "routing": choice_field(
            "causal is Lory; the others are baselines (docs/baselines.md)", *MERGED, *SPARSE
        ),
        **MODEL_VARIANTS,
        "first_segment_routing": choice_field(
            "routing of segment 1: by its own mean (the paper) or 1/E each (strictly causal)",
            "self",
            "uniform",
        ),
        "capacity_factor": float_field(
            1.0,
            "sparse baselines: total expert slots divided by total token-expert assignments",
            0.0,
        ),
        "experts_per_token": int_field(
            1, "remoe, expert_threshold: experts per token that training aims at", 1
        ),
        "routing_group": int_field(
            0,
            "sparse baselines: sequences that compete for slots; 0 means a whole microbatch",
            0,
        ),
        "balancing": choice_field(
            "where tokens choose experts, what balances the load: a loss, or a bias per expert "
            "that is adjusted after each step",
            "auxiliary",
            "loss_free",
        ),
        "load_balancing_weight": float_field(
            0.01,
            "balancing=auxiliary: weight of the load-balancing loss, summed over layers",
            0.0,
        ),
        "balancing_rate": float_field(
            1e-3, "balancing=loss_free: how far a step moves the bias of an expert", 0.0
        ),
        "top_k_experts": int_field(
            0,
            "experts that a merge keeps: the K of largest weight, renormalised; 0 keeps all",
            0,
        ),
        "router_init_scale": float_field(
            0.23, "the router is initialised from N(0, (scale/sqrt(D))^2)", 0.0
        ),
        "ffn_init_scale": float_field(
            1.0,
            "a dense FFN's matrices are initialised with the standard deviation "
            "scale/sqrt(fan-in); tune it like the learning rate, on both sides of a comparison",
            0.0,
        ),
        "expert_init_scale": float_field(
            1.0, "the same for experts that are trained from scratch, without dense warm-up", 0.0
        ),
        "tie_embeddings": bool_field(
            False, "the output head is the transposed embedding", is_architecture=True
        ),
        "rope_theta": float_field(
            10_000.0, "base of the rotary position embedding", 1.0, is_architecture=True
        ),
        "rope_scaling": choice_field(
            "which rotary frequencies are scaled down: none, all, or the low ones (Llama 3.1, "
            "YaRN); dynamic is none, and scales beyond sequence_length after an export",
            "none",
            "linear",
            "llama3",
            "yarn",
            "dynamic",
            is_architecture=True,
        ),
        "rope_factor": float_field(
            1.0, "what rope_scaling divides the frequencies by", 1.0, is_architecture=True
        ),
        "rope_low_frequency_factor": float_field(
            1.0,
            "llama3: wavelengths above rope_original_length / this value are scaled in full",
            1e-6,
            is_architecture=True,
        ),
        "rope_high_frequency_factor": float_field(
            4.0,
            "llama3: wavelengths below rope_original_length / this value are not scaled",
            1e-6,
            is_architecture=True,
        ),
        "rope_original_length": int_field(
            8192, "llama3, yarn: sequence length before scaling", 1, is_architecture=True
        ),
        "rope_beta_fast": float_field(
            32.0,
            "yarn: pairs that turn more often within rope_original_length are not scaled",
            1e-6,
            is_architecture=True,
        ),
        "rope_beta_slow": float_field(
            1.0,
            "yarn: pairs that turn less often within rope_original_length are scaled in full",
            1e-6,
            is_architecture=True,
        ),
        "rope_attention_factor": float_field(
            0.0,
            "yarn: what queries and keys are multiplied by; 0 means 0.1 ln(rope_factor) + 1",
            0.0,
            is_architecture=True,
        ),
        "rope_truncate": bool_field(
            True, "yarn: the border pairs are rounded to whole ones", is_architecture=True
        ),
        "norm_epsilon": float_field(
            1e-5, "added to the mean square in RMSNorm", 0.0, 1.0, is_architecture=True
        ),
        "compute_dtype": choice_field("type of matrix products", "bfloat16", "float32"),
        "remat": choice_field(
            "what the backward pass keeps of a layer: all, only its input (full), products (dots), "
            "or, beside its input, the flash kernel's result, q, k and v, the FFN's gate and up",
            *("none", "full", "dots", "attention", "attention+qkv", "attention+hidden"),
            may_change=True,
        ),
        "attention": choice_field(
            "auto is cudnn on GPUs (xla with document_mask, which cudnn cannot compute), paired on "
            "TPUs where it can run (heads 64 wide), splash where not, else xla",
            "auto",
            "xla",
            "cudnn",
            "splash",
            "paired",
            may_change=True,
        ),
        "merged_ffn": choice_field(
            "auto is kernel on TPUs if it fits, else blocks; whole on CPUs and GPUs; einsum with "
            "mlp_bias",
            "auto",
            "einsum",
            "whole",
            "blocks",
            "kernel",
        ),
        "merged_ffn_group": int_field(
            0,
            "merged_ffn=kernel: the most segments merged at a time; 0 lets the kernels choose",
            0,
        ),
        "grouped_product": choice_field(
            "sparse baselines without slots: blocks is a loop over blocks of each expert's tokens, "
            "ragged is JAX's ragged_dot (all experts for all tokens with remoe and "
            "expert_threshold); auto is blocks on CPUs",
            "auto",
            "ragged",
            "blocks",
            may_change=True,
        ),
        "attention_sharding": choice_field(
            "what is split over the mesh axis tensor: sequences, or heads (for more devices than "
            "sequences)",
            "batch",
            "heads",
            may_change=True,
        ),
        "document_mask": bool_field(
            False, "attention stays inside documents, each of which begins at a BOS"
        ),
        "bos_id": int_field(0, "document_mask: the id of BOS, as the tokenizer has it", 0),
        "scan_layers": bool_field(True, "scan over the layers rather than unroll them"),
    },
    "train": {
        "steps": int_field(1000, "optimiser steps", 1),
        "global_batch_size": int_field(256, "instances per step over all devices", 1),
        "microbatches": int_field(
            1, "parts of a batch whose gradients are accumulated", 1, may_change=True
        ),
        "seed": int_field(0, "seed of initialisation and of the data order", 0),
        "learning_rate": float_field(2e-4, "peak learning rate", 0.0),
        "warmup_fraction": float_field(0.05, "share of the steps with linear warm-up", 0.0, 1.0),
        "final_learning_rate_fraction": float_field(
            0.1, "final learning rate divided by the peak", 0.0, 1.0
        ),
        "dense_warmup_fraction": float_field(
            0.05, "share of the steps that train the dense model before upcycling", 0.0, 1.0
        ),
        "upcycle_redraw": float_field(
            0.0,
            "share of every expert's entries drawn anew when experts are copied: from the dense "
            "FFN (Drop-Upcycling), or in growth; with expert_rank, only growth copies any",
            0.0,
            1.0,
        ),
        "upcycle_rewarm_fraction": float_field(
            0.0,
            "share of the steps after upcycling with a second linear warm-up; 0 for none",
            0.0,
            1.0,
        ),
        "threshold_warmup_fraction": float_field(
            0.2,
            "expert_threshold: share of the steps in which experts take their share of the batch, "
            "while their thresholds are found",
            0.0,
            1.0,
        ),
        **TRAINING_VARIANTS,
        "top_k_anneal_start": float_field(
            0.0,
            "share of the steps after which the number of merged experts falls, linearly, from E "
            "to config.model.top_k_experts",
            0.0,
            1.0,
        ),
        "top_k_anneal_end": float_field(
            0.5, "share of the steps after which it has reached top_k_experts", 0.0, 1.0
        ),
        "top_k_gradient": choice_field(
            "what routers learn from with top_k_experts: the renormalised weights of the experts "
            "that are kept, or, straight through, those of all experts",
            "renormalised",
            "straight_through",
        ),
        "beta1": float_field(0.9, "AdamW: decay of the first moment", 0.0, 1.0),
        "beta2": float_field(0.95, "AdamW: decay of the second moment", 0.0, 1.0),
        "epsilon": float_field(1e-8, "AdamW: added to the root of the second moment", 0.0),
        "first_moment_dtype": choice_field(
            "AdamW: type of the first moment", "float32", "bfloat16"
        ),
        "weight_decay": float_field(0.1, "AdamW: decoupled decay of matrices (not of norms)", 0.0),
        "clip_norm": float_field(1.0, "largest global gradient norm; 0 turns clipping off", 0.0),
        "log_every_steps": int_field(10, "steps between console lines", 1, may_change=True),
        "validate_every_steps": int_field(100, "steps between validations", 1, may_change=True),
        "validation_batches": int_field(
            8, "batches per domain in a validation inside the loop", 1, may_change=True
        ),
        "max_skipped_steps": int_field(
            10,
            "consecutive steps with a NaN or infinite loss or gradient that stop the run",
            1,
            may_change=True,
        ),
    },
    "checkpoint": CHECKPOINT,
    "parallel": PARALLEL,
    # Read by `prepare`; a run is bound to its data by the hash of their manifest.
    "data": DATA,
}


def find_field(name: str) -> Field:
    """Returns the schema's field `section.name`, or raises with the nearest name."""
    section, _, key = name.partition(".")
    field = SCHEMA.get(section, {}).get(key)
    if field is None:
        known = [f"{s}.{k}" for s, fields in SCHEMA.items() for k in fields]
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise ConfigError(f"config.{shorten(name)}: no such field; did you mean config.{near}?")
    return field


def fields_where(section: str, **properties: bool) -> list[str]:
    """The names of a section's fields with these properties, such as `is_architecture=True`."""
    return [
        name
        for name, field in SCHEMA[section].items()
        if all(getattr(field, key) == value for key, value in properties.items())
    ]


def section_defaults(section: str) -> dict[str, Any]:
    """Every field of a section at its default. A field younger than a run had its default."""
    return {name: field.default for name, field in SCHEMA.get(section, {}).items()}


def may_change(section: str, name: str) -> bool:
    """Whether a run may be resumed with another value of a field.

    A field of an older version, which the schema no longer has, may change where most of its
    section may.
    """
    fields = SCHEMA.get(section, {})
    if name in fields:
        return fields[name].may_change
    return 2 * sum(field.may_change for field in fields.values()) > len(fields)


def describe_fields() -> str:
    """Returns one line per field for `--help`."""
    lines = [
        f"  --config.{section}.{name}  {field.meaning} ({field.accepts}; {field.default!r})"
        for section, fields in SCHEMA.items()
        for name, field in fields.items()
    ]
    return "config fields (meaning, accepted values, default of the schema):\n" + "\n".join(lines)
