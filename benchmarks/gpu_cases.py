"""The cases of benchmarks/gpu.py, one per process: a case on standard input, its result as the last
line of standard output.

Requires jax, flax, optax and orbax only.

Letters: B batch, L sequence, S segments, T tokens per segment, D model, F FFN, E experts.
"""

import dataclasses
import json
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lory_jax.diagnosis.kernels import attention_error, loss_error, merged_ffn_error
from lory_jax.generation.programs import make_decoder
from lory_jax.model.config import ModelConfig
from lory_jax.model.flops import flops_per_token, peak_flops
from lory_jax.model.merged_ffn import merged_ffn
from lory_jax.model.transformer import init_params
from lory_jax.parallel import make_mesh, place_batch
from lory_jax.schema import section_defaults
from lory_jax.training.optimizer import make_optimizer
from lory_jax.training.state import init_state
from lory_jax.training.step import make_train_step

LEAST_STEPS = 20  # of training, however long compiling took
MOST_INSTANCES = 20_000  # 80M tokens of L = 4096, more than an hour on one GPU reads

Case = dict[str, Any]
Result = dict[str, Any]


def run_case(case: Case) -> Result:
    """The result of a case by its kind, with how long it took in all."""
    begin = time.perf_counter()
    kinds: dict[str, Callable[[Case], Result]] = {
        "machine": machine,
        "kernels": kernels,
        "step": step,
        "layer": layer,
        "decode": decode,
        "train": train,
    }
    result = kinds[case["kind"]](case)
    return result | {"date": time.strftime("%Y-%m-%d"), "took": time.perf_counter() - begin}


def model_config(case: Case) -> ModelConfig:
    fields = section_defaults("model") | case["model"]
    return ModelConfig.for_platform(fields, jax.default_backend())


def machine(case: Case) -> Result:
    from importlib.metadata import version

    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
    return {
        "device": device.device_kind,
        "memory_bytes": stats.get("bytes_limit"),
        "python": sys.version.split()[0],
        "versions": {name: version(name) for name in packages},
    }


def kernels(case: Case) -> Result:
    """The largest error of value and gradients of every kernel, relative to the reference."""
    mesh = make_mesh(1, 1, 1, jax.devices()[:1])
    model = model_config(case)
    D, F = min(256, model.embed_dim), min(512, model.mlp_dim)
    small = dataclasses.replace(model, embed_dim=D, mlp_dim=F)
    errors = {"attention": attention_error(model, mesh), "loss": loss_error(small, mesh)}
    for name in ("whole", "blocks"):
        errors[name] = merged_ffn_error(dataclasses.replace(small, merged_ffn=name), mesh)
    return errors | {"dtype": model.compute_dtype, "attention_is": model.attention}


# ---------------------------------------------------------------- steps


def step(case: Case) -> Result:
    """The median step on one batch of random tokens, after the first."""
    model, mesh = model_config(case), make_mesh(1, 1, 1, jax.devices()[:1])
    optimizer = make_optimizer(section_defaults("train"))
    tokens = np.random.default_rng(0).integers(
        0, model.vocab_size, (case["batch"], model.sequence_length + 1), np.int32
    )
    with jax.set_mesh(mesh):
        state = init_state(model, optimizer, mesh, seed=0)
        batch = place_batch(tokens, mesh, model.batch_axis)
        begin = time.perf_counter()
        run = make_train_step(model, optimizer, mesh).lower(state, batch).compile()
        compiling = time.perf_counter() - begin
        memory = run.memory_analysis()
        seconds = []
        for _ in range(case["rounds"] + 1):
            begin = time.perf_counter()
            state, metrics = run(state, batch)
            jax.block_until_ready((state, metrics))
            seconds.append(time.perf_counter() - begin)
    median = statistics.median(seconds[1:])
    rate = case["batch"] * model.sequence_length / median
    peak = peak_flops(jax.devices()[0].device_kind)
    return {
        "experts": model.num_experts,
        "layers": model.num_layers,
        "batch": case["batch"],
        "remat": model.remat,
        "merged_ffn": model.merged_ffn if model.num_experts else "",
        "seconds": median,
        "quartiles": [round(q, 5) for q in statistics.quantiles(seconds[1:])],
        "tokens_per_second": rate,
        "mfu": rate * flops_per_token(model) / peak if peak else None,
        "peak_bytes": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
        "planned_bytes": memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes,
        "compile_seconds": compiling,
        "loss": float(metrics["loss"]),
    }


