"""The config fields of how a run is saved and split over devices, for schema.py."""

from lory_jax.fields import all_may_change, float_field, int_field

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
