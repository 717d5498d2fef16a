"""The mesh and its rules; training on 8 faked devices equals training on one."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from lory_jax import parallel
from lory_jax.config import load_config
from lory_jax.errors import ConfigError, InputError
from lory_jax.model.config import ModelConfig
from lory_jax.model.routing_rules import ADAPTED, SPARSE
from lory_jax.model.transformer import build, init_params
from lory_jax.parallel import (
    check_batch,
    check_parameters,
    constrain,
    make_mesh,
    partition_spec,
    place_batch,
)
from lory_jax.recipes import resolve
from tests.support.models import tiny_config
from tests.support.tiny import run_worker

MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)]
HEADS_MESHES = [(2, 2, 2), (1, 2, 4)]
CASES = [("dense", (2, 2, 2)), ("dense, paired", (2, 2, 2))]
CASES += [("lory", mesh) for mesh in MESHES]
LESS_USUAL = ("expert_choice_segment", "top1", "dropless_top1")  # others like them are usual
CASES += [(routing, (2, 2, 2)) for routing in SPARSE if routing not in LESS_USUAL]
CASES += [("dropless_top2, ragged", (2, 2, 2)), ("remoe, ragged", (2, 2, 2))]
CASES += [("lory, documents", (2, 2, 2)), ("uniform", (2, 2, 2))]
CASES += [("lory, fewer experts", (2, 2, 2))]
CASES += [("lory, grouped and tied", (2, 2, 2)), ("lory, grouped heads", (1, 2, 4))]
CASES += [("lory, heads", mesh) for mesh in HEADS_MESHES]
MORE = [(model, mesh) for model in ("dense", "dense, paired") for mesh in MESHES[:-1]]
MORE += [("dense, heads", mesh) for mesh in HEADS_MESHES]
MORE += [(routing, (2, 2, 2)) for routing in LESS_USUAL]
TOLERANCE = 2e-5  # float32, on the scale of each parameter; sums run in another order


@pytest.fixture(scope="module")
def report():
    return run_worker("parallel_worker")


@pytest.fixture(scope="module")
def more():
    return run_worker("parallel_worker", "more")


def assert_equals_one_device(got):
    for name in ("losses", "nll", "gradients", "params"):
        assert got[name] <= TOLERANCE, (name, got[name])


@pytest.mark.parametrize(("model", "mesh"), CASES, ids=str)
def test_losses_gradients_and_updates_equal_one_device(report, model, mesh):
    assert_equals_one_device(report[model][str(mesh)])


@pytest.mark.slow
@pytest.mark.parametrize(("model", "mesh"), MORE, ids=str)
def test_more_models_and_meshes_equal_one_device(more, model, mesh):
    got = more[model][str(mesh)]
    assert_equals_one_device(got)
    assert got["donated"] and got["compilations"] == 1
    assert_sharded(got, model, mesh)


@pytest.mark.parametrize(("model", "mesh"), CASES, ids=str)
def test_state_is_donated_and_the_step_compiles_once(report, model, mesh):
    got = report[model][str(mesh)]
    assert got["donated"]
    assert got["compilations"] == 1


@pytest.mark.parametrize("microbatches", ["2", "4"])
def test_accumulated_microbatches_make_the_same_update(report, microbatches):
    got = report["accumulated"][microbatches]
    assert got["losses"] <= TOLERANCE and got["gradients"] <= TOLERANCE
    assert got["params"] <= TOLERANCE and got["donated"] and got["compilations"] == 1


def test_no_expert_parameter_or_gradient_travels_over_tensor(report):
    eight, sixteen = report["bytes_over_tensor"]
    S, D, F = 8 * 3, 32, 64
    one_matrix = 8 * D * F * 4 / 8  # what 8 experts more add to a device's part of one matrix
    routing_terms = S * 8 * 4
    assert 0 <= sixteen - eight <= 4 * routing_terms < one_matrix
    assert eight > 0


ADAPTED_KEYS = tuple(f"['{name}']" for name in ADAPTED)


def count_adapted(names) -> int:
    return sum(name.endswith(ADAPTED_KEYS) for name in names)


def fraction(name: str, fsdp: int, tensor: int) -> float:
    """What part of a parameter one device holds, by its name."""
    if "norm" in name or name.endswith(ADAPTED_KEYS):
        return 1.0
    if "attention" in name:
        return 1 / (fsdp * tensor)
    return 1 / fsdp if "router" in name else 1 / (fsdp * tensor)


def assert_sharded(got, model, mesh):
    _, fsdp, tensor = mesh
    for part, leaves in got["fraction"].items():
        expected = 12 if model.startswith("dense") or "tied" in model else 13
        shared = sum("['shared']" in name for name in leaves)
        assert shared == (3 if model == "expert_threshold" else 0)
        assert len(leaves) - count_adapted(leaves) - shared == expected
        for name, got in leaves.items():
            assert got == fraction(name, fsdp, tensor), (part, name)


@pytest.mark.parametrize(("model", "mesh"), CASES, ids=str)
def test_parameters_and_both_moments_are_sharded(report, model, mesh):
    assert_sharded(report[model][str(mesh)], model, mesh)


def test_initial_and_upcycled_states_do_not_depend_on_the_mesh(report):
    assert report["init_is_independent_of_the_mesh"]
    assert report["upcycle_is_independent_of_the_mesh"]
    # The mean and the standard deviation of a matrix are summed in another order.
    assert report["redrawn_upcycle"] <= 1e-6


def test_partition_spec_looks_every_axis_up():
    assert partition_spec(("experts", "embed", "mlp")) == PartitionSpec(None, "fsdp", "tensor")
    assert partition_spec(("batch", "length")) == PartitionSpec(("data", "fsdp", "tensor"), None)
    assert partition_spec(("norm",)) == PartitionSpec(None)


def test_experts_are_on_no_mesh_axis():
    assert parallel.RULES["experts"] == parallel.RULES["layers"] == ()


def test_two_logical_axes_on_one_mesh_axis_are_refused():
    with pytest.raises(ValueError, match="'vocab' on a mesh axis that is already used"):
        partition_spec(("mlp", "vocab"))


def test_an_unknown_logical_axis_is_refused():
    with pytest.raises(ValueError, match="'width' is not in the table"):
        partition_spec(("embed", "width"))


CPU_MESH = AbstractMesh((2, 4, 4), parallel.MESH_AXES)


def test_a_batch_that_does_not_divide_names_what_would():
    check_batch(64, 2, "batch", CPU_MESH)
    check_batch(8, 1, "moe_batch", CPU_MESH)
    with pytest.raises(ConfigError) as error:
        check_batch(40, 1, "batch", CPU_MESH)
    assert str(error.value) == (
        "config.train.global_batch_size: got 40; must be a multiple of 32 (config.parallel data=2 "
        "x fsdp=4 x tensor=4, config.train.microbatches=1), such as 32 or 64; "
        "config.model.attention_sharding=heads accepts it"
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"mlp_dim": 90},
            "config.model.mlp_dim: got 90; must be a multiple of 4 .*such as 88 or 92",
        ),
        ({"vocab_size": 42}, "config.model.vocab_size: got 42; must be a multiple of 4"),
        ({"embed_dim": 12}, "config.model.embed_dim: got 12; must be a multiple of 16"),
        (
            {"num_heads": 2, "attention_sharding": "heads"},
            "config.model.num_heads: got 2; must be a multiple of 4 .*such as 4$",
        ),
        (
            {"num_heads": 4, "num_kv_heads": 2, "attention_sharding": "heads"},
            "config.model.num_kv_heads: got 2; must be a multiple of 4 .*such as 4$",
        ),
    ],
)
def test_sizes_that_do_not_divide_name_what_would(fields, message):
    config = tiny_config(**{"vocab_size": 40, "embed_dim": 32, "mlp_dim": 64, **fields})
    with pytest.raises(ConfigError, match=message):
        check_model(config)


def check_model(config, mesh=CPU_MESH):
    _, axes = build(config)
    shapes = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    check_parameters(axes, shapes, mesh)


@pytest.mark.parametrize("fields", [{"expert_rank": 32}, {"token_deltas": 8}, {}], ids=str)
def test_the_large_recipe_is_sharded_over_64_devices_in_every_variant(fields):
    """The factors of low-rank experts are sharded over F, whichever axis has the devices."""
    recipe = load_config(resolve("lory_0_3b") + ":experts=8").model
    for shape in ((1, 64, 1), (2, 32, 1), (1, 32, 2)):
        config = dataclasses.replace(ModelConfig.for_platform(recipe, "tpu"), **fields)
        check_model(config, AbstractMesh(shape, parallel.MESH_AXES))


def test_many_unsharded_parameters_are_named():
    shapes = {
        "a": jax.ShapeDtypeStruct((32, 32), np.float32),
        "b": {"norm": jax.ShapeDtypeStruct((32,), np.float32)},
    }
    axes = {"a": ("embed", "mlp"), "b": {"norm": ("norm",)}}
    with pytest.raises(ConfigError, match=r"3\.0% of the parameters unsharded.*: b\.norm"):
        check_parameters(axes, shapes, CPU_MESH)
    # One device of fsdp and tensor holds everything anyway.
    check_parameters(axes, shapes, AbstractMesh((8, 1, 1), parallel.MESH_AXES))


def tpu(i):
    """Device i of two slices of four chips each, numbered in turn."""
    chip = i // 2
    return SimpleNamespace(
        platform="tpu",
        device_kind="TPU v5 lite",
        id=i,
        process_index=i,
        slice_index=i % 2,
        coords=(chip % 2, chip // 2, 0),
        core_on_chip=0,
    )


def test_slices_lie_along_data():
    devices = [tpu(i) for i in range(8)]
    arranged = parallel.arrange_devices(devices, (2, 2, 2))
    assert [{device.slice_index for device in part.flat} for part in arranged] == [{0}, {1}]
    assert {device.id for device in arranged.flat} == set(range(8))
    with pytest.raises(
        ConfigError, match=r"config\.parallel\.data: got 1; must be a multiple of 2"
    ):
        parallel.arrange_devices(devices, (1, 4, 2))


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
