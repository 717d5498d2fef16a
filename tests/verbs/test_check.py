"""The verb `check` as a user runs it, and that it would notice a wrong kernel."""

import re
import subprocess

import jax
import jax.numpy as jnp
import pytest

from lory_jax import check
from lory_jax.model.config import ModelConfig
from lory_jax.parallel import make_mesh
from tests.support.tiny import ROOT, assert_one_line_error, verb, verb_command, verb_environment

PARTS = ("attention (xla)", "merged FFN (whole)", "loss (chunks)", "training", "save and restore")


@pytest.mark.parametrize("devices", [1, 4])
def test_all_is_well_on_cpus(devices, tmp_path):
    result = subprocess.run(
        verb_command("check", f"--workdir={tmp_path}"),
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env=verb_environment() | {"JAX_NUM_CPU_DEVICES": str(devices)},
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"{devices} x cpu")
    for part, line in zip(PARTS, lines[1:-1], strict=True):
        assert line.startswith(f"ok      {part}: "), line
    assert "20 steps" in lines[4] and "peak unknown" in lines[4]
    assert re.fullmatch(r"all is well, \d+ s", lines[-1])
    assert (tmp_path / "check" / "20").is_dir()


def test_wrong_arguments_are_one_line():
    assert_one_line_error(verb("check", "--size=huge"), 2, "--size", "huge")


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(1, 1, 1, jax.devices()[:1])


def inputs(key):
    return jax.random.normal(key, (8, 8)), jax.random.normal(key, (8, 8))


def test_errors_in_values_and_in_gradients_are_measured(mesh):
    @jax.custom_vjp
    def wrong_gradient(x, y):
        return x @ y

    wrong_gradient.defvjp(lambda x, y: (x @ y, (x, y)), lambda s, g: (g @ s[1].T * 1.5, s[0].T @ g))
    right = jnp.matmul
    measure = check.largest_error
    assert measure(right, right, inputs, "float32", mesh) < 1e-6
    assert measure(lambda x, y: 1.25 * (x @ y), right, inputs, "float32", mesh) == pytest.approx(
        0.25, rel=1e-3
    )
    assert measure(wrong_gradient, right, inputs, "float32", mesh) == pytest.approx(0.5, rel=1e-3)
    nan = measure(lambda x, y: x @ y / 0.0 * 0.0, right, inputs, "float32", mesh)
    assert not nan <= check.LIMITS["float32"]


def test_bfloat16_passes_its_limit(mesh):
    model = ModelConfig(**{**vars(small()), "compute_dtype": "bfloat16", "sequence_length": 128})
    for run in (check.check_attention, check.check_merged_ffn, check.check_loss):
        assert 1e-4 < run(model, mesh) < check.LIMITS["bfloat16"] / 2


def small() -> ModelConfig:
    config = check.base_config()
    config.model.update(check.SIZES["small"])
    return ModelConfig.for_platform(config.model, "cpu")
