"""What is installed: a wheel with recipes, task files and types, and the versions it requires."""

import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.support.tiny import ROOT, assert_one_line_error

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


# ---------------------------------------------------------------- pins and ranges


def pins(name: str) -> dict[str, Requirement]:
    lines = (ROOT / name).read_text("utf-8").splitlines()
    parsed = [Requirement(line) for line in lines if line and line[0] not in "#-"]
    return {item.name: item for item in parsed}


def ranges(items: list[str]) -> dict[str, Requirement]:
    parsed = [Requirement(item) for item in items]
    return {item.name: item for item in parsed if item.name != "lory-jax"}


@pytest.mark.parametrize(
    ("file", "items"),
    [
        ("requirements.txt", PROJECT["dependencies"]),
        ("requirements-eval.txt", EXTRAS["eval"]),
        ("requirements-storage.txt", EXTRAS["storage"]),
        ("requirements-formats.txt", EXTRAS["formats"]),
        ("requirements-serve.txt", EXTRAS["serve"]),
        ("requirements-dev.txt", EXTRAS["dev"]),
    ],
)
def test_the_pins_are_the_lowest_versions_of_the_ranges(file, items):
    pinned, accepted = pins(file), ranges(items)
    assert pinned.keys() == accepted.keys()
    for name, pin in pinned.items():
        assert str(pin.marker) == str(accepted[name].marker), name
        (exact,) = pin.specifier
        assert exact.operator == "=="
        low = [s for s in accepted[name].specifier if s.operator in (">=", "==")]
        assert [Version(s.version) for s in low] == [Version(exact.version)], name


@pytest.mark.parametrize(("file", "extra"), [("tpu", "tpu"), ("cuda", "cuda")])
def test_jax_of_an_accelerator_is_the_jax_of_all(file, extra):
    (accelerated,) = ranges(EXTRAS[extra]).values()
    assert accelerated.specifier == ranges(PROJECT["dependencies"])["jax"].specifier
    pinned = pins(f"requirements-{file}.txt")["jax"]
    assert pinned.specifier == pins("requirements.txt")["jax"].specifier
    assert pinned.extras == accelerated.extras


# ---------------------------------------------------------------- the wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    result = subprocess.run(
        [*pip, f"--wheel-dir={directory}", str(ROOT)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    (path,) = directory.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def lory(wheel, tmp_path_factory):
    """Runs the installed `lory` in an empty directory, with the packages of these tests."""
    directory = tmp_path_factory.mktemp("installed")
    python = directory / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", directory / "venv"], check=True)
    site = directory / "venv" / Path(sysconfig.get_path("purelib")).relative_to(sys.prefix)
    # Python does not read .pth files in there, such as that of an editable lory_jax.
    packages = [path for path in sys.path if path.endswith("site-packages")]
    (site / "tests.pth").write_text("".join(f"{path}\n" for path in packages))
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-index"]
    subprocess.run([*pip, "--quiet", "--no-deps", "--ignore-installed", str(wheel)], check=True)
    empty = directory / "empty"
    empty.mkdir()

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        return subprocess.run(
            [directory / "venv" / "bin" / "lory", *arguments],
            capture_output=True,
            text=True,
            cwd=empty,
            env=environment | {"JAX_PLATFORMS": "cpu"},
        )

    return run


def test_the_wheel_holds_every_file_of_the_package(wheel):
    listed = subprocess.run(
        ["git", "ls-files", "lory_jax", "configs"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("requires a git checkout to know which files belong to the package")
    expected = {re.sub("^configs/", "lory_jax/configs/", name) for name in listed.stdout.split()}
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in names if ".dist-info/" not in name} == expected
    for needed in ("lory_jax/py.typed", "lory_jax/evaluation/harness/tasks/yelp.yaml"):
        assert needed in names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_verbs_run_in_an_empty_directory(lory):
    assert "prepare" in lory("--help").stdout
    shown = lory("prepare", "--help")
    assert shown.returncode == 0 and "--source" in shown.stdout
    assert_one_line_error(lory("prepare", "--out=d", "--source=missing"), 1, "missing")


def test_a_recipe_by_name_in_an_empty_directory(lory):
    plan = ("plan", "--no_compile", "--json", "--topology=v5e-4")
    result = lory(*plan, "--config=local:experts=8")
    assert result.returncode == 0, result.stderr
    assert '"flops_per_token"' in result.stdout
    assert_one_line_error(lory(*plan, "--config=nowhere"), 2, "nowhere", "lory_0_3b")
