"""Trains tiny models on 8 faked devices, mesh after mesh; prints one JSON object for the tests.

python -m tests.support.parallel_worker [more]

With `more`, those models on those meshes that only the slow tests compare.
"""

import dataclasses
import functools
import json
import math
import os
import re
import sys

# What is tested is how programs are split, not how well they are compiled: save the time.
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from lory_jax.model.attention import paired  # noqa: E402
from lory_jax.parallel import make_mesh, place_batch  # noqa: E402
from lory_jax.training.state import init_state, new_state, state_shardings  # noqa: E402
from lory_jax.training.step import make_loss_step, make_train_step  # noqa: E402
from lory_jax.training.top_k import top_k_schedule  # noqa: E402
from lory_jax.training.upcycle import make_upcycle  # noqa: E402
from tests.support.models import constant_rate, params_of, tiny_config  # noqa: E402

STEPS, BATCH = 3, 8
MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)]
SPARSE = {
    "expert_choice_segment": {},
    "expert_choice_token": {"routing_group": 2},
    "top1": {},
    "top2": {"routing_group": 2},
    "dropless_top1": {},
    "dropless_top2": {"balancing": "loss_free", "balancing_rate": 0.1},
    "remoe": {},
    "expert_threshold": {"routing_group": 2, "shared_expert": True},
}
LESS_USUAL = ("expert_choice_segment", "top1", "dropless_top1")  # others like them are compared
HEADS_MESHES = [(2, 2, 2), (1, 2, 4)]  # more devices than sequences per microbatch
# Every sharded axis divides by 8. A large epsilon keeps Adam from amplifying rounding.
CONFIG = functools.partial(tiny_config, vocab_size=40, sequence_length=10)
ANNEALED = {"steps": STEPS, "top_k_anneal_start": 0.0, "top_k_anneal_end": 1.0}
OPTIMIZER = constant_rate(0.01, epsilon=1e-3, clip_norm=0.0)


def by_name(tree):
    return {jax.tree_util.keystr(p): x for p, x in jax.tree_util.tree_leaves_with_path(tree)}


def error(actual, expected) -> float:
    """The largest relative difference of any leaf, each on its own scale."""
    errors = []
    actual, expected = jax.device_get((actual, expected))
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        errors.append(np.max(np.abs(a - e)) / max(np.max(np.abs(e)), 1e-6))
    return float(max(errors))


def train(config, mesh, microbatches=1):
    """Losses, gradients of the first step, final parameters, and facts about the placement."""
    state = new_state(config, OPTIMIZER, params_of(config))
    state = jax.device_put(state, state_shardings(config, OPTIMIZER, mesh))
    schedule = top_k_schedule(config, ANNEALED)
    step = make_train_step(config, OPTIMIZER, mesh, microbatches, schedule)
    L1 = config.sequence_length + 1
    tokens = np.random.default_rng(0).integers(0, 40, (STEPS, BATCH, L1)).astype(np.int32)
    place = functools.partial(place_batch, mesh=mesh, axis=config.batch_axis)
    result = {"losses": [], "donated": True}
    with jax.set_mesh(mesh):
        for i in range(STEPS):
            old, (state, metrics) = state, step(state, place(tokens[i]))
            result["losses"].append(float(metrics["loss"]))
            result["donated"] &= all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
            if i == 0:
                # From zero moments, the first moment is 0.1 times the gradient. A copy: an array
                # that numpy looks into cannot be donated.
                result["gradients"] = jax.tree.map(jnp.copy, state["opt_state"][0].mu)
        nll = make_loss_step(config, mesh, config.measured_routing, 3)(
            state["params"], place(tokens[0])
        )
    result |= {"params": state["params"], "nll": nll}
    result["compilations"] = step._cache_size()
    adam = state["opt_state"][0]
    result["fraction"] = {
        part: {
            name: leaf.addressable_shards[0].data.nbytes / leaf.nbytes
            for name, leaf in by_name(tree).items()
        }
        for part, tree in (("params", state["params"]), ("mu", adam.mu), ("nu", adam.nu))
    }
    return result


train_once = functools.cache(train)  # several comparisons have the same reference


def run_interpreted(attention, query, key, value, rope, interpret):
    return attention(query, key, value, rope, True)


def compare(config, single, meshes=MESHES, microbatches=1, reference=None) -> dict:
    """Errors by mesh, against one device with the same config or with that of a reference."""
    expected, report = train_once(reference or config, single), {}
    for shape in meshes:
        got = train(config, make_mesh(*shape), microbatches)
        report[str(shape)] = {
            name: error(got[name], expected[name])
            for name in ("losses", "nll", "gradients", "params")
        } | {name: got[name] for name in ("donated", "compilations", "fraction")}
    return report


def bytes_over_tensor(config, mesh) -> int:
    """Bytes that collectives of one step put out which join devices of several `tensor` places.

    Loop bodies count once: only differences between equal programs mean something.
    """
    step = make_train_step(config, OPTIMIZER, mesh)
    state = new_state(config, OPTIMIZER, params_of(config))
    state = jax.device_put(state, state_shardings(config, OPTIMIZER, mesh))
    with jax.set_mesh(mesh):
        tokens = place_batch(np.zeros((BATCH, 11), np.int32), mesh, config.batch_axis)
        program = step.lower(state, tokens).compile().as_text()
    tensor = {device.id: place[2] for place, device in np.ndenumerate(mesh.devices)}
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    total = 0
    for line in program.splitlines():
        found = re.search(rf"= (.*?) (?:{kinds})(?:-start)?\(", line)
        if found and any(len({tensor[d] for d in group}) > 1 for group in groups_of(line)):
            for shape in re.findall(r"[fsu]\d+\[([\d,]*)\]", found[1]):
                total += 4 * math.prod(map(int, shape.split(",") if shape else ()))
    return total


