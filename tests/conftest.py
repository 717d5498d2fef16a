"""All tests run on the CPU, whatever else the machine has; 8 devices are faked where needed."""

import jax

jax.config.update("jax_platforms", "cpu")
