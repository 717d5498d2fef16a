"""Compiles the real training step for devices that this machine does not have."""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from lory_jax.errors import InputError
from lory_jax.model.config import ModelConfig
from lory_jax.parallel import check_batch, partition_spec
from lory_jax.planning.topology import PIP
from lory_jax.training.optimizer import make_optimizer
from lory_jax.training.state import abstract_state
from lory_jax.training.step import make_train_step

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Program:
    """A compiled training step.

    Attributes:
      text: its optimised HLO; "" if the program does not fit into memory.
      arguments: bytes per device of state and batch.
      temporaries: bytes per device of everything else.
      seconds: how long tracing and compiling took.
    """

    text: str
    arguments: int
    temporaries: int
    seconds: float


@dataclass(frozen=True)
class Lowered:
    """A traced training step, before the compiler optimises it.

    Attributes:
      lowered: what JAX compiles.
      arguments: bytes per device of state and batch.
      seconds: how long tracing took.
    """

    lowered: jax.stages.Lowered
    arguments: int
    seconds: float


def lower_step(config: ConfigDict, mesh: Mesh) -> Lowered:
    """Traces the training step of a recipe, as `train` runs it, for the devices of a mesh.

    Raises:
      ConfigError: the recipe does not fit the mesh.
    """
    model_config = ModelConfig.for_platform(config.model, mesh.devices.flat[0].platform)
    train = config.train
    check_batch(train.global_batch_size, train.microbatches, model_config.batch_axis, mesh)
    optimizer = make_optimizer(train)
    step: Any = make_train_step(model_config, optimizer, mesh, train.microbatches)
    state = abstract_state(model_config, optimizer, mesh)
    tokens_BxL1 = jax.ShapeDtypeStruct(
        (train.global_batch_size, model_config.sequence_length + 1),
        jnp.int32,
        sharding=NamedSharding(mesh, partition_spec((model_config.batch_axis, "length"))),
    )
    arguments = bytes_on_one_device([*jax.tree.leaves(state), tokens_BxL1])
    start = time.monotonic()
    with jax.set_mesh(mesh):
        lowered = step.lower(state, tokens_BxL1)
    return Lowered(lowered, arguments, time.monotonic() - start)


def compile_lowered(traced: Lowered) -> Program:
    """Compiles a traced training step.

    Raises:
      InputError: the compiler rejects the program for a reason other than its size, or writes
        programs that this jaxlib cannot read.
    """
    start = time.monotonic() - traced.seconds
    try:
        compiled = traced.lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        temporaries = max(0, memory_needed(str(error)) - traced.arguments)
        return Program("", traced.arguments, temporaries, time.monotonic() - start)
    try:
        text = program_text(compiled)
    except jax.errors.JaxRuntimeError as error:
        raise InputError(
            f"libtpu {version('libtpu')}: jaxlib {version('jaxlib')} cannot read its program "
            f"({str(error).splitlines()[0][:100]}); {PIP}"
        ) from None
    memory: Any = compiled.memory_analysis()
    return Program(
        text,
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes,
        time.monotonic() - start,
    )


def program_text(compiled: Any) -> str:
    """The optimised HLO with the values of all constants; `as_text()` leaves out those of arrays.

    Kernels read from such arrays which of their steps to skip.
    """
    from jaxlib._hlo import HloPrintOptions  # type: ignore[import-not-found]

    options = HloPrintOptions()
    options.print_large_constants = True
    (module,) = compiled.runtime_executable().hlo_modules()
    return str(module.to_string(options))


def bytes_on_one_device(leaves: Sequence[jax.ShapeDtypeStruct]) -> int:
    """Bytes of one device's shards of the arrays, without padding."""
    total = 0
    for leaf in leaves:
        count = 1
        for size in leaf.sharding.shard_shape(leaf.shape):
            count *= size
        total += count * leaf.dtype.itemsize
    return total


def memory_needed(message: str) -> int:
    """Returns the bytes that a program needs, from the compiler's out-of-memory message.

    Raises:
      InputError: the message is not about memory.
    """
    is_hbm = "memory space vmem" not in message  # otherwise one kernel did not fit on the chip
    patterns = (r"Used ([\d.]+)([KMGT]?)i?B? of", r"\(([\d.]+)([KMGT])\) exceeds available HBM")
    for pattern in patterns:
        if is_hbm and (found := re.search(pattern, message)):
            return int(float(found[1]) * _UNITS[found[2]])
    raise InputError(f"the compiler rejected the program: {message.splitlines()[0][:300]}")
