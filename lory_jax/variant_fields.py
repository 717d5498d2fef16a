"""The config fields of what this project tries beyond the paper (docs/beyond.md), for schema.py."""

from lory_jax.fields import Field, bool_field, choice_field, int_field
from lory_jax.model.routing_rules import EXPERT_LAYERS, SOURCES
from lory_jax.segment_schedule import FORM, is_schedule

MODEL_VARIANTS = {
    "routing_source": choice_field(
        "what routes a segment: the mean of the last one (the paper), of all earlier ones, an "
        "average that halves with every segment, or attention of the last one's first token",
        *SOURCES,
    ),
    "expert_layers": choice_field(
        "which layers hold experts; the others hold a dense FFN",
        *EXPERT_LAYERS,
        of_experts=True,
    ),
    "expert_rank": int_field(
        0,
        "rank of what each expert adds to one FFN that all share; 0 means full experts",
        0,
        of_experts=True,
    ),
    "shared_expert": bool_field(
        False,
        "one more dense FFN beside the FFN of every layer, which all tokens share",
        is_architecture=True,
    ),
    "token_deltas": int_field(
        0,
        "small FFNs (F/16) beside the FFN of every layer, of which each token picks one",
        0,
        is_architecture=True,
    ),
}

TRAINING_VARIANTS = {
    "segment_schedule": Field(
        "",
        "segment lengths before model.segment_length, such as 128:0.25,64:0.5: 128 for the "
        "first quarter of the steps, 64 until half of them",
        FORM,
        is_schedule,
    ),
}
