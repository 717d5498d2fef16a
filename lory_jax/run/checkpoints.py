"""Checkpoints: Orbax writes the state, and sums over its bits show whether it was read back intact.

A checkpoint holds two items: `state`, the train state, and `meta`, which is JSON: the step (also
the data position, because batches are a pure function of it), the phase, one sum per leaf, the
counters of the run, the validation loss if there is one, and a digest of all this. A sum runs over
the bits of all elements modulo 2^32, so it is the same on every mesh, and any single flipped bit
changes it.

Orbax writes to file systems and to gs://, but not to s3://. For s3:// it writes to the cache, and
`Mirror` copies the files.
"""

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging
from jax import Array

from lory_jax.errors import InputError, Unsaved
from lory_jax.json_text import parse_object
from lory_jax.run.metric_lines import is_number
from lory_jax.run.mirror import Mirror
from lory_jax.run.phases import DENSE, EXPERTS
from lory_jax.run.retention import OrbaxPolicy, Retention, best_first
from lory_jax.run.step_choice import BEST, NEWEST, Step
from lory_jax.storage import check_links, is_remote

State = dict[str, Any]
Meta = dict[str, Any]

COUNTERS = ("watch", "goodput")  # of the run so far
UNFINISHED = ".orbax-checkpoint-tmp"  # ends the name of a checkpoint until it is complete


