"""The device mesh and the one table of which logical axis lives on which mesh axis.

Parameters name their logical axes where they are declared (`model/`); activations name theirs in
`constrain`. Everything else is left to the compiler (Auto axis types).
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lory_jax.errors import ConfigError, InputError

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
    "rank": (),
    "factor_mlp": ("fsdp", "tensor"),  # F beside a rank: nothing else of a factor can be sharded
    "attention_embed": ("fsdp", "tensor"),
    "heads": (),
    "tensor_heads": ("tensor",),
    "tensor_kv_heads": ("tensor",),
    "head_dim": (),
    "vocab": ("tensor",),
    "norm": (),
    # activations; with heads on `tensor`, "moe_batch" is the batch everywhere
    "batch": ("data", "fsdp", "tensor"),
    "moe_batch": ("data", "fsdp"),
    "length": (),
    "whole": (),
    "activation_embed": (),
}


def start_process() -> None:
    """Sets JAX up for a run, alone or as one of several processes; call it before any other use.

    Compiled programs are kept in the user's cache directory. Several processes find each other

    - with LORY_DISTRIBUTED=1 by themselves, on TPU pods (one slice or several), under SLURM (`srun`
      with one task per GPU: a task sees the GPU of its local rank) and other launchers JAX knows;
    - on plain hosts by LORY_COORDINATOR (HOST:PORT of process 0), LORY_NUM_PROCESSES and
      LORY_PROCESS_ID.

    Raises:
      InputError: these variables are incomplete, or no launcher is found.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        jax.config.update("jax_compilation_cache_dir", str(cache / "lory_jax" / "xla"))
    if jax.distributed.is_initialized():
        return
    if "LORY_COORDINATOR" in os.environ:
        count, index = (
            _integer_variable(f"LORY_{name}") for name in ("NUM_PROCESSES", "PROCESS_ID")
        )
        jax.distributed.initialize(os.environ["LORY_COORDINATOR"], count, index)
    elif os.environ.get("LORY_DISTRIBUTED") == "1":
        try:
            jax.distributed.initialize()
        except ValueError as error:
            raise InputError(
                "LORY_DISTRIBUTED: got '1', but this is not a TPU pod, SLURM step or other "
                f"launcher that JAX knows ({error}); on plain hosts set LORY_COORDINATOR, "
                "LORY_NUM_PROCESSES and LORY_PROCESS_ID"
            ) from None


def _integer_variable(name: str) -> int:
    text = os.environ.get(name, "")
    if not text.isdigit():
        raise InputError(f"{name}: got {text!r}; must be a number when LORY_COORDINATOR is set")
    return int(text)


