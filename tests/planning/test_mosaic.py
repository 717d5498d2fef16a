"""What a kernel does per call, on real kernels of Pallas whose work is counted by hand."""

import base64
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lory_jax.planning.bundles import KernelCost
from lory_jax.planning.kernels import price_of
from lory_jax.planning.mosaic import Product, read_work, text_of
from lory_jax.planning.topology import DEVICES


def body_of(function, *shapes):
    """The program of the only kernel of a function, as it is lowered for TPUs."""
    arguments = [jax.ShapeDtypeStruct(shape, kind) for shape, kind in shapes]
    text = jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",)).as_text()
    return base64.b64decode(re.findall(r"body\\22: \\22([^\\]*)\\22", text)[0])


def kernel(i_ref, x_ref, y_ref, o_ref, *, turns):
    """Adds x @ y in the steps of a triangle, several times; the first of a row writes zeros."""
    row, column = pl.program_id(0), pl.program_id(1)

    @pl.when(column == 0)
    def _():
        o_ref[...] = jnp.zeros_like(o_ref)

    @pl.when(i_ref[column] <= row)
    def _():
        def add(_, total):
            return total + jnp.dot(x_ref[...], y_ref[...], preferred_element_type=jnp.float32)

        o_ref[...] += jax.lax.fori_loop(0, turns, add, jnp.zeros(o_ref.shape, jnp.float32))

    @pl.when(x_ref[0, 0] > 0)
    def _():
        o_ref[...] += 1.0


def triangle(i, x, y, *, turns=3):
    return pl.pallas_call(
        functools.partial(kernel, turns=turns),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(4, 4),
            in_specs=[
                pl.BlockSpec((16, 128), lambda r, c, i: (r, 0)),
                pl.BlockSpec((128, 128), lambda r, c, i: (0, i[c])),
            ],
            out_specs=pl.BlockSpec((16, 128), lambda r, c, i: (r, 0)),
        ),
        out_shape=jax.ShapeDtypeStruct((64, 128), jnp.float32),
    )(i, x, y)


SHAPES = [((4,), "int32"), ((64, 128), "bfloat16"), ((128, 512), "bfloat16")]


def test_conditions_products_and_blocks_are_those_of_the_grid():
    body = body_of(triangle, *SHAPES)
    work = read_work(body, [np.arange(4)])
    assert work.steps == 16
    # The third condition depends on data.
    assert work.conditions == (4 / 16, 10 / 16, None)
    assert work.products == (Product(m=16, k=128, n=128, times=3 * 10, passes=1),)
    # 4 blocks of x and of o; y is fetched anew in every step, because column follows column.
    assert work.moved_bytes == 4 * 16 * 128 * 2 + 16 * 128 * 128 * 2 + 4 * 16 * 128 * 4


def test_another_prefetched_array_changes_what_runs_and_what_is_fetched():
    work = read_work(body_of(triangle, *SHAPES), [np.zeros(4, int)])
    assert work.conditions[:2] == (4 / 16, 1.0)
    assert work.products[0].times == 3 * 16
    assert work.moved_bytes == 4 * 16 * 128 * 2 + 1 * 128 * 128 * 2 + 4 * 16 * 128 * 4


def test_an_unknown_array_counts_as_if_all_ran():
    work = read_work(body_of(triangle, *SHAPES), [None])
    assert work.conditions == (4 / 16, None, None)
    assert work.products[0].times == 3 * 16
    assert work.moved_bytes == 4 * 16 * 128 * 2 + 16 * 128 * 128 * 2 + 4 * 16 * 128 * 4


def test_the_matrix_unit_holds_padded_columns_and_streams_rows():
    work = read_work(body_of(triangle, *SHAPES), [np.arange(4)])
    assert work.matrix_cycles(128, 2 * 128 * 128) == 30 * 16
    assert work.matrix_cycles(256, 2 * 256 * 256) == 30 * 16  # a quarter of it is used


def test_equal_kernels_from_other_lines_have_one_text():
    def elsewhere(i, x, y):
        return triangle(i, x, y)

    first, second = body_of(triangle, *SHAPES), body_of(elsewhere, *SHAPES)
    assert text_of(first) == text_of(second)
    assert text_of(first) != text_of(body_of(functools.partial(triangle, turns=2), *SHAPES))


def test_cores_share_what_is_declared_parallel():
    def double(x, semantics):
        return pl.pallas_call(
            lambda x_ref, o_ref: o_ref.__setitem__(..., x_ref[...] * 2),
            grid=(4,),
            in_specs=[pl.BlockSpec((8, 128), lambda i: (i, 0))],
            out_specs=pl.BlockSpec((8, 128), lambda i: (i, 0)),
            out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
            compiler_params=pltpu.CompilerParams(dimension_semantics=(semantics,)),
        )(x)

    v5p = DEVICES["v5p"]
    for semantics, bundles in (("parallel", 500), ("arbitrary", 1000)):
        body = body_of(functools.partial(double, semantics=semantics), ((32, 128), "float32"))
        work = read_work(body)
        cost = KernelCost(1000.0, {}, {"SALU": 0.5})
        assert price_of(work, cost, v5p, 0).bundles == bundles
        assert price_of(work, cost, DEVICES["v5e"], 0).bundles == 1000


def test_what_is_no_kernel_is_refused():
    with pytest.raises(Exception, match=r"MLIR|parse"):
        read_work(b"nothing")
