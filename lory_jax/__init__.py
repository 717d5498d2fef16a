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


def load(workdir: str | Path) -> "Model":
    """The model of the newest intact checkpoint of a run; see `lory_jax.api.Model`.

    Raises:
      InputError: `workdir` holds no run, or none of its checkpoints can be read.
    """
    # Imported here so that `import lory_jax` does not start JAX.
    from lory_jax.api import load as load_model

    return load_model(workdir)
