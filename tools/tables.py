"""Markdown tables between two marks of a page, for the scripts beside this file."""

import os
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
END = "<!-- end -->"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write(path: Path, text: str) -> None:
    """Writes the file under a temporary name and moves it into place."""
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def replace_marked(page: Path, script: str, text: str) -> None:
    """Writes `text` between the marks of a page, `<!-- begin: SCRIPT -->` and `<!-- end -->`."""
    begin = f"<!-- begin: {script} -->"
    before, rest = page.read_text().split(begin)
    _, after = rest.split(END, 1)
    write(page, f"{before}{begin}\n\n{text}\n\n{END}{after}")