def make_mesh(
    data: int, fsdp: int, tensor: int, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """The mesh (data, fsdp, tensor) over `devices` (all, if None); `fsdp=0` means all that remain.

    Over several TPU slices, whole slices are placed along `data`, so that only one sum of gradients
    per step crosses the network between them.
    """
    devices = jax.devices() if devices is None else devices
    if fsdp == 0:
        fsdp = max(1, len(devices) // (data * tensor))
    if data * fsdp * tensor != len(devices):
        raise InputError(
            f"config.parallel: data x fsdp x tensor = {data} x {fsdp} x {tensor} is "
            f"{data * fsdp * tensor}, but there are {len(devices)} devices"
        )
    arranged = arrange_devices(devices, (data, fsdp, tensor))
    return Mesh(arranged, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def arrange_devices(devices: Sequence[Any], shape: tuple[int, int, int]) -> np.ndarray:
    """Arranges `devices` in `shape`, with neighbours of a TPU's interconnect next to each other.

    Raises:
      ConfigError: there are several TPU slices, and their number does not divide `data`.
    """
    data, fsdp, tensor = shape
    slices: dict[int, list[Any]] = {}
    for device in devices:
        # Hosts of GPUs carry a slice_index too, but sharding parameters over hosts is usual there.
        index = getattr(device, "slice_index", 0) if device.platform == "tpu" else 0
        slices.setdefault(index, []).append(device)
    if data % len(slices):
        raise ConfigError(
            f"config.parallel.data: got {data}; must be a multiple of {len(slices)}, "
            "the number of TPU slices"
        )
    in_slice = (data // len(slices), fsdp, tensor)
    parts = [
        mesh_utils.create_device_mesh(in_slice, slices[i], allow_split_physical_axes=True)
        for i in sorted(slices)
    ]
    return np.concatenate(parts, axis=0)


def partition_spec(axes: tuple[str, ...]) -> PartitionSpec:
    """Looks every logical axis up in the table; two of them on one mesh axis are an error."""
    used: set[str] = set()
    entries: list[MeshAxes | None] = []
    for axis in axes:
        if axis not in RULES:
            raise ValueError(f"logical axis {axis!r} is not in the table of parallel.py")
        if used & set(RULES[axis]):
            raise ValueError(
                f"logical axes {axes} put {axis!r} on a mesh axis that is already used"
            )
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


def has_mesh() -> bool:
    """Whether a mesh is set (`jax.set_mesh`) where the program is traced."""
    return not jax.sharding.get_abstract_mesh().empty


def on_mesh(function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """A function that each device runs on its own part when a mesh is set; else the function.

    Inside the function, `has_mesh()` says whether there are other devices to talk to.
    """
    if not has_mesh():
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def constrain(x: Array, *axes: str) -> Array:
    """Pins the layout of an activation when a mesh is set, else returns it."""
    if not has_mesh():
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes))


def place_local(rows: np.ndarray, sharding: NamedSharding) -> Array:
    """Makes a global array from this process's rows of it."""
    # With several processes JAX counts this explicit transfer as a hidden one.
    with jax.transfer_guard_host_to_device("allow"):
        return jax.make_array_from_process_local_data(sharding, rows)


def place_batch(batch_BxL: np.ndarray, mesh: Mesh, axis: str = "batch") -> Array:
    """Makes the global batch `[B, L]` from this process's rows of it; `axis` names its first."""
    sharding = NamedSharding(mesh, partition_spec((axis, "length")))
    return place_local(batch_BxL, sharding)


# ---------------------------------------------------------------- what must fit the mesh

# The field of `config.model` that is the size of a logical axis; the others are never sharded.
SIZE_FIELDS = {
    "embed": "embed_dim",
    "attention_embed": "embed_dim",
    "mlp": "mlp_dim",
    "vocab": "vocab_size",
    "tensor_heads": "num_heads",
    "tensor_kv_heads": "num_kv_heads",
}

MAX_UNSHARDED = 0.02  # share of the bytes of all parameters


def _shards(axis: str, mesh: Mesh) -> int:
    return math.prod(mesh.shape[name] for name in RULES[axis])


def _product(axis: str, mesh: Mesh) -> str:
    sizes = " x ".join(f"{name}={mesh.shape[name]}" for name in RULES[axis])
    return f"config.parallel {sizes}"


def _multiples(size: int, divisor: int) -> str:
    """The multiples of a divisor that are nearest to a size, for messages."""
    below = size // divisor * divisor
    return " or ".join(str(value) for value in (below, below + divisor) if value)


def check_batch(global_batch_size: int, microbatches: int, axis: str, mesh: Mesh) -> None:
    """Raises `ConfigError` unless every device gets equally many sequences of every microbatch.

    `axis` is the logical axis of the batch (`ModelConfig.batch_axis`).
    """
    divisor = _shards(axis, mesh) * microbatches
    if global_batch_size % divisor == 0:
        return
    way_out = ""
    if axis == "batch" and global_batch_size % (_shards("moe_batch", mesh) * microbatches) == 0:
        way_out = "; config.model.attention_sharding=heads accepts it"
    raise ConfigError(
        f"config.train.global_batch_size: got {global_batch_size}; must be a multiple of {divisor} "
        f"({_product(axis, mesh)}, config.train.microbatches={microbatches}), such as "
        f"{_multiples(global_batch_size, divisor)}{way_out}"
    )


def check_parameters(axes: Any, shapes: Any, mesh: Mesh) -> None:
    """Checks that every sharded size divides and that few bytes stay unsharded.

    Args:
      axes: a tree whose leaves are tuples of logical axes.
      shapes: the same tree of `jax.ShapeDtypeStruct`.

    Raises:
      ConfigError: a size does not divide what it is sharded over, or parameters of more than
        `MAX_UNSHARDED` of all bytes are replicated on every device of `fsdp` and `tensor`.
    """
    unsharded: dict[str, int] = {}
    total = 0
    leaves, _ = jax.tree_util.tree_flatten_with_path(shapes)
    all_axes = jax.tree.leaves(axes, is_leaf=lambda node: isinstance(node, tuple))
    for (path, leaf), leaf_axes in zip(leaves, all_axes, strict=True):
        for size, axis in zip(leaf.shape, leaf_axes, strict=True):
            if size % _shards(axis, mesh):
                raise ConfigError(
                    f"config.model.{SIZE_FIELDS[axis]}: got {size}; must be a multiple of "
                    f"{_shards(axis, mesh)} ({_product(axis, mesh)}), such as "
                    f"{_multiples(size, _shards(axis, mesh))}"
                )
        total += leaf.size * leaf.dtype.itemsize
        if all(_shards(axis, mesh) == 1 for axis in leaf_axes):
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            unsharded[name] = leaf.size * leaf.dtype.itemsize
    share = sum(unsharded.values()) / total
    if mesh.shape["fsdp"] * mesh.shape["tensor"] > 1 and share > MAX_UNSHARDED:
        raise ConfigError(
            f"config.parallel: fsdp={mesh.shape['fsdp']}, tensor={mesh.shape['tensor']} leave "
            f"{share:.1%} of the parameters unsharded, must be at most {MAX_UNSHARDED:.0%}: "
            + ", ".join(sorted(unsharded))
        )
