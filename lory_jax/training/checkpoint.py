"""Checkpoints: Orbax writes the state, and sums over its bits say whether it came back intact.

A checkpoint holds two items: `state`, the train state, and `meta`, JSON: the step (which is also
the data position: batches are a pure function of it), the phase, and one sum per leaf. The sums are
over all elements modulo 2^32, so they are the same on every mesh, and any single flipped bit
changes one.

Orbax writes to file systems and to gs://, not to s3://: there it writes to the cache, and a
`Mirror` copies.
"""

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
from lory_jax.storage import is_remote
from lory_jax.training.mirror import Mirror
from lory_jax.training.state import State

Meta = dict[str, Any]

# What Orbax, TensorStore and JSON raise on files that are missing, truncated or malformed.
DAMAGE = (OSError, ValueError, KeyError, TypeError)


class Checkpoints:
    """The checkpoints of one run, newest last."""

    def __init__(self, directory: Path, keep: int | None = None):
        """`keep` newest checkpoints stay; None opens them for reading only.

        Raises:
          InputError: the directory is on s3:// and there are several processes.
        """
        logging.set_verbosity(logging.ERROR)  # Orbax narrates every file it touches
        policies = ocp.checkpoint_managers.preservation_policy
        self.directory = directory if is_remote(directory) else directory.absolute()
        self._mirror = Mirror(directory, keep) if str(directory).startswith("s3://") else None
        self._manager = ocp.CheckpointManager(
            self._mirror.local if self._mirror else self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.LatestN(keep) if keep else policies.PreserveAll(),
                read_only=keep is None,
                create=keep is not None,
                cleanup_tmp_directories=keep is not None,
            ),
        )

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, ascending."""
        return self._mirror.steps() if self._mirror else sorted(self._manager.all_steps())

    def save(self, state: State, phase: str) -> None:
        """Saves in the background; returns once the state may be donated."""
        step = int(state["step"])
        if step in self._manager.all_steps():  # damaged, or its step would not have run again
            self._manager.delete(step)
        meta = {"step": step, "phase": phase, "sums": leaf_sums(state)}
        saved = self._manager.save(
            step,
            args=ocp.args.Composite(state=ocp.args.PyTreeSave(state), meta=ocp.args.JsonSave(meta)),
        )
        if not saved:
            raise RuntimeError(f"{self.directory}: Orbax declined to save step {step}")
        if self._mirror:
            self._manager.wait_until_finished()
            self._mirror.upload(step)

    def restore_newest(self, target: Callable[[Meta], Any]) -> tuple[Any, Meta] | None:
        """The newest intact checkpoint, or None where there is none at all.

        Args:
          target: from a checkpoint's meta, the tree of `jax.ShapeDtypeStruct` to restore: a train
            state, or a part of one (`{"params": ...}`).

        Raises:
          InputError: there are checkpoints, but none is intact.
        """
        for step in reversed(self.steps()):
            try:
                return self._restore(step, target)
            except DAMAGE as error:
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                print(
                    f"WARNING: checkpoint {self.directory / str(step)} is damaged and skipped: "
                    f"{reason}",
                    file=sys.stderr,
                )
        if self.steps():
            raise InputError(
                f"{self.directory}: none of the checkpoints {self.steps()} is intact; "
                "move the directory away to start from scratch"
            )
        return None

    def _restore(self, step: int, target: Callable[[Meta], Any]) -> tuple[Any, Meta]:
        if self._mirror:
            self._mirror.download(step)
            self._manager.reload()
        args = ocp.args.Composite(meta=ocp.args.JsonRestore())
        meta = self._manager.restore(step, args=args)["meta"]
        wanted = target(meta)
        restore_args = jax.tree.map(
            lambda leaf: ocp.ArrayRestoreArgs(sharding=leaf.sharding, dtype=leaf.dtype), wanted
        )
        args = ocp.args.Composite(
            state=ocp.args.PyTreeRestore(wanted, restore_args=restore_args, partial_restore=True)
        )
        tree = self._manager.restore(step, args=args)["state"]
        for leaf, found in leaf_sums(tree).items():
            if found != meta["sums"][leaf]:
                raise ValueError(f"{leaf} differs from what was saved")
        return tree, meta

    def close(self) -> None:
        """Waits for saves under way."""
        self._manager.wait_until_finished()
        self._manager.close()
        if self._mirror:
            self._mirror.close()


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
