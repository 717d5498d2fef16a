"""The mesh and its rules; training on 8 faked devices equals training on one."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from tiny import verb_environment

from lory_jax import parallel
from lory_jax.errors import InputError
from lory_jax.parallel import constrain, make_mesh, partition_spec, place_batch

MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)]
TOLERANCE = 2e-5  # float32, on the scale of each parameter; sums run in another order


@pytest.fixture(scope="module")
def report():
    worker = Path(__file__).parent / "parallel_worker.py"
    result = subprocess.run(
        [sys.executable, worker],
        capture_output=True,
        text=True,
        timeout=600,
        env=verb_environment() | {"PYTHONPATH": str(worker.parent.parent)},
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("model", ["dense", "lory"])
def test_losses_gradients_and_updates_equal_one_device(report, model, mesh):
    got = report[model][str(mesh)]
    for name in ("losses", "nll", "gradients", "params"):
        assert got[name] <= TOLERANCE, (name, got[name])


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("model", ["dense", "lory"])
def test_state_is_donated_and_the_step_compiles_once(report, model, mesh):
    got = report[model][str(mesh)]
    assert got["donated"]
    assert got["compilations"] == 1


def fraction(name: str, fsdp: int, tensor: int) -> float:
    """What part of a parameter one device holds, by its name."""
    if "norm" in name:
        return 1.0
    if "attention" in name:
        return 1 / (fsdp * tensor)
    return 1 / fsdp if "router" in name else 1 / (fsdp * tensor)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("model", ["dense", "lory"])
def test_parameters_and_both_moments_are_sharded(report, model, mesh):
    _, fsdp, tensor = mesh
    for part, leaves in report[model][str(mesh)]["fraction"].items():
        assert len(leaves) == (12 if model == "dense" else 13)
        for name, got in leaves.items():
            assert got == fraction(name, fsdp, tensor), (part, name)


def test_initial_and_upcycled_states_do_not_depend_on_the_mesh(report):
    assert report["init_is_independent_of_the_mesh"]
    assert report["upcycle_is_independent_of_the_mesh"]


def test_partition_spec_looks_every_axis_up():
    assert partition_spec(("experts", "embed", "mlp")) == PartitionSpec(None, "fsdp", "tensor")
    assert partition_spec(("batch", "length")) == PartitionSpec(("data", "fsdp", "tensor"), None)
    assert partition_spec(("norm",)) == PartitionSpec(None)


def test_experts_are_on_no_mesh_axis():
    assert parallel.RULES["experts"] == parallel.RULES["layers"] == ()


def test_two_logical_axes_on_one_mesh_axis_are_refused():
    with pytest.raises(ValueError, match="'vocab' on a mesh axis that is taken"):
        partition_spec(("mlp", "vocab"))


def test_an_unknown_logical_axis_is_refused():
    with pytest.raises(ValueError, match="'width' is not in the table"):
        partition_spec(("embed", "width"))


def test_a_mesh_takes_all_devices():
    assert dict(make_mesh(1, 0, 1).shape) == {"data": 1, "fsdp": jax.device_count(), "tensor": 1}
    with pytest.raises(InputError, match="2 x 1 x 2 is 4, but there are 1 devices"):
        make_mesh(2, 0, 2)


def test_constrain_does_nothing_without_a_mesh():
    x = jax.numpy.ones((2, 3))
    assert constrain(x, "batch", "length") is x


def test_place_batch_keeps_rows_and_order():
    batch = np.arange(12, dtype=np.int32).reshape(4, 3)
    np.testing.assert_array_equal(place_batch(batch, make_mesh(1, 0, 1)), batch)
