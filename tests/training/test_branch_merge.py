"""Several dense runs become the experts of one model: real runs, and what they must agree on."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

import lory_jax
from lory_jax.errors import ConfigError
from lory_jax.training import loop
from lory_jax.training.branch_merge import check_branches, merge_branches
from tests.support.in_process import NoSignal, train
from tests.support.models import assert_close, forward, params_of, random_tokens, tiny_config
from tests.support.tiny import write_prepared, write_recipe

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


def test_two_domains_trained_apart_become_one_model(tmp_path, monkeypatch):
    """One dense start, one run on each domain, and one model of both after a few steps more."""
    monkeypatch.setattr(loop, "StopRequest", NoSignal)
    write_recipe(tmp_path)
    write_prepared(tmp_path / "data", with_domains=True)
    few = {"train__validate_every_steps": 100, "checkpoint__every_steps": 100}
    start = train(tmp_path, tmp_path / "start", experts=0, **few)
    domains = ("ones", "threes")
    for domain in domains:
        fields = {**few, "data__mixture": f"{domain}=1"}
        train(tmp_path, tmp_path / domain, experts=0, init_from=(tmp_path / "start",), **fields)
    branches = tuple(tmp_path / domain for domain in domains)
    with pytest.raises(ConfigError, match="num_experts: got 4; must be 2"):
        train(tmp_path, tmp_path / "wrong", init_from=branches)
    still = {**few, "train__learning_rate": 0, "train__steps": 1}
    train(tmp_path, tmp_path / "merged", experts=2, init_from=branches, **still)
    ffn = lory_jax.load(tmp_path / "merged").params["layers"]["ffn"]
    for expert, branch in enumerate(branches):
        own = lory_jax.load(branch).params["layers"]["ffn"]
        np.testing.assert_array_equal(ffn["gate"][:, expert], own["gate"])
    trained = train(tmp_path, tmp_path / "trained", experts=2, init_from=branches, **few)
    # It begins with what its branches know, and has experts from the first step on.
    assert trained[0]["loss"] < start[0]["loss"] - 0.5
    assert trained[0]["experts_active"] is not None
    means = [np.mean([line["loss"] for line in lines]) for lines in (start, trained)]
    assert means[1] < means[0] - 0.5
    # Stopped after a step, it goes on from its own checkpoint and not from the branches again.
    often = {**few, "checkpoint__every_steps": 1, "checkpoint__keep": 99}
    whole = train(tmp_path, tmp_path / "whole", experts=2, init_from=branches, **often)
    for checkpoint in (tmp_path / "whole" / "checkpoints").iterdir():
        if checkpoint.name.isdigit() and int(checkpoint.name) > 1:
            shutil.rmtree(checkpoint)
    resumed = train(tmp_path, tmp_path / "whole", experts=2, init_from=branches, **often)
    assert [line["step"] for line in resumed] == [line["step"] for line in whole]
    assert [line["loss"] for line in resumed] == [line["loss"] for line in whole]
    router = lory_jax.load(tmp_path / "trained").params["layers"]["ffn"]["router"]
    assert np.any(router != ffn["router"])
