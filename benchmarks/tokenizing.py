"""What `prepare` adds to the tokenizer's own time: arrays, and the check that no byte is lost.

    TOKENIZERS_PARALLELISM=false python benchmarks/tokenizing.py [--json=FILE]

Trains a tokenizer of 8,192 tokens on made-up documents, then encodes others by turns: by
`encode_batch_fast` of tokenizers alone, and by what stage `encode` calls. Each is given the same
batches and frees what it made. The ratio is that of megabytes per CPU-second.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median

from prepare import machine, write_corpus

from lory_jax.preparation import packing
from lory_jax.preparation.tokenizer_training import train_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        write_corpus(Path(directory) / "corpus", 2 * args.documents)
        lines = (Path(directory) / "corpus" / "part-00000.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    texts, sample = texts[: args.documents], texts[args.documents :]
    tokenizer = train_tokenizer(sample, 8192)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    rounds = []
    for _ in range(args.rounds):
        started = time.process_time()
        tokenizer._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        middle = time.process_time()
        packing.tokenize(texts, tokenizer, "")
        rounds.append((megabytes / (middle - started), megabytes / (time.process_time() - middle)))
    ratio = round(median(ours / raw for raw, ours in rounds), 3)
    for raw, ours in rounds:
        print(f"encode_batch_fast {raw:.2f} MB/s, stage encode {ours:.2f} MB/s: {ours / raw:.3f}")
    print(f"median ratio {ratio}")
    if args.json:
        result = {"machine": machine(), "rounds": rounds, "ratio": ratio}
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
