"""Checkpoints: Orbax writes the state, and sums over its bits say whether it came back intact.

A checkpoint holds two items: `state`, the train state, and `meta`, JSON: the step (which is also
the data position: batches are a pure function of it), the phase, one sum per leaf, what the run
counts, and a digest of all this. The sums are over all elements modulo 2^32, so they are the same
on every mesh, and any single flipped bit changes one.

Orbax writes to file systems and to gs://, not to s3://: there it writes to the cache, and a
`Mirror` copies.
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

from lory_jax.errors import InputError
from lory_jax.run.mirror import Mirror
from lory_jax.run.retention import OrbaxPolicy, Retention
from lory_jax.storage import is_remote
from lory_jax.training.state import State

Meta = dict[str, Any]

UNFINISHED = ".orbax-checkpoint-tmp"  # ends the name of a checkpoint until it is complete


class Checkpoints:
    """The checkpoints of one run, newest last."""

    # Whether a save failed in this process: Orbax's threads then wait minutes for its files.
    has_failed_saves = False

    def __init__(
        self,
        directory: Path,
        keep: int | Retention | None = None,
        all_well: Callable[[bool], bool] = bool,
        witness: Path | None = None,
    ):
        """Opens the checkpoints; what a killed process left unfinished is removed.

        Args:
          directory: where they are.
          keep: which stay, or how many of the newest; None opens them for reading only.
          all_well: whether it is true in every process; asked once per checkpoint restored.
          witness: a local file without which nothing is saved: Orbax would make the directory
            anew where a disk is not mounted any more.

        Raises:
          InputError: the directory is on s3:// and there are several processes.
        """
        logging.set_verbosity(logging.FATAL)  # Orbax narrates; its errors arrive as exceptions
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
            self._losses |= {s: saved_loss(self.directory / str(s)) for s in self.steps()}

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, ascending."""
        return self._mirror.steps() if self._mirror else sorted(self._manager.all_steps())

    def save(self, state: State, phase: str, **facts: Any) -> None:
        """Saves in the background; returns once the state may be donated.

        `facts` go into the meta; `validation_loss` counts for which checkpoints stay. Where this
        checkpoint, or the one before it, cannot be written, that is said, and those before stay.
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
                if later >= step:  # damaged, or its steps would not have run again
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
        """Waits for the save under way; says so if it failed."""
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
        print(
            f"WARNING: checkpoint {self.directory / str(step)} could not be written: "
            f"{reason(error)}; those before it stay",
            file=sys.stderr,
            flush=True,
        )
        if not is_remote(self.directory) and jax.process_index() == 0:
            for rest in self.directory.glob(f"{step}{UNFINISHED}*"):  # it takes space
                shutil.rmtree(rest, ignore_errors=True)

    def restore_newest(self, target: Callable[[Meta], Any]) -> tuple[Any, Meta] | None:
        """The newest intact checkpoint, or None where there is none at all.

        Args:
          target: from a checkpoint's meta, the tree of `jax.ShapeDtypeStruct` to restore: a train
            state, or a part of one (`{"params": ...}`).

        Raises:
          InputError: there are checkpoints, but none is intact.
        """
        for step in reversed(self.steps()):
            restored, damage = self.restore(step, target)
            if damage is None:
                return restored
            print(
                f"WARNING: checkpoint {self.directory / str(step)} is damaged and skipped: "
                f"{damage}",
                file=sys.stderr,
                flush=True,
            )
        if self.steps():
            raise InputError(
                f"{self.directory}: none of the checkpoints {self.steps()} is intact; "
                "move the directory away to start from scratch"
            )
        return None

    def restore(self, step: int, target: Callable[[Meta], Any]) -> tuple[Any, str | None]:
        """`((tree, meta), None)` of one checkpoint, or `(None, what is wrong with it)`."""
        restored, damage = None, None
        try:
            restored = self._read(step, target)
        except (InputError, jax.errors.JaxRuntimeError):
            raise  # the mesh does not fit, or memory does not suffice: no damage
        except Exception as error:  # bits turned in Orbax's own files raise anything at all
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
        args = ocp.args.Composite(meta=ocp.args.JsonRestore())
        meta = self._manager.restore(step, args=args)["meta"]
        # The first checkpoints had no digest; one that has lost it has a malformed meta otherwise.
        if meta["step"] != step or meta.get("digest", digest(meta)) != digest(meta):
            raise ValueError("meta differs from what was saved")
        wanted = target(meta)
        restore_args = jax.tree.map(
            lambda leaf: ocp.ArrayRestoreArgs(sharding=leaf.sharding, dtype=leaf.dtype), wanted
        )
        args = ocp.args.Composite(
            state=ocp.args.PyTreeRestore(wanted, restore_args=restore_args, partial_restore=True)
        )
        tree = self._manager.restore(step, args=args)["state"]
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            if not isinstance(leaf, Array):  # a partial restore leaves the target where it is
                raise ValueError(f"{jax.tree_util.keystr(path)} is missing")
        return tree, meta

    def close(self) -> None:
        """Waits for saves under way; raises `InputError` if the last one failed."""
        self._finish()
        self._manager.close()
        if self._mirror:
            self._mirror.close()
        if self._failure is not None:
            step, why = self._failure
            raise InputError(f"{self.directory}: step {step} could not be saved: {why}")


def digest(meta: Meta) -> str:
    """SHA-256 of a meta without its digest."""
    rest = {name: value for name, value in meta.items() if name != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def saved_loss(checkpoint: Path) -> float | None:
    """The validation loss in the meta of a checkpoint, if it can be read and has one."""
    try:
        return json.loads((checkpoint / "meta" / "metadata").read_text("utf-8"))["validation_loss"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def reason(error: Exception) -> str:
    """An error in one short line; of TensorStore's long ones, what the system said."""
    text = str(error) or type(error).__name__
    if system := re.search(r": ([^:]+) \[os_error_code=", text):
        return system[1]
    return text.splitlines()[0][:300]


def leaf_sums(tree: Any) -> dict[str, int]:
    """For every leaf, the sum of its elements' bits modulo 2^32, computed where the leaf lies."""
    sums = jax.device_get(_leaf_sums(tree))
    leaves, _ = jax.tree_util.tree_flatten_with_path(sums)
    return {jax.tree_util.keystr(path): int(value) for path, value in leaves}


@jax.jit
def _leaf_sums(tree: Any) -> Any:
    def bits_sum(leaf: Array) -> Array:
        bits = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * leaf.dtype.itemsize}"))
        return jnp.sum(bits.astype(jnp.uint32), dtype=jnp.uint32)

    return jax.tree.map(bits_sum, tree)
