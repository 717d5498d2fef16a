"""`doctor` without a run as a user runs it, and that it would notice what is wrong."""

import re
import subprocess

import jax
import jax.numpy as jnp
import pytest

from lory_jax.diagnosis import devices, kernels
from lory_jax.diagnosis.findings import Findings
from lory_jax.model.config import ModelConfig
from lory_jax.parallel import make_mesh
from tests.support.tiny import ROOT, assert_one_line_error, verb, verb_command, verb_environment

PARTS = (
    "attention (xla)",
    "merged FFN (whole)",
    "loss (in chunks)",
    "training",
    "save and restore",
)


@pytest.mark.parametrize("count", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_all_checks_pass_on_cpus(count, tmp_path):
    result = subprocess.run(
        verb_command("doctor", f"--scratch={tmp_path}"),
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env=verb_environment() | {"JAX_NUM_CPU_DEVICES": str(count)},
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"{count} x cpu")
    for part, line in zip(PARTS, lines[1:-1], strict=True):
        assert line.startswith(f"ok       {part}: "), line
    assert "20 steps" in lines[4] and "MFU unknown" in lines[4]
    assert re.fullmatch(r"all checks passed in \d+ s", lines[-1])
    assert (tmp_path / "doctor" / "20").is_dir()


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (("--size=huge",), "--size"),
        (("--size=small", "--workdir=w"), "--size"),
        (("--scratch=s", "--workdir=w"), "--scratch"),
        (("--data=d",), "--data"),
    ],
)
def test_wrong_flags_are_one_line(flags, name):
    assert_one_line_error(verb("doctor", *flags), 2, name)


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
    measure = kernels.largest_error
    assert measure(right, right, inputs, "float32", mesh) < 1e-6
    assert measure(lambda x, y: 1.25 * (x @ y), right, inputs, "float32", mesh) == pytest.approx(
        0.25, rel=1e-3
    )
    assert measure(wrong_gradient, right, inputs, "float32", mesh) == pytest.approx(0.5, rel=1e-3)
    nan = measure(lambda x, y: x @ y / 0.0 * 0.0, right, inputs, "float32", mesh)
    assert not nan <= kernels.LIMITS["float32"]


@pytest.mark.parametrize("error", [1.0, float("nan")])
def test_a_wrong_kernel_is_a_problem(monkeypatch, mesh, capsys, error):
    monkeypatch.setattr(devices, "attention_error", lambda model_config, mesh: error)
    monkeypatch.setattr(devices, "merged_ffn_error", lambda model_config, mesh: 0.0)
    monkeypatch.setattr(devices, "loss_error", lambda model_config, mesh: 0.0)
    findings = Findings()
    devices.check_kernels(small(), mesh, findings)
    lines = capsys.readouterr().out.splitlines()
    assert findings.problems == 1 and lines[0].startswith("PROBLEM  attention")
    assert all(line.startswith("ok ") for line in lines[1:])


def test_a_loss_that_does_not_fall_is_a_problem(monkeypatch, mesh, capsys):
    standing_still = devices.optimizer_for_check(learning_rate=0.0)
    monkeypatch.setattr(devices, "optimizer_for_check", lambda: standing_still)
    findings = Findings()
    with jax.set_mesh(mesh):
        devices.check_training(tiny(), mesh, 2, findings)
    assert findings.problems == 1 and "PROBLEM  training" in capsys.readouterr().out


def test_a_checkpoint_that_comes_back_changed_is_a_problem(monkeypatch, mesh, capsys, tmp_path):
    sums = iter([{"leaf": 1}, {"leaf": 2}])
    findings = Findings()
    with jax.set_mesh(mesh):
        state = devices.init_state(tiny(), devices.optimizer_for_check(), mesh, seed=0)
        devices.check_checkpoint(tiny(), mesh, state, tmp_path / "intact", findings)
        assert findings.problems == 0
        monkeypatch.setattr(devices, "leaf_sums", lambda tree: next(sums))
        devices.check_checkpoint(tiny(), mesh, state, tmp_path / "changed", findings)
    assert findings.problems == 1 and "PROBLEM  save and restore" in capsys.readouterr().out


def test_bfloat16_passes_its_limit(mesh):
    config = ModelConfig(**{**vars(small()), "compute_dtype": "bfloat16", "sequence_length": 128})
    for measure in (kernels.attention_error, kernels.merged_ffn_error, kernels.loss_error):
        assert 1e-4 < measure(config, mesh) < kernels.LIMITS["bfloat16"] / 2


def small() -> ModelConfig:
    config = devices.base_config()
    config.model.update(devices.SIZES["small"])
    return ModelConfig.for_platform(config.model, "cpu")


def tiny() -> ModelConfig:
    changes = {"num_layers": 1, "embed_dim": 16, "mlp_dim": 16, "vocab_size": 32}
    return ModelConfig(**{**vars(small()), **changes, "sequence_length": 16, "segment_length": 8})
