"""A small Lory that trains on two CPU cores: bash launch/local.sh.

It has the scale of the study (docs/study.md). Its learning rate and the start of its FFN are those
that the study found best on validation, for Lory and for the dense baseline alike.
"""

from ml_collections import ConfigDict

from lory_jax.config import base_config, parse_argument


def get_config(argument: str | None = None) -> ConfigDict:
    """`experts=8` is Lory with 8 experts per layer (default), `experts=0` the dense baseline."""
    config = base_config()
    model = config.model
    model.num_experts = parse_argument(argument, experts=8)["experts"]
    model.vocab_size = 512
    model.num_layers = 4
    model.embed_dim = 32
    model.num_heads = 2
    model.mlp_dim = 88
    model.sequence_length = 256
    model.segment_length = 32
    model.router_init_scale = 1.0
    model.compute_dtype = "float32"
    model.remat = "full"  # what a layer keeps then fits a CPU's cache: twice as fast
    model.ffn_init_scale = 0.1
    train = config.train
    train.steps = 1500
    train.global_batch_size = 16
    train.microbatches = 2
    train.learning_rate = 1.2e-2
    train.log_every_steps = 20
    train.validate_every_steps = 250
    config.checkpoint.every_steps = 250
    data = config.data
    data.max_domain_bytes = 10_000_000
    data.confirmation_fraction = 0.04
    data.tokenizer_sample_bytes = 4_000_000
    return config
