"""The scale of the study: four layers of width 32, contexts of 256 tokens in segments of 32.

A run of 1,500 steps takes a few minutes on one core. The FFN holds 41 % of the dense model's
parameters. configs/local.py has this scale, too; these settings stay as they are, because the
committed runs were made with them. What families tune is set by the study (tools/study/arms.py).
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
    # A step takes half the time on a CPU: what a layer keeps fits the cache. Only the gradients of
    # expert choice, remoe and expert_threshold change: their groups of tokens are microbatches.
    model.remat = "full"
    train = config.train
    train.microbatches = 2
    train.steps = 1500
    train.global_batch_size = 16
    train.learning_rate = 1.6e-2
    train.log_every_steps = 20
    train.validate_every_steps = 250
    config.checkpoint.every_steps = 250
    data = config.data
    data.max_domain_bytes = 0
    data.confirmation_fraction = 0.04
    data.tokenizer_sample_bytes = 4_000_000
    return config
