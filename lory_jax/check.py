"""Checks an installation on the devices it finds, in a few minutes: the first thing to run on one.

    python -m lory_jax.check [--workdir=DIR or gs://...] [--size=small]

Devices; each kernel against its reference, in values and gradients; 20 training steps with MFU; a
save and a restore. Exit status 1 if anything is wrong.
"""

import functools
import math
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from lory_jax import cli
from lory_jax.config import base_config
from lory_jax.errors import InputError
from lory_jax.model.attention import attend, causal_attention
from lory_jax.model.config import ModelConfig
from lory_jax.model.flops import flops_per_token, parameter_counts, peak_flops
from lory_jax.model.merged_ffn import merged_ffn
from lory_jax.parallel import make_mesh, place_batch, replicated, start_process
from lory_jax.run.checkpoints import Checkpoints, leaf_sums
from lory_jax.run.directory import EXPERTS
from lory_jax.storage import storage_path
from lory_jax.training.loss import mean_loss
from lory_jax.training.optimizer import Optimizer, make_optimizer
from lory_jax.training.state import State, abstract_state, init_state
from lory_jax.training.step import make_train_step

STEPS = 20
KERNEL_LENGTH = 1024  # at most: the reference of attention holds all scores
LIMITS = {"float32": 1e-4, "bfloat16": 5e-2}  # error over the largest value

