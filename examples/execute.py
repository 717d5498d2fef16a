"""Executes notebooks from top to bottom and writes their outputs into them.

    python examples/execute.py [NOTEBOOK.ipynb ...]

Each notebook runs in a process of its own, as in a fresh kernel. Text that a cell prints, the value
of its last line, and the pictures it draws become its outputs. No Jupyter is required.
"""

import ast
import base64
import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def main() -> None:
    names = sys.argv[1:]
    if len(names) == 2 and names[0] == "--here":
        execute(Path(names[1]))
        return
    for path in [Path(name) for name in names] or sorted(HERE.glob("*.ipynb")):
        print(f"executing {path.name}", flush=True)
        subprocess.run([sys.executable, __file__, "--here", str(path)], check=True)


def execute(path: Path) -> None:
    """Runs the cells in this process; an exception ends it, and the notebook stays as it was."""
    os.environ["MPLBACKEND"] = "agg"
    notebook = json.loads(path.read_text("utf-8"))
    namespace: dict[str, Any] = {"__name__": "__main__"}
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(cells, start=1):
        source = "".join(cell["source"])
        cell["execution_count"] = number
        cell["outputs"] = run_cell(source, namespace, number, f"{path.name}[{number}]")
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", "utf-8")
    temporary.replace(path)


def run_cell(
    source: str, namespace: dict[str, Any], number: int, filename: str
) -> list[dict[str, Any]]:
    """The outputs of one cell, in the notebook format."""
    tree = ast.parse(source, filename)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, filename, "exec"), namespace)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), filename, "eval"), namespace)
    outputs: list[dict[str, Any]] = []
    if text := printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": lines_of(text)})
    if value is not None:
        data = {"text/plain": lines_of(repr(value))}
        outputs.append(
            {
                "output_type": "execute_result",
                "execution_count": number,
                "metadata": {},
                "data": data,
            }
        )
    return outputs + pictures()


def pictures() -> list[dict[str, Any]]:
    """What the cell drew with pyplot, as Jupyter shows it; the figures are closed."""
    if "matplotlib.pyplot" not in sys.modules:
        return []
    import matplotlib.pyplot as plt

    outputs = []
    for figure in map(plt.figure, plt.get_fignums()):
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=100, metadata={"Software": None})
        data = {"image/png": base64.b64encode(png.getvalue()).decode(), "text/plain": ["<Figure>"]}
        outputs.append({"output_type": "display_data", "metadata": {}, "data": data})
    plt.close("all")
    return outputs


def lines_of(text: str) -> list[str]:
    return text.splitlines(keepends=True)


if __name__ == "__main__":
    main()
