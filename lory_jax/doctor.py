"""Checks a work directory and its data without touching them, and says what a resume would do.

    python -m lory_jax.doctor --workdir=W [--data=DIR]

Every checkpoint is read and its sums are compared; of the data every file is hashed. Memory for one
train state is needed. Exit status 1 if anything is damaged or missing.
"""

from pathlib import Path
from typing import Any

import jax

from lory_jax import cli
from lory_jax.data.manifest import MANIFEST_NAME, TOKENIZER_NAME, read_manifest, verify_files
from lory_jax.data.tokenizer import Tokenizer
from lory_jax.errors import InputError
from lory_jax.model.config import ModelConfig
from lory_jax.parallel import make_mesh, start_process
from lory_jax.run.checkpoints import UNFINISHED, Checkpoints, Meta
from lory_jax.run.directory import (
    CONFIG,
    DATASET,
    abstract_params,
    data_directory,
    model_config,
    phase_config,
    read_config,
    read_metrics,
)
from lory_jax.run.lock import holder
from lory_jax.storage import is_remote, storage_path
from lory_jax.training.monitoring.log_files import METRICS
from lory_jax.training.optimizer import make_optimizer
from lory_jax.training.state import abstract_state


def main(argv: list[str]) -> None:
    parser = cli.Parser("doctor", __doc__)
    parser.add_argument("--workdir", required=True, type=storage_path, help="of train")
    parser.add_argument(
        "--data", type=storage_path, help="prepared data (default: where the run found them)"
    )
    args = parser.parse(argv)
    start_process()
    report = Report()
    examine(args.workdir, args.data, report)
    if report.problems:
        raise InputError(f"{args.workdir}: {report.problems} of the things above are not well")


class Report:
    """Prints findings, and counts the bad ones."""

    def __init__(self) -> None:
        self.problems = 0

    def ok(self, text: str) -> None:
        print(f"ok       {text}", flush=True)

    def note(self, text: str) -> None:
        print(f"note     {text}", flush=True)

    def bad(self, text: str) -> None:
        self.problems += 1
        print(f"PROBLEM  {text}", flush=True)


def examine(workdir: Path, data: Path | None, report: Report) -> None:
    """Looks at everything in a work directory; raises `InputError` if it is none."""
    config, model = read_config(workdir), model_config(workdir)
    kind = f"Lory with {model.num_experts} experts" if model.num_experts else "a dense model"
    report.ok(f"{CONFIG}: {kind}, {config['train']['steps']:,} steps")
    if who := holder(workdir):
        report.note(f"a run is in it at this moment ({who}): its files change")
    try:
        Tokenizer.load(workdir / TOKENIZER_NAME)
        report.ok(TOKENIZER_NAME)
    except InputError as error:
        report.bad(str(error))
    examine_data(workdir, data, report)
    meta, has_any = examine_checkpoints(workdir, config, model, report)
    examine_metrics(workdir, meta["step"] if meta else 0, report)
    print(prospect(workdir, config["train"]["steps"], meta, has_any))


def examine_data(workdir: Path, data: Path | None, report: Report) -> None:
    """Hashes the files of the prepared data, which must be those of the run."""
    try:
        directory = data_directory(workdir, data)
        manifest = read_manifest(directory)
        if is_remote(directory):
            report.note(f"{directory}: {MANIFEST_NAME} is the run's; files are checked when copied")
            return
        verify_files(manifest, directory, hashes=True)
        size = sum(entry["bytes"] for entry in manifest.files.values())
        report.ok(f"{directory}: {len(manifest.files)} files, {size:,} bytes, as they were made")
    except InputError as error:
        report.bad(str(error))


def examine_checkpoints(
    workdir: Path, config: dict[str, Any], model: ModelConfig, report: Report
) -> tuple[Meta | None, bool]:
    """Reads every checkpoint; the meta of the newest intact one, and whether there is any."""
    directory, newest = workdir / "checkpoints", None
    if not directory.is_dir():
        return None, False
    train, mesh = config["train"], make_mesh(data=1, fsdp=0, tensor=1)
    optimizer = make_optimizer(train)

    def target(meta: Meta) -> dict[str, Any]:
        phase_model = phase_config(model, meta["phase"])
        if not (workdir / DATASET).exists():  # made by convert from-hf
            return {"params": abstract_params(phase_model, mesh)}
        return abstract_state(phase_model, optimizer, mesh)

    checkpoints = Checkpoints(directory)
    for step in reversed(checkpoints.steps()):
        restored, damage = checkpoints.restore(step, target)
        if damage is not None:
            report.bad(f"checkpoint {step}: {damage}")
            continue
        tree, meta = restored
        newest = newest or meta
        loss = meta.get("validation_loss")
        report.ok(
            f"checkpoint {step}: phase {meta['phase']}, all {len(jax.tree.leaves(tree))} leaves as "
            "saved" + ("" if loss is None else f", validation loss {loss:.4f}")
        )
        del restored, tree  # one state in memory at a time
    for path in sorted(directory.iterdir()):
        if UNFINISHED in path.name:
            report.note(f"checkpoints/{path.name}: half-written; train removes it when it starts")
    has_any = bool(checkpoints.steps())
    checkpoints.close()
    return newest, has_any


def examine_metrics(workdir: Path, step: int, report: Report) -> None:
    if not (workdir / METRICS).exists():
        report.note(f"{METRICS}: none yet")
        return
    try:
        lines = read_metrics(workdir)
    except InputError as error:
        report.bad(str(error))
        return
    later = sum(line["step"] > step for line in lines)
    report.ok(f"{METRICS}: {len(lines):,} lines, {later:,} of steps that would run again")


def prospect(workdir: Path, steps: int, meta: Meta | None, has_any: bool) -> str:
    """What `train` would do in this work directory."""
    if not (workdir / DATASET).exists():
        return "made by convert from-hf: train --init_from takes it, in a work directory of its own"
    if meta is None and has_any:
        return "train would refuse: there are checkpoints, and none is intact"
    if meta is None:
        return f"train would start at step 0 of {steps:,}"
    if meta["step"] >= steps:
        return f"the run is finished, at step {meta['step']:,}"
    text = f"train would go on at step {meta['step']:,} of {steps:,}, phase {meta['phase']}"
    if "goodput" in meta:
        total = sum(meta["goodput"].values())
        text += f"; until there {total:,.0f} s, {meta['goodput']['productive'] / total:.1%} of "
        text += "them productive"
    return text


if __name__ == "__main__":
    cli.run(main)
