"""What routers learn without gradients: new values after each step, and who else keeps them."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from lory_jax.config import base_config, validate
from lory_jax.errors import ConfigError
from lory_jax.model.routing_rules import TOKEN_CHOICE
from lory_jax.model.transformer import assemble, build
from lory_jax.parallel import make_mesh
from lory_jax.run.phases import EXPERTS
from lory_jax.training.initialization_from import state_from
from lory_jax.training.loss import token_losses
from lory_jax.training.phases import Phases
from lory_jax.training.state import new_state
from lory_jax.training.step import make_train_step
from lory_jax.training.upcycle import make_upcycle
from tests.support.models import (
    assert_trees_close,
    constant_rate,
    params_of,
    random_tokens,
    tiny_config,
)

E = 4
OPTIMIZER = constant_rate(0.05, weight_decay=0.5)


def ffn(state_or_params):
    return state_or_params.get("params", state_or_params)["layers"]["ffn"]


def run_of(config):
    """What `state_from` needs of a run directory with random parameters after 7 steps."""
    found = config, jax.tree.map(np.copy, params_of(config)), 7
    return SimpleNamespace(load_params=lambda _: found)


def stepped(config, params, tokens, microbatches=1):
    """The state and the metrics after one step from these parameters."""
    step = make_train_step(config, OPTIMIZER, make_mesh(1, 1, 1), microbatches)
    return jax.device_get(step(new_state(config, OPTIMIZER, params), tokens))


@functools.cache
def how_routed(config):
    """The jitted `(params, tokens_BxL+1) -> Routed` of all layers, in training."""
    graph, _ = build(config)
    return jax.jit(lambda params, tokens: assemble(graph, params).hidden(tokens[:, :-1])[1])


def probabilities_of(config, params, tokens):
    """Probabilities `[Y, M, E]` of all tokens of a batch: the means of segments of one token."""
    one = dataclasses.replace(config, segment_length=1)
    routed = how_routed(one)(params, tokens)
    return np.asarray(routed.weights_BxNxE).reshape(config.num_layers, -1, E)


BIASED = [(routing, 3) for routing in TOKEN_CHOICE] + [("dropless_top2", 1)]
BIASED += [
    pytest.param(routing, 1, marks=pytest.mark.slow)
    for routing in TOKEN_CHOICE
    if routing != "dropless_top2"
]


@pytest.mark.parametrize(("routing", "microbatches"), BIASED)
def test_a_bias_moves_by_the_rate_towards_the_mean_load(routing, microbatches):
    """By the rate alone: neither the optimiser nor weight decay moves it."""
    config = tiny_config(
        routing=routing, balancing="loss_free", balancing_rate=0.25, capacity_factor=4.0
    )
    params, tokens = params_of(config), random_tokens(6, 15)
    new, metrics = stepped(config, params, tokens, microbatches)
    violations = []
    for y, p_MxE in enumerate(probabilities_of(config, params, tokens)):
        before = ffn(params)["choice_bias"][y]
        counts = np.zeros(E)
        for p in p_MxE:
            for e in np.argsort(-(p + before))[: TOKEN_CHOICE[routing]]:
                counts[e] += 1
        expected = [
            b + 0.25 * np.sign(counts.mean() - c) for b, c in zip(before, counts, strict=True)
        ]
        np.testing.assert_allclose(ffn(new)["choice_bias"][y], expected, rtol=1e-6)
        violations.append(counts.max() / counts.mean() - 1)
    np.testing.assert_allclose(metrics["load_violation"], np.mean(violations), rtol=1e-5)
    assert "load_balancing_loss" not in metrics


def test_the_bias_balances_a_router_that_prefers_one_expert():
    config = tiny_config(routing="dropless_top1", balancing="loss_free", balancing_rate=0.02)
    frozen = constant_rate(0.0)
    step = make_train_step(config, frozen, make_mesh(1, 1, 1))
    state, found = new_state(config, frozen, params_of(config)), []
    for i in range(120):
        state, metrics = step(state, random_tokens(16, 15, seed=i))
        found.append(float(metrics["load_violation"]))
    assert np.mean(found[-20:]) < 0.5 * np.mean(found[:5])


def test_remoe_raises_its_weight_until_gates_close():
    config = tiny_config(routing="remoe", experts_per_token=1)
    params, tokens = params_of(config), random_tokens(6, 15)
    new, metrics = stepped(config, params, tokens)
    assert metrics["experts_per_token"] > 1  # about half of all gates are open at first
    np.testing.assert_allclose(ffn(new)["l1_weight"], 1.2 * ffn(params)["l1_weight"], rtol=1e-6)
    all_open = tiny_config(routing="remoe", experts_per_token=4)
    new, _ = stepped(all_open, params, tokens)
    np.testing.assert_allclose(ffn(new)["l1_weight"], ffn(params)["l1_weight"] / 1.2, rtol=1e-6)


def test_remoe_minimises_the_weighted_l1_loss_beside_the_loss():
    """The first moment is 0.1 of the gradient of the sum; the weight itself has none."""
    config = tiny_config(routing="remoe")
    params, tokens = params_of(config), random_tokens(2, 15)
    graph, optimizer = build(config)[0], constant_rate(0.05, clip_norm=0.0)
    weight_Y = ffn(params)["l1_weight"]

    def total(params):
        x, routed = assemble(graph, params).hidden(tokens[:, :-1])
        nll = token_losses(x, params["head"], tokens[:, 1:])
        return nll.mean() + (weight_Y * routed.balance).mean()

    gradients = jax.jit(jax.grad(total))(params)
    step = make_train_step(config, optimizer, make_mesh(1, 1, 1))
    new, _ = step(new_state(config, optimizer, params), tokens)
    moments = jax.tree.map(lambda m: m / 0.1, new["opt_state"][0].mu)
    assert_trees_close(moments, gradients, 1e-5)
    assert not np.any(ffn(moments)["l1_weight"])


def test_thresholds_follow_the_cutoffs():
    config = tiny_config(routing="expert_threshold")
    params, tokens = params_of(config), random_tokens(6, 15)
    cutoff_YxE = np.asarray(how_routed(config)(params, tokens).cutoff_E)
    new, _ = stepped(config, params, tokens)
    # The mean that is divided by 1 - decay^updates, as Adam's moments are: 7 updates before this.
    raw = ffn(params)["threshold"] * (1 - 0.99**7)
    expected = (0.99 * raw + 0.01 * cutoff_YxE) / (1 - 0.99**8)
    np.testing.assert_allclose(ffn(new)["threshold"], expected, rtol=1e-5)
    np.testing.assert_array_equal(ffn(new)["threshold_updates"], 8.0)


def test_thresholds_of_the_first_steps_are_the_mean_of_their_cutoffs():
    """At a learning rate of 0, all steps of one batch have the same cut-offs."""
    config, frozen = tiny_config(routing="expert_threshold"), constant_rate(0.0)
    zeros = {
        "threshold": np.zeros((2, E), np.float32),
        "threshold_updates": np.zeros(2, np.float32),
    }
    params = params_of(config)
    params = {**params, "layers": {**params["layers"], "ffn": {**ffn(params), **zeros}}}
    step = make_train_step(config, frozen, make_mesh(1, 1, 1), threshold_warmup_end=3)
    state, tokens = new_state(config, frozen, params), random_tokens(6, 15)
    shares = []
    for updates in range(1, 6):
        state, metrics = step(state, tokens)
        shares.append(float(metrics["experts_per_token"]))
        np.testing.assert_array_equal(ffn(state)["threshold_updates"], updates)
        if updates == 1:
            first = np.asarray(ffn(state)["threshold"])
        elif updates <= 3:  # the second layer reads what thresholds let through, later
            np.testing.assert_allclose(ffn(state)["threshold"], first, rtol=1e-5)
    # Every expert takes its share of the batch in the warm-up; then the thresholds say the same.
    slots = -(-6 * 14 // E)
    np.testing.assert_allclose(shares, E * slots / (6 * 14), rtol=0.05)
    np.testing.assert_allclose(shares[:3], E * slots / (6 * 14), rtol=1e-6)


def test_a_run_takes_its_warm_up_of_thresholds_from_the_config():
    """In the first 2 of 10 steps experts take their share of the batch, and not in the third."""
    model_config = tiny_config(routing="expert_threshold")
    config = base_config()
    config.model.update(dataclasses.asdict(model_config))
    config.train.update(steps=10, dense_warmup_fraction=0.0, threshold_warmup_fraction=0.2)
    config.train.update(microbatches=1, global_batch_size=6)
    step = Phases(config, model_config, OPTIMIZER, make_mesh(1, 1, 1)).first().train_step(0)
    tokens, shares = random_tokens(6, 15), []
    for number in (1, 2):
        state = new_state(model_config, OPTIMIZER, params_of(model_config))
        state = {**state, "step": jax.numpy.asarray(number, state["step"].dtype)}
        shares.append(float(step(state, tokens)[1]["experts_per_token"]))
    share = E * -(-6 * 14 // E) / (6 * 14)
    assert shares[0] == pytest.approx(share) and abs(shares[1] - share) > 0.05


def test_a_skipped_step_moves_nothing():
    config = tiny_config(routing="dropless_top1", balancing="loss_free")
    params = params_of(config)
    broken = {**params, "head": np.full_like(params["head"], np.nan)}
    new, metrics = stepped(config, broken, random_tokens(2, 15))
    assert metrics["skipped"] == 1
    np.testing.assert_array_equal(ffn(new)["choice_bias"], ffn(params)["choice_bias"])


def test_upcycling_starts_the_bias_at_zero_and_its_moments_too():
    config = tiny_config(routing="dropless_top2", balancing="loss_free")
    dense = tiny_config(num_experts=0)
    mesh = make_mesh(1, 1, 1)
    state = make_upcycle(config, OPTIMIZER, mesh, 0)(new_state(dense, OPTIMIZER, params_of(dense)))
    adam = state["opt_state"][0]
    for tree in (state["params"], adam.mu, adam.nu):
        np.testing.assert_array_equal(ffn(tree)["choice_bias"], np.zeros((2, E)))
    expected = jax.tree.structure(new_state(config, OPTIMIZER, params_of(config)))
    assert jax.tree.structure(state) == expected


def test_other_rules_than_token_choice_refuse_a_bias():
    config = base_config()
    config.model.balancing = "loss_free"
    for routing in ("causal", "expert_choice_token"):
        config.model.routing = routing
        with pytest.raises(ConfigError, match=r"config\.model\.balancing"):
            validate(config)
    for routing in TOKEN_CHOICE:
        config.model.routing = routing
        validate(config)
    config.model.routing, config.model.num_experts = "causal", 0
    validate(config)


def test_a_run_that_starts_from_another_rule_has_its_own_adapted_parameter():
    """What the source lacks begins as from scratch, what only the source has is left behind."""
    top = tiny_config(routing="dropless_top1", balancing="loss_free")
    threshold = tiny_config(routing="expert_threshold")
    mesh = make_mesh(1, 1, 1)
    for found, target in ((tiny_config(), threshold), (top, threshold), (top, tiny_config())):
        state, phase = state_from([run_of(found)], target, OPTIMIZER, mesh)
        assert phase == EXPERTS
        expected = new_state(target, OPTIMIZER, params_of(target))
        assert jax.tree.structure(state) == jax.tree.structure(expected)
        np.testing.assert_array_equal(ffn(state)["router"], ffn(params_of(found))["router"])
    state, _ = state_from([run_of(top)], top, OPTIMIZER, mesh)
    np.testing.assert_array_equal(ffn(state)["choice_bias"], ffn(params_of(top))["choice_bias"])