SIZES: dict[str, dict[str, Any]] = {
    "full": {"num_layers": 4, "compute_dtype": "bfloat16", "remat": "full"},  # of 0.3B/8E
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


def main(argv: list[str]) -> None:
    parser = cli.Parser("check", __doc__)
    parser.add_argument(
        "--workdir",
        type=storage_path,
        metavar="DIR",
        help="where to save and restore; several hosts need one that all see (default, on one "
        "host: a temporary directory)",
    )
    parser.add_argument(
        "--size", choices=SIZES, help="default: full on accelerators, small on a CPU"
    )
    args = parser.parse(argv)
    start_process()
    size = args.size or ("small" if jax.default_backend() == "cpu" else "full")
    begin = time.perf_counter()
    failed = check(size, args.workdir)
    seconds = time.perf_counter() - begin
    if failed:
        raise InputError(f"check: {', '.join(failed)} failed after {seconds:.0f} s; see above")
    say(f"all is well, {seconds:.0f} s")


def check(size: str, workdir: Path | None) -> list[str]:
    """Runs everything and prints a line for each; returns the names of what failed."""
    config = base_config()
    config.model.update(SIZES[size])
    model = ModelConfig.for_platform(config.model, jax.default_backend())
    mesh = make_mesh(1, 0, 1)
    say_devices()
    failed = []
    with jax.set_mesh(mesh):
        for name, run in (
            (f"attention ({model.attention})", check_attention),
            (f"merged FFN ({model.merged_ffn})", check_merged_ffn),
            ("loss (chunks)", check_loss),
        ):
            begin = time.perf_counter()
            error, limit = run(model, mesh), LIMITS[model.compute_dtype]
            is_fine = error <= limit  # and not NaN
            say(
                f"{'ok    ' if is_fine else 'FAILED'}  {name}: error {error:.1e}, "
                f"at most {limit:g} ({time.perf_counter() - begin:.0f} s)"
            )
            failed += [] if is_fine else [name]
        state, is_fine = check_training(model, mesh, SEQUENCES_PER_DEVICE[size] * mesh.size)
        failed += [] if is_fine else ["training"]
    if workdir is None and jax.process_count() > 1:
        say("not checked: save and restore; give --workdir=gs://... (several hosts)")
    elif workdir is None:
        with tempfile.TemporaryDirectory() as directory:
            failed += check_checkpoint(model, mesh, state, Path(directory))
    else:
        failed += check_checkpoint(model, mesh, state, workdir / "check")
    return failed


def say(text: str) -> None:
    """Prints a line, once for all processes."""
    if jax.process_index() == 0:
        print(text, flush=True)


def say_devices() -> None:
    device = jax.local_devices()[0]
    memory = (device.memory_stats() or {}).get("bytes_limit")
    size = f", {memory / 2**30:.1f} GiB each" if memory else ""
    say(
        f"{jax.device_count()} x {device.device_kind} ({device.platform}){size}, "
        f"{jax.process_count()} processes; Python {sys.version.split()[0]}, jax {jax.__version__}"
    )


# ---------------------------------------------------------------- kernels


def largest_error(
    kernel: Callable[..., Array],
    reference: Callable[..., Array],
    inputs: Callable[[Array], tuple[Any, ...]],
    dtype: str,
    mesh: Mesh,
) -> float:
    """The largest error of a kernel's value and gradients, each over the reference's largest value.

    `inputs` makes the float32 arguments from a key; the kernel gets them in `dtype`.
    """

    def run(key: Array) -> Array:
        exact = inputs(key)
        rounded = jax.tree.map(lambda x: x.astype(dtype), exact)
        found, pull = jax.vjp(kernel, *rounded)
        with jax.default_matmul_precision("highest"):
            expected, pull_reference = jax.vjp(reference, *exact)
            cotangent = jax.random.normal(jax.random.fold_in(key, 1), expected.shape)
            gradients_expected = pull_reference(cotangent)
        gradients = pull(cotangent.astype(found.dtype))
        errors = [
            jnp.max(jnp.abs(a.astype(jnp.float32) - b)) / jnp.max(jnp.abs(b))
            for a, b in zip(
                jax.tree.leaves((found, gradients)),
                jax.tree.leaves((expected, gradients_expected)),
                strict=True,
            )
        ]
        return jnp.max(jnp.stack(errors))

    return float(jax.jit(run, out_shardings=replicated(mesh))(jax.random.key(0)))


def check_attention(model: ModelConfig, mesh: Mesh) -> float:
    """The attention of this platform against the whole square of scores."""
    L = min(model.sequence_length, KERNEL_LENGTH)
    shape = (mesh.size, L, model.num_heads, model.embed_dim // model.num_heads)

    def whole(*arrays: Array) -> Array:
        query, key, value = (x.swapaxes(1, 2) for x in arrays)
        return attend(query, key, value, jnp.tril(jnp.ones((L, L), bool))).swapaxes(1, 2)

    def inputs(key: Array) -> tuple[Array, ...]:
        return tuple(jax.random.normal(k, shape) for k in jax.random.split(key, 3))

    kernel = functools.partial(causal_attention, implementation=model.attention)
    return largest_error(kernel, whole, inputs, model.compute_dtype, mesh)


def check_merged_ffn(model: ModelConfig, mesh: Mesh) -> float:
    """The merged FFN of this platform, with its hand-derived gradient, against the plain einsum."""
    D, F, E, S = model.embed_dim, model.mlp_dim, model.num_experts, 2 * mesh.size

    def inputs(key: Array) -> tuple[Any, ...]:
        x, gate, up, down, r = jax.random.split(key, 5)
        experts = {
            "gate": jax.random.normal(gate, (E, D, F)) / math.sqrt(D),
            "up": jax.random.normal(up, (E, D, F)) / math.sqrt(D),
            "down": jax.random.normal(down, (E, F, D)) / math.sqrt(F),
        }
        r_SxE = jax.nn.softmax(jax.random.normal(r, (S, E)))
        return jax.random.normal(x, (S, model.segment_length, D)), experts, r_SxE

    kernel = functools.partial(merged_ffn, implementation=model.merged_ffn)
    reference = functools.partial(merged_ffn, implementation="einsum")
    return largest_error(kernel, reference, inputs, model.compute_dtype, mesh)


def check_loss(model: ModelConfig, mesh: Mesh) -> float:
    """The cross-entropy by chunks against all logits at once."""
    B, L, V = mesh.size, min(model.sequence_length, KERNEL_LENGTH), model.vocab_size
    targets_BxL = np.random.default_rng(1).integers(0, V, (B, L), np.int32)

    def whole(x_BxLxD: Array, head_DxV: Array) -> Array:
        log_p_BxLxV = jax.nn.log_softmax(jnp.matmul(x_BxLxD, head_DxV))
        return -jnp.mean(
            jnp.take_along_axis(log_p_BxLxV, jnp.asarray(targets_BxL)[..., None], axis=-1)
        )

    def inputs(key: Array) -> tuple[Array, ...]:
        x, head = jax.random.split(key)
        shape_x, shape_head = (B, L, model.embed_dim), (model.embed_dim, V)
        scale = 1 / math.sqrt(model.embed_dim)
        return jax.random.normal(x, shape_x), scale * jax.random.normal(head, shape_head)

    def chunks(x_BxLxD: Array, head_DxV: Array) -> Array:
        return mean_loss(x_BxLxD, head_DxV, jnp.asarray(targets_BxL))

    return largest_error(chunks, whole, inputs, model.compute_dtype, mesh)


# ---------------------------------------------------------------- training, saving


def make_check_optimizer() -> Optimizer:
    """The default one, at a constant rate."""
    train = base_config().train
    train.update(learning_rate=1e-3, warmup_fraction=0.0, final_learning_rate_fraction=1.0)
    return make_optimizer(train)


def check_training(model: ModelConfig, mesh: Mesh, batch_size: int) -> tuple[State, bool]:
    """20 steps on one batch, whose loss must fall; prints seconds, tokens per second and MFU."""
    optimizer = make_check_optimizer()
    state = init_state(model, optimizer, mesh, seed=0)
    step = make_train_step(model, optimizer, mesh)
    rows, index = batch_size // jax.process_count(), jax.process_index()
    tokens_BxL1 = np.random.default_rng(0).integers(
        0, model.vocab_size, (batch_size, model.sequence_length + 1), np.int32
    )
    batch = place_batch(tokens_BxL1[index * rows : (index + 1) * rows], mesh, model.batch_axis)

    begin = time.perf_counter()
    state, metrics = step(state, batch)
    first = float(metrics["loss"])
    compiled = time.perf_counter()
    for _ in range(STEPS - 1):
        state, metrics = step(state, batch)
    last = float(metrics["loss"])
    seconds = (time.perf_counter() - compiled) / (STEPS - 1)

    rate = batch_size * model.sequence_length / seconds
    peak = peak_flops(jax.devices()[0].device_kind)
    mfu = (
        f"MFU {rate * flops_per_token(model) / (peak * mesh.size):.1%}" if peak else "peak unknown"
    )
    is_fine = math.isfinite(last) and last < first
    say(
        f"{'ok    ' if is_fine else 'FAILED'}  training: {STEPS} steps of "
        f"{batch_size * model.sequence_length:,} tokens, "
        f"{parameter_counts(model)['total'] / 1e6:,.1f}M parameters, loss {first:.3f} to "
        f"{last:.3f}, {seconds:.3f} s a step, {rate:,.0f} tok/s, {mfu} "
        f"(the first step with compilation {compiled - begin:.0f} s)"
    )
    return state, is_fine


def check_checkpoint(model: ModelConfig, mesh: Mesh, state: State, directory: Path) -> list[str]:
    """Saves the state and reads it back: every bit must be the same."""
    begin = time.perf_counter()
    writer = Checkpoints(directory, keep=1)
    writer.save(state, EXPERTS)
    writer.close()
    saved = time.perf_counter()
    reader = Checkpoints(directory)
    restored = reader.restore_newest(lambda _: abstract_state(model, make_check_optimizer(), mesh))
    reader.close()
    is_fine = restored is not None and leaf_sums(restored[0]) == leaf_sums(state)
    say(
        f"{'ok    ' if is_fine else 'FAILED'}  save and restore: {saved - begin:.1f} s and "
        f"{time.perf_counter() - saved:.1f} s in {directory}"
    )
    return [] if is_fine else ["save and restore"]


if __name__ == "__main__":
    cli.run(main)
