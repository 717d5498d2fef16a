"""Exports load, pad and generate in transformers 4.57 as in the version that is installed.

The older version is installed into an environment of its own, over the packages of this one.
"""

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from lory_jax.conversion import runs
from lory_jax.run.directory import RunDirectory
from tests.conversion.test_families import FAMILIES, save
from tests.support.tiny import ROOT

pytestmark = pytest.mark.slow

OLDER = ("transformers==4.57.6", "huggingface_hub==0.36.2", "tokenizers==0.22.2")
EXPORTED = ("attention_bias", "mlp_bias", "qwen2", "qwen2, tied", "nemo", "yarn", "dynamic")
TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def older(tmp_path_factory) -> Path:
    """The interpreter of the environment with the older version."""
    directory = tmp_path_factory.mktemp("older")
    subprocess.run([sys.executable, "-m", "venv", str(directory)], check=True)
    python = directory / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", *OLDER]
    if subprocess.run(install, capture_output=True).returncode:
        pytest.skip(f"pip cannot install {OLDER[0]} here")
    paths = sysconfig.get_paths(vars={"base": str(directory), "platbase": str(directory)})
    (Path(paths["purelib"]) / "zz.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return python


@pytest.fixture(scope="module")
def exports(tmp_path_factory) -> list[Path]:
    """A Lory model of every family, merged by a text and exported."""
    made = []
    for number, family in enumerate(EXPORTED):
        directory = tmp_path_factory.mktemp("exports")
        save(directory / "hf", *FAMILIES[family])
        settings = {"chat_template": TEMPLATE} if number % 2 else {}
        (directory / "hf" / "tokenizer_config.json").write_text(json.dumps(settings))
        runs.import_llama(directory / "hf", directory / "run", experts=2)
        runs.export_run(RunDirectory(directory / "run"), directory / "out", prompt="a boat")
        made.append(directory / "out")
    return made


def used(python: str | Path, exports: list[Path]) -> list[dict]:
    script = ROOT / "tests" / "support" / "use_export.py"
    result = subprocess.run(
        [str(python), str(script), *map(str, exports)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_both_versions_do_the_same_with_an_export(exports, older):
    newer_found, older_found = used(sys.executable, exports), used(older, exports)
    for number, (newer, found) in enumerate(zip(newer_found, older_found, strict=True)):
        assert newer.pop("version").startswith("5.") and found.pop("version") == "4.57.6"
        np.testing.assert_allclose(newer.pop("logits"), found.pop("logits"), atol=1e-4)
        assert newer.pop("loading") == found.pop("loading") == {}
        assert newer == found
        assert found["inputs"] == ["attention_mask", "input_ids"]
        assert found["chat"] == ("[user] hello" if number % 2 else None)
        assert found["decoded"] == "naïve 河"
