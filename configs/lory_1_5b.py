"""The paper's 1.5B model and its Lory variants: 48 layers, D = 1536, 150B tokens.

    experts=0    1.5B parameters (the dense baseline)
    experts=8    7.8B      experts=16   15.0B     experts=32   29.5B

    python -m lory_jax.train --config=configs/lory_1_5b.py:experts=8 --data=DIR --workdir=W

Every number is of paper section 4.1 and appendices D and E; F, which the paper does not print, is
LLaMA's rule and gives its parameter totals. Expected validation perplexity of 8 experts in the
paper: C4 10.6 against 10.7 dense, Wikipedia 7.6 against 7.8, Python 10.1 against 10.4.
"""

from ml_collections import ConfigDict

from lory_jax.config import base_config, paper_recipe, parse_argument


def get_config(argument: str | None = None) -> ConfigDict:
    """`experts` is 0, 8, 16 or 32 in the paper; any number works."""
    config = paper_recipe(base_config(), tokens=150e9)
    config.model.num_experts = parse_argument(argument, experts=8)["experts"]
    config.model.num_layers = 48
    config.model.embed_dim = 1536
    config.model.num_heads = 24
    config.model.mlp_dim = 4096
    return config
