"""Tiny models and their jitted functions, compiled once per test session."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from lory_jax.config import base_config, section_defaults
from lory_jax.model.config import ModelConfig
from lory_jax.model.routing import Routing
from lory_jax.model.transformer import assemble, build, init_params
from lory_jax.training.optimizer import Optimizer, make_optimizer

VOCAB = 37


def tiny_config(**fields) -> ModelConfig:
    """A two-layer Lory of 4 experts in float32; any field can be given.

    What is not given has its default of the schema; "auto" is not, so that all platforms agree.
    """
    tiny = dict(
        compute_dtype="float32",
        attention="xla",
        merged_ffn="blocks",
        grouped_product="blocks",
        vocab_size=VOCAB,
        num_layers=2,
        embed_dim=16,
        num_heads=2,
        mlp_dim=24,
        num_experts=4,
        sequence_length=14,
        segment_length=4,
    )
    return ModelConfig(**{**section_defaults("model"), **tiny, **fields})


def constant_rate(rate: float, **fields) -> Optimizer:
    """AdamW as in `config.train`, at one learning rate in all steps; any field can be given."""
    train = base_config().train
    train.update(learning_rate=rate, warmup_fraction=0.0, final_learning_rate_fraction=1.0)
    train.update(fields)
    return make_optimizer(train)


@functools.cache
def params_of(config: ModelConfig, seed: int = 0):
    """Random parameters drawn by numpy, which compiles nothing; norms are not one."""
    shapes = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        if name.endswith("norm"):
            return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        if name == "choice_bias":
            return rng.normal(scale=0.2, size=leaf.shape).astype(np.float32)
        if name == "threshold_updates":
            return np.full(leaf.shape, 7.0, np.float32)
        if name in ("threshold", "l1_weight"):
            return rng.uniform(0.1, 0.4, size=leaf.shape).astype(np.float32)
        scale = 2.0 if name == "router" else 1.0  # far from uniform routing
        return (rng.normal(size=leaf.shape) * scale * config.embed_dim**-0.5).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


@functools.cache
def forward(config: ModelConfig, kind: str | None = None):
    """The jitted `(params, tokens, prompt_lengths) -> (logits, weights)`."""
    graph, _ = build(config)

    @jax.jit
    def run(params, tokens_BxL, prompt_lengths_B=None):
        routing = None if kind is None else Routing(kind, prompt_lengths_B)
        return assemble(graph, params)(tokens_BxL, routing)

    return run


@functools.cache
def loss_and_gradients(config: ModelConfig):
    """The jitted `(params, tokens_BxL+1) -> (mean loss, gradients)`, the loss from the logits."""
    graph, _ = build(config)

    def loss(params, tokens_BxL1):
        logits, _ = assemble(graph, params)(tokens_BxL1[:, :-1])
        log_probabilities = jax.nn.log_softmax(logits)
        chosen = jnp.take_along_axis(log_probabilities, tokens_BxL1[:, 1:, None], axis=-1)
        return -jnp.mean(chosen)

    return jax.jit(jax.value_and_grad(loss))


def float64(tree):
    """A tree of numpy float64 arrays, for the references."""
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def random_tokens(batch: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, (batch, length)).astype(np.int32)


def assert_close(actual, expected, tolerance: float, what: str = "") -> None:
    """The largest difference is at most `tolerance` times the largest expected magnitude."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, (what, actual.shape, expected.shape)
    scale = max(np.max(np.abs(expected)), 1e-6)
    error = np.max(np.abs(actual - expected)) / scale
    assert error <= tolerance, f"{what}: relative error {error:.2e} > {tolerance:.0e}"


def assert_trees_close(actual, expected, tolerance: float) -> None:
    """`assert_close` on every leaf, each on its own scale; the trees have the same structure."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    pairs = zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True)
    for (path, a), e in pairs:
        assert_close(a, e, tolerance, jax.tree_util.keystr(path))
