"""Checks a run directory and its data without changing them, and says what a resume would do.

Every checkpoint is read and its sums are compared; every file of the data is hashed.
"""

from pathlib import Path
from typing import Any

import jax

from lory_jax.data.manifest import MANIFEST_NAME, TOKENIZER_NAME
from lory_jax.data.tokenizer import Tokenizer
from lory_jax.diagnosis.findings import Findings
from lory_jax.errors import InputError
from lory_jax.model.config import ModelConfig
from lory_jax.parallel import make_mesh
from lory_jax.run.checkpoints import UNFINISHED, Meta
from lory_jax.run.directory import CONFIG, METRICS, RunDirectory, abstract_params
from lory_jax.run.phases import phase_config
from lory_jax.run.retention import best_first
from lory_jax.training.optimizer import make_optimizer
from lory_jax.training.state import abstract_state


def examine_run(run: RunDirectory, data: Path | None, findings: Findings) -> None:
    """Checks everything in a run directory, and prints what `train` would do in it.

    Args:
      run: the run directory.
      data: where the prepared data are; by default where the run found them.
      findings: where to report.

    Raises:
      InputError: `workdir` is not a run directory.
    """
    train, trained = run.train_config, run.model_config
    kind = f"Lory with {trained.num_experts} experts" if trained.num_experts else "a dense model"
    findings.ok(f"{CONFIG}: {kind}, {train['steps']:,} steps")
    if process := run.lock_holder():
        findings.note(f"a run is training in it right now ({process}), so its files change")
    check_tokenizer(run, findings)
    check_data(run, data, findings)
    meta, has_any = check_checkpoints(run, train, trained, findings)
    check_metrics(run, meta["step"] if meta else 0, findings)
    findings.say(prospect(run, train["steps"], meta, has_any))


def check_tokenizer(run: RunDirectory, findings: Findings) -> None:
    try:
        Tokenizer.load(run.tokenizer_file)
        findings.ok(TOKENIZER_NAME)
    except InputError as error:
        findings.problem(str(error))


def check_data(run: RunDirectory, data: Path | None, findings: Findings) -> None:
    """Hashes the files of the prepared data, which must be those that the run was trained on."""
    try:
        prepared = run.open_data(data)
        if prepared.is_remote:
            findings.note(
                f"{prepared.directory}: its {MANIFEST_NAME} is that of the run; the files "
                "themselves are checked when they are copied"
            )
            return
        prepared.verify(hashes=True)
        files = prepared.manifest.files
        size = sum(entry["bytes"] for entry in files.values())
        findings.ok(f"{prepared.directory}: {len(files)} files, {size:,} bytes, all intact")
    except InputError as error:
        findings.problem(str(error))


def check_checkpoints(
    run: RunDirectory, train: dict[str, Any], trained: ModelConfig, findings: Findings
) -> tuple[Meta | None, bool]:
    """Reads every checkpoint, newest first.

    Args:
      run: the run directory.
      train: the section `train` of its config.
      trained: its model, with experts.
      findings: where to report.

    Returns:
      The meta of the newest intact checkpoint, and whether there is any checkpoint at all.
    """
    directory, newest = run.checkpoint_directory, None
    if not directory.is_dir():
        return None, False
    mesh = make_mesh(data=1, fsdp=0, tensor=1)
    optimizer = make_optimizer(train)

    def target(meta: Meta) -> dict[str, Any]:
        phase_model_config = phase_config(trained, meta["phase"])
        if run.dataset is None:  # made by convert from-hf
            return {"params": abstract_params(phase_model_config, mesh)}
        return abstract_state(phase_model_config, optimizer, mesh)

    checkpoints = run.open_checkpoints()
    losses: dict[int, float | None] = {}  # validation losses of the intact checkpoints, by step
    for step in reversed(checkpoints.steps()):
        restored, damage = checkpoints.restore(step, target)
        if damage is not None:
            findings.problem(f"checkpoint {step}: {damage}")
            continue
        tree, meta = restored
        newest = newest or meta
        losses[step] = loss = meta.get("validation_loss")
        findings.ok(
            f"checkpoint {step}: phase {meta['phase']}, all {len(jax.tree.leaves(tree))} leaves "
            "are as they were saved" + ("" if loss is None else f", validation loss {loss:.4f}")
        )
        del restored, tree  # hold one state in memory at a time
    if losses:
        best = best_first(losses)
        which = f"the best is {best[0]}" if best else "none has a validation loss"
        findings.note(f"intact checkpoints: {', '.join(map(str, sorted(losses)))}; {which}")
    for path in sorted(directory.iterdir()):
        if UNFINISHED in path.name:
            findings.note(f"checkpoints/{path.name}: half-written; train removes it when it starts")
    has_any = bool(checkpoints.steps())
    checkpoints.close()
    return newest, has_any


def check_metrics(run: RunDirectory, step: int, findings: Findings) -> None:
    """Reads metrics.jsonl; `step` is that of the newest intact checkpoint."""
    if not run.metrics_file.exists():
        findings.note(f"{METRICS}: none yet")
        return
    try:
        lines = run.read_metrics()
    except InputError as error:
        findings.problem(str(error))
        return
    later = sum(line["step"] > step for line in lines)
    findings.ok(f"{METRICS}: {len(lines):,} lines, {later:,} of steps that would run again")


def prospect(run: RunDirectory, steps: int, meta: Meta | None, has_any: bool) -> str:
    """What `train` would do in this run directory."""
    if run.dataset is None:
        return "made by convert from-hf: start a run from it with train --init_from"
    if meta is None and has_any:
        return "train would refuse to start: there are checkpoints, but none is intact"
    if meta is None:
        return f"train would start at step 0 of {steps:,}"
    if meta["step"] >= steps:
        return f"the run is finished, at step {meta['step']:,}"
    text = f"train would resume at step {meta['step']:,} of {steps:,}, phase {meta['phase']}"
    if "goodput" in meta:
        total = sum(meta["goodput"].values())
        text += f"; {total:,.0f} s were spent up to there, "
        text += f"{meta['goodput']['productive'] / total:.1%} of them productive"
    return text