def groups_of(line: str) -> list[list[int]]:
    """The devices of every group of a collective, from its four spellings."""
    if found := re.search(r"(?:source_target_pairs|replica_groups)=\{(\{.*?\})\}", line):
        return [[int(d) for d in group.split(",")] for group in re.findall(r"{(.*?)}", found[1])]
    iota = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"  # ids counted up in this shape, then transposed
    if found := re.search(rf"replica_groups=\[([\d,]+)\]<={iota}", line):
        return counted(found[2], found[3]).reshape(numbers(found[1])).tolist()
    found = re.search(rf"replica_groups=mesh\[(.*?)\](?:, device_ids=\({iota}\))? {{(.*?)}}", line)
    axes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
    sizes = [int(size) for size in axes.values()]
    ids = counted(found[2] or str(math.prod(sizes)), found[3]).reshape(sizes)
    joined = [list(axes).index(name) for name in re.findall(r"'(\w+)'", found[4])]
    rest = [axis for axis in range(ids.ndim) if axis not in joined]
    group_size = math.prod(sizes[axis] for axis in joined)
    return ids.transpose(rest + joined).reshape(-1, group_size).tolist()


def counted(shape: str, order: str | None) -> np.ndarray:
    ids = np.arange(math.prod(numbers(shape))).reshape(numbers(shape))
    return ids.transpose(numbers(order)) if order else ids


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def sparse(routing):
    return CONFIG(routing=routing, **SPARSE[routing])


def heads(**fields):
    return CONFIG(num_heads=4, attention_sharding="heads", **fields)


def compare_paired(single, meshes) -> dict:
    """The kernel of a TPU, interpreted: two heads of 64, whose rows are a multiple of 128."""
    sizes = {"num_experts": 0, "embed_dim": 128, "sequence_length": 128, "num_layers": 1}
    original = paired.paired_attention
    paired.paired_attention = functools.partial(run_interpreted, original)
    report = compare(CONFIG(attention="paired", **sizes), single, meshes, reference=CONFIG(**sizes))
    paired.paired_attention = original
    return report


def compare_more() -> dict:
    single, dense = make_mesh(1, 1, 1, devices=jax.devices()[:1]), CONFIG(num_experts=0)
    return {
        **{name: compare(sparse(name), single, [(2, 2, 2)]) for name in LESS_USUAL},
        "dense": compare(dense, single, MESHES[:-1]),
        "dense, heads": compare(heads(num_experts=0), single, HEADS_MESHES),
        "dense, paired": compare_paired(single, MESHES[:-1]),
    }


def compare_usual() -> dict:
    single = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    mesh = make_mesh(2, 2, 2)
    dense, lory = CONFIG(num_experts=0), CONFIG()
    report = {"dense": compare(dense, single, [(2, 2, 2)]), "lory": compare(lory, single)}
    report["lory, heads"] = compare(heads(), single, HEADS_MESHES)
    report["accumulated"] = {
        "2": compare(heads(), single, [(2, 2, 2)], microbatches=2)["(2, 2, 2)"],
        "4": compare(heads(), single, [(1, 2, 4)], microbatches=4)["(1, 2, 4)"],
    }
    # Sequences that compete for slots share a device, or lie on several.
    for routing in SPARSE:
        if routing not in LESS_USUAL:
            report[routing] = compare(sparse(routing), single, [(2, 2, 2)])
    # What TPUs and GPUs multiply with, against what CPUs do.
    for routing in ("dropless_top2", "remoe"):
        ragged = dataclasses.replace(sparse(routing), grouped_product="ragged")
        on_one = sparse(routing)
        report[f"{routing}, ragged"] = compare(ragged, single, [(2, 2, 2)], reference=on_one)
    tied = CONFIG(num_heads=4, num_kv_heads=2, tie_embeddings=True)
    report["lory, grouped and tied"] = compare(tied, single, [(2, 2, 2)])
    grouped = CONFIG(num_heads=8, num_kv_heads=4, attention_sharding="heads")
    report["lory, grouped heads"] = compare(grouped, single, [(1, 2, 4)])
    report["lory, documents"] = compare(CONFIG(document_mask=True), single, [(2, 2, 2)])
    report["dense, paired"] = compare_paired(single, [(2, 2, 2)])
    report["lory, fewer experts"] = compare(CONFIG(top_k_experts=2), single, [(2, 2, 2)])
    report["uniform"] = compare(CONFIG(routing="uniform"), single, [(2, 2, 2)])
    wide = functools.partial(CONFIG, embed_dim=32, mlp_dim=64)
    report["bytes_over_tensor"] = [bytes_over_tensor(wide(num_experts=E), mesh) for E in (8, 16)]

    one, many = (init_state(lory, OPTIMIZER, m, seed=3) for m in (single, mesh))
    report["init_is_independent_of_the_mesh"] = error(many, one) == 0.0

    def upcycled(mesh, redraw=0.0):
        state = new_state(dense, OPTIMIZER, params_of(dense))
        state = jax.device_put(state, state_shardings(dense, OPTIMIZER, mesh))
        return jax.device_get(make_upcycle(lory, OPTIMIZER, mesh, 3, redraw)(state))

    report["upcycle_is_independent_of_the_mesh"] = error(upcycled(mesh), upcycled(single)) == 0.0
    report["redrawn_upcycle"] = error(upcycled(mesh, 0.5), upcycled(single, 0.5))
    return report


if __name__ == "__main__":
    json.dump(compare_more() if sys.argv[1:] == ["more"] else compare_usual(), sys.stdout)
