"""A stand-in for what a run of the study starts: train, evaluate and measure, told by their flags.

Training counts its steps in a file, saves at SIGTERM, and diverges at a learning rate above 1. The
loss of a run is its learning rate plus a hundredth of its seed.
"""

import json
import signal
import sys
import time
from pathlib import Path
from types import FrameType

import numpy as np

from lory_jax.evaluation.held_out import encode_instances

STEP_SECONDS = 0.005


def train(workdir: Path, fields: dict[str, str]) -> None:
    workdir.mkdir(parents=True, exist_ok=True)
    saved = workdir / "step"
    step = int(saved.read_text()) if saved.exists() else 0

    def save(number: int, frame: FrameType | None) -> None:
        saved.write_text(str(step))
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, save)
    (workdir / "fields.json").write_text(json.dumps(fields))
    if float(fields["train.learning_rate"]) > 1:
        sys.exit(3)
    with open(workdir.parent / "steps.txt", "a") as log:
        while step < int(fields["train.steps"]):
            step += 1
            print(workdir.name, step, file=log, flush=True)
            time.sleep(STEP_SECONDS)
    saved.write_text(str(step))
    losses = dict.fromkeys(("ones", "threes"), loss_of(fields))
    line = {"step": step, "tokens": step, "loss": loss_of(fields), "step_seconds": 0.1}
    line |= {"experts_active": None, "validation_loss_by_domain": losses}
    (workdir / "metrics.jsonl").write_text(json.dumps(line) + "\n")


def loss_of(fields: dict[str, str]) -> float:
    return float(fields["train.learning_rate"]) + float(fields["train.seed"]) / 100


def evaluate(workdir: Path, out: Path) -> None:
    fields = json.loads((workdir / "fields.json").read_text())
    losses = {domain: np.full(3, loss_of(fields), np.float32) for domain in ("ones", "threes")}
    perplexity = {domain: float(np.exp(loss_of(fields))) for domain in losses}
    out.write_text(json.dumps({"perplexity": perplexity, "seconds": 1.0}))
    origins = {domain: ["a", "b", "b"] for domain in losses}
    out.with_name(f"{out.stem}_instances.npz").write_bytes(encode_instances(losses, origins))


def main() -> None:
    flags = dict(word.removeprefix("--").partition("=")[::2] for word in sys.argv[1:])
    workdir = Path(flags["workdir"])
    if "config" in flags:
        fields = {n.removeprefix("config."): v for n, v in flags.items() if n.startswith("config.")}
        train(workdir, fields)
    elif "split" in flags:
        evaluate(workdir, Path(flags["out"]))
    else:
        Path(flags["out"]).write_text(json.dumps({"steps": 1, "step_seconds": 0.1}))


if __name__ == "__main__":
    main()
