"""Merging in parameter space against loops: the contract of `merged_ffn`."""

import dataclasses
import functools
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lory_jax.errors import ConfigError
from lory_jax.model.merged_ffn import (
    blocks,
    kernels,
    merge_experts,
    merged_ffn,
    resolve_merged_ffn,
    swiglu,
    tiling,
)
from lory_jax.model.merged_ffn.kernel_products import kernel_products
from lory_jax.model.merged_ffn.vjp import products_ffn
from lory_jax.model.remat import rematerialized
from tests.support import reference
from tests.support.models import assert_close, assert_trees_close, float64
from tests.support.reference import central_differences
from tests.support.tiny import run_worker, verb_environment

S, T, D, F, E = 3, 2, 5, 8, 3
VALUES, GRADIENTS = 1e-5, 1e-4


def inputs(num_experts=E, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"gate": (D, F), "up": (D, F), "down": (F, D)}
    experts = {
        name: rng.normal(size=(num_experts, *shape)).astype(np.float32)
        for name, shape in shapes.items()
    }
    x = rng.normal(size=(S, T, D)).astype(np.float32)
    # Any weights will do: merging is linear in them, they need not sum to one.
    r = rng.normal(size=(S, num_experts)).astype(np.float32)
    return x, experts, r


def loops(x, experts, r):
    return np.array([reference.merged_ffn(x[s], experts, r[s]) for s in range(len(x))])


def run_by(implementation, x, experts, r):
    """`merged_ffn`; the TPU's kernels are interpreted."""
    if implementation == "kernel":
        return products_ffn(kernel_products(interpret=True), x, experts, r)
    return merged_ffn(x, experts, r, implementation)


@pytest.fixture(params=["einsum", "whole", "kernel", "blocks and a rest", "whole blocks"])
def run(request, monkeypatch):
    """`merged_ffn` of expert-major weights, by every implementation and way of blocking F = 8."""
    columns = {"blocks and a rest": 3, "whole blocks": 2}.get(request.param)
    if columns:
        monkeypatch.setattr(blocks, "block_size", lambda *shape: columns)
    implementation = "blocks" if columns else request.param
    return lambda x, experts, r: run_by(implementation, x, experts, r)


@pytest.fixture
def biases():
    rng = np.random.default_rng(5)
    shapes = {"gate_bias": F, "up_bias": F, "down_bias": D}
    return {name: rng.normal(size=(E, size)).astype(np.float32) for name, size in shapes.items()}


def test_biases_are_merged_with_their_matrices(biases):
    assert_equals_loops(lambda *given: merged_ffn(*given, "auto"), biases)


@pytest.mark.parametrize("implementation", ["whole", "blocks", "kernel"])
def test_an_implementation_without_biases_refuses_them(implementation, biases):
    x, experts, r = inputs()
    with pytest.raises(ConfigError, match=f"merged_ffn: got {implementation}.*mlp_bias"):
        merged_ffn(x, experts | biases, r, implementation)


def test_equals_loops_in_value_and_every_gradient(run):
    assert_equals_loops(run, {})


def assert_equals_loops(run, biases):
    x, experts, r = inputs()
    experts |= biases
    probe = np.random.default_rng(1).normal(size=(S, T, D)).astype(np.float32)

    def loss(x, experts, r):
        y = run(x, experts, r)
        return jnp.sum(y * probe), y

    gradients, y = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(x, experts, r)
    of_x, of_experts, of_r = gradients
    x, experts, r = float64((x, experts, r))
    assert_close(y, loops(x, experts, r), VALUES)

    def scalar(x, experts, r):
        return np.sum(loops(x, experts, r) * probe)

    assert_close(of_x, central_differences(lambda v: scalar(v, experts, r), x), GRADIENTS)
    assert_close(of_r, central_differences(lambda v: scalar(x, experts, v), r), GRADIENTS)
    for name, w in experts.items():
        expected = central_differences(lambda v, n=name: scalar(x, {**experts, n: v}, r), w)
        assert_close(of_experts[name], expected, GRADIENTS, name)


