"""`launch/gpu.sh bench` without a GPU, and without packages that GPU images lack."""

import json
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from tests.support.tiny import ROOT

# What an image with jax, flax, optax and orbax does not have.
MISSING = ("grain", "scann", "tensorflow_datasets", "ml_collections", "array_record", "tokenizers")
MISSING += ("safetensors", "sklearn", "numba", "matplotlib", "tensorboardX", "transformers")


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """An environment in which importing any of these packages fails."""
    directory = tmp_path_factory.mktemp("site")
    (directory / "sitecustomize.py").write_text(
        textwrap.dedent(f"""\
            import sys

            class Missing:
                def find_spec(self, name, path=None, target=None):
                    if name.partition(".")[0] in {MISSING!r}:
                        raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

            sys.meta_path.insert(0, Missing())
            """)
    )
    # Never the environment of this checkout: without jax, the script would install into $VENV.
    return os.environ | {
        "PYTHONPATH": f"{directory}:{ROOT}",
        "PYTHON": sys.executable,
        "VENV": str(directory / "venv"),
    }


def bench(environment, *flags, cwd):
    command = ["bash", str(ROOT / "launch" / "gpu.sh"), "bench", *flags]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=cwd, timeout=3000
    )


def test_the_blocker_blocks(environment):
    done = subprocess.run([sys.executable, "-c", "import grain"], env=environment, check=False)
    assert done.returncode == 1


def test_the_cases_import_only_what_gpu_images_have(environment):
    worker = [sys.executable, str(ROOT / "benchmarks" / "gpu_cases.py")]
    environment = environment | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        worker, input='{"kind": "machine"}', capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["device"] == "cpu" and result["versions"]["flax"]


@pytest.mark.parametrize(
    ("flags", "name"), [(["--minutes=0"], "--minutes"), (["--instances=no.npy"], "--instances")]
)
def test_wrong_flags_are_named(environment, flags, name, tmp_path):
    done = bench(environment, *flags, cwd=tmp_path)
    assert done.returncode == 2 and name in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_the_whole_script_runs_at_toy_size_and_resumes(environment, tmp_path):
    out, instances = tmp_path / "bench.json", tmp_path / "instances.npy"
    np.save(instances, np.arange(20 * 129).reshape(20, 129) % 320)
    flags = ["--dry-run", f"--out={out}", f"--instances={instances}"]
    done = bench(environment, *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())
    assert not [name for name, row in results.items() if "error" in row]
    kernels = results["kernels"]
    assert all(kernels[name] < 1e-4 for name in ("attention", "loss", "whole", "blocks"))
    for name, row in results.items():
        if name.startswith("step"):
            assert row["seconds"] > 0 and row["planned_bytes"] > 0
            # A model that knows nothing yet is about as good as a guess among 320 tokens.
            assert abs(row["loss"] - np.log(320)) < 1.5
    trained = results["train 8 experts"]
    assert trained["instances"] == 20 and trained["last_loss"] < trained["first_loss"]
    # Run again, it measures only what is missing.
    del results["step dense"]
    out.write_text(json.dumps(results))
    again = bench(environment, *flags, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert [line.split(": ")[1] for line in again.stdout.splitlines() if " min left: " in line] == [
        "step dense"
    ]
    now = json.loads(out.read_text())
    assert now.keys() == results.keys() | {"step dense"}
    assert {name: now[name] for name in results} == results
