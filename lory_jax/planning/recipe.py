"""Plans a recipe, and its dense baseline beside it, for a topology."""

import copy
import sys
from typing import Any

from ml_collections import ConfigDict

from lory_jax.model.config import ModelConfig
from lory_jax.parallel import make_mesh
from lory_jax.planning.estimate import default_mesh, plan_step
from lory_jax.planning.gpus import GpuTopology
from lory_jax.planning.topology import Topology

MeshShape = tuple[int, int, int]  # data, fsdp, tensor


def plan_recipe(
    config: ConfigDict, topology: Topology | GpuTopology, shape: MeshShape | None = None
) -> dict[str, Any]:
    """Compiles a recipe, and its dense baseline if it has experts, for a topology.

    A program that was compiled before is read from the user's cache; `compile_seconds` is what it
    took then.

    Args:
      config: the recipe.
      topology: the slice or host to compile for.
      shape: devices on the mesh axes; by default those of `config.parallel` if it sets any, else
        `default_mesh`.

    Returns:
      The fields of a plan other than `parameters` and `flops_per_token`; `dense` holds the plan of
      the baseline.

    Raises:
      InputError: libtpu or the plug-in for CUDA is missing, or the recipe does not fit the mesh.
    """
    devices = topology.devices()
    mesh = make_mesh(*(shape or mesh_shape(config, len(devices), topology)), devices=devices)
    versions = with_baseline(config)
    plans = []
    for i, (name, version) in enumerate(versions.items()):
        print(f"compiling {i + 1} of {len(versions)}: {name}", file=sys.stderr, flush=True)
        plans.append(plan_step(version, mesh, topology.device, is_kept=True))
    return {
        "topology": topology.name,
        "device": devices[0].device_kind,
        "devices": len(devices),
        "mesh": dict(mesh.shape),
        **plans[0],
        "dense": plans[1] if len(plans) > 1 else None,
    }


def mesh_shape(config: ConfigDict, devices: int, topology: Topology | GpuTopology) -> MeshShape:
    """The mesh of `config.parallel` if it sets any of its fields, else the default."""
    parallel = config.parallel
    if (parallel.data, parallel.fsdp, parallel.tensor) != (1, 0, 1):
        return parallel.data, parallel.fsdp, parallel.tensor
    sequences = config.train.global_batch_size // config.train.microbatches
    model_config = ModelConfig.for_platform(config.model, topology.platform)
    memory = topology.device.memory_limit if topology.platform == "tpu" else 0
    return default_mesh(model_config, sequences, devices, memory)


def with_baseline(config: ConfigDict) -> dict[str, ConfigDict]:
    """A recipe and, if it has experts, its dense baseline, by name."""
    if not config.model.num_experts:
        return {"dense": config}
    dense = copy.deepcopy(config)
    dense.model.num_experts = 0
    routing = config.model.routing
    return {"Lory" if routing == "causal" else routing: config, "dense": dense}