def test_blocks_fit_their_memory_and_cover_f():
    for S, D, F, itemsize in ((64, 1024, 2816, 2), (4096, 4096, 11_008, 2), (1, 8, 100, 4)):
        size = blocks.block_size(S, D, F, itemsize)
        assert size == F or size % blocks.BLOCK_MULTIPLE == 0
        fits = S * D * size * itemsize <= blocks.MERGED_BYTES
        assert fits or size == blocks.BLOCK_MULTIPLE
    assert blocks.block_size(1, 8, 100, 4) == 100


def test_an_unknown_implementation_is_refused():
    x, experts, r = inputs()
    with pytest.raises(
        ValueError, match=r"implementation: got .*auto, einsum, whole, blocks, kernel"
    ):
        merged_ffn(x, experts, r, "magic")


def test_one_hot_weights_pick_one_expert():
    x, experts, _ = inputs()
    got = merged_ffn(x, experts, jnp.eye(E)[jnp.array([2, 0, 1])])
    for s, expert in enumerate((2, 0, 1)):
        one = [experts[name][expert] for name in ("gate", "up", "down")]
        assert_close(got[s], swiglu(x[s], *one), VALUES)


def test_identical_experts_are_one_expert_for_any_distribution():
    x, experts, r = inputs()
    same = {name: np.repeat(w[:1], E, axis=0) for name, w in experts.items()}
    r = jax.nn.softmax(r)
    one = [w[0] for w in experts.values()]
    assert_close(merged_ffn(x, same, r), swiglu(x, *one), VALUES)


def test_a_single_expert_is_a_dense_ffn():
    x, experts, _ = inputs(num_experts=1)
    one = [experts[name][0] for name in ("gate", "up", "down")]
    got = merged_ffn(x, experts, jnp.ones((S, 1)))
    assert_close(got, swiglu(x, *one), 1e-6)


def test_it_is_parameters_that_are_merged_not_outputs():
    x, experts, r = inputs()
    outputs = sum(
        r[:, i, None, None] * swiglu(x, *(experts[n][i] for n in ("gate", "up", "down")))
        for i in range(E)
    )
    got = merged_ffn(x, experts, r)
    assert np.max(np.abs(got - outputs)) > 0.1 * np.max(np.abs(got))


def test_merging_in_half_precision_accumulates_in_float32():
    """Sixty-four experts whose sum would stall at 256 if it were kept in bfloat16."""
    ones = {
        name: jnp.full((64, *shape), 8.0, jnp.bfloat16)
        for name, shape in {"gate": (D, F), "up": (D, F), "down": (F, D)}.items()
    }
    merged = merge_experts(ones, jnp.ones((S, 64)))
    for w in merged.values():
        assert w.dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.asarray(w, np.float32), 512.0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_output_and_gradients_have_the_types_of_their_inputs(dtype):
    x, experts, r = inputs()
    x = jnp.asarray(x, dtype)

    def loss(x, experts, r):
        y = merged_ffn(x, experts, r)
        assert y.dtype == dtype
        return jnp.sum(y.astype(jnp.float32) ** 2)

    got = jax.grad(loss, argnums=(0, 1, 2))(x, experts, r)
    assert got[0].dtype == dtype and got[2].dtype == jnp.float32
    assert all(g.dtype == jnp.float32 for g in got[1].values())
    if dtype == jnp.bfloat16:
        exact = jax.grad(lambda *a: jnp.sum(merged_ffn(*a) ** 2), argnums=(0, 1, 2))(
            x.astype(jnp.float32), experts, r
        )
        assert_trees_close(got[1:], exact[1:], 0.03)


# ---------------------------------------------------------------- every implementation, any shape


def value_and_gradients(implementation, x, experts, r, dy):
    def both(x, experts, r, dy):
        y, pull = jax.vjp(lambda *a: run_by(implementation, *a), x, experts, r)
        return {"y": y, **dict(zip(("x", "experts", "r"), pull(dy.astype(y.dtype)), strict=True))}

    return jax.jit(both)(x, experts, r, dy)


