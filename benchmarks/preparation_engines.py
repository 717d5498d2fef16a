"""Whether engines, workers and kills change what `prepare` writes; they must not change a byte.

    python benchmarks/preparation_engines.py --documents=300000 --scratch=DIR \
      [--beam_python=PYTHON] [--kills=20] [--json=FILE]

Prepares one corpus by the local engine with one and with two workers and, with the interpreter of
an environment that has requirements-beam.txt, by Beam with two. Then it prepares it again by
engines in turn, each of which is killed with SIGKILL at a random moment, and compares the
manifests, which hold the SHA-256 of every file. The marker of a finished task must never change.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from prepare import FIRST, machine, measure, write_corpus

FLAGS = [
    *("--config=lory_0_3b", "--config.model.sequence_length=1024"),
    *("--config.model.vocab_size=8192", "--config.data.shard_documents={shard}"),
]


class Trial:
    """One corpus, prepared again and again."""

    def __init__(self, scratch: Path, documents: int, shard: int):
        self.scratch, self.corpus = scratch, scratch / f"corpus-{documents}"
        if not self.corpus.exists():
            write_corpus(self.corpus, documents)
        tokenizer = scratch / "tokenizer.json"
        if not tokenizer.exists():
            measure(scratch, FIRST, 160, [], None)
            shutil.copyfile(scratch / f"data-{FIRST}" / "tokenizer.json", tokenizer)
        self._flags = [flag.format(shard=shard) for flag in FLAGS] + [f"--tokenizer={tokenizer}"]

    def start(self, name: str, engine: tuple[str, list[str]]) -> subprocess.Popen[bytes]:
        python, flags = engine
        log = (self.scratch / f"{name}.log").open("ab")
        out = f"--out={self.scratch / name}"
        command = [python, "-m", "lory_jax.prepare", f"--source={self.corpus}", out]
        return subprocess.Popen(
            [*command, *self._flags, *flags], stdout=log, stderr=log, start_new_session=True
        )

    def run(self, name: str, engine: tuple[str, list[str]]) -> str:
        """Prepares to the end; returns the hash of the manifest."""
        shutil.rmtree(self.scratch / name, ignore_errors=True)
        process = self.start(name, engine)
        if process.wait():
            raise SystemExit(f"{name}: failed; see {self.scratch / name}.log")
        return self.manifest(name)

    def manifest(self, name: str) -> str:
        contents = (self.scratch / name / "manifest.json").read_bytes()
        return hashlib.sha256(contents).hexdigest()

    def markers(self, name: str) -> dict[str, bytes]:
        """The markers of finished tasks; a running process removes all of them at its end."""
        found = {}
        for path in (self.scratch / f"{name}.tmp-prepare").glob("*/*.json"):
            with contextlib.suppress(FileNotFoundError):
                found[str(path)] = path.read_bytes()
        return found

    def kill(self, name: str, engine: tuple[str, list[str]], rng: random.Random, most: int) -> None:
        """Starts, waits for some new markers and a moment more, and kills all its processes."""
        wanted = len(self.markers(name)) + rng.randint(0, most)
        process = self.start(name, engine)
        while process.poll() is None and len(self.markers(name)) < wanted:
            time.sleep(0.1)
        time.sleep(3 * rng.random())
        with contextlib.suppress(ProcessLookupError):  # it has finished meanwhile
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=300_000)
    parser.add_argument("--shard", type=int, default=100_000)
    parser.add_argument("--scratch", type=Path, required=True, metavar="DIR")
    parser.add_argument("--beam_python", metavar="PYTHON")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    args.scratch.mkdir(parents=True, exist_ok=True)
    trial = Trial(args.scratch.resolve(), args.documents, args.shard)
    engines = {f"local-{n}": (sys.executable, [f"--workers={n}"]) for n in (1, 2)}
    if args.beam_python:
        engines["beam-2"] = (args.beam_python, ["--engine=beam", "--workers=2"])
    manifests = {}
    for name, engine in engines.items():
        manifests[name] = trial.run(name, engine)
        print(f"{name}: manifest {manifests[name]}", flush=True)

    shutil.rmtree(trial.scratch / "killed", ignore_errors=True)
    rng, done, kills = random.Random(0), {}, 0
    while kills < args.kills:
        name = list(engines)[kills % len(engines)]
        trial.kill("killed", engines[name], rng, most=2)
        if (trial.scratch / "killed").exists():  # it was finished first: begin again
            manifests[f"{kills} kills"] = trial.manifest("killed")
            shutil.rmtree(trial.scratch / "killed")
            done = {}
            continue
        kills += 1
        now = trial.markers("killed")
        again = [path for path, marker in done.items() if now.get(path) != marker]
        assert not again, f"finished tasks ran again: {again}"
        done = now
        print(f"kill {kills}, {name}: {len(done)} tasks are done", flush=True)
    if not (trial.scratch / "killed").exists():
        process = trial.start("killed", engines["local-2"])
        assert process.wait() == 0, f"see {trial.scratch / 'killed'}.log"
    manifests[f"{kills} kills"] = trial.manifest("killed")
    print(f"{kills} kills: manifest {manifests[f'{kills} kills']}")
    same = len(set(manifests.values())) == 1
    print("all manifests are equal" if same else "MANIFESTS DIFFER")
    if args.json:
        result = {"machine": machine(), "documents": args.documents, "shard": args.shard}
        result |= {"manifests": manifests, "equal": same, "tasks": len(done)}
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(not same)


if __name__ == "__main__":
    main()
