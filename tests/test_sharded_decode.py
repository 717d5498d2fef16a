"""A model that lies on 8 faked devices generates what it generates on one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import verb_environment

MESHES = ["(1, 8, 1)", "(1, 2, 4)"]


@pytest.fixture(scope="module")
def report():
    worker = Path(__file__).parent / "decode_worker.py"
    result = subprocess.run(
        [sys.executable, worker],
        capture_output=True,
        text=True,
        timeout=600,
        env=verb_environment() | {"PYTHONPATH": str(worker.parent.parent)},
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("routing", ["prompt", "segment"])
def test_logits_equal_those_of_one_device(report, routing, mesh):
    assert report[f"{routing} {mesh}"] <= 1e-5  # of the largest logit


@pytest.mark.parametrize("mesh", MESHES)
def test_no_device_holds_the_model(report, mesh):
    """An eighth and the norms; nor does a step put the whole of it together."""
    found = report["bytes"][mesh]
    assert found["one device"] < found["whole"] / 7
    assert found["temporaries"] < found["whole"] / 16
