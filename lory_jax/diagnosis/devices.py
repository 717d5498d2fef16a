"""Checks an installation on the devices of this machine, in a few minutes.

It prints the devices, compares each kernel with its reference in values and gradients, runs 20
training steps and measures their MFU, and saves and restores a checkpoint.
"""

import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from lory_jax.config import base_config
from lory_jax.diagnosis.findings import Findings
from lory_jax.diagnosis.kernels import LIMITS, attention_error, loss_error, merged_ffn_error
from lory_jax.model.config import ModelConfig
from lory_jax.model.flops import flops_per_token, parameter_counts, peak_flops
from lory_jax.parallel import make_mesh, place_batch
from lory_jax.run.checkpoints import Checkpoints, leaf_sums
from lory_jax.run.phases import EXPERTS
from lory_jax.storage import naming
from lory_jax.training.optimizer import Optimizer, make_optimizer
from lory_jax.training.state import State, abstract_state, init_state
from lory_jax.training.step import make_train_step

STEPS = 20

SIZES: dict[str, dict[str, Any]] = {
    # Four layers of the 0.3B/8E recipe.
    "full": {"num_layers": 4, "compute_dtype": "bfloat16", "remat": "full"},
    "small": {
        "vocab_size": 512,
        "num_layers": 2,
        "embed_dim": 128,
        "num_heads": 2,
        "mlp_dim": 256,
        "num_experts": 4,
        "sequence_length": 256,
        "segment_length": 64,
        "compute_dtype": "float32",
    },
}
SEQUENCES_PER_DEVICE = {"full": 4, "small": 2}


def examine_devices(size: str | None, scratch: Path | None, findings: Findings) -> None:
    """Runs all checks of this machine and reports each.

    Args:
      size: one of `SIZES`; by default "small" on a CPU and "full" elsewhere.
      scratch: where to save and restore. By default this is a temporary directory, which only
        works on one host.
      findings: where to report.
    """
    size = size or ("small" if jax.default_backend() == "cpu" else "full")
    config = base_config()
    config.model.update(SIZES[size])
    model_config = ModelConfig.for_platform(config.model, jax.default_backend())
    mesh = make_mesh(1, 0, 1)
    findings.say(devices_line())
    with jax.set_mesh(mesh):
        check_kernels(model_config, mesh, findings)
        state = check_training(model_config, mesh, SEQUENCES_PER_DEVICE[size] * mesh.size, findings)
    if scratch is not None:
        with naming(scratch):
            check_checkpoint(model_config, mesh, state, scratch / "doctor", findings)
    elif jax.process_count() == 1:
        with tempfile.TemporaryDirectory() as directory:
            check_checkpoint(model_config, mesh, state, Path(directory), findings)
    else:
        findings.note(
            "save and restore were not checked: several processes require a scratch directory "
            "that all of them can reach"
        )


def devices_line() -> str:
    """The devices and the versions of Python and JAX, in one line."""
    device = jax.local_devices()[0]
    memory = (device.memory_stats() or {}).get("bytes_limit")
    size = f", {memory / 2**30:.1f} GiB each" if memory else ""
    return (
        f"{jax.device_count()} x {device.device_kind} ({device.platform}){size}, "
        f"{jax.process_count()} processes; Python {sys.version.split()[0]}, jax {jax.__version__}"
    )


def check_kernels(model_config: ModelConfig, mesh: Mesh, findings: Findings) -> None:
    """Compares every kernel with its reference; a NaN is an error too."""
    limit = LIMITS[model_config.compute_dtype]
    for name, measure in (
        (f"attention ({model_config.attention})", attention_error),
        (f"merged FFN ({model_config.merged_ffn})", merged_ffn_error),
        ("loss (in chunks)", loss_error),
    ):
        begin = time.perf_counter()
        error = measure(model_config, mesh)
        seconds = time.perf_counter() - begin
        findings.check(
            error <= limit,
            f"{name}: largest error {error:.1e}, at most {limit:g} is accepted ({seconds:.0f} s)",
        )


def optimizer_for_check(learning_rate: float = 1e-3) -> Optimizer:
    """The default optimiser at a constant rate."""
    train = base_config().train
    train.update(learning_rate=learning_rate, warmup_fraction=0.0, final_learning_rate_fraction=1.0)
    return make_optimizer(train)


def check_training(
    model_config: ModelConfig, mesh: Mesh, batch_size: int, findings: Findings
) -> State:
    """Trains 20 steps on one batch, whose loss must fall; reports speed and MFU."""
    optimizer = optimizer_for_check()
    state = init_state(model_config, optimizer, mesh, seed=0)
    step = make_train_step(model_config, optimizer, mesh)
    rows, index = batch_size // jax.process_count(), jax.process_index()
    tokens_BxL1 = np.random.default_rng(0).integers(
        0, model_config.vocab_size, (batch_size, model_config.sequence_length + 1), np.int32
    )
    own_rows = tokens_BxL1[index * rows : (index + 1) * rows]
    batch = place_batch(own_rows, mesh, model_config.batch_axis)

    begin = time.perf_counter()
    state, metrics = step(state, batch)
    first = float(metrics["loss"])
    compiled = time.perf_counter()
    for _ in range(STEPS - 1):
        state, metrics = step(state, batch)
    last = float(metrics["loss"])
    seconds = (time.perf_counter() - compiled) / (STEPS - 1)

    tokens = batch_size * model_config.sequence_length
    findings.check(
        math.isfinite(last) and last < first,
        f"training: {STEPS} steps of {tokens:,} tokens, "
        f"{parameter_counts(model_config)['total'] / 1e6:,.1f}M parameters, "
        f"loss {first:.3f} to {last:.3f}, {seconds:.3f} s per step, {tokens / seconds:,.0f} tok/s, "
        f"{mfu_text(model_config, tokens / seconds, mesh.size)} "
        f"(the first step and its compilation took {compiled - begin:.0f} s)",
    )
    return state


def mfu_text(model_config: ModelConfig, tokens_per_second: float, devices: int) -> str:
    """The MFU as text, where the peak of the devices is known."""
    peak = peak_flops(jax.devices()[0].device_kind)
    if not peak:
        return "MFU unknown on this device"
    return f"MFU {tokens_per_second * flops_per_token(model_config) / (peak * devices):.1%}"


def check_checkpoint(
    model_config: ModelConfig, mesh: Mesh, state: State, directory: Path, findings: Findings
) -> None:
    """Saves the state and restores it: every bit must be the same."""
    begin = time.perf_counter()
    writer = Checkpoints(directory, keep=1)
    writer.save(state, EXPERTS)
    writer.close()
    saved = time.perf_counter()
    reader = Checkpoints(directory)
    target = abstract_state(model_config, optimizer_for_check(), mesh)
    restored = reader.restore_newest(lambda _: target)
    reader.close()
    end = time.perf_counter()
    findings.check(
        restored is not None and leaf_sums(restored[0]) == leaf_sums(state),
        f"save and restore: {saved - begin:.1f} s and {end - saved:.1f} s in {directory}",
    )
