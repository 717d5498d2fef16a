"""Lory, a fully differentiable mixture of experts for language models (arXiv 2405.03133), in JAX.

model = lory_jax.load("runs/local/lory")
model.generate(["def read(self"])
"""

from pathlib import Path
from typing import TYPE_CHECKING

from lory_jax import interrupts

interrupts.install_in_commands()

if TYPE_CHECKING:
    from lory_jax.api import Model


def load(workdir: str | Path, step: int | str = "newest") -> "Model":
    """Loads the model of a run; `lory_jax.api.Model` describes what it can do.

    Args:
      workdir: the run directory.
      step: "newest" or "best" (the lowest validation loss) among the intact checkpoints, or the
        step of one of them.

    Raises:
      InputError: `workdir` holds no run, or no such checkpoint, or it is damaged.
      ConfigError: `step` is none of the above.
    """
    # Imported here so that `import lory_jax` does not start JAX.
    from lory_jax.api import load as load_model

    return load_model(workdir, step)