def random_inputs(S, T, D, F, E, seed=0):
    rng = np.random.default_rng(seed)
    sizes = {"gate": (E, D, F), "up": (E, D, F), "down": (E, F, D)}
    experts = {
        name: (rng.normal(size=size) / size[1] ** 0.5).astype(np.float32)
        for name, size in sizes.items()
    }
    x, dy = rng.normal(size=(2, S, T, D)).astype(np.float32)
    return x, experts, np.asarray(jax.nn.softmax(rng.normal(size=(S, E)))).astype(np.float32), dy


def worst_error(got, expected):
    """The largest error of any array, on the scale of that array."""
    errors = [
        np.max(np.abs(np.asarray(a, np.float64) - b)) / np.max(np.abs(b))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(float64(expected)), strict=True)
    ]
    return max(errors)


@settings(max_examples=2, deadline=None, derandomize=True)
@example(S=1, T=4, D=24, F=130, E=1)  # one segment, one expert, F of one block and a bit
@example(S=3, T=5, D=16, F=20, E=3)
@example(S=2, T=3, D=16, F=129, E=128)
@example(S=9, T=2, D=16, F=16, E=20)  # halves of registers change places; groups of 9 padded
@given(
    S=st.integers(1, 9),
    T=st.integers(1, 9),
    D=st.integers(1, 40),
    F=st.integers(1, 140),
    E=st.integers(1, 33),
)
def test_every_implementation_equals_the_reference_for_any_shape(S, T, D, F, E):
    arrays = random_inputs(S, T, D, F, E)
    expected = value_and_gradients("einsum", *arrays)
    for implementation in ("whole", "kernel"):
        error = worst_error(value_and_gradients(implementation, *arrays), expected)
        assert error < VALUES, implementation


@pytest.mark.parametrize(("E", "columns", "parts"), [(5, 128, 2), (20, 256, 2), (20, 128, 1)])
def test_kernels_agree_however_their_work_is_cut(E, columns, parts, monkeypatch):
    """Sums over groups, blocks of F and parts of D, whatever a chip would choose."""

    def cut(problem, chip, most):
        smallest = tiling.smallest_tiling(problem.E)
        return dataclasses.replace(smallest, columns=columns, parts=parts)

    monkeypatch.setattr(tiling, "tile", cut)
    arrays = random_inputs(S=5, T=3, D=256, F=512, E=E)
    got = value_and_gradients("kernel", *arrays)
    assert worst_error(got, value_and_gradients("einsum", *arrays)) < VALUES


@pytest.mark.parametrize("implementation", ["whole", "kernel"])
def test_bfloat16_is_as_exact_as_the_plain_einsum(implementation):
    x, experts, r, dy = random_inputs(S=4, T=16, D=32, F=64, E=8)
    x, dy = (np.asarray(jnp.asarray(a, jnp.bfloat16), np.float32) for a in (x, dy))
    with jax.enable_x64(True):
        exact = value_and_gradients("einsum", *float64((x, experts, r, dy)))
        exact = jax.tree.map(np.asarray, exact)
    half = jnp.asarray(x, jnp.bfloat16), experts, r, jnp.asarray(dy, jnp.bfloat16)
    plain, got = (value_and_gradients(i, *half) for i in ("einsum", implementation))
    for name in exact:
        assert worst_error(got[name], exact[name]) < 1.5 * worst_error(plain[name], exact[name])


def test_under_meshes_it_equals_one_device():
    report = run_worker("merged_ffn_worker")
    assert {tuple(case["mesh"]) for case in report} == {(2, 2, 2), (1, 1, 8)}
    for case in report:
        assert case["error"] < VALUES, case


# ---------------------------------------------------------------- rematerialisation