def layer(case: Case) -> Result:
    """Forward and backward of one layer's merged FFN, and of a dense FFN, taking turns."""
    model = model_config(case)
    T, D, F, E = model.segment_length, model.embed_dim, model.mlp_dim, model.num_experts
    S = case["batch"] * model.sequence_length // T
    keys = jax.random.split(jax.random.key(0), 5)
    x = jax.random.normal(keys[0], (S, T, D), model.compute_dtype)
    r = jax.nn.softmax(jax.random.normal(keys[1], (S, E)))
    sizes = {"gate": (E, D, F), "up": (E, D, F), "down": (E, F, D)}
    experts = {
        name: jax.random.normal(key, size) / size[1] ** 0.5
        for key, (name, size) in zip(keys[2:], sizes.items(), strict=True)
    }

    @jax.jit
    def merged(x: Any, experts: Any, r: Any) -> Any:
        y, pull = jax.vjp(lambda *a: merged_ffn(*a, model.merged_ffn), x, experts, r)
        return pull(y)

    @jax.jit
    def dense(x: Any, experts: Any, r: Any) -> Any:
        def run(x: Any, w: Any) -> Any:
            gate, up = (x @ w[name][0].astype(x.dtype) for name in ("gate", "up"))
            return (jax.nn.silu(gate) * up) @ w["down"][0].astype(x.dtype)

        y, pull = jax.vjp(run, x, experts)
        return pull(y)

    seconds: dict[str, list[float]] = {"merged": [], "dense": []}
    for turn in range(case["rounds"] + 1):
        for name, run in (("merged", merged), ("dense", dense)):
            begin = time.perf_counter()
            jax.block_until_ready(run(x, experts, r))
            if turn:  # the first compiles
                seconds[name].append(time.perf_counter() - begin)
    ratios = [m / d for m, d in zip(seconds["merged"], seconds["dense"], strict=True)]
    return {
        "merged_ffn": model.merged_ffn,
        "segments": S,
        "seconds": statistics.median(seconds["merged"]),
        "over_dense": statistics.median(ratios),
        "quartiles": [round(q, 4) for q in statistics.quantiles(ratios)],
    }


def decode(case: Case) -> Result:
    """Tokens per second after a prompt, with experts merged for each row, or kept as experts."""
    model = model_config(case)
    params = init_params(model, jax.random.key(0))
    rows, prompt = case["batch"], model.segment_length
    tokens = np.ones((rows, prompt), np.int32)
    lengths = np.full(rows, prompt, np.int32)
    decoder = make_decoder(model, "prompt", None, case["ffn"])
    room = prompt + case["tokens"] + 1
    jax.block_until_ready(decoder.prefill(params, tokens, lengths, room, None))  # compiles
    begin = time.perf_counter()
    logits_BxV, merged, cache = decoder.prefill(params, tokens, lengths, room, None)
    weights = decoder.weights(params, merged)
    jax.block_until_ready((logits_BxV, weights))
    prefill = time.perf_counter() - begin
    seconds = []
    for _ in range(case["tokens"]):
        begin = time.perf_counter()
        chosen_B = jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)
        logits_BxV, cache = decoder.step(weights, cache, chosen_B)
        jax.block_until_ready(logits_BxV)
        seconds.append(time.perf_counter() - begin)
    median = statistics.median(seconds[1:])
    return {
        "rows": rows,
        "ffn": case["ffn"],
        "prefill_seconds": prefill,
        "tokens_per_second": rows / median,
    }


# ---------------------------------------------------------------- training


def train(case: Case) -> Result:
    """Trains from scratch for some seconds, compiling included; losses by step.

    Each loss is that of a batch before the model learned from it.
    """
    model, mesh = model_config(case), make_mesh(1, 1, 1, jax.devices()[:1])
    instances = load_instances(case["instances"], model)
    settings = section_defaults("train") | {"steps": 2000, "learning_rate": 3e-4}
    optimizer = make_optimizer(settings)
    order = np.random.default_rng(0).permutation(len(instances))
    losses: list[tuple[int, float]] = []
    with jax.set_mesh(mesh):
        state = init_state(model, optimizer, mesh, seed=0)
        run = make_train_step(model, optimizer, mesh)
        begin, done = time.perf_counter(), 0
        while done < LEAST_STEPS or time.perf_counter() - begin < case["seconds"]:
            start = done * case["batch"]
            chosen = order.take(range(start, start + case["batch"]), mode="wrap")
            batch = place_batch(instances[chosen], mesh, model.batch_axis)
            state, metrics = run(state, batch)
            losses.append((done, float(metrics["loss"])))
            done += 1
    return {
        "experts": model.num_experts,
        "steps": done,
        "tokens": done * case["batch"] * model.sequence_length,
        "instances": len(instances),
        "data": case["instances"] or "bytes of Python's own sources",
        "first_loss": losses[0][1],
        "last_loss": statistics.mean(loss for _, loss in losses[-10:]),
        "losses": [(s, round(loss, 4)) for s, loss in losses[:: max(1, len(losses) // 100)]],
    }


def load_instances(path: str | None, model: ModelConfig) -> np.ndarray:
    """int32 `[N, L + 1]` from a file, or the bytes of the standard library's sources."""
    L = model.sequence_length
    if path:
        instances = np.load(path)
        if (
            instances.ndim != 2
            or instances.shape[1] != L + 1
            or instances.max() >= model.vocab_size
        ):
            raise ValueError(
                f"--instances: got {instances.shape} with ids up to {instances.max()}, must be "
                f"[N, {L + 1}] with ids below {model.vocab_size}"
            )
        return instances.astype(np.int32)
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = b"\x00".join(file.read_bytes() for file in files)
    count = (len(text) - 1) // L
    ids = np.frombuffer(text[: count * L + 1], np.uint8).astype(np.int32)
    return np.stack([ids[i * L : (i + 1) * L + 1] for i in range(count)])


def export_instances(data: str, path: Path) -> None:
    """Writes the training instances of prepared data as `load_instances` reads them."""
    from lory_jax.data.prepared import PreparedData

    instances = PreparedData.open(data).training_instances()
    count = min(len(instances), MOST_INSTANCES)
    np.save(path, np.stack([np.asarray(instances[i], np.int32) for i in range(count)]))


if __name__ == "__main__":
    print(json.dumps(run_case(json.load(sys.stdin))))
