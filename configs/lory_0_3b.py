"""The paper's 0.3B model and its Lory variants: 24 layers, D = 1024, 150B tokens.

    experts=0    0.37B parameters (the dense baseline, "0.3B")
    experts=8    1.8B      experts=16   3.5B      experts=32   6.8B

    python -m lory_jax.train --config=configs/lory_0_3b.py:experts=8 --data=DIR --workdir=W

Every number is of paper section 4.1 and appendices D and E; F, which the paper does not print, is
LLaMA's rule and gives its parameter totals. Expected validation perplexity of 8 experts in the
paper: C4 13.3 against 13.8 dense, Wikipedia 9.2 against 10.3, Python 12.5 against 15.2.
"""

from ml_collections import ConfigDict

from lory_jax.config import base_config, paper_recipe, parse_argument


def get_config(argument: str | None = None) -> ConfigDict:
    """`experts` is 0, 8, 16 or 32 in the paper; any number works."""
    config = paper_recipe(base_config(), tokens=150e9)
    config.model.num_experts = parse_argument(argument, experts=8)["experts"]
    config.model.num_layers = 24
    config.model.embed_dim = 1024
    config.model.num_heads = 16
    config.model.mlp_dim = 2816
    return config
