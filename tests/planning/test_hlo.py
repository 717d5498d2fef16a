"""The reader of compiled programs, on programs whose costs are known."""

import dataclasses
import json
import subprocess
import sys
import textwrap

import pytest

from lory_jax.planning.collectives import (
    axes_of,
    bytes_by_kind_and_axis,
    device_groups,
    find_collectives,
)
from lory_jax.planning.cycles import count_cycles, kernel_flops, reprice
from lory_jax.planning.hlo import executions, parse, shape_bytes
from lory_jax.planning.kernels import Price
from lory_jax.planning.topology import Device

MESH = {"data": 2, "fsdp": 2, "tensor": 2}

# ---------------------------------------------------------------- a program of known cost

# On a mesh (2, 2, 2): sums over `tensor` in 3 x 5 turns of nested loops, gathers over `fsdp` in 3,
# and once each a reduce-scatter over data and tensor, a ring shift over `data`, an exchange over
# `fsdp`.
WORKER = """
import jax, json, sys
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
import numpy as np

mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("data", "fsdp", "tensor"))

def local(x):
    def inner(x, _):
        return jnp.sin(jax.lax.psum(x, "tensor")), None

    def outer(x, _):
        x, _ = jax.lax.scan(inner, x, None, length=5)
        return jnp.sin(jax.lax.all_gather(x, "fsdp", tiled=True)[:16] + x), None

    x, _ = jax.lax.scan(outer, x, None, length=3)
    y = jax.lax.psum_scatter(jnp.cos(x), ("data", "tensor"), tiled=True)
    z = jax.lax.ppermute(jnp.tan(x), "data", [(0, 1), (1, 0)])
    w = jax.lax.all_to_all(jnp.exp(x), "fsdp", 0, 0, tiled=True)
    return x + w, y, z

run = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False))
x = jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=NamedSharding(mesh, P()))
print(json.dumps(run.lower(x).compile().as_text()))
"""
BYTES = 16 * 8 * 4


