"""`convert prune`: a run with only the experts of a domain."""

import numpy as np
import pytest

import lory_jax
from lory_jax.conversion.prune import keep_experts, prune_run
from lory_jax.errors import InputError
from lory_jax.generation.merge import domain_routing
from lory_jax.run.directory import RunDirectory
from tests.support.models import forward, params_of, tiny_config
from tests.support.tiny import verb, write_prepared, write_recipe

TOKENS = np.random.default_rng(0).integers(0, 37, (2, 14)).astype(np.int32)


@pytest.mark.parametrize("mlp_bias", [False, True])
def test_all_experts_in_another_order_are_the_same_model(mlp_bias):
    config = tiny_config(mlp_bias=mlp_bias, merged_ffn="einsum")
    params = params_of(config)
    order_YxE = np.array([[2, 0, 3, 1], [1, 3, 2, 0]])
    logits, weights = forward(config)(params, TOKENS)
    found, found_weights = forward(config)(keep_experts(params, order_YxE), TOKENS)
    np.testing.assert_allclose(found, logits, atol=1e-5)
    for y, order in enumerate(order_YxE):
        np.testing.assert_allclose(found_weights[y], weights[y][..., order], atol=1e-6)


def test_routers_choose_among_the_kept_experts_as_before():
    """In the first layer, whose router reads the same: the old weights, renormalised."""
    config, kept_YxK = tiny_config(), np.array([[0, 3], [1, 2]])
    params = params_of(config)
    pruned = keep_experts(params, kept_YxK)
    _, weights = forward(config)(params, TOKENS)
    _, found = forward(tiny_config(num_experts=2))(pruned, TOKENS)
    old = np.asarray(weights)[0][..., kept_YxK[0]]
    np.testing.assert_allclose(found[0], old / old.sum(axis=-1, keepdims=True), atol=1e-6)
    for name in ("gate", "up", "down"):
        for y, kept in enumerate(kept_YxK):
            expected = params["layers"]["ffn"][name][y, kept]
            np.testing.assert_array_equal(pruned["layers"]["ffn"][name][y], expected)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    data, recipe = write_prepared(root / "data"), write_recipe(root)
    result = verb("train", f"--config={recipe}", f"--data={data}", f"--workdir={root / 'run'}")
    assert result.returncode == 0, result.stderr
    return root / "run"


def test_a_pruned_run_holds_the_experts_that_the_domain_weights_most(run, tmp_path):
    flags = ["--domain=threes", "--experts=2", f"--out={tmp_path / 'pruned'}"]
    result = verb("convert", "prune", f"--workdir={run}", *flags)
    assert result.returncode == 0, result.stderr
    assert "share of the routing of threes" in result.stdout and "MiB now" in result.stdout
    old, new = lory_jax.load(run), lory_jax.load(tmp_path / "pruned")
    assert new.config.num_experts == 2
    directory = RunDirectory(run)
    rows = directory.open_data().held_out_with_instances("validation")["threes"][:, :-1]
    r_YxE = domain_routing(old.config, old.params, rows)
    for y in range(2):
        most = sorted(np.argsort(r_YxE[y])[-2:])
        expected = old.params["layers"]["ffn"]["gate"][y][np.array(most)]
        np.testing.assert_array_equal(new.params["layers"]["ffn"]["gate"][y], expected)
    measured = verb("evaluate", f"--workdir={tmp_path / 'pruned'}")
    assert measured.returncode == 0, measured.stderr
    assert new.generate("a", max_new_tokens=3, temperature=0.0)


@pytest.mark.parametrize(
    ("domain", "experts", "message"),
    [("fives", 2, "domain: got 'fives'"), ("ones", 5, "experts: got 5, must be 1 to 4")],
)
def test_what_cannot_be_pruned_is_refused(run, tmp_path, domain, experts, message):
    with pytest.raises(InputError, match=message):
        prune_run(RunDirectory(run), tmp_path / "out", domain, experts)
    assert not (tmp_path / "out").exists()