def products_recomputed(ffn, matrices, remat, operation):
    """How many more such operations a layer's gradient has than without rematerialisation."""
    arrays = np.ones((2, 16, 128), np.float32), matrices, np.ones((2, 3), np.float32)

    def operations(remat):
        def loss(*arrays):
            return jnp.sum(rematerialized(ffn, remat)(*arrays) ** 2)

        return str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(*arrays)).count(operation)

    return operations(remat) - operations("none")


@pytest.mark.parametrize(
    ("remat", "products"), [("full", 2), ("attention", 2), ("attention+hidden", 0), ("dots", 0)]
)
def test_remat_recomputes_no_more_than_of_a_dense_layer(remat, products):
    D, F, E = 128, 128, 3
    dense = {"gate": np.ones((D, F)), "up": np.ones((D, F)), "down": np.ones((F, D))}
    experts = {name: np.stack([w] * E).astype(np.float32) for name, w in dense.items()}

    def dense_ffn(x, w, r):
        return swiglu(x, w["gate"], w["up"], w["down"])

    assert products_recomputed(dense_ffn, dense, remat, "dot_general[") == products
    whole = functools.partial(merged_ffn, implementation="whole")
    merging = products  # each of gate and up is merged for its product
    assert products_recomputed(whole, experts, remat, "dot_general[") == products + merging
    kernel = functools.partial(products_ffn, kernel_products(interpret=True))
    # One kernel makes gate and up; that of down is not made again.
    assert products_recomputed(kernel, experts, remat, "pallas_call[") == products / 2


# ---------------------------------------------------------------- which one


@pytest.mark.parametrize(
    ("platform", "D", "chosen"),
    [
        ("cpu", 1024, "whole"),
        ("gpu", 1024, "whole"),
        ("tpu", 1024, "kernel"),
        ("tpu", 96, "blocks"),
    ],
)
def test_auto_is_by_platform_and_shape(platform, D, chosen):
    assert resolve_merged_ffn("auto", platform, 256, D, 8, 2) == chosen


@pytest.mark.parametrize(
    ("platform", "T", "D", "message"),
    [
        ("cpu", 256, 1024, "merged_ffn: got kernel.* tpu.* cpu"),
        ("tpu", 256, 96, "multiples of 128, with 96"),
        ("tpu", 65_536, 1024, "cannot hold segments of 65536 x 1024"),
    ],
)
def test_a_kernel_that_cannot_run_is_refused(platform, T, D, message):
    with pytest.raises(ConfigError, match=message):
        resolve_merged_ffn("kernel", platform, T, D, 8, 2)
    assert resolve_merged_ffn("einsum", platform, T, D, 8, 2) == "einsum"


@pytest.mark.parametrize(("mib", "cores", "side"), [(64, 2, 128), (128, 1, 128), (128, 1, 256)])
@pytest.mark.parametrize("E", [1, 8, 16, 17, 32])
@pytest.mark.parametrize("S", [1, 16, 17, 128])
@pytest.mark.parametrize("F", [2816, 700])
def test_tilings_fit_the_chip_in_whole_tiles(S, E, F, mib, cores, side):
    chip = tiling.Chip(mib * 2**20, cores, side)
    budget = tiling.vmem_budget(chip.vmem)
    for call in tiling.CALLS:
        problem = tiling.Problem(*call, S=S, T=256, D=1024, F=F, E=E, itemsize=2)
        cut = tiling.tile(problem, chip)
        assert tiling.vmem_bytes(problem, cut) <= budget
        assert cut.group * cut.rows % tiling.ROWS == 0
        assert cut.rows * cut.experts % tiling.ROWS == 0
        assert cut.rows * E <= side or cut.rows == 4
        is_whole = call[0] == tiling.TO_HIDDEN  # its parts are of experts, not of lanes
        assert 1024 % (cut.parts * (tiling.ROWS if is_whole else tiling.LANES)) == 0
        assert S == 1 or -S % cut.group <= S / 4
        assert max(tiling.shared(problem, cut)) >= cores
        few = tiling.tile(problem, chip, most=8)
        assert few.group <= max(8, tiling.smallest_tiling(E, side).group)
        assert -F % cut.columns < tiling.LANES


