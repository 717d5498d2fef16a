"""The config fields of data, and of how a run is saved and split over devices, for schema.py."""

from lory_jax.data.mixture import is_mixture
from lory_jax.fields import Field, all_may_change, bool_field, float_field, int_field

CHECKPOINT = all_may_change(
    {
        "every_steps": int_field(1000, "steps between checkpoints", 1),
        "every_minutes": float_field(
            0.0, "also save a checkpoint after this many minutes; 0 turns this off", 0.0
        ),
        "keep": int_field(2, "newest checkpoints to keep", 1),
        "keep_best": int_field(0, "also keep this many checkpoints of lowest validation loss", 0),
        "keep_every_steps": int_field(
            0, "also keep checkpoints at multiples of this many steps; 0 turns this off", 0
        ),
    }
)

PARALLEL = all_may_change(
    {
        "data": int_field(1, "devices on the mesh axis data", 1),
        "fsdp": int_field(0, "devices on the mesh axis fsdp; 0 means all that remain", 0),
        "tensor": int_field(1, "devices on the mesh axis tensor", 1),
    }
)

DATA = all_may_change(
    {
        "min_document_bytes": int_field(200, "shorter documents are dropped", 1),
        "max_document_bytes": int_field(100_000, "longer documents are cut into pieces", 1),
        "max_domain_bytes": int_field(0, "bytes kept per domain; 0 keeps all", 0),
        "validation_fraction": float_field(
            0.04, "share of each domain's bytes for validation", 0, 0.5
        ),
        "test_fraction": float_field(0.06, "share of each domain's bytes for test", 0, 0.5),
        "confirmation_fraction": float_field(
            0.0,
            "share of each domain's bytes for a second test set, to confirm what was chosen before",
            0,
            0.5,
        ),
        "embedding_dim": int_field(256, "dimensions of the document embedding", 2),
        "num_neighbors": int_field(20, "neighbours per document in the similarity graph", 1),
        "tokenizer_sample_bytes": int_field(
            20_000_000, "bytes of training text that the tokenizer is trained on", 1
        ),
        "shard_documents": int_field(
            100_000, "training documents that are put in order together, at most", 2
        ),
        "drop_near_duplicates": bool_field(
            True, "leave out documents that repeat a neighbour almost word for word"
        ),
        "eval_instances": int_field(
            0, "instances of each domain in each held-out set; 0 keeps all", 0
        ),
        "instances_per_shard": int_field(8192, "instances in one ArrayRecord file", 1),
    }
)
DATA |= {
    # Read by `train`, not by `prepare`: it is no setting of prepared data.
    "mixture": Field(
        "",
        "shares of the training instances by domain, such as books=2,web=0.5; empty draws each "
        "instance once per epoch",
        "name=weight,… with each domain once, or empty",
        is_mixture,
    ),
}
