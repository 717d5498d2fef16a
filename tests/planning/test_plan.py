"""The verb `plan`: names of topologies, meshes, and compiles for TPUs that are not there."""

import importlib.util
import json
import subprocess
import sys

import pytest

from lory_jax import plan
from lory_jax.errors import ConfigError, InputError
from lory_jax.model.config import ModelConfig
from lory_jax.model.flops import baselines, flops_per_token, parameter_counts
from lory_jax.planning import topology
from lory_jax.planning.estimate import default_mesh
from lory_jax.planning.program import memory_needed
from lory_jax.planning.topology import parse_topology
from tests.support.models import tiny_config
from tests.support.tiny import assert_one_line_error

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason=f"needs {topology.PIP}"
)


def run_plan(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lory_jax.plan", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=1500)


def planned(*flags: str) -> dict:
    result = run_plan("--json", *flags)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def model_config(**fields) -> ModelConfig:
    defaults = dict(vocab_size=320, num_layers=2, embed_dim=1024, num_heads=4, mlp_dim=256)
    defaults |= dict(num_experts=4, sequence_length=256, segment_length=128)
    return tiny_config(**(defaults | fields))


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("name", "libtpu_name"),
    [
        ("v5e-1", "v5e:1x1"),
        ("v5e-256", "v5e:16x16"),
        ("v5litepod-8", "v5e:2x4"),
        ("v6e-64", "v6e:8x8"),
        ("v5p-8", "v5p:2x2x1"),
        ("v5p-128", "v5p:4x4x4"),
        ("tpu7x-128", "tpu7x:4x4x4"),
    ],
)
def test_cloud_names_of_topologies(name, libtpu_name):
    assert parse_topology(name).libtpu_name == libtpu_name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e-3", "topology: .*v5e-3.* 1, 4, 8, 16"),
        ("v5p-4", "topology: .* 8, 16, 32"),
        ("v5p-9", "topology: "),
        ("h100-3", "topology: .*h100-3.* 1, 2, 4, 8"),
        ("b200-8", "topology: .* v5e-CHIPS.* h100-N"),
    ],
)
def test_other_names_say_what_is_accepted(name, message):
    with pytest.raises(ConfigError, match=message):
        parse_topology(name)


@pytest.mark.parametrize("text", ["8", "2,0,4", "a,b,c", "1,2,3,4"])
def test_a_mesh_is_three_positive_integers(text):
    with pytest.raises(ConfigError, match="--mesh: got"):
        plan.parse_mesh(text)
    assert plan.parse_mesh("2,4,1") == (2, 4, 1)


@pytest.mark.parametrize(
    ("config", "sequences", "devices", "mesh"),
    [
        (model_config(), 256, 64, (1, 64, 1)),
        (model_config(), 256, 256, (4, 64, 1)),  # 256 would leave 4 rows of D
        (model_config(embed_dim=1536), 256, 64, (2, 32, 1)),  # 64 would leave one tile and a half
        (model_config(embed_dim=4096), 256, 256, (1, 256, 1)),
        (model_config(attention_sharding="heads"), 64, 256, (1, 64, 4)),
        (model_config(attention_sharding="heads"), 256, 256, (4, 64, 1)),
    ],
)
def test_default_meshes(config, sequences, devices, mesh):
    assert default_mesh(config, sequences, devices) == mesh


def test_on_tpus_half_a_slice_holds_a_replica_where_memory_allows():
    config = model_config()
    needed = 2 * 12 * parameter_counts(config)["total"] / 64 / 0.25
    assert default_mesh(config, 256, 64, int(needed) + 1) == (2, 32, 1)
    assert default_mesh(config, 256, 64, int(needed) - 1) == (1, 64, 1)
    # Where fsdp is a part of the slice anyway, more replicas would only take memory.
    assert default_mesh(config, 256, 256, 10 * int(needed)) == (4, 64, 1)


def test_memory_needed_is_read_off_the_compilers_message():
    message = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
        "required for HLO temporaries (512.00G) exceeds available HBM (15.75G)."
    )
    assert memory_needed(message) == 512 * 2**30
    assert memory_needed("Ran out of memory. Used 17.50G of 15.75G hbm.") == int(17.5 * 2**30)
    with pytest.raises(InputError, match="INTERNAL: no"):
        memory_needed("INTERNAL: no\nmore")
    # A kernel too large for the chip's own memory is an error, not a program that does not fit.
    with pytest.raises(InputError, match="memory space vmem"):
        memory_needed("Ran out of memory in memory space vmem. Used 88.06M of 63.94M vmem.")


# ---------------------------------------------------------------- the verb

