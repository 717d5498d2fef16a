"""What `prepare` costs at several sizes: memory, CPU time and its exponent, time for neighbours.

    python benchmarks/prepare.py --documents=100000,300000 --scratch=DIR

Makes documents of about 900 bytes in 400 topics, prepares each corpus by the local engine with a
tokenizer trained on a smaller one, and prints a table in Markdown. The exponent is that of CPU
time from the smallest corpus to the largest; the peak is that of any one process.
"""

import argparse
import json
import math
import random
import resource
import shutil
import subprocess
import sys
from pathlib import Path

TOPICS, WORDS_PER_TOPIC, WORDS = 400, 120, 160
FILES_EVERY = 20_000
FIRST = 10_000  # documents that the tokenizer of all sizes is trained on
STAGES = ("read", "fit", "encode", "assign", "order")


def write_corpus(directory: Path, documents: int) -> None:
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
                words = rng.choices(common, weights, k=WORDS // 2)
                words += rng.choices(topics[topic], k=WORDS // 2)
                rng.shuffle(words)
                record = {
                    "text": " ".join(words),
                    "domain": f"domain{topic % 4}",
                    "source": f"source{rng.randrange(max(documents // 30, 100))}",
                }
                file.write(json.dumps(record) + "\n")


def measure(
    scratch: Path, documents: int, workers: int, tokenizer: Path | None
) -> dict[str, float]:
    """Prepares a corpus, and reads the stages' manifests just before they are removed."""
    corpus, out = scratch / f"corpus-{documents}", scratch / f"data-{documents}"
    if not corpus.exists():
        write_corpus(corpus, documents)
    shutil.rmtree(out, ignore_errors=True)
    work = scratch / f"work-{documents}"
    shutil.rmtree(work, ignore_errors=True)
    command = [
        *(sys.executable, "-m", "lory_jax.prepare", f"--source={corpus}", f"--out={out}"),
        *(f"--work={work}", "--config=lory_0_3b", "--config.model.sequence_length=1024"),
        *("--config.model.vocab_size=8192", f"--workers={workers}"),
        *([f"--tokenizer={tokenizer}"] if tokenizer else []),
    ]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code = (
        "import sys, shutil; from lory_jax import cli, prepare\n"
        "from lory_jax.preparation import pipeline\n"
        "pipeline._remove = lambda work: None\n"  # the manifests are wanted
        "cli.run(prepare.main)\n"
    )
    subprocess.run([sys.executable, "-c", code, *command[3:]], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    stages = {name: json.loads((work / f"{name}.json").read_text()) for name in STAGES}
    neighbours = [
        json.loads(path.read_text())["values"]["neighbour_cpu_seconds"]
        for path in (work / "order").glob("*.json")
    ]
    similarity = json.loads((out / "manifest.json").read_text())["similarity"]["similar"]
    shutil.rmtree(work)
    return {
        "documents": documents,
        **{name: stage["cpu_seconds"] for name, stage in stages.items()},
        "cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "peak": max(stage["peak_mib"] for stage in stages.values()),
        "neighbours": 1000 * sum(neighbours) / stages["order"]["rows"],
        "shards": stages["order"]["tasks"],
        "cosine": similarity["mean_cosine"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", default="100000,300000")
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    sizes = [int(size) for size in args.documents.split(",")]
    measure(args.scratch, FIRST, args.workers, None)
    tokenizer = args.scratch / f"data-{FIRST}" / "tokenizer.json"
    rows = [measure(args.scratch, size, args.workers, tokenizer) for size in sizes]
    print(
        "| documents | read | fit | encode | assign | order | all CPU-s | peak MiB | "
        "neighbours, ms a document | shards | mean cosine |"
    )
    print("|---" * 11 + "|")
    for row in rows:
        stages = " | ".join(f"{row[name]:.1f}" for name in STAGES)
        print(
            f"| {row['documents']:,.0f} | {stages} | {row['cpu']:.0f} | {row['peak']:,.0f} | "
            f"{row['neighbours']:.3f} | {row['shards']:.0f} | {row['cosine']} |"
        )
    if len(rows) > 1:
        first, last = rows[0], rows[-1]
        growth = math.log(last["documents"] / first["documents"])
        print(f"exponent of CPU time: {math.log(last['cpu'] / first['cpu']) / growth:.2f}")


if __name__ == "__main__":
    main()
