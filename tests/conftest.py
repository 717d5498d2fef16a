"""All tests run on the CPU, whatever else the machine has; 8 devices are faked where needed.

Broadcasting over missing dimensions must be explicit: a wrong rank raises.

Nearly all the time of the tests goes into compiling tiny programs once, so XLA optimises them less
than a user's, here and in every process that a test starts. With `XLA_FLAGS=` (or any flags) in the
environment, the tests run what users run.
"""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import gc

import jax
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="module", autouse=True)
def forget_compiled_programs():
    """Linux gives a process 65,530 memory maps; thousands of programs would take them all."""
    yield
    jax.clear_caches()
    gc.collect()
