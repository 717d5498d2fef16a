"""A model that lies on 8 faked devices generates what it generates on one."""

import pytest

from tests.support.tiny import run_worker

MESHES = ["(1, 8, 1)", "(1, 2, 4)"]


@pytest.fixture(scope="module")
def report():
    return run_worker("decode_worker")


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("ffn", ["merged", "experts"])
@pytest.mark.parametrize("routing", ["prompt", "segment"])
def test_logits_equal_those_of_one_device(report, routing, ffn, mesh):
    assert report[f"{routing} {ffn} {mesh}"] <= 1e-5  # of the largest logit


@pytest.mark.parametrize("model", ["beyond the paper", "dropless_top2", "remoe"])
def test_logits_of_other_models_equal_those_of_one_device(report, model):
    assert report[f"{model} (1, 2, 4)"] <= 1e-5


@pytest.mark.parametrize("ffn", ["merged", "experts"])
@pytest.mark.parametrize("mesh", MESHES)
def test_no_device_holds_the_model(report, mesh, ffn):
    """An eighth and the norms; nor does a step put the whole of it together."""
    found = report[f"bytes {ffn}"][mesh]
    assert found["one device"] < found["whole"] / 7
    assert found["temporaries"] < found["whole"] / 16
