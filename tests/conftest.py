"""All tests run on the CPU, whatever else the machine has; 8 devices are faked where needed.

Broadcasting over missing dimensions must be explicit: a wrong rank raises.
"""

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_rank_promotion", "raise")
