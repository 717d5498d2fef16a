"""How long `launch/local.sh` prepares its documents, compared with another version of this code.

    git worktree add DIR a8b7418
    python benchmarks/prepare_versions.py --other=DIR --scratch=DIR2 [--json=FILE]

Prepares the documents of the Python installation with the recipe `local` by both versions in turn,
so that both meet the same load, and prints the ratio of their CPU-seconds and of their seconds.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from prepare import machine

ROOT = Path(__file__).resolve().parent.parent


def measure(root: Path, out: Path, flags: list[str]) -> tuple[float, float]:
    """Prepares with the code of `root`; returns CPU-seconds of all processes, and seconds."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "lory_jax.prepare", "--config=configs/local.py"]
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run(
        [*command, "--source=python", f"--out={out}", *flags],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return cpu, time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--other", type=Path, required=True, metavar="DIR", help="a checkout")
    parser.add_argument("--scratch", type=Path, required=True, metavar="DIR")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--domain_bytes", type=int, default=10_000_000)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    flags = [f"--config.data.max_domain_bytes={args.domain_bytes}"]
    # As launch/local.sh has it; the other version has no such setting.
    mine = [*flags, "--config.data.drop_near_duplicates=false"]
    rounds = []
    for i in range(args.rounds):
        theirs = measure(args.other.resolve(), args.scratch / "theirs", flags)
        ours = measure(ROOT, args.scratch / "ours", mine)
        rounds.append({"other": theirs, "this": ours})
        print(f"round {i}: CPU-seconds {theirs[0]:.1f}, {ours[0]:.1f}", flush=True)
    ratios = {
        name: round(median(r["this"][i] / r["other"][i] for r in rounds), 3)
        for i, name in enumerate(("cpu", "seconds"))
    }
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=args.other,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    print(f"this version over {commit}: CPU {ratios['cpu']}, seconds {ratios['seconds']}")
    if args.json:
        result = {
            "machine": machine(),
            "other": commit,
            "domain_bytes": args.domain_bytes,
            "rounds": rounds,
            "ratios": ratios,
        }
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