def moved_by_walking_the_grid(problem, cut):
    """Bytes of blocks that change from one step of a kernel's grid to the next."""
    groups, blocks = problem.S // cut.group, problem.F // cut.columns
    part, size = problem.D // cut.parts, problem.itemsize
    activations = size * cut.group * problem.T * part
    hidden = size * cut.group * problem.T * cut.columns
    experts = size * part * problem.E * cut.columns
    g, f, d = range(groups), range(blocks), range(cut.parts)
    matrices = range(problem.weights)
    experts_at = [lambda g, f, d, k: (f, d)] * problem.weights
    if problem.kernel == tiling.TO_HIDDEN:
        steps = [(i, j, part, k) for i in g for j in f for k in matrices for part in d]
        moving = [(activations * cut.parts, lambda g, f, d, k: g)]
        # A matrix moves in its own turn only.
        last = cut.parts - 1
        experts_at = [
            lambda g, f, d, k, own=own: (f, d if k == own else last if k > own else 0)
            for own in matrices
        ]
    elif problem.kernel == tiling.FROM_HIDDEN:
        steps = [(i, j, k, 0) for i in g for k in d for j in f]
        moving = [(activations, lambda g, f, d, k: (g, d))]
    else:
        steps = [(i, j, k, 0) for k in d for j in f for i in g]
        routing = 4 * cut.group * cut.rows * cut.rows * problem.E
        moving = [(routing, lambda *step: step)]
        if cut.is_held:
            moving.append((activations * groups, lambda g, f, d, k: d))
        else:
            moving.append((activations, lambda g, f, d, k: (g, d)))
        moving.append((experts, lambda g, f, d, k: (f, d)))  # the gradients, beside the experts
    moving += [(hidden, lambda g, f, d, k: (g, f))] * problem.hidden
    moving += [(experts, index) for index in experts_at]
    return sum(
        bytes_
        for bytes_, index in moving
        for before, step in zip([None, *steps], steps, strict=False)
        if before is None or index(*before) != index(*step)
    )


