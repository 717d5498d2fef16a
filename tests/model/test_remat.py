"""Rematerialisation recomputes what its name says, and no more, as the program shows."""

from collections import Counter

import jax
import numpy as np
import pytest
from flax import nnx

from lory_jax.model.merged_ffn import kernel_products as kernels
from lory_jax.model.parameters import Initializer
from lory_jax.model.remat import rematerialized
from lory_jax.model.routing import Routing
from lory_jax.model.transformer import Block
from lory_jax.schema import SCHEMA
from tests.support.models import tiny_config

PAIRED, SPLASH = "paired_attention_forward", "splash_mha_fwd_residuals"
GATE_AND_UP = "merged_to_hidden"


def operations(jaxpr, found=None):
    """Matrix products outside of kernels, and kernels by name."""
    found = Counter() if found is None else found
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "pallas_call":
            found[equation.params["name"]] += 1
            continue
        found[name] += name == "dot_general"
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    operations(inner, found)
    return +found


def layer_operations(policy, **fields):
    """What one layer's value and gradient compute under a policy."""
    sizes = {"embed_dim": 128, "mlp_dim": 128, "sequence_length": 128, "segment_length": 32}
    config = tiny_config(**sizes, **fields)
    graph, state = nnx.split(nnx.eval_shape(lambda: Block(Initializer(jax.random.key(0)), config)))
    params = nnx.to_pure_dict(state)

    def run(x, params):
        return nnx.merge(graph, params)(x, Routing("causal"))[0]

    def loss(x, params):
        return rematerialized(run, policy)(x, params).sum()

    x = jax.ShapeDtypeStruct((2, 128, 128), np.float32)
    return operations(jax.make_jaxpr(jax.grad(loss, (0, 1)))(x, params).jaxpr)


QKV, OUT, FFN = 3, 1, 2  # products: query, key, value; output; gate and up

# What is computed again beside norms and other elementwise work.
RECOMPUTED = {
    "none": {},
    "full": {"dot_general": QKV + OUT + FFN, "flash": 1},
    "attention": {"dot_general": QKV + OUT + FFN},
    "attention+qkv": {"dot_general": OUT + FFN},
    "attention+hidden": {"dot_general": QKV + OUT},
    "dots": {},
}


def test_every_policy_of_the_config_is_tested():
    accepted = SCHEMA["model"]["remat"].accepts.removeprefix("one of ").split(", ")
    assert set(accepted) == set(RECOMPUTED)


@pytest.mark.parametrize("policy", RECOMPUTED)
@pytest.mark.parametrize("attention", ["paired", "splash"])
def test_a_dense_layer_recomputes_what_the_policy_says(policy, attention):
    fields = {"num_experts": 0, "attention": attention}
    extra = layer_operations(policy, **fields) - layer_operations("none", **fields)
    # JAX keeps splash's kernel though its results are unused; the compiler drops it.
    extra.pop(SPLASH, None)
    expected = Counter(RECOMPUTED[policy])
    flash = {PAIRED: expected["flash"]} if attention == "paired" else {}
    assert extra == +Counter({"dot_general": expected["dot_general"], **flash})


@pytest.mark.parametrize("policy", RECOMPUTED)
def test_a_lory_layer_recomputes_what_the_policy_says(policy, monkeypatch):
    interpreted = kernels.kernel_products(interpret=True)
    monkeypatch.setattr(kernels, "kernel_products", lambda: interpreted)
    fields = {"attention": "paired", "merged_ffn": "kernel"}
    extra = layer_operations(policy, **fields) - layer_operations("none", **fields)
    expected = Counter(RECOMPUTED[policy])
    recomputes_ffn = policy != "none" and "hidden" not in policy and policy != "dots"
    attention = expected["dot_general"] - FFN * recomputes_ffn
    assert extra[PAIRED] == expected["flash"]
    assert extra[GATE_AND_UP] == recomputes_ffn, "one kernel merges and makes gate and up"
    # The router is small; its products are computed again.
    router = layer_operations("none", **fields)["dot_general"] - 3 * (QKV + OUT)
    assert attention <= extra["dot_general"] <= attention + router
    assert set(extra) <= {"dot_general", PAIRED, GATE_AND_UP}
