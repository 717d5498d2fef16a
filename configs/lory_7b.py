"""The paper's 7B model and its Lory variant: 32 layers, D = 4096, 200B tokens.

    experts=0    6.7B parameters (the dense baseline, "7B")
    experts=4    19.7B

    python -m lory_jax.train --config=configs/lory_7b.py:experts=4 --data=DIR --workdir=W

Every number is of paper section 4.1 and appendices D and E; F, which the paper does not print, is
LLaMA's rule and gives its parameter totals.
"""

from ml_collections import ConfigDict

from lory_jax.config import base_config, paper_recipe, parse_argument


def get_config(argument: str | None = None) -> ConfigDict:
    """`experts` is 0 or 4 in the paper; any number works."""
    config = paper_recipe(base_config(), tokens=200e9)
    config.model.num_experts = parse_argument(argument, experts=4)["experts"]
    config.model.num_layers = 32
    config.model.embed_dim = 4096
    config.model.num_heads = 32
    config.model.mlp_dim = 11_008
    return config
