"""The two phases of a run: dense warm-up, then training of the experts."""

import dataclasses

from lory_jax.model.config import ModelConfig

DENSE, EXPERTS = "dense", "experts"


def phase_config(config: ModelConfig, phase: str) -> ModelConfig:
    """The model that a phase trains: during the dense warm-up, the dense baseline."""
    return dataclasses.replace(config, num_experts=0) if phase == DENSE else config
