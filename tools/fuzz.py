"""Fuzzes every reader of outside bytes and writes what was found into docs/reliability.md.

    pip install atheris
    python tools/fuzz.py [--seconds=600] [--readers=manifest,metrics] [--logs=DIR]

The readers run one after the other, each in a process of its own (tests/support/fuzz_worker.py),
which ends at the first finding: fix it and run the reader again. docs/fuzzing.json keeps one row
for each reader. With --logs, the outputs that workers left in DIR/READER.log are read instead.
"""

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tables import ROOT, markdown, replace_marked, write

FIGURES = ROOT / "docs" / "fuzzing.json"
READERS = {
    "manifest": "the manifest of prepared data",
    "run_config": "config.json of a run",
    "hf_config": "config.json of Hugging Face",
    "safetensors_header": "the header of a safetensors file",
    "safetensors_index": "the index of safetensors files",
    "tokenizer_json": "tokenizer.json",
    "json_lines": "a .jsonl file of documents",
    "checkpoint_meta": "the metadata of a checkpoint",
    "metrics": "metrics.jsonl",
    "json_documents": "a .json file of documents",
    "hf_tokenizer_config": "tokenizer_config.json",
    "special_tokens": "tokenizer_special.json",
    "dataset": "dataset.json of a run",
}
FOUND = {
    "inputs": r"stat::number_of_executed_units: +(\d+)",
    "peak_mib": r"stat::peak_rss_mb: +(\d+)",
    "seconds": r"Done \d+ runs in (\d+) second",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--readers", default=",".join(READERS))
    parser.add_argument("--logs", type=Path)
    args = parser.parse_args()
    figures = json.loads(FIGURES.read_text("utf-8")) if FIGURES.exists() else {}
    for reader in args.readers.split(","):
        if args.logs:
            log = (args.logs / f"{reader}.log").read_text(errors="replace")
        else:
            log = fuzz(reader, args.seconds)
        figures[reader] = row(log)
        write(FIGURES, json.dumps(figures, indent=1) + "\n")
    replace_marked(ROOT / "docs" / "reliability.md", "tools/fuzz.py", table(figures))


def fuzz(reader: str, seconds: int) -> str:
    """What a worker prints; exits if it found something."""
    with tempfile.TemporaryDirectory() as directory:
        target = Path(directory) / reader
        target.mkdir()
        worker = ("-m", "tests.support.fuzz_worker", reader, str(seconds), str(target))
        result = subprocess.run(
            [sys.executable, *worker],
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            cwd=ROOT,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )
    if result.returncode:
        sys.exit(f"{reader}: status {result.returncode}\n{result.stderr[-5000:]}")
    return result.stderr


def row(log: str) -> dict[str, Any]:
    """Inputs, peak memory and seconds of a worker that found nothing, and the date."""
    found = {name: re.findall(pattern, log) for name, pattern in FOUND.items()}
    if not all(found.values()):
        sys.exit(f"not the output of a worker that ran to its end:\n{log[-2000:]}")
    numbers = {name: int(values[-1]) for name, values in found.items()}
    return numbers | {"findings": 0, "date": datetime.date.today().isoformat()}


def table(figures: dict[str, Any]) -> str:
    rows = [
        (
            what,
            f"{found['seconds']:,}",
            f"{found['inputs']:,}",
            str(found["findings"]),
            f"{found['peak_mib']} MiB",
            found["date"],
        )
        for reader, what in READERS.items()
        if (found := figures.get(reader))
    ]
    return markdown(("reader", "seconds", "inputs", "findings", "peak memory", "date"), rows)


if __name__ == "__main__":
    main()
