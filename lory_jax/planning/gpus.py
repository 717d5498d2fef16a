"""NVIDIA GPUs by name, for which programs are compiled without one.

`h100-8` is one host with eight H100s, connected by NVLink. The compiler takes a GPU's properties
from a text in `gpu_targets/` (a GpuTargetConfigProto), in which every figure has its source.
"""

import importlib.util
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING

from lory_jax.errors import ConfigError, InputError

if TYPE_CHECKING:
    import jax

PIP = "pip install 'jax[cuda12]==0.10.2' (requirements-cuda.txt)"
COUNTS = (1, 2, 4, 8)  # GPUs of one host


@dataclass(frozen=True)
class Gpu:
    """What one GPU can do, by its data sheet (NVIDIA: A100 80 GB, H100 SXM5, H200).

    Attributes:
      name: as in the name of a topology.
      peak_flops: of dense bfloat16 products, per second.
      hbm_bandwidth: bytes per second between memory and the GPU.
      link_bandwidth: bytes per second that all NVLinks can receive together: half of the sheet's
        total, which counts both directions (600 GB/s for A100, 900 GB/s for H100 and H200).
    """

    name: str
    peak_flops: float
    hbm_bandwidth: float
    link_bandwidth: float

    @property
    def target(self) -> str:
        """The text of its GpuTargetConfigProto."""
        return (
            resources.files("lory_jax.planning.gpu_targets")
            .joinpath(f"{self.name}.txtpb")
            .read_text()
        )

    @property
    def memory_limit(self) -> int:
        """Bytes that a program may use: the share that launch/gpu.sh lets JAX reserve."""
        found = re.findall(r"device_memory_size: (\d+)", self.target)
        return int(MEMORY_SHARE * int(found[0]))


MEMORY_SHARE = 0.9  # XLA_PYTHON_CLIENT_MEM_FRACTION in launch/gpu.sh

GPUS = {
    "a100": Gpu("a100", 312e12, 2039e9, 300e9),
    "h100": Gpu("h100", 989e12, 3352e9, 450e9),
    "h200": Gpu("h200", 989e12, 4800e9, 450e9),
}


@dataclass(frozen=True)
class GpuTopology:
    """One host with some GPUs of one kind."""

    name: str
    device: Gpu
    count: int
    platform = "gpu"
    devices_per_chip = 1

    def devices(self) -> "Sequence[jax.Device]":
        """Descriptions of its GPUs, for which programs can be compiled.

        Raises:
          InputError: JAX's plug-in for CUDA is not installed.
        """
        if importlib.util.find_spec("jax_cuda12_plugin") is None:
            raise InputError(
                f"jax_cuda12_plugin: not found; compiling for GPUs requires it (but no GPU): {PIP}"
            )
        # The plug-in must not look for a GPU or its driver here.
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
        from jax.experimental import topologies

        described = topologies.get_topology_desc(
            platform="cuda", target_config=self.device.target, topology=f"1x1x{self.count}"
        )
        return described.devices


def parse_gpus(name: str) -> GpuTopology | None:
    """The topology of a name such as h100-8; None if it is no name of GPUs.

    Raises:
      ConfigError: it names GPUs, but not as many as one host has.
    """
    found = re.fullmatch(rf"({'|'.join(GPUS)})-(\d+)", name)
    if not found:
        return None
    count = int(found[2])
    if count not in COUNTS:
        raise ConfigError(
            f"topology: got {name!r}, must be {found[1]}- and one of "
            f"{', '.join(map(str, COUNTS))}, the GPUs of one host"
        )
    return GpuTopology(name, GPUS[found[1]], count)
