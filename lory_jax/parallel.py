"""The device mesh and the one table of which logical axis lives on which mesh axis.

Parameters name their logical axes where they are declared (`model/`); activations name theirs in
`constrain`. Everything else is left to the compiler (Auto axis types).
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lory_jax.errors import InputError

MESH_AXES = ("data", "fsdp", "tensor")

MeshAxes = tuple[str, ...]

# Experts are never sharded: each device holds the same slice of F of every expert, so merging is
# local and only activations travel over `tensor` (paper, section 6: expert-wise model parallelism).
RULES: Mapping[str, MeshAxes] = {
    # parameters
    "layers": (),
    "embed": ("fsdp",),
    "mlp": ("tensor",),
    "experts": (),
    "router_experts": (),
    "attention_embed": ("fsdp", "tensor"),
    "heads": (),
    "head_dim": (),
    "vocab": ("tensor",),
    "norm": (),
    # activations
    "batch": ("data", "fsdp", "tensor"),
    "moe_batch": ("data", "fsdp"),
    "length": (),
    "activation_embed": (),
}


def start_process() -> None:
    """Sets JAX up for a run, alone or as one of several processes; call it before any other use.

    Compiled programs are kept in the user's cache directory. Processes find each other by
    themselves on TPU pods and, with LORY_DISTRIBUTED=1, under SLURM and other launchers that JAX
    knows; on plain hosts by LORY_COORDINATOR (HOST:PORT), LORY_NUM_PROCESSES and LORY_PROCESS_ID.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        jax.config.update("jax_compilation_cache_dir", str(cache / "lory_jax" / "xla"))
    if "LORY_COORDINATOR" in os.environ:
        count, index = (
            _integer_variable(f"LORY_{name}") for name in ("NUM_PROCESSES", "PROCESS_ID")
        )
        jax.distributed.initialize(os.environ["LORY_COORDINATOR"], count, index)
    elif os.environ.get("LORY_DISTRIBUTED") == "1":
        jax.distributed.initialize()


def _integer_variable(name: str) -> int:
    text = os.environ.get(name, "")
    if not text.isdigit():
        raise InputError(f"{name}: got {text!r}, takes a number (LORY_COORDINATOR is set)")
    return int(text)


def make_mesh(
    data: int, fsdp: int, tensor: int, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """The mesh (data, fsdp, tensor) over `devices` (all, if None); `fsdp=0` takes what remains."""
    count = len(devices) if devices is not None else jax.device_count()
    if fsdp == 0:
        fsdp = max(1, count // (data * tensor))
    if data * fsdp * tensor != count:
        raise InputError(
            f"config.parallel: data x fsdp x tensor = {data} x {fsdp} x {tensor} is "
            f"{data * fsdp * tensor}, but there are {count} devices"
        )
    return jax.make_mesh(
        (data, fsdp, tensor), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices
    )


def partition_spec(axes: tuple[str, ...]) -> PartitionSpec:
    """Looks every logical axis up in the table; two of them on one mesh axis is an error."""
    used: set[str] = set()
    entries: list[MeshAxes | None] = []
    for axis in axes:
        if axis not in RULES:
            raise ValueError(f"logical axis {axis!r} is not in the table of parallel.py")
        if used & set(RULES[axis]):
            raise ValueError(f"logical axes {axes} put {axis!r} on a mesh axis that is taken")
        used |= set(RULES[axis])
        entries.append(RULES[axis] or None)
    return PartitionSpec(*entries)


def shardings(axes_tree: Any, mesh: Mesh) -> Any:
    """A tree of `NamedSharding` for a tree whose leaves are tuples of logical axes."""
    return jax.tree.map(
        lambda axes: NamedSharding(mesh, partition_spec(axes)),
        axes_tree,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def constrain(x: Array, *axes: str) -> Array:
    """Pins the layout of an activation when a mesh is set (`jax.set_mesh`), else returns it."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes))


def place_batch(batch_BxL: np.ndarray, mesh: Mesh) -> Array:
    """Makes the global batch `[B, L]` from this process's rows of it."""
    sharding = NamedSharding(mesh, partition_spec(("batch", "length")))
    return jax.make_array_from_process_local_data(sharding, batch_BxL)
