"""What the TPU compiler is asked for, by `train` and by `plan`, before JAX loads it.

On v5p and v6e, libtpu gathers parameters synchronously unless it is told otherwise. With these
flags, gathers run beside computing: 0.14 s of a step are waited for instead of 0.29 (1.5B with 32
experts on v5p-128, docs/scaling.md). On v5e they change nothing.
"""

import os

VARIABLE = "LIBTPU_INIT_ARGS"
FLAGS = (
    "xla_tpu_enable_async_collective_fusion",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather",
    "xla_tpu_enable_async_collective_fusion_multiple_steps",
    "xla_tpu_overlap_compute_collective_tc",
    "xla_enable_async_all_gather",
)


def set_tpu_flags() -> None:
    """Adds the flags that the user did not set to `LIBTPU_INIT_ARGS`; other devices ignore it."""
    given = os.environ.get(VARIABLE, "").split()
    named = {flag.lstrip("-").partition("=")[0] for flag in given}
    missing = [f"--{name}=true" for name in FLAGS if name not in named]
    os.environ[VARIABLE] = " ".join([*given, *missing])