TINY = (
    "--config=configs/local.py:experts=4",
    "--config.model.vocab_size=1024",
    "--config.model.remat=none",
    "--config.train.microbatches=1",
    "--config.train.global_batch_size=8",
    "--config.model.num_layers=2",
    "--config.model.embed_dim=128",
    "--config.model.num_heads=2",
    "--config.model.mlp_dim=256",
    "--config.model.sequence_length=256",
    "--config.model.segment_length=128",
    "--config.model.compute_dtype=bfloat16",
)


def test_without_compiling_only_counts_and_requires_no_topology():
    result = planned("--no_compile", *TINY)
    config = model_config(
        vocab_size=1024, embed_dim=128, num_heads=2, num_experts=4, sequence_length=256
    )
    assert result == {
        "parameters": parameter_counts(config),
        "flops_per_token": flops_per_token(config),
    }


def test_the_table_sets_every_baseline_side_by_side():
    result = run_plan("--no_compile", *TINY)
    assert result.returncode == 0, result.stderr
    rows = {line.split()[0]: line.split()[1:] for line in result.stdout.splitlines() if line}
    for name, config in baselines(
        model_config(vocab_size=1024, embed_dim=128, num_heads=2, sequence_length=256)
    ).items():
        counts = parameter_counts(config)
        assert rows[name][:2] == [f"{counts[k] / 1e6:,.1f}M" for k in ("total", "active")]
        assert rows[name][2] == f"{flops_per_token(config) / 1e9:.3f}"


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ((), "--topology"),
        (("--topology=v5e-3",), "topology"),
        (("--mesh=8",), "--topology"),
        (("--rank",), "--topology"),
        (("--rank", "--no_compile", "--topology=v5e-4"), "--rank"),
        (("--topology=v5e-4", "--price=v5e=1"), "--price"),
        (("--topology=v5e-4", "--rank", "--price=v5e"), "--price"),
        (("--topology=v5e-4", "--rank", "--budget=0"), "--budget"),
    ],
)
def test_wrong_flags_are_one_line(flags, name):
    assert_one_line_error(run_plan(*TINY, *flags), 2, name)


@needs_libtpu
def test_a_tiny_step_compiles_for_a_tpu():
    result = planned(*TINY, "--topology=v5e-4", "--mesh=2,2,1")
    for version, has_experts in ((result, True), (result["dense"], False)):
        memory, estimate = version["bytes_per_device"], version["estimate"]
        assert memory["fits"] and memory["limit"] == int(15.75 * 2**30)
        assert memory["total"] == memory["arguments"] + memory["temporaries"]
        axes = {axis for kind in version["collective_bytes"].values() for axis in kind}
        assert {"fsdp"} <= axes <= {"data", "fsdp", "data+fsdp"}
        for cycles in (estimate["cycles"], estimate["repriced_cycles"]):
            assert cycles["total"] == sum(v for name, v in cycles.items() if name != "total")
            assert (cycles["merge"] > 0) == has_experts and cycles["attention"] > 0
        assert estimate["compute_seconds"] == estimate["repriced_cycles"]["total"] / 1.5e9
        assert estimate["hbm_seconds"] == estimate["hbm_bytes"] / 819e9
        kernels = estimate["kernels"].values()
        assert all(not k["unread"] and not k["counted_always"] for k in kernels)
        assert all(k["cycles"] >= k["matrix_unit"] > 0 and k["bundles"] > 0 for k in kernels)
        assert estimate["loops_counted_once"] == [] and estimate["uncounted_kernels"] == {}
        assert any(kernel.startswith("paired") for kernel in estimate["kernel_cycles"])
        assert 0 < estimate["mfu_upper_bound"] < 1
    # Parameters and two moments in float32 over fsdp=2; the TPU pads some of their tiles.
    state = 12 * result["parameters"]["total"]
    assert state / 2 <= result["bytes_per_device"]["arguments"] <= 0.6 * state
    lory, dense = result["estimate"]["cycles"]["total"], result["dense"]["estimate"]["cycles"]
    assert lory > dense["total"]


def test_a_missing_libtpu_is_named(monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install libtpu"):
        parse_topology("v5e-4").devices()


RECIPES = [
    ("lory_0_3b", 8, "v5e-64"),
    ("lory_0_3b", 8, "v5e-256"),
    ("lory_0_3b", 16, "v5e-256"),
    ("lory_0_3b", 32, "v5e-64"),
    ("lory_0_3b", 32, "v5e-256"),
    ("lory_1_5b", 8, "v5p-128"),
    ("lory_1_5b", 16, "v5p-128"),
    ("lory_1_5b", 32, "v5p-128"),
    ("lory_7b", 4, "v5p-128"),
]


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "experts", "slice_name"), RECIPES)
def test_recipes_fit_and_compile_in_ten_minutes(recipe, experts, slice_name):
    result = planned(f"--config=configs/{recipe}.py:experts={experts}", f"--topology={slice_name}")
    for version in (result, result["dense"]):
        assert version["bytes_per_device"]["fits"]
        assert version["compile_seconds"] < 600
