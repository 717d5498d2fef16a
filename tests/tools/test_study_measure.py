"""What the study records of a finished run beside its losses."""

import dataclasses

import pytest

from lory_jax.model.flops import flops_per_token
from tests.support.models import tiny_config
from tools.study import arms, step_seconds
from tools.study.beyond_arms import BEYOND_ARMS, BEYOND_BASE
from tools.study.measure import gated_flops, of_load


@pytest.mark.parametrize("routing", ["remoe", "expert_threshold"])
def test_flops_of_gates_are_those_of_the_experts_that_a_token_had(routing):
    config = tiny_config(routing=routing)
    for k in (1, 2, 3):
        stated = flops_per_token(dataclasses.replace(config, experts_per_token=k))
        assert gated_flops(config, k) == pytest.approx(stated)
    half = (gated_flops(config, 1) + gated_flops(config, 2)) / 2
    assert gated_flops(config, 1.5) == pytest.approx(half)


def test_a_load_is_the_mean_of_the_run_and_of_its_last_tenth():
    lines = [{"step": 0}, *({"load_violation": float(i)} for i in range(20)), {"dropped_tokens": 1}]
    assert of_load(lines, "load_violation") == {"mean": 9.5, "last": 18.5}
    assert of_load(lines, "dropped_tokens") == {"mean": 1.0, "last": 1.0}


def test_steps_are_measured_of_the_recipe_and_of_every_arm_beside_it():
    base, measured = step_seconds.arms_of("A")
    assert base == "lory" and {*measured} == {base, *arms.SECONDS_ARMS}
    base, measured = step_seconds.arms_of("beyond")
    changed = {a.name for a in BEYOND_ARMS if not (a.keeps_run or a.factors)}
    assert {*measured} == {base, *changed} and base == BEYOND_BASE
    assert measured["rank_4"]["model.expert_rank"] == 4
    assert measured[base]["train.learning_rate"] == measured["rank_4"]["train.learning_rate"]
