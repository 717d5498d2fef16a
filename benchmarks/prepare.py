"""What `prepare` costs at several sizes: memory, CPU time and its exponent, time for neighbours.

    python benchmarks/prepare.py --documents=100000,300000,1000000 --scratch=DIR --json=FILE

Makes documents of about 1,000 bytes in 400 topics, prepares each corpus by the local engine with a
tokenizer trained on a smaller one, and prints CPU-seconds and peak memory of every stage.
tools/preparation.py makes the table of docs/data.md from the JSON. CPU-seconds are those that the
tasks' markers say, so a run that was interrupted resumes with the same figures.
"""

import argparse
import datetime
import json
import os
import platform
import random
import shutil
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PACKAGES = ("numpy", "scann", "tokenizers")
TOPICS, WORDS_PER_TOPIC, WORDS = 400, 120, 160
KEEP_WORK = """
from lory_jax import cli, prepare
from lory_jax.preparation import pipeline
pipeline._remove = lambda work: None  # the markers are wanted
cli.run(prepare.main)
"""
FILES_EVERY = 20_000
FIRST = 10_000  # documents that the tokenizer of all sizes is trained on


def write_corpus(directory: Path, documents: int, words: int = WORDS) -> None:
    """Writes documents of words that a topic and all topics share, by Zipf's law."""
    rng = random.Random(0)
    letters = "etaoinshrdlucmfwygpb"
    common = ["".join(rng.choices(letters, k=rng.randint(2, 6))) for _ in range(500)]
    topics = [
        ["".join(rng.choices(letters, k=rng.randint(4, 9))) for _ in range(WORDS_PER_TOPIC)]
        for _ in range(TOPICS)
    ]
    weights = [1 / (i + 5) for i in range(500)]
    directory.mkdir(parents=True)
    for start in range(0, documents, FILES_EVERY):
        with (directory / f"part-{start // FILES_EVERY:05d}.jsonl").open("w") as file:
            for _ in range(min(FILES_EVERY, documents - start)):
                topic = rng.randrange(TOPICS)
                chosen = rng.choices(common, weights, k=words // 2)
                chosen += rng.choices(topics[topic], k=words // 2)
                rng.shuffle(chosen)
                record = {
                    "text": " ".join(chosen),
                    "domain": f"domain{topic % 4}",
                    "source": f"source{rng.randrange(max(documents // 30, 100))}",
                }
                file.write(json.dumps(record) + "\n")


def measure(
    scratch: Path, documents: int, words: int, flags: list[str], tokenizer: Path | None
) -> dict[str, Any]:
    """Prepares a corpus, and reads the stages' markers before the work would be removed."""
    name = f"{documents}" if words == WORDS else f"{documents}-{words}"
    corpus, out = scratch / f"corpus-{name}", scratch / f"data-{name}"
    if not corpus.exists():
        write_corpus(corpus, documents, words)
    shutil.rmtree(out, ignore_errors=True)
    work = scratch / f"work-{name}"
    flags = [
        *(f"--source={corpus}", f"--out={out}", f"--work={work}"),
        *("--config=lory_0_3b", "--config.model.sequence_length=1024"),
        "--config.model.vocab_size=8192",
        *flags,
        *([f"--tokenizer={tokenizer}"] if tokenizer else []),
    ]
    subprocess.run([sys.executable, "-c", KEEP_WORK, *flags], check=True)
    row = from_markers(work)
    manifest = json.loads((out / "manifest.json").read_text())
    shutil.rmtree(work)
    return row | {
        "documents": documents,
        "cpu_seconds": round(sum(stage["cpu_seconds"] for stage in row["stages"].values()), 1),
        "similarity": manifest["similarity"],
        "tokens": sum(d["tokens"] for d in manifest["counts"]["train"]["domains"].values()),
        "left_out": manifest.get("dropped", {}),
    }


def from_markers(work: Path) -> dict[str, Any]:
    """CPU-seconds and peak memory of every stage."""
    from lory_jax.preparation.stages import STAGES

    markers = {
        stage.name: [json.loads(path.read_text()) for path in (work / stage.name).glob("*.json")]
        for stage in STAGES
    }
    orders = markers["order"]
    neighbours = sum(marker["values"]["neighbour_cpu_seconds"] for marker in orders)
    ordered = sum(m["rows"] + m["values"]["near_duplicates"] for m in orders)
    return {
        "stages": {
            name: {
                "tasks": len(of_stage),
                "cpu_seconds": round(sum(marker["cpu_seconds"] for marker in of_stage), 1),
                "peak_mib": max(marker["peak_mib"] for marker in of_stage),
            }
            for name, of_stage in markers.items()
        },
        "neighbour_ms": round(1000 * neighbours / ordered, 3),
        "largest_shard": max(m["rows"] + m["values"]["near_duplicates"] for m in orders),
    }


def machine() -> dict[str, Any]:
    """What a reader needs to know about where figures come from."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "date": datetime.date.today().isoformat(),
        "processor": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES if find_spec(name)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", default="100000,300000,1000000")
    parser.add_argument("--scratch", type=Path, required=True, metavar="DIR")
    parser.add_argument("--words", type=int, default=WORDS, help="of a document")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("flags", nargs="*", help="more flags of prepare, after --")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    tokenizer = args.scratch / "tokenizer.json"
    flags = [f"--workers={args.workers}", *args.flags]
    if not tokenizer.exists():
        measure(args.scratch, FIRST, WORDS, flags, None)
        shutil.copyfile(args.scratch / f"data-{FIRST}" / "tokenizer.json", tokenizer)
    rows = []
    for size in map(int, args.documents.split(",")):
        rows.append(measure(args.scratch, size, args.words, flags, tokenizer))
        print(json.dumps(rows[-1], indent=1), flush=True)
        if args.json:
            setting = {"words": args.words, "flags": flags}
            result = {"machine": machine(), **setting, "rows": rows}
            args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
