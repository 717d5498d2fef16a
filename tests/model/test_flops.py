"""Parameter counts against built models and the paper's tables; FLOPs against a count by hand."""

import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest

from lory_jax.model.config import ModelConfig
from lory_jax.model.flops import baselines, flops_per_token, parameter_counts, peak_flops
from lory_jax.model.routing_rules import SPARSE
from lory_jax.model.transformer import init_params
from tests.support.models import tiny_config

GROUPED_AND_TIED = {"num_heads": 4, "num_kv_heads": 2, "tie_embeddings": True}

CONFIGS = Path(__file__).parents[2] / "configs"

# Recipe, experts, total parameters in billions as printed in the paper's appendices D and E (the
# dense models' exact sizes, which it rounds to 0.3B and 7B, follow from its shapes).
PAPER = [
    ("lory_0_3b", 0, "0.374"),
    ("lory_0_3b", 8, "1.8"),
    ("lory_0_3b", 16, "3.5"),
    ("lory_0_3b", 32, "6.8"),
    ("lory_1_5b", 0, "1.5"),
    ("lory_1_5b", 8, "7.8"),
    ("lory_1_5b", 16, "15.0"),
    ("lory_1_5b", 32, "29.5"),
    ("lory_7b", 0, "6.74"),
    ("lory_7b", 4, "19.7"),
]


def recipe(name: str, experts: int) -> ModelConfig:
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return ModelConfig(**module.get_config(f"experts={experts}").model)


def built_size(config: ModelConfig) -> int:
    shapes = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize(("name", "experts", "billions"), PAPER)
def test_recipes_have_the_papers_sizes_to_the_printed_digit(name, experts, billions):
    config = recipe(name, experts)
    counts = parameter_counts(config)
    digits = len(billions.partition(".")[2])
    assert f"{counts['total'] / 1e9:.{digits}f}" == billions
    assert counts["total"] == built_size(config)
    assert counts["active"] == built_size(recipe(name, 0))


@pytest.mark.parametrize("experts", [0, 1, 5])
@pytest.mark.parametrize("fields", [{}, GROUPED_AND_TIED], ids=["plain", "grouped and tied"])
def test_counts_equal_the_size_of_a_built_model(fields, experts):
    config = tiny_config(num_experts=experts, num_layers=3, **fields)
    counts = parameter_counts(config)
    assert counts["total"] == built_size(config)
    assert counts["active"] == built_size(tiny_config(num_experts=0, num_layers=3, **fields))


@pytest.mark.parametrize("fields", [{}, GROUPED_AND_TIED], ids=["plain", "grouped and tied"])
def test_flops_equal_a_count_of_every_matrix_product(fields):
    V, Y, D, F, E, L, T = 37, 2, 16, 24, 4, 16, 4
    config = tiny_config(sequence_length=L, **fields)
    kv = D // 2 if fields else D  # width of all heads of keys
    products = []  # (rows, inner, columns) of every product of one forward pass
    for _ in range(Y):
        products += [(L, D, D)] * 2 + [(L, D, kv)] * 2 + [(L, D, F)] * 2 + [(L, F, D)]
        products += [(L, D, L)] * 2  # scores and mixing, all heads
        products += [(1, E, D * F)] * 3 * (L // T)
    products += [(L, D, V)]
    forward = sum(2 * a * b * c for a, b, c in products)
    np.testing.assert_allclose(flops_per_token(config), 3 * forward / L, rtol=1e-12)


def test_sparse_flops_equal_a_count_of_every_matrix_product():
    V, Y, D, F, E, L = 37, 2, 16, 24, 4, 16
    for routing, experts_per_token, routes_tokens in (
        ("expert_choice_segment", 1.5, False),
        ("expert_choice_token", 1.5, True),
        ("top1", 1, True),
        ("top2", 2, True),
        ("dropless_top1", 1, True),
        ("dropless_top2", 2, True),
        ("remoe", 3, True),
        ("expert_threshold", 3, True),
    ):
        balancing = "loss_free" if routing == "dropless_top2" else "auxiliary"
        config = tiny_config(
            sequence_length=L,
            routing=routing,
            capacity_factor=1.5,
            experts_per_token=3,
            balancing=balancing,
        )
        per_token = Y * (4 * D * D + 2 * D * L + 3 * D * F * experts_per_token) + D * V
        per_token += Y * D * E * routes_tokens
        assert flops_per_token(config) == pytest.approx(6 * per_token)
        counts = parameter_counts(config)
        assert counts["total"] == built_size(config)
        dense = built_size(tiny_config(num_experts=0))
        assert counts["active"] == dense + Y * 3 * D * F * (experts_per_token - 1)


def test_what_a_recipe_is_compared_with():
    found = baselines(tiny_config())
    assert list(found) == ["dense", "dense_total", "Lory", "prefix", "uniform", *SPARSE]
    assert found["dense"].num_experts == 0 and found["Lory"].routing == "causal"
    assert all(found[name].routing == name for name in ("prefix", "uniform", *SPARSE))
    assert flops_per_token(found["uniform"]) == flops_per_token(found["dense"])
    # The experts of all layers, without their routers.
    routers = 2 * 16 * 4
    lory = parameter_counts(found["Lory"])["total"]
    assert parameter_counts(found["dense_total"])["total"] == lory - routers
    assert flops_per_token(found["Lory"]) > flops_per_token(found["dense"])
    assert parameter_counts(found["top2"])["active"] > parameter_counts(found["Lory"])["active"]


def test_merging_costs_the_fraction_that_the_paper_states():
    """Appendix B: E / T of the FFN, 3.1 % for 8 experts and 12.5 % for 32."""
    dense = recipe("lory_0_3b", 0)
    ffn = 6 * 3 * dense.embed_dim * dense.mlp_dim * dense.num_layers
    for experts, fraction in ((8, 0.03125), (32, 0.125)):
        extra = flops_per_token(recipe("lory_0_3b", experts)) - flops_per_token(dense)
        np.testing.assert_allclose(extra / ffn, fraction, rtol=1e-9)


def test_peak_is_known_for_accelerators_only():
    assert peak_flops("TPU v5e") == 197e12
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("cpu") is None
