"""The price of a kernel, by compiling it alone for a TPU that is not there."""

import importlib.util
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lory_jax.errors import InputError
from lory_jax.planning import topology
from lory_jax.planning.hlo import executions, parse
from lory_jax.planning.kernels import prefetched_arrays, price_kernels
from lory_jax.planning.program import program_text
from lory_jax.planning.topology import DEVICES, smallest_topology

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason=f"needs {topology.PIP}"
)
ROWS = 4  # blocks of 128 rows


def compiled(runs_where, turns):
    """A loop around a kernel of 4 steps that multiplies where an array, a constant, is 1."""

    def body(where_ref, x_ref, o_ref):
        o_ref[...] = jnp.zeros_like(o_ref)

        @pl.when(where_ref[pl.program_id(0)] == 1)
        def _():
            o_ref[...] = jnp.dot(x_ref[...], x_ref[...], preferred_element_type=jnp.float32)

    def step(x, _):
        block = pl.BlockSpec((128, 128), lambda i, where: (i, 0))
        y = pl.pallas_call(
            body,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1, grid=(ROWS,), in_specs=[block], out_specs=block
            ),
            out_shape=jax.ShapeDtypeStruct(x.shape, jnp.float32),
            name="sometimes",
        )(np.array(runs_where, np.int32), x)
        return y.astype(x.dtype), None

    def loop(x):
        return jax.lax.scan(step, x, None, length=turns)[0]

    return compiled_for_tpu(loop, ((ROWS * 128, 128), jnp.bfloat16))


def compiled_for_tpu(function, *arguments):
    """The program of a function of arrays with these shapes and types, on one v5e."""
    sharding = jax.sharding.SingleDeviceSharding(smallest_topology(DEVICES["v5e"]).devices()[0])
    shapes = [jax.ShapeDtypeStruct(*argument, sharding=sharding) for argument in arguments]
    return parse(program_text(jax.jit(function).lower(*shapes).compile()))


def price(module):
    (found,) = price_kernels(module, executions(module), DEVICES["v5e"]).values()
    return found


@needs_libtpu
def test_a_kernel_costs_what_its_conditions_let_run(monkeypatch, tmp_path):
    monkeypatch.setenv("LORY_PLAN_CACHE", str(tmp_path))
    never, always = (price(compiled([run] * ROWS, turns=3)) for run in (0, 1))
    half = price(compiled([1, 0, 0, 1], turns=3))
    assert never.counted_always == half.counted_always == 0 and not half.unread
    assert 0 < never.bundles < half.bundles < always.bundles
    assert half.bundles - never.bundles == pytest.approx(always.bundles - half.bundles, rel=1e-6)
    # [128, 128] x [128, 128] at 131,072 FLOP a cycle, in every step or in half of them.
    assert always.matrix_unit == ROWS * 2 * 128**3 / 131_072
    assert (never.matrix_unit, half.matrix_unit) == (0, always.matrix_unit / 2)
    moved = ROWS * 128 * 128 * (2 + 4)
    assert never.dma == pytest.approx(moved / 819e9 * 1.5e9)
    assert half.cycles == max(half.bundles, half.matrix_unit, half.dma)

    # Prices are kept by content: nothing is compiled again.
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("compiled again"))
    assert price(compiled([1, 0, 0, 1], turns=5)) == half


CARRIED = """\
HloModule m

%body (t: (s32[], s32[3])) -> (s32[], s32[3]) {
  %t = (s32[], s32[3]{0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %a = s32[3]{0} get-tuple-element(%t), index=1
  %c = s32[3]{0:T(128)S(1)} copy(%a)
  %k = f32[8]{0} custom-call(%c, %i), custom_call_target="tpu_custom_call"
  ROOT %r = (s32[], s32[3]{0}) tuple(%i, %a)
}

%cond (t: (s32[], s32[3])) -> pred[] {
  %t = (s32[], s32[3]{0}) parameter(0)
  ROOT %p = pred[] constant(false)
}

ENTRY %main (x: s32[3]) -> s32[3] {
  %x = s32[3]{0} parameter(0)
  %n = s32[] constant(7)
  %v = s32[3]{0} constant({4, -5, 6})
  %s = (s32[], s32[3]{0}) tuple(%n, %v)
  %l = (s32[], s32[3]{0}) while(%s), condition=%cond, body=%body
  ROOT %g = s32[3]{0} get-tuple-element(%l), index=1
}
"""


def prefetched(text):
    module = parse(text)
    body = module.computations["body"]
    return prefetched_arrays(body.instructions["k"], body, module)


def test_prefetched_arrays_are_found_through_copies_and_loops():
    array, number = prefetched(CARRIED)
    assert array.tolist() == [4, -5, 6] and number.tolist() == 7
    copied = prefetched(CARRIED.replace("tuple(%i, %a)", "tuple(%i, %c)"))[0]
    assert copied.tolist() == [4, -5, 6]
    # What the loop changes is unknown, and so is what comes from outside.
    changed = CARRIED.replace("%c = s32[3]{0:T(128)S(1)} copy(%a)", "%c = s32[3]{0} negate(%a)")
    changed = changed.replace("custom-call(%c, %i)", "custom-call(%a, %i)")
    assert prefetched(changed)[0].tolist() == [4, -5, 6]
    assert prefetched(changed.replace("tuple(%i, %a)", "tuple(%i, %c)"))[0] is None
    assert prefetched(CARRIED.replace("tuple(%n, %v)", "tuple(%n, %x)"))[0] is None


def test_an_element_that_a_copy_of_another_replaces_is_constant_if_both_are():
    """A copy that runs one turn ahead of its use: element 1 is what element 2 was."""
    ahead = CARRIED.replace("(s32[], s32[3])", "(s32[], s32[3], s32[3])")
    ahead = ahead.replace("(s32[], s32[3]{0})", "(s32[], s32[3]{0}, s32[3]{0})")
    ahead = (
        ahead.replace(
            "  ROOT %r",
            "  %b = s32[3]{0} get-tuple-element(%t), index=2\n"
            "  %d = s32[3]{0:S(1)} copy(%b)\n  ROOT %r",
        )
        .replace("tuple(%i, %a)", "tuple(%i, %d, %b)")
        .replace("tuple(%n, %v)", "tuple(%n, %v, %w)")
    )
    equal = ahead.replace("  %s =", "  %w = s32[3]{0} constant({4, -5, 6})\n  %s =")
    other = ahead.replace("  %s =", "  %w = s32[3]{0} constant({4, -5, 7})\n  %s =")
    assert prefetched(equal)[0].tolist() == [4, -5, 6]
    assert prefetched(other)[0] is None


@needs_libtpu
def test_a_kernel_that_the_compiler_brings_is_refused_in_one_line():
    rows, matrices = ((512, 256), jnp.bfloat16), ((4, 256, 256), jnp.bfloat16)
    module = compiled_for_tpu(jax.lax.ragged_dot, rows, matrices, ((4,), jnp.int32))
    with pytest.raises(InputError, match=r"^kernel \S+: cannot be priced, .*ragged.*--no_compile"):
        price(module)
