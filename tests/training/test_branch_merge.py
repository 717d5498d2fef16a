"""Several dense runs become the experts of one model: real runs, and what they must agree on."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import lory_jax
from lory_jax.errors import ConfigError
from lory_jax.training.branch_merge import check_branches, merge_branches
from tests.support.models import assert_close, forward, params_of, random_tokens, tiny_config
from tests.support.tiny import assert_one_line_error, verb, write_prepared, write_recipe

DENSE = tiny_config(num_experts=0, num_layers=4)


@pytest.mark.parametrize("which", ["all", "upper_half", "every_second"])
def test_every_branch_is_an_expert_and_all_else_is_the_mean(which):
    config = tiny_config(num_experts=3, num_layers=4, expert_layers=which)
    branches = [params_of(DENSE, seed) for seed in range(3)]
    merged = merge_branches(config, branches, jax.random.key(0))
    expected = jax.eval_shape(lambda: params_of(config))
    assert jax.tree.structure(merged) == jax.tree.structure(expected)
    ffn = merged["layers"]["ffn"]
    for name in ("gate", "up", "down"):
        for expert, branch in enumerate(branches):
            own = branch["layers"]["ffn"][name][np.array(config.layer_numbers)]
            np.testing.assert_array_equal(ffn[name][:, expert], own)
    for name in ("embedding", "head", "final_norm"):
        mean = sum(branch[name] / 3 for branch in branches)
        assert_close(merged[name], mean, 1e-6, name)
    for stack, numbers in (
        ("layers", config.layer_numbers),
        ("dense_layers", config.dense_layer_numbers),
    ):
        if numbers:
            mean = sum(branch["layers"]["attention"]["key"] / 3 for branch in branches)
            found = merged[stack]["attention"]["key"]
            assert_close(found, mean[np.array(numbers)], 1e-6, stack)


def test_branches_that_are_one_model_compute_what_it_does():
    """Whatever the router says: equal experts merge to themselves."""
    config = tiny_config(num_experts=2, num_layers=4)
    merged = merge_branches(config, [params_of(DENSE)] * 2, jax.random.key(0))
    tokens = random_tokens(2, 14)
    expected, _ = forward(DENSE)(params_of(DENSE), tokens)
    assert_close(forward(config)(merged, tokens)[0], expected, 1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_experts": 3}, "num_experts: got 3; must be 2, the number of runs"),
        ({"num_experts": 2, "routing": "top1"}, "init_from: .* one run with .*routing=top1"),
        ({"num_experts": 2, "expert_rank": 2}, "init_from: .*expert_rank=2"),
    ],
)
def test_models_that_cannot_have_branches_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        check_branches([DENSE, DENSE], dataclasses.replace(DENSE, **fields))
    with pytest.raises(ConfigError, match="several runs must be dense"):
        check_branches([DENSE, tiny_config()], tiny_config(num_experts=2))


def test_two_domains_trained_apart_become_one_model(tmp_path):
    """One dense start, one run on each domain, and one model of both after a few steps more."""
    recipe = write_recipe(tmp_path)
    data = write_prepared(tmp_path / "data", with_domains=True)

    def train(workdir, experts, *more):
        return verb(
            "train",
            f"--config={recipe}:experts={experts}",
            f"--data={data}",
            f"--workdir={tmp_path / workdir}",
            *more,
        )

    assert train("start", 0).returncode == 0
    for domain in ("ones", "threes"):
        start = f"--init_from={tmp_path / 'start'}"
        result = train(domain, 0, start, f"--config.data.mixture={domain}=1")
        assert result.returncode == 0, result.stderr
    both = f"--init_from={tmp_path / 'ones'},{tmp_path / 'threes'}"
    assert_one_line_error(train("wrong", 4, both), 2, "config.model.num_experts", "must be 2")
    merged = train("both", 2, both, "--config.train.learning_rate=0", "--config.train.steps=1")
    assert merged.returncode == 0, merged.stderr
    ffn = lory_jax.load(tmp_path / "both").params["layers"]["ffn"]
    for expert, domain in enumerate(("ones", "threes")):
        own = lory_jax.load(tmp_path / domain).params["layers"]["ffn"]
        np.testing.assert_array_equal(ffn["gate"][:, expert], own["gate"])
    trained = train("trained", 2, both)
    assert trained.returncode == 0, trained.stderr
    lines = (tmp_path / "trained" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    start_losses = (tmp_path / "start" / "metrics.jsonl").read_text().splitlines()
    # It begins with what its branches know, and has experts from the first step on.
    assert losses[0] < json.loads(start_losses[0])["loss"] - 0.5
    assert json.loads(lines[0])["experts_active"] is not None
    router = lory_jax.load(tmp_path / "trained").params["layers"]["ffn"]["router"]
    assert np.any(router != ffn["router"])
