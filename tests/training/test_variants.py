"""Training the models beyond the paper: on several devices, from dense models, and grown."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lory_jax.errors import ConfigError
from lory_jax.parallel import make_mesh
from lory_jax.training import loop
from lory_jax.training.state import new_state
from lory_jax.training.step import make_train_step
from lory_jax.training.upcycle import grow, make_upcycle
from tests.support.in_process import NoSignal, train
from tests.support.models import (
    assert_close,
    assert_trees_close,
    constant_rate,
    forward,
    params_of,
    random_tokens,
    tiny_config,
)
from tests.support.tiny import run_worker, write_prepared, write_recipe
from tests.support.variants import VARIANTS

TOLERANCE = 2e-5  # float32, on the scale of each parameter; sums run in another order

ALL = pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)


@pytest.fixture(scope="module")
def report():
    return run_worker("variants_worker")


@pytest.mark.parametrize("name", VARIANTS)
def test_eight_devices_train_as_one(report, name):
    got = report[name]
    for what in ("losses", "nll", "gradients", "params"):
        assert got[what] <= TOLERANCE, (what, got[what])
    assert got["donated"] and got["compilations"] == 1
    for part, leaves in got["fraction"].items():
        for leaf, fraction in leaves.items():
            is_small = any(word in leaf for word in ("norm", "down_bias"))
            assert (fraction == 1.0) == is_small, (part, leaf)


@ALL
def test_upcycling_keeps_the_function_and_the_moments_of_what_it_does_not_copy(fields):
    lory = tiny_config(**fields)
    of_experts = {"expert_layers", "expert_rank"}
    dense = tiny_config(num_experts=0, **{k: v for k, v in fields.items() if k not in of_experts})
    optimizer, mesh = constant_rate(1e-2), make_mesh(1, 1, 1)
    state = new_state(dense, optimizer, params_of(dense))
    state, _ = make_train_step(dense, optimizer, mesh)(state, random_tokens(2, 15))
    before = jax.device_get(state)
    after = make_upcycle(lory, optimizer, mesh, seed=0)(state)
    expected_structure = jax.tree.structure(new_state(lory, optimizer, params_of(lory)))
    assert jax.tree.structure(after) == expected_structure
    assert_only_full_experts_are_redrawn(
        lory, after, make_upcycle(lory, optimizer, mesh, 0, 0.5)(state)
    )
    tokens = random_tokens(2, 14)
    expected, _ = forward(dense)(before["params"], tokens)
    logits, _ = forward(lory)(after["params"], tokens)
    assert_close(logits, expected, 1e-5)
    # Attention has no part in it: each layer's moments are where its parameters are.
    for found, old in (
        (after["params"], before["params"]),
        (after["opt_state"][0].mu, before["opt_state"][0].mu),
        (after["opt_state"][0].nu, before["opt_state"][0].nu),
    ):
        for stack, numbers in (
            ("layers", lory.layer_numbers),
            ("dense_layers", lory.dense_layer_numbers),
        ):
            if numbers:
                kept = jax.tree.map(lambda w, n=numbers: w[np.array(n)], old["layers"])
                got = dict(found[stack])
                ffn = got.pop("ffn")
                assert_trees_close(got, {k: kept[k] for k in got}, 0.0)
                if stack == "dense_layers" or "gate_a" in ffn:
                    assert_trees_close({k: ffn[k] for k in kept["ffn"]}, kept["ffn"], 0.0)


def assert_only_full_experts_are_redrawn(config, copied, redrawn):
    """Neither dense layers, shared experts and deltas, nor experts that add to one FFN."""
    adam = redrawn["opt_state"][0]
    for found, kept in (
        (redrawn["params"], copied["params"]),
        (adam.mu, copied["opt_state"][0].mu),
        (adam.nu, copied["opt_state"][0].nu),
    ):
        pairs = zip(jax.tree.leaves_with_path(found), jax.tree.leaves(kept), strict=True)
        changed = {
            jax.tree_util.keystr(path, simple=True, separator="/")
            for (path, new), old in pairs
            if np.any(np.asarray(new) != np.asarray(old))
        }
        matrices = {f"layers/ffn/{name}" for name in ("gate", "up", "down")}
        assert changed == (set() if config.expert_rank else matrices)


def test_growing_low_rank_experts_keeps_the_function_and_redraws_a_share():
    small, large = (tiny_config(num_experts=E, expert_rank=3) for E in (2, 4))
    params, tokens = params_of(small), random_tokens(2, 14)
    expected, r_small = forward(small)(params, tokens)
    logits, r_large = forward(large)(grow(params, 2, jax.random.key(1), 0.0), tokens)
    assert_close(logits, expected, 1e-5)
    assert_close(jnp.reshape(r_large, (*r_large.shape[:-1], 2, 2)).sum(-2), r_small, 1e-6)
    old, new = (p["layers"]["ffn"] for p in (params, grow(params, 2, jax.random.key(1), 0.25)))
    for name in ("gate_a", "down_b"):
        np.testing.assert_array_equal(new[name][:, :2], old[name])
        assert 0.1 < np.mean(np.asarray(new[name][:, 2:]) != old[name]) < 0.4
    np.testing.assert_array_equal(new["gate"], old["gate"])


def test_low_rank_experts_of_an_upcycled_model_part_at_once():
    """Their factors differ from the start, so gradients of the products that are zero do, too."""
    config, optimizer, mesh = tiny_config(expert_rank=3), constant_rate(1e-2), make_mesh(1, 1, 1)
    dense = tiny_config(num_experts=0)
    state = make_upcycle(config, optimizer, mesh, 0)(new_state(dense, optimizer, params_of(dense)))
    assert not np.any(state["params"]["layers"]["ffn"]["gate_b"])
    state, _ = make_train_step(config, optimizer, mesh)(state, random_tokens(2, 15))
    for name in ("gate_b", "up_b", "down_b"):
        w_ExP = np.asarray(state["params"]["layers"]["ffn"][name][0]).reshape(4, -1)
        assert np.abs(np.corrcoef(w_ExP) - np.eye(4)).max() < 0.9


def test_a_resumed_run_equals_one_that_was_never_stopped(tmp_path, monkeypatch):
    """Everything at once; resumed in the dense phase, and where segments still have 12 tokens."""
    monkeypatch.setattr(loop, "StopRequest", NoSignal)
    write_recipe(tmp_path)
    write_prepared(tmp_path / "data")
    fields = {
        "model__expert_layers": "every_second",
        "model__expert_rank": 2,
        "model__shared_expert": True,
        "model__token_deltas": 2,
        "train__segment_schedule": "12:0.8",
        "train__steps": 10,
        "train__validate_every_steps": 100,
        "checkpoint__every_steps": 2,
        "checkpoint__keep": 99,
    }
    whole = train(tmp_path, tmp_path / "whole", **fields)
    for step in (2, 6):
        resumed = tmp_path / f"resumed-{step}"
        shutil.copytree(tmp_path / "whole", resumed)
        for checkpoint in (resumed / "checkpoints").iterdir():
            if checkpoint.name.isdigit() and int(checkpoint.name) > step:
                shutil.rmtree(checkpoint)
        lines = train(tmp_path, resumed, **fields)
        assert [line["step"] for line in lines] == list(range(1, 11))
        for name in ("loss", "grad_norm", "router_entropy"):
            assert [line[name] for line in lines] == [line[name] for line in whole], (step, name)
    other = {name: value for name, value in fields.items() if "expert_" not in name}
    message = "config.model.expert_layers=every_second config.model.expert_rank=2$"
    with pytest.raises(ConfigError, match=message):
        train(tmp_path, tmp_path / "other", init_from=(tmp_path / "whole",), **other)