class Checkpoints:
    """The checkpoints of one run, newest last."""

    # Whether a save failed in this process. Orbax's threads then wait for its files for minutes.
    has_failed_saves = False

    def __init__(
        self,
        directory: Path,
        keep: int | Retention | None = None,
        all_well: Callable[[bool], bool] = bool,
        witness: Path | None = None,
    ):
        """Opens the checkpoints, and removes what a killed process left unfinished.

        Args:
          directory: where they are.
          keep: which checkpoints to keep, or how many of the newest; None opens them read-only and
            removes nothing.
          all_well: returns whether its argument is true in every process; called once for each
            checkpoint that is restored.
          witness: a local file that must exist for a save to happen. Without it, Orbax would create
            the directory again where a disk is no longer mounted.

        Raises:
          InputError: the directory is on s3:// and there are several processes.
        """
        logging.set_verbosity(logging.FATAL)  # Orbax logs a lot; its errors are raised anyway
        if isinstance(keep, int):
            keep = Retention(keep)
        self.directory = directory if is_remote(directory) else directory.absolute()
        self._all_well, self._witness = all_well, witness
        self._losses: dict[int, float | None] = {}
        self._saving: int | None = None
        self._failure: tuple[int, str] | None = None
        self._mirror = Mirror(directory, keep) if str(directory).startswith("s3://") else None
        policies = ocp.checkpoint_managers.preservation_policy
        self._manager = ocp.CheckpointManager(
            self._mirror.local if self._mirror else self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=OrbaxPolicy(keep, self._losses)
                if keep
                else policies.PreserveAll(),
                read_only=keep is None,
                create=keep is not None,
                cleanup_tmp_directories=keep is not None,
            ),
        )
        if keep and keep.best:
            self._losses |= self.validation_losses()

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, ascending."""
        return self._mirror.steps() if self._mirror else sorted(self._manager.all_steps())

    def validation_losses(self) -> dict[int, float | None]:
        """The validation loss of every step; None where there is none or the meta is damaged."""
        metas = {step: self.read_meta(step) or {} for step in self.steps()}
        return {step: meta.get("validation_loss") for step, meta in metas.items()}

    def read_meta(self, step: int) -> Meta | None:
        """The meta of a checkpoint, without its state; None if it is damaged."""
        path = self.directory / str(step) / "meta" / "metadata"
        try:
            self._check_links(step)
            return checked_meta(parse_object(path.read_bytes(), path), step)
        except (OSError, ValueError):
            return None

    def save(self, state: State, phase: str, **facts: Any) -> None:
        """Saves in the background; returns once the state may be donated.

        `facts` are stored in the meta; `validation_loss` decides which checkpoints are the best.
        If this checkpoint or the previous one cannot be written, a warning says so and the earlier
        ones are kept.
        """
        step = int(jax.device_get(state["step"]))
        meta = {"step": step, "phase": phase, "sums": leaf_sums(state)} | facts
        meta["digest"] = digest(meta)
        self._finish()
        self._saving = step
        try:
            if self._witness and not self._witness.exists():
                raise FileNotFoundError(f"{self._witness} is gone")
            for later in self._manager.all_steps():
                if later >= step:  # it was damaged: otherwise the run would have resumed from it
                    self._manager.delete(later)
            self._losses[step] = facts.get("validation_loss")
            items = {"state": ocp.args.PyTreeSave(state), "meta": ocp.args.JsonSave(meta)}
            if not self._manager.save(step, args=ocp.args.Composite(**items)):
                raise RuntimeError("Orbax declined to save")
            if self._mirror:
                self._manager.wait_until_finished()
                self._mirror.upload(step, self._losses)
        except (OSError, ValueError, RuntimeError) as error:
            self._failed(error)

    def _finish(self) -> None:
        """Waits for the save in progress; prints a warning if it failed."""
        try:
            self._manager.wait_until_finished()
            if self._mirror:
                self._mirror.wait()
        except (OSError, ValueError, RuntimeError) as error:
            self._failed(error)
        if self._saving is not None:
            self._saving = self._failure = None

    def _failed(self, error: Exception) -> None:
        Checkpoints.has_failed_saves = True
        step, self._saving = self._saving or 0, None
        self._failure = (step, reason(error))
        _warn(
            f"checkpoint {self.directory / str(step)} could not be written: {reason(error)}; "
            "earlier ones are kept"
        )
        if not is_remote(self.directory) and jax.process_index() == 0:
            for rest in self.directory.glob(f"{step}{UNFINISHED}*"):  # frees its space
                shutil.rmtree(rest, ignore_errors=True)

    def restore_newest(self, target: Callable[[Meta], Any]) -> tuple[Any, Meta] | None:
        """The newest intact checkpoint, or None where there is none at all.

        Args:
          target: from a checkpoint's meta, the tree of `jax.ShapeDtypeStruct` to restore: a train
            state, or a part of one (`{"params": ...}`).

        Raises:
          InputError: there are checkpoints, but none is intact.
        """
        return self.restore_chosen(NEWEST, target) if self.steps() else None

    def restore_chosen(self, choice: Step, target: Callable[[Meta], Any]) -> tuple[Any, Meta]:
        """Restores the newest or best intact checkpoint, or the one of a given step.

        Damaged checkpoints are named on standard error; the next newest or next best one is
        restored instead. A given step is never replaced by another.

        Args:
          choice: "newest", "best" (the lowest validation loss) or a step.
          target: as for `restore_newest`.

        Raises:
          InputError: there is no such checkpoint, or none of those that qualify is intact.
        """
        candidates = self._candidates(choice)
        for step in candidates:
            restored, damage = self.restore(step, target)
            if damage is None:
                return restored
            if step == choice:
                raise InputError(f"step: {self.directory / str(step)} is damaged: {damage}")
            _warn(f"checkpoint {self.directory / str(step)} is damaged and skipped: {damage}")
        which = "with a validation loss " if choice == BEST else ""
        raise InputError(
            f"{self.directory}: none of the checkpoints {which}{sorted(candidates)} is intact"
            + ("" if choice == BEST else "; move the directory away to start from scratch")
        )

    def _candidates(self, choice: Step) -> list[int]:
        """The steps that a choice allows, in order of preference."""
        steps = self.steps()
        if not steps:
            raise InputError(f"{self.directory}: holds no checkpoint yet")
        there = f"its checkpoints are {', '.join(map(str, steps))}"
        if choice == NEWEST:
            return steps[::-1]
        if choice == BEST:
            for step in steps:
                if self.read_meta(step) is None:
                    _warn(f"checkpoint {self.directory / str(step)} is damaged and skipped: meta")
            best = best_first(self.validation_losses())
            if not best:
                raise InputError(
                    f"step: got best, but no checkpoint in {self.directory} has a validation loss; "
                    f"{there}"
                )
            return best
        if choice not in steps:
            raise InputError(f"step: got {choice}, not a checkpoint in {self.directory}; {there}")
        return [int(choice)]

    def restore(self, step: int, target: Callable[[Meta], Any]) -> tuple[Any, str | None]:
        """`((tree, meta), None)` of one checkpoint, or `(None, what is wrong with it)`."""
        restored, damage = None, None
        try:
            restored = self._read(step, target)
        except (InputError, jax.errors.JaxRuntimeError):
            raise  # the mesh does not fit or memory ran out: the checkpoint is not damaged
        except Exception as error:  # flipped bits in Orbax's own files can raise anything
            damage = reason(error)
        if not self._all_well(damage is None):
            return None, damage or "another process cannot read its part"
        assert restored is not None
        tree, meta = restored
        for leaf, found in leaf_sums(tree).items():
            if found != meta["sums"].get(leaf):
                return None, f"{leaf} differs from what was saved"
        return restored, None

    def _read(self, step: int, target: Callable[[Meta], Any]) -> tuple[Any, Meta]:
        if self._mirror:
            self._mirror.download(step)
            self._manager.reload()
        self._check_links(step)
        args = ocp.args.Composite(meta=ocp.args.JsonRestore())
        meta = checked_meta(self._manager.restore(step, args=args)["meta"], step)
        wanted = target(meta)
        restore_args = jax.tree.map(
            lambda leaf: ocp.ArrayRestoreArgs(sharding=leaf.sharding, dtype=leaf.dtype), wanted
        )
        args = ocp.args.Composite(
            state=ocp.args.PyTreeRestore(wanted, restore_args=restore_args, partial_restore=True)
        )
        tree = self._manager.restore(step, args=args)["state"]
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            if not isinstance(leaf, Array):  # a partial restore returns the target
                raise ValueError(f"{jax.tree_util.keystr(path)} is missing")
        return tree, meta

    def _check_links(self, step: int) -> None:
        """Raises `ValueError` if a checkpoint holds a symbolic link that leads out of it."""
        if is_remote(self.directory):
            return
        try:
            check_links(self.directory, str(step))
        except InputError as error:
            raise ValueError(str(error)) from None

    def close(self) -> None:
        """Waits for saves in progress; raises `Unsaved` if the last one failed."""
        self._finish()
        try:
            self._manager.close()
        except (OSError, ValueError, RuntimeError):
            if self._failure is None:  # else it misses files of the save that failed
                raise
        if self._mirror:
            self._mirror.close()
        if self._failure is not None:
            step, why = self._failure
            raise Unsaved(f"{self.directory}: step {step} could not be saved: {why}")


def digest(meta: Meta) -> str:
    """SHA-256 of a meta without its digest."""
    rest = {name: value for name, value in meta.items() if name != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def checked_meta(meta: Any, step: int) -> Meta:
    """Returns a meta that was read back; raises `ValueError` unless it is what was saved."""
    if not isinstance(meta, dict) or meta.get("step") != step:
        raise ValueError("meta differs from what was saved")
    if meta.get("phase") not in (DENSE, EXPERTS) or not _are_numbers(meta.get("sums")):
        raise ValueError("meta is malformed")
    loss = meta.get("validation_loss")
    counters = [meta[name] for name in COUNTERS if meta.get(name) is not None]
    if not (loss is None or is_number(loss)) or not all(map(_are_numbers, counters)):
        raise ValueError("meta is malformed")
    # The first checkpoints had no digest. Damage that removed the digest would also break the JSON.
    if meta.get("digest", digest(meta)) != digest(meta):
        raise ValueError("meta differs from what was saved")
    return meta


def _are_numbers(values: Any) -> bool:
    return isinstance(values, dict) and all(map(is_number, values.values()))


def reason(error: Exception) -> str:
    """An error in one short line; of TensorStore's messages, only the system's part."""
    text = str(error) or type(error).__name__
    if system := re.search(r": ([^:]+) \[os_error_code=", text):
        return system[1]
    return text.splitlines()[0][:300]


def leaf_sums(tree: Any) -> dict[str, int]:
    """The sum of every leaf's bits modulo 2^32, computed on the devices that hold the leaf."""
    sums = jax.device_get(_leaf_sums(tree))
    leaves, _ = jax.tree_util.tree_flatten_with_path(sums)
    return {jax.tree_util.keystr(path): int(value) for path, value in leaves}


@jax.jit
def _leaf_sums(tree: Any) -> Any:
    def bits_sum(leaf: Array) -> Array:
        bits = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * leaf.dtype.itemsize}"))
        return jnp.sum(bits.astype(jnp.uint32), dtype=jnp.uint32)

    return jax.tree.map(bits_sum, tree)


def _warn(text: str) -> None:
    print(f"WARNING: {text}", file=sys.stderr, flush=True)
