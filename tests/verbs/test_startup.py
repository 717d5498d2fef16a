"""`--help` and a wrong flag import nothing heavy, for every verb: a property, not a timing."""

import subprocess
import sys

import pytest

from lory_jax.__main__ import VERBS
from tests.support.tiny import ROOT, verb_environment

HEAVY = {
    "array_record",
    "etils",
    "flax",
    "grain",
    "jax",
    "jaxlib",
    "lm_eval",
    "matplotlib",
    "numba",
    "numpy",
    "optax",
    "orbax",
    "pyarrow",
    "safetensors",
    "scann",
    "prometheus_client",
    "scipy",
    "sklearn",
    "starlette",
    "tensorboardX",
    "tensorflow_datasets",
    "tokenizers",
    "transformers",
    "uvicorn",
}
COMMANDS = [*((verb,) for verb in VERBS), ("convert", "to-hf")]
COMMANDS += [("convert", "from-hf"), ("convert", "prune")]


def imported(*words: str) -> tuple[subprocess.CompletedProcess[str], set[str]]:
    """Runs a verb; the top-level packages that it imported."""
    verb, *rest = words
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", f"lory_jax.{verb}", *rest],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=verb_environment(),
    )
    lines = [line for line in result.stderr.splitlines() if line.startswith("import time:")]
    return result, {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_imports_nothing_heavy(command):
    result, packages = imported(*command, "--help")
    assert result.returncode == 0 and "usage:" in result.stdout
    assert "lory_jax" in packages
    assert not packages & HEAVY


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_wrong_flag_imports_nothing_heavy(command):
    result, packages = imported(*command, "--colour=red")
    assert result.returncode == 2
    assert "lory_jax" in packages
    assert not packages & HEAVY


def test_the_list_of_verbs_imports_no_verb():
    code = "import sys; from lory_jax.__main__ import dispatch; dispatch(['--help']);"
    code += "print([m for m in sys.modules if m.startswith('lory_jax.')])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert not any(f"'lory_jax.{verb}'" in result.stdout.splitlines()[-1] for verb in VERBS)
