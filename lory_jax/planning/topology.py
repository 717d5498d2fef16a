"""Topologies by name, and what a device of each can do: TPUs by the names of Google Cloud.

`v5e-256` and `v6e-64` count chips; `v5p-128` and `tpu7x-128` count TensorCores, of which a chip has
two. `gpus.py` has those of GPUs, such as `h100-8`.
"""

import importlib.util
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lory_jax.errors import ConfigError, InputError
from lory_jax.planning.gpus import GpuTopology, parse_gpus
from lory_jax.tpu_flags import set_tpu_flags

if TYPE_CHECKING:
    import jax

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """One device as JAX sees it.

    Attributes:
      generation: name of the generation for libtpu.
      units_per_chip: what the cloud's name counts per chip (chips or TensorCores).
      memory_limit: bytes of HBM that a program may use, as libtpu reports them when a program
        requires more ("exceeds available HBM (15.75G)").
      clock: cycles per second.
      flops_per_cycle: peak of bf16 matrix products. Times the clock, this is the vendor's peak
        (docs.cloud.google.com/tpu, one page per generation). The compiler's estimates of large
        products are within 2 to 15 % of it: 126,900, 256,300, 455,700 and 444,800 FLOP per cycle.
      ici_bandwidth: bytes per second that all links to other chips can receive together: half of
        the vendor's bidirectional bandwidth per chip.
      hbm_bandwidth: the vendor's peak, in bytes per second between HBM and the device.
      matrix_side: width of the matrix unit, which holds this many rows and columns of an operand.
      register_bytes: bytes per cycle that elementwise work moves between on-chip memory and the
        registers, if HBM does not bound it: one register of 8 x 128 numbers of 32 bits.
      cores: TensorCores of one device; the two of a v5p share a kernel's grid.
    """

    generation: str
    units_per_chip: int
    memory_limit: int
    clock: float
    flops_per_cycle: int
    ici_bandwidth: float
    hbm_bandwidth: float
    matrix_side: int
    cores: int = 1
    register_bytes: int = 4096


DEVICES = {
    "v5e": Device("v5e", 1, int(15.75 * GIB), 1.5e9, 131_072, 200e9, 819e9, 128),
    "v5p": Device("v5p", 2, int(95.73 * GIB), 1.75e9, 262_144, 600e9, 2765e9, 128, 2),
    "v6e": Device("v6e", 1, int(31.24 * GIB), 1.75e9, 524_288, 400e9, 1640e9, 256),
    # JAX sees each of a TPU7x chip's two TensorCores as a device.
    "tpu7x": Device("tpu7x", 2, int(94.74 * GIB), 2.2e9, 524_288, 300e9, 3690e9, 256),
}

# The shapes that the cloud offers, in chips, by their number of chips.
PLANES = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
CUBES = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8"}
CUBES |= {512: "8x8x8", 1024: "8x8x16", 2048: "8x16x16", 4096: "16x16x16"}
SHAPES = {"v5e": PLANES, "v6e": PLANES, "v5p": CUBES, "tpu7x": CUBES}

# The version that JAX's extra `tpu` requires. This jaxlib cannot read every program of newer ones,
# because they write other HLO (async-update with several operands).
PIP = "pip install libtpu==0.0.42.1"


@dataclass(frozen=True)
class Topology:
    """A slice: `name` is the cloud's, `libtpu_name` is such as v5p:4x4x4."""

    name: str
    libtpu_name: str
    device: Device
    platform = "tpu"

    @property
    def devices_per_chip(self) -> int:
        """Devices of JAX per chip, which is what the cloud charges for."""
        return self.device.units_per_chip // self.device.cores

    def devices(self) -> "Sequence[jax.Device]":
        """Descriptions of its devices, for which programs can be compiled.

        Raises:
          InputError: libtpu is not installed.
        """
        if importlib.util.find_spec("libtpu") is None:
            raise InputError(
                f"libtpu: not found; compiling for TPUs requires it (but no TPU): {PIP}"
            )
        # libtpu must not look for a TPU here: neither take its lock nor ask what this host is.
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        set_tpu_flags()  # as `train` does
        from jax.experimental import topologies

        # libtpu assumes four chips per host; the smallest slice has one.
        bounds = {"chips_per_host_bounds": (1, 1, 1)} if self.libtpu_name.endswith(":1x1") else {}
        return topologies.get_topology_desc(self.libtpu_name, platform="tpu", **bounds).devices


def parse_topology(name: str) -> Topology | GpuTopology:
    """The topology of a name; needs neither libtpu nor the plug-in for CUDA.

    Raises:
      ConfigError: there is no such topology.
    """
    return parse_gpus(name) or parse_slice(name)


def parse_slice(name: str) -> Topology:
    """The TPU topology that the cloud calls `name`.

    Raises:
      ConfigError: there is no such slice.
    """
    found = re.fullmatch(r"(v5e|v5litepod|v5p|v6e|tpu7x)-([0-9]{1,9})", name)
    if not found:
        raise ConfigError(
            f"topology: got {name!r}, must be the cloud's name of a slice: v5e-CHIPS, v6e-CHIPS, "
            "v5p-CORES or tpu7x-CORES, such as v5e-256 or v5p-128; or a host of GPUs: a100-N, "
            "h100-N or h200-N, such as h100-8"
        )
    generation = found[1].replace("v5litepod", "v5e")
    device, shapes = DEVICES[generation], SHAPES[generation]
    chips, remainder = divmod(int(found[2]), device.units_per_chip)
    if remainder or chips not in shapes:
        sizes = ", ".join(str(count * device.units_per_chip) for count in shapes)
        raise ConfigError(f"topology: got {name!r}, must be {found[1]}- and one of {sizes}")
    return Topology(name, f"{generation}:{shapes[chips]}", device)


def smallest_topology(device: Device) -> Topology:
    """The smallest slice of a generation: what is compiled for one device needs no more."""
    chips = min(SHAPES[device.generation])
    name = f"{device.generation}-{chips * device.units_per_chip}"
    return parse_slice(name)
