"""Whether many domains cost more than few: CPU-seconds of every stage for one number of documents.

    python benchmarks/prepare_domains.py --scratch=DIR [--documents=30000] [--json=FILE]

Prepares documents of 30 words in 4 and in 5,000 domains, by the local engine with one worker.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

from prepare import KEEP_WORK, from_markers, machine

DOMAINS, WORDS = (4, 5000), 30
SMALL = ["--config.model.sequence_length=32", "--config.model.segment_length=16"]


def measure(scratch: Path, documents: int, domains: int) -> dict[str, float]:
    rng = random.Random(0)
    vocabulary = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(3, 8))) for _ in range(5000)]
    source = scratch / f"domains-{domains}.jsonl"
    with source.open("w") as file:
        for i in range(documents):
            text = " ".join(rng.choices(vocabulary, k=WORDS))
            file.write(json.dumps({"text": text, "domain": f"domain{i % domains}"}) + "\n")
    out, work = scratch / f"data-{domains}", scratch / f"work-{domains}"
    shutil.rmtree(out, ignore_errors=True)
    flags = [f"--source={source}", f"--out={out}", f"--work={work}", "--workers=1", *SMALL]
    flags += ["--config=lory_0_3b", "--config.model.vocab_size=2000"]
    flags += ["--config.data.min_document_bytes=1", "--config.data.embedding_dim=64"]
    subprocess.run([sys.executable, "-c", KEEP_WORK, *flags], check=True)
    stages = from_markers(work)["stages"]
    shutil.rmtree(work)
    return {name: stage["cpu_seconds"] for name, stage in stages.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=30_000)
    parser.add_argument("--scratch", type=Path, required=True, metavar="DIR")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    args.scratch.mkdir(parents=True, exist_ok=True)
    stages = {domains: measure(args.scratch, args.documents, domains) for domains in DOMAINS}
    few, many = (sum(stages[domains].values()) for domains in DOMAINS)
    for name in stages[DOMAINS[0]]:
        print(f"{name:<12}" + "".join(f"{stages[domains][name]:>8.1f}" for domains in DOMAINS))
    print(f"{DOMAINS[1]:,} domains over {DOMAINS[0]}: {many:.1f} / {few:.1f} = {many / few:.2f}")
    if args.json:
        result = {"machine": machine(), "documents": args.documents, "cpu_seconds": stages}
        args.json.write_text(json.dumps(result | {"ratio": round(many / few, 3)}, indent=1) + "\n")


if __name__ == "__main__":
    main()
