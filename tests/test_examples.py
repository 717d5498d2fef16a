"""The notebooks of examples/ run from top to bottom, and the stored outputs are theirs."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny import ROOT

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def test_there_are_two_notebooks():
    assert [path.stem for path in NOTEBOOKS] == ["train_and_look_inside", "upcycle_a_llama"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_outputs_are_complete_and_name_no_machine(path):
    cells = code_cells(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert any(
        "image/png" in output.get("data", {}) for cell in cells for output in cell["outputs"]
    )
    for cell in cells:
        for text in texts(cell):
            assert not re.search(r"(?<![\w.:/])/(tmp|home|root|var|Users|work)\b", text), text


@pytest.mark.slow  # a minute and a half each
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(path, tmp_path):
    copy = Path(shutil.copy(path, tmp_path))
    result = execute(copy)
    assert result.returncode == 0, result.stderr
    for before, after in zip(code_cells(path), code_cells(copy), strict=True):
        assert kinds(before) == kinds(after), "".join(before["source"])


def test_a_failing_cell_is_named_and_the_notebook_stays(tmp_path):
    notebook = {"cells": [cell("x = 1\nx + 1"), cell("x / 0")], "nbformat": 4, "nbformat_minor": 5}
    path = tmp_path / "failing.ipynb"
    path.write_text(json.dumps(notebook))
    result = execute(path)
    assert result.returncode != 0
    assert "failing.ipynb[2]" in result.stderr and "ZeroDivisionError" in result.stderr
    assert json.loads(path.read_text()) == notebook


def test_prints_values_and_pictures_become_outputs(tmp_path):
    source = "import matplotlib.pyplot as plt\nprint('said')\nplt.plot([1, 2])\nplt.show()\n6 * 7"
    path = tmp_path / "good.ipynb"
    path.write_text(json.dumps({"cells": [cell(source)], "nbformat": 4, "nbformat_minor": 5}))
    assert execute(path).returncode == 0
    (done,) = code_cells(path)
    assert kinds(done) == ["stream", "execute_result", "display_data"]
    assert texts(done)[:2] == ["said\n", "42"]


def execute(path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "examples" / "execute.py"), str(path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def cell(source: str) -> dict[str, Any]:
    return {"cell_type": "code", "source": source, "outputs": [], "execution_count": None}


def code_cells(path: Path) -> list[dict[str, Any]]:
    cells = json.loads(path.read_text("utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def kinds(cell: dict[str, Any]) -> list[str]:
    return [output["output_type"] for output in cell["outputs"]]


def texts(cell: dict[str, Any]) -> list[str]:
    """What a cell printed, and its value."""
    return [
        "".join(output.get("text") or output["data"]["text/plain"]) for output in cell["outputs"]
    ]