@pytest.mark.parametrize(("parts", "is_held"), [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("call", tiling.CALLS, ids=str)
def test_what_a_call_moves(call, parts, is_held):
    # Two blocks at least of everything, so that what is walked through is fetched again.
    problem = tiling.Problem(*call, S=12, T=16, D=512, F=384, E=8, itemsize=2)
    cut = dataclasses.replace(tiling.smallest_tiling(8), group=4, parts=parts, is_held=is_held)
    assert tiling.moved_bytes(problem, cut) == moved_by_walking_the_grid(problem, cut)


@pytest.mark.parametrize(("E", "P"), [(8, 8), (16, 8), (32, 4)])
def test_the_matrix_unit_works_off_128_numbers_at_a_time(E, P):
    S, T, D, F = 64, 256, 1024, 2816
    cut = dataclasses.replace(tiling.smallest_tiling(E), group=128 // P)
    assert cut.rows == P
    for kernel, weights, hidden in tiling.CALLS:
        problem = tiling.Problem(kernel, weights, hidden, S, T, D, F, E, 2)
        merging = 2 * 128 if kernel != tiling.GRADIENTS else 2 * (128 + min(128, P * E))
        by_hand = weights * S * D * F * (2 * T + merging)
        assert tiling.flops(problem, cut, side=128) == by_hand


def test_smaller_groups_compute_the_same():
    """Values and all gradients, with 2 and with 16 segments at a time."""
    S, T, D, F, E = 16, 16, 128, 128, 3
    for call in tiling.CALLS:
        problem = tiling.Problem(*call, S=S, T=T, D=D, F=F, E=E, itemsize=4)
        groups = [tiling.tile(problem, tiling.V5E, most).group for most in (2, tiling.MAX_GROUP)]
        assert groups == [2, 16]
    rng = np.random.default_rng(0)
    shapes = {"gate": (E, D, F), "up": (E, D, F), "down": (E, F, D)}
    experts = {n: jnp.asarray(rng.normal(size=s) / 11, jnp.float32) for n, s in shapes.items()}
    x = jnp.asarray(rng.normal(size=(S, T, D)), jnp.float32)
    r = jnp.asarray(rng.dirichlet(np.ones(E), S), jnp.float32)

    def run(most):
        products = kernel_products(interpret=True, most=most)
        value = lambda *given: jnp.sum(products_ffn(products, *given) ** 2)  # noqa: E731
        return products_ffn(products, x, experts, r), jax.grad(value, (0, 1, 2))(x, experts, r)

    assert_trees_close(run(2), run(tiling.MAX_GROUP), 1e-5)


def test_the_fastest_tiling_is_chosen():
    v5p = tiling.Chip(vmem=64 * 2**20, cores=2, flops_per_byte=166)
    problem = tiling.Problem(*tiling.CALLS[-1], S=64, T=256, D=1536, F=4096, E=32, itemsize=2)
    # Groups of 4 fill an eighth of the matrix unit. A part of x stays for all blocks of F.
    chosen = tiling.tile(problem, v5p)
    assert (chosen.group * chosen.rows >= 128, chosen.is_held) == (True, True)
    # With more segments than the chip holds, x is read once per block of F: the blocks are wide.
    problem = dataclasses.replace(problem, D=1024, F=2816, S=512)
    chosen = tiling.tile(problem, tiling.V5E)
    assert (chosen.columns, chosen.is_held) == (256, False)


def test_spreading_merges_as_the_plain_sum_and_its_gradient_is_its_transpose():
    S, D, F, E = 4, 8, 6, 8  # of more experts, registers are rolled: in kernels only
    rng = np.random.default_rng(0)
    w_DxExF, r_SxE = rng.normal(size=(D, E, F)), rng.normal(size=(S, E))
    cut = tiling.smallest_tiling(E)
    a = kernels.spread(jnp.asarray(r_SxE), cut, jnp.float32)
    P = cut.rows
    parts = [a @ w_DxExF[d : d + P].reshape(P * E, F) for d in range(0, D, P)]
    merged = kernels._join_rows(parts, S, P)  # S is one group
    assert_close(merged, np.einsum("se,def->sdf", r_SxE, w_DxExF), VALUES)
    for part, again in zip(parts, kernels._split_rows(merged, P), strict=True):
        np.testing.assert_array_equal(part, again)
    da = rng.normal(size=a.shape).astype(np.float32)
    _, pull = jax.vjp(lambda r: kernels.spread(r, cut, jnp.float32), jnp.asarray(r_SxE))
    assert_close(kernels.gather_spread(jnp.asarray(da), cut), pull(jnp.asarray(da))[0], VALUES)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e-1", "v5p-8", "v6e-1"])
def test_the_kernels_compile_for_tpus(topology, tmp_path):
    root = Path(__file__).parents[2]
    script = root / "benchmarks" / "merged_ffn.py"
    sizes = ["--segments=4", "--experts=20", "--T=256", "--D=1024", "--F=256", "--gathered"]
    command = [sys.executable, script, f"--topology={topology}", "--implementations=kernel"]
    environment = verb_environment() | {"PYTHONPATH": str(root)}
    rows = tmp_path / "rows.json"
    subprocess.run([*command, *sizes, f"--json={rows}"], check=True, timeout=600, env=environment)
    dense, kernel = json.loads(rows.read_text())
    calls = {name: cost["calls"] for name, cost in kernel["kernels"].items()}
    assert calls == {
        "merged_to_hidden": 1,
        "merged_from_hidden": 1,
        "merged_to_hidden_backward": 1,
        "merged_from_hidden_backward": 1,
        "merged_gradients": 3,
    }
    assert kernel["cycles"] > dense["cycles"]