@pytest.fixture(scope="module")
def program():
    result = subprocess.run(
        [sys.executable, "-c", WORKER], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def collective_bytes(text):
    module = parse(text)
    runs = executions(module)
    assert not runs.unknown_loops
    return bytes_by_kind_and_axis(find_collectives(module, runs, MESH))


def test_a_compiled_program_has_its_known_bytes(program):
    assert collective_bytes(program) == {
        "all-gather": {"fsdp": 3 * 2 * BYTES},
        "all-reduce": {"tensor": 15 * BYTES},
        "all-to-all": {"fsdp": BYTES},
        "collective-permute": {"data": BYTES},
        "reduce-scatter": {"data+tensor": BYTES},
    }


def test_trip_counts_are_found_without_the_compilers_note(program):
    assert '"known_trip_count"' in program
    assert collective_bytes(program.replace("known_trip_count", "x")) == collective_bytes(program)


# ---------------------------------------------------------------- what a TPU writes

TPU = textwrap.dedent("""\
    HloModule jit_step, is_scheduled=true

    %start_fusion (p.1: bf16[8,32]) -> (bf16[8,32], bf16[32,32]) {
      %p.1 = bf16[8,32]{1,0:T(8,128)(2,1)} parameter(0)
      %ag.1 = bf16[32,32]{1,0} all-gather(%p.1), channel_id=1, replica_groups=mesh['a'=4] {'a'}, dimensions={0}, frontend_attributes={chain_id="0"}
      ROOT %s.1 = (bf16[8,32]{1,0}, bf16[32,32]{1,0}) custom-call(%ag.1), custom_call_target="AsyncCollectiveStart"
    }

    %middle_fusion (p.2: bf16[8,32]) -> bf16[32,32] {
      %p.2 = bf16[8,32]{1,0} parameter(0)
      ROOT %ag.2 = bf16[32,32]{1,0} all-gather(%p.2), channel_id=1, replica_groups=mesh['a'=4] {'a'}, dimensions={0}, frontend_attributes={chain_id="0"}
    }

    %all-reduce-scatter.7 (p.3: f32[32,32]) -> f32[8,32] {
      %p.3 = f32[32,32]{1,0} parameter(0)
      %ar.3 = f32[32,32]{1,0} all-reduce(%p.3), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add
      ROOT %ds.3 = f32[8,32]{1,0} slice(%ar.3), slice={[0:8], [0:32]}
    }

    %inside (p.4: f32[8]) -> f32[8] {
      %p.4 = f32[8]{0} parameter(0)
      ROOT %m.4 = f32[8]{0} multiply(%p.4, %p.4), metadata={op_name="jit(step)/attention/mul"}, backend_config={"estimated_cycles":"999999"}
    }

    %count (p.5: s32[]) -> s32[] {
      %p.5 = s32[]{:T(128)} parameter(0)
      %two = s32[] constant(2)
      ROOT %add.5 = s32[]{:T(128)} add(%p.5, %two)
    }

    %body (arg: (s32[], f32[8], bf16[8,32], f32[32,32])) -> (s32[], f32[8], bf16[8,32], f32[32,32]) {
      %arg = (s32[], f32[8]{0}, /*index=2*/bf16[8,32]{1,0}, f32[32,32]{1,0}) parameter(0)
      %i = s32[] get-tuple-element(%arg), index=0
      %next = s32[] fusion(%i), kind=kLoop, calls=%count
      %x = f32[8]{0} get-tuple-element(%arg), index=1
      %w = bf16[8,32]{1,0} get-tuple-element(%arg), index=2
      %g = f32[32,32]{1,0} get-tuple-element(%arg), index=3
      %f.1 = (bf16[8,32]{1,0}, bf16[32,32]{1,0}) fusion(%w), kind=kCustom, calls=%start_fusion
      %f.2 = bf16[32,32]{1,0} fusion(%w), kind=kCustom, calls=%middle_fusion, metadata={op_name="jit(step)/while/body/merge/dot"}, backend_config={"estimated_cycles":"100"}
      %f.3 = f32[8,32]{1,0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.7
      %f.4 = f32[8]{0} fusion(%x), kind=kLoop, calls=%inside, metadata={op_name="convert.1"}, backend_config={"estimated_cycles":"7"}
      %splash_mha_fwd.2 = f32[2,64,16]{2,1,0} custom-call(%s8, %q, %q, %q), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
    "note":"x"
    }}, metadata={op_name="jit(step)/attention/pallas_call"}
      %q = bf16[2,64,16]{2,1,0} broadcast(%x), dimensions={}
      %s8 = s8[1,1]{1,0} constant({...})
      %mystery.1 = f32[8]{0} custom-call(%x), custom_call_target="tpu_custom_call"
      %known.1 = f32[8]{0} custom-call(%x), custom_call_target="tpu_custom_call", metadata={op_name="jit(step)/merge/pallas_call"}, backend_config={"custom_call_config":{"cost_estimate":{"flops":"2000","bytes_accessed":"5"}}}
      %copy.9 = f32[8]{0} copy(%x), metadata={op_name="jit(step)/merge/copy"}, backend_config={"estimated_cycles":"11"}
      ROOT %out = (s32[], f32[8]{0}, bf16[8,32]{1,0}, f32[32,32]{1,0}) tuple(%next, %f.4, %w, %g)
    }

    %condition (carried: (s32[], f32[8], bf16[8,32], f32[32,32])) -> pred[] {
      %carried = (s32[], f32[8]{0}, bf16[8,32]{1,0}, f32[32,32]{1,0}) parameter(0)
      %end = s32[]{:T(128)} constant(9)
      %now = s32[] get-tuple-element(%carried), index=0
      ROOT %lt = pred[]{:T(512)} compare(%now, %end), direction=LT
    }

    ENTRY %main (x.0: f32[8], w.0: bf16[8,32], g.0: f32[32,32]) -> f32[8] {
      %x.0 = f32[8]{0} parameter(0)
      %w.0 = bf16[8,32]{1,0} parameter(1)
      %g.0 = f32[32,32]{1,0} parameter(2)
      %one = s32[] constant(1)
      %init = (s32[], f32[8]{0}, bf16[8,32]{1,0}, f32[32,32]{1,0}) tuple(%one, %x.0, %w.0, %g.0)
      %loop = (s32[], f32[8]{0}, bf16[8,32]{1,0}, f32[32,32]{1,0}) while(%init), condition=%condition, body=%body
      %st = (f32[8]{0}, f32[8]{0}) all-reduce-start(%x.0), channel_id=2, replica_groups=[2,2]<=[2,2]T(1,0), to_apply=%add
      %dn = f32[8]{0} all-reduce-done(%st)
      %up = f32[8]{0} fusion(%dn), kind=kLoop, calls=%inside, metadata={op_name="jit(step)/optimizer/sub"}, backend_config={"estimated_cycles":"40"}
      ROOT %result = f32[8]{0} get-tuple-element(%loop), index=1
    }
    """)  # noqa: E501


def test_chains_and_fused_scatters_of_a_tpu_count_once_per_turn():
    module = parse(TPU)
    runs = executions(module)
    assert runs.times["body"] == 4 and runs.times["main"] == 1  # 1, 3, 5, 7 < 9
    found = find_collectives(module, runs, {"data": 2, "fsdp": 2})
    assert bytes_by_kind_and_axis(found) == {
        "all-gather": {"data+fsdp": 4 * 32 * 32 * 2},
        "all-reduce": {"data": 8 * 4},
        "reduce-scatter": {"data+fsdp": 4 * 32 * 32 * 4},
    }
    received = {c.kind: c.received for c in found}
    assert received == {
        "all-gather": 2048 * 3 / 4,
        "all-reduce": 32,
        "reduce-scatter": 4096 * 3 / 4,
    }


# Of 64 bytes and 100 FLOP a cycle.
DEVICE = Device("v5e", 1, 2**34, 1.0, 100, 1.0, 64.0, 128)


def price(cycles):
    return Price(cycles, 0.0, 0.0, "", {}, 0)


def test_both_sums_by_scope_with_turns_and_kernels():
    module = parse(TPU)
    prices = {"splash_mha_fwd.2": price(5000.0), "mystery.1": price(70.0), "known.1": price(30.0)}
    cycles = count_cycles(module, executions(module), DEVICE, prices)
    splash = 2 * 2 * 2 * 64 * 64 * 16 / 2 / 100
    none = {"optimizer": 0, "merge": 0, "expert_ffn": 0, "attention": 0, "head_and_loss": 0}
    assert cycles.compiler == none | {
        "optimizer": 40,
        "merge": 4 * (100 + 20),
        "attention": 4 * (7 + splash),
        "layout_copies": 4 * 11,
        "other": 0,
    }
    # Reading and writing f32[8] takes a cycle; f.2 reads bf16[8, 32] and writes bf16[32, 32].
    assert cycles.repriced == none | {
        "optimizer": 1,
        "merge": 4 * ((512 + 2048) / 64 + 30),
        "attention": 4 * (1 + 5000),
        "layout_copies": 4 * 1,
        "other": 4 * (70 + (32 + 2 * 64 * 16 * 2) / 64),  # the kernel without a name, and %q
    }
    assert cycles.kernels == {"known": 4 * 30, "mystery": 4 * 70, "splash_mha_fwd": 4 * 5000}
    assert cycles.uncounted == {"mystery": 4}
    assert cycles.compiler_total == sum(cycles.compiler.values())
    assert cycles.repriced_total == sum(cycles.repriced.values())


def test_an_estimate_below_the_bytes_stays_and_that_of_a_product_always():
    module = parse(TPU)
    body = module.computations["body"].instructions
    slow = dataclasses.replace(DEVICE, hbm_bandwidth=1.0)
    assert reprice(body["f.2"], module.computations["body"], module, slow) == 100
    product = parse(TPU.replace("multiply(%p.4, %p.4)", "dot(%p.4, %p.4)"))
    body = product.computations["body"]
    assert reprice(body.instructions["f.4"], body, product, DEVICE) == 7


def test_splash_reads_the_length_from_either_layout():
    instruction = parse(TPU).computations["body"].instructions["splash_mha_fwd.2"]
    flops = 2 * 2 * 2 * 64 * 64 * 16 / 2
    assert kernel_flops(instruction, parse(TPU).computations["body"]) == flops
    text = TPU.replace("%q = bf16[2,64,16]", "%q = bf16[2,16,64]")
    text = text.replace('"note":"x"', '"xprof_metadata":"{\\"q_layout\\": 2}"')
    body = parse(text).computations["body"]
    assert kernel_flops(body.instructions["splash_mha_fwd.2"], body) == flops


def test_a_loop_over_data_is_named_and_counts_once():
    module = parse(TPU.replace("%end = s32[]{:T(128)} constant(9)", "%end = s32[] partition-id()"))
    runs = executions(module)
    assert runs.unknown_loops == ("loop",) and runs.times["body"] == 1


def test_what_is_no_module_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        parse("hello")


# ---------------------------------------------------------------- parts

PAIRS = [[0, 1], [2, 3], [4, 5], [6, 7]]


@pytest.mark.parametrize(
    ("attributes", "groups"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}, x={1}", PAIRS),
        ("replica_groups={}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("replica_groups=[4,2]<=[8], dimensions={0}", PAIRS),
        ("replica_groups=[2,4]<=[2,2,2]T(1,0,2)", [[0, 1, 4, 5], [2, 3, 6, 7]]),
        ("replica_groups=mesh['a'=4,'b'=2] {'b'}", PAIRS),
        ("replica_groups=mesh['a'=4,'b'=2] {'a'}", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        (
            "replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}",
            [[0, 4], [1, 5], [2, 6], [3, 7]],
        ),
        ("replica_groups=mesh['a'=8] {'a':(2)4}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
    ],
)
def test_groups_are_read_in_every_spelling(attributes, groups):
    assert device_groups(attributes, 8) == groups


def test_groups_must_be_there():
    with pytest.raises(ValueError, match="no replica_groups"):
        device_groups("dimensions={0}", 8)


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        (PAIRS, "tensor"),
        ([[0, 2], [1, 3], [4, 6], [5, 7]], "fsdp"),
        ([[0, 4], [1, 5], [2, 6], [3, 7]], "data"),
        ([[0, 1, 4, 5], [2, 3, 6, 7]], "data+tensor"),
        ([list(range(8))], "data+fsdp+tensor"),
        ([[3], [4]], ""),
    ],
)
def test_axes_are_those_that_a_group_extends_over(groups, axes):
    assert axes_of(groups, MESH) == axes


@pytest.mark.parametrize(
    ("shape", "count"),
    [
        ("f32[2,3]{1,0:T(8,128)S(1)}", 24),
        ("(bf16[4]{0}, /*index=1*/s32[], pred[8]{0})", 8 + 4 + 8),
        ("f8e4m3fn[16]", 16),
        ("token[]", 0),
    ],
)
def test_bytes_of_shapes(shape, count):
    assert shape_bytes(shape) == count
