"""The choice between merged FFNs and unmerged experts: what the arithmetic of a device says."""

import dataclasses
import json
from pathlib import Path

import pytest

from lory_jax.generation.cost import RIDGES, UNMERGED_SHARES, choose_ffn, step_costs
from lory_jax.model.flops import PEAK_BANDWIDTH, PEAK_FLOPS
from tests.support.models import tiny_config

DOCS = Path(__file__).parents[2] / "docs"
V5E = PEAK_FLOPS["TPU v5e"] / PEAK_BANDWIDTH["TPU v5e"]


def costs(ridge, rows, ffns=None, experts=8, itemsize=2, merges_per_step=0.0):
    ffns = rows if ffns is None else ffns
    return step_costs(
        ridge, itemsize, rows=rows, ffns=ffns, experts=experts, merges_per_step=merges_per_step
    )


def test_on_an_accelerator_bytes_decide():
    merged, experts = costs(V5E, rows=32)
    assert experts / merged == 8 / 32  # both read weights; FLOPs hide behind them
    assert costs(V5E, rows=4)[0] < costs(V5E, rows=4)[1]
    merged, experts = costs(V5E, rows=256, ffns=1)  # all rows share a merge
    assert merged < experts


def test_where_flops_bind_unmerged_experts_cost_e_times_as_much():
    merged, experts = costs(1.0, rows=64, ffns=1)
    assert experts == 8 * merged


def test_merging_again_at_borders_counts():
    once, _ = costs(V5E, rows=8)
    often, experts = costs(V5E, rows=8, merges_per_step=0.5)
    assert often > once == experts


def test_every_device_with_a_peak_has_a_bandwidth():
    assert PEAK_FLOPS.keys() == PEAK_BANDWIDTH.keys()


def test_auto_chooses_for_this_device_and_a_choice_is_kept():
    config = tiny_config(num_experts=4)
    assert choose_ffn("auto", config, rows=1, ffns=1) == "merged"
    assert choose_ffn("auto", config, rows=64, ffns=1) == "merged"
    assert choose_ffn("auto", config, rows=64, ffns=64) == "experts"
    assert choose_ffn("experts", config, rows=1, ffns=1) == "experts"
    assert choose_ffn("merged", config, rows=64, ffns=64) == "merged"
    for other in ({"num_experts": 0}, {"routing": "top1"}):
        assert (
            choose_ffn("experts", dataclasses.replace(config, **other), rows=9, ffns=9) == "merged"
        )


def test_auto_takes_what_was_faster_on_the_cpu_of_the_committed_benchmark():
    measured = json.loads((DOCS / "decoding.json").read_text())
    config = tiny_config(num_experts=measured["experts"])
    for rows, rates in measured["tokens_per_second"].items():
        is_faster = rates["unmerged experts"] > rates["merged per row"]
        chosen = choose_ffn("auto", config, rows=int(rows), ffns=int(rows))
        assert chosen == ("experts" if is_faster else "merged"), rows


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_every_platform_has_its_limits(platform):
    assert RIDGES[platform] > 1
    assert 0 < UNMERGED_SHARES[platform] <= 1
