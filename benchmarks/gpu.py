"""Everything to be learned from one GPU in a short time, in order of worth.

    bash launch/gpu.sh bench --minutes=25 [--out=gpu_bench.json] [--instances=FILE.npy]
    bash launch/gpu.sh bench --dry-run                       the whole script at toy size, on a CPU

1. The kernels against their references: errors of values and gradients.
2. The training step at 0.3B: dense, 8, 16 and 32 experts; the ratio to the dense step of as many
   layers, tokens per second, MFU, and peak memory beside what the compiler planned.
3. `merged_ffn` = whole and blocks: one layer, and the step.
4. Batch sizes and what is recomputed (`remat`).
5. Decoding: tokens per second of a dense model, and of a Lory model whose experts are merged for
   each row or stay experts.
6. With the time that is left, 0.3B with 8 experts and dense, trained on the same instances.

Each case runs in a process of its own, so that its peak memory is its own and a case that does not
fit ends nothing else. Every result is written to the file as it comes; run again, the script
resumes with what the file lacks. Requires jax, flax, optax and orbax only.

Instances are int32 [N, L + 1]: `--export` writes them from prepared data, on a machine with all
packages. Without them, a model of the same size is trained on the bytes of Python's own sources.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])

Case = dict[str, Any]

# The paper's step times over dense on A100s, from its tokens per second (29,000 dense).
PAPER_RATIOS = {8: 1.18, 16: 1.27, 32: 1.39}
LEAST_SECONDS = 90  # a case is not begun with less time than this
TRAIN_SHARE = 0.25  # of the time, kept for training at the end

FULL: Case = {
    "vocab_size": 32_000,
    "num_layers": 24,
    "embed_dim": 1024,
    "num_heads": 16,
    "mlp_dim": 2816,
    "sequence_length": 4096,
    "segment_length": 256,
    "compute_dtype": "bfloat16",
}
TOY: Case = {
    "vocab_size": 320,
    "num_layers": 2,
    "embed_dim": 64,
    "num_heads": 2,
    "mlp_dim": 128,
    "sequence_length": 128,
    "segment_length": 32,
    "compute_dtype": "float32",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=25.0, help="when to stop (default: 25)")
    parser.add_argument("--out", type=Path, default=Path("gpu_bench.json"))
    parser.add_argument("--instances", type=Path, metavar="FILE.npy", help="what to train on")
    parser.add_argument("--dry-run", action="store_true", help="at toy size, on a CPU")
    parser.add_argument("--export", metavar="DATA", help="write --instances from prepared data")
    args = parser.parse_args()
    if args.minutes <= 0:
        parser.error(f"--minutes: got {args.minutes}, must be above 0")
    if args.instances and not args.export and not args.instances.is_file():
        parser.error(f"--instances: got {args.instances}, which is no file")
    if args.export:
        if not args.instances:
            parser.error("--export: requires --instances=FILE.npy, where to write")
        from gpu_cases import export_instances

        export_instances(args.export, args.instances)
        return
    if args.dry_run:
        os.environ["JAX_PLATFORMS"] = "cpu"
    run_all(args)


def run_all(args: argparse.Namespace) -> None:
    """Runs every case that the file lacks, as far as the time goes, and prints the table."""
    begin = time.monotonic()
    results: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}
    cases = all_cases(args)
    for i, (name, case) in enumerate(cases.items()):
        if "error" not in results.get(name, {"error": ""}):
            continue
        left = 60 * args.minutes - (time.monotonic() - begin)
        is_training = case["kind"] == "train"
        reserve = 0 if is_training else 60 * args.minutes * TRAIN_SHARE
        if not args.dry_run and left - reserve < LEAST_SECONDS:
            print(f"{name}: left out, {max(left, 0):.0f} s are left", flush=True)
            continue
        if is_training:  # what remains is shared by the models that are still to be trained
            waiting = [c for c in list(cases.values())[i:] if c["kind"] == "train"]
            case = case | {"seconds": 5.0 if args.dry_run else (left - 60) / len(waiting)}
        print(f"{i + 1} of {len(cases)}, {left / 60:.1f} min left: {name}", flush=True)
        results[name] = run_one(case, args, left)
        print(f"  {summary(results[name])}", flush=True)
        write(args.out, json.dumps(results, indent=1) + "\n")
    print("\n" + table(results))


def all_cases(args: argparse.Namespace) -> dict[str, Case]:
    """The cases by name, in order of worth."""
    shape = TOY if args.dry_run else FULL
    rounds, batch = (2, 2) if args.dry_run else (10, 8)
    half = {"num_layers": shape["num_layers"] // 2}

    def step(experts: int, batch: int = batch, **fields: Any) -> Case:
        model = shape | {"num_experts": experts, "remat": "full"} | fields
        return {"kind": "step", "model": model, "batch": batch, "rounds": rounds}

    cases: dict[str, Case] = {
        "machine": {"kind": "machine"},
        "kernels": {"kind": "kernels", "model": shape | {"num_experts": 8}},
        "step dense": step(0),
        "step 8 experts": step(8),
        "step 16 experts": step(16),
        "step 32 experts": step(32),
        # Of 32 experts' parameters and moments, those of half the layers fit into 80 GB.
        "step dense, half the layers": step(0, **half),
        "step 32 experts, half the layers": step(32, **half),
    }
    for name in ("whole", "blocks"):
        layer = {"kind": "layer", "model": shape | {"num_experts": 8, "merged_ffn": name}}
        cases[f"layer 8 experts, {name}"] = layer | {"batch": batch, "rounds": rounds}
    cases["step 8 experts, blocks"] = step(8, merged_ffn="blocks")  # those above are `whole`
    for remat in ("none", "dots"):
        cases[f"step dense, remat={remat}"] = step(0, remat=remat)
        cases[f"step 8 experts, remat={remat}"] = step(8, remat=remat)
    for size in (batch // 2, batch * 2):
        cases[f"step dense, batch {size}"] = step(0, size)
        cases[f"step 8 experts, batch {size}"] = step(8, size)
    for experts, name, ffn in (
        (0, "dense", "merged"),
        (8, "merged", "merged"),
        (8, "experts", "experts"),
    ):
        for rows in (1, 32):
            decode = {"kind": "decode", "model": shape | {"num_experts": experts}, "batch": rows}
            decode |= {"ffn": ffn, "tokens": 4 if args.dry_run else 64}
            cases[f"decode {name}, {rows} rows"] = decode
    for experts, name in ((8, "8 experts"), (0, "dense")):
        model = shape | {"num_experts": experts, "remat": "full"}
        train = {"kind": "train", "model": model, "batch": batch}
        path = str(args.instances.resolve()) if args.instances else None
        cases[f"train {name}"] = train | {"instances": path}
    return cases


def run_one(case: Case, args: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """A case's result; what failed is a result too: `{"error": ...}`."""
    if args.dry_run:  # one process for all: starting them is most of the time
        from gpu_cases import run_case

        return run_case(case)
    worker = [sys.executable, str(Path(__file__).with_name("gpu_cases.py"))]
    try:
        done = subprocess.run(
            worker, input=json.dumps(case), capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not finished in {seconds:.0f} s"}
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return {"error": next((e for e in lines if "RESOURCE_EXHAUSTED" in e), lines[-1])[:300]}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


# ---------------------------------------------------------------- the table


def summary(result: dict[str, Any]) -> str:
    parts = []
    for name, value in result.items():
        if isinstance(value, float):
            parts.append(f"{name} {value:,.4g}")
        elif isinstance(value, str | int):
            parts.append(f"{name} {value}")
    return ", ".join(parts)


def table(results: dict[str, Any]) -> str:
    """The steps beside the dense one of as many layers, and the paper's ratios."""
    rows = [["", "over dense", "paper", "tokens/s", "MFU", "GiB", "planned"]]
    for name, row in results.items():
        if not name.startswith("step ") or "seconds" not in row:
            continue
        dense = results.get(dense_of(name), {}).get("seconds")
        rows.append(
            [
                name,
                f"{row['seconds'] / dense:.3f}" if dense else "-",
                f"{PAPER_RATIOS[row['experts']]}" if row["experts"] else "-",
                f"{row['tokens_per_second']:,.0f}",
                f"{row['mfu']:.1%}" if row["mfu"] else "-",
                f"{row['peak_bytes'] / 2**30:.1f}" if row["peak_bytes"] else "-",
                f"{row['planned_bytes'] / 2**30:.1f}",
            ]
        )
    return "\n".join(f"{row[0]:<38}" + "".join(f"{c:>12}" for c in row[1:]) for row in rows)


def dense_of(name: str) -> str:
    """The dense step that a step is compared with: of the same layers, batch and remat."""
    _, _, rest = name.partition(", ")
    is_same = rest and rest != "blocks"
    return f"step dense, {rest}" if is_same else "step dense"


if __name__ == "__main__":
    main()
