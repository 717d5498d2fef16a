"""What a compiled program waits for, played by hand."""

import textwrap

import pytest

from lory_jax.planning.collectives import find_collectives
from lory_jax.planning.hlo import executions, parse
from lory_jax.planning.overlap import Schedule, awaited_cycles
from tests.planning.test_hlo import DEVICE, TPU, price

# The links of DEVICE receive a byte per cycle. An all-gather of f32[64] over 2 devices receives 128
# bytes, an all-reduce of f32[8] over 2 devices 32.
MESH = {"data": 1, "fsdp": 2, "tensor": 1}

PROGRAM = """
HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[32]{0}, f32[8]{0})->f32[8]{0}}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%work (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %d = f32[8]{0} dot(%p, %p), metadata={op_name="jit(step)/dot"}
}

%body (c: (s32[], f32[8])) -> (s32[], f32[8]) {
  %c = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %x = f32[8]{0} get-tuple-element(%c), index=1
  %y = f32[8]{0} fusion(%x), kind=kOutput, calls=%work, backend_config={"estimated_cycles":"30"}
  ROOT %t = (s32[], f32[8]{0}) tuple(%i, %y)
}

%condition (c.1: (s32[], f32[8])) -> pred[] {
  %c.1 = (s32[], f32[8]{0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}

ENTRY %main (w: f32[32], x.0: f32[8]) -> f32[8] {
  %w = f32[32]{0} parameter(0)
  %x.0 = f32[8]{0} parameter(1)
  %zero = s32[] constant(0)
BODY
}
"""
START = (
    "%st = (f32[32]{0}, f32[64]{0}) all-gather-start(%w), replica_groups={{0,1}}, dimensions={0}"
)
START_2 = START.replace("%st", "%st2")
DONE = "%dn = f32[64]{0} all-gather-done(%st)"
DONE_2 = DONE.replace("%dn", "%dn2").replace("%st", "%st2")
WORK = (
    "%f = f32[8]{0} fusion(%x.0), kind=kOutput, calls=%work, "
    'backend_config={"estimated_cycles":"CYCLES"}'
)
LOOP = """%init = (s32[], f32[8]{0}) tuple(%zero, %x.0)
%loop = (s32[], f32[8]{0}) while(%init), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"4"}}""".replace("\\\n", "")
REDUCE = "%r = f32[8]{0} all-reduce(%x.0), replica_groups={{0,1}}, to_apply=%add"


def work(cycles, name="f"):
    return WORK.replace("CYCLES", str(cycles)).replace("%f ", f"%{name} ")


def play(*lines):
    """`{kind: [awaited cycles]}` of a program with these lines, and their sum."""
    module = parse(PROGRAM.replace("BODY", textwrap.indent("\n".join(lines), "  ")))
    runs = executions(module)
    transfers = Schedule(module, runs, MESH, DEVICE, {}).transfers()
    found: dict = {}
    for transfer in transfers:
        found.setdefault(transfer.collective.kind, []).append(transfer.awaited)
    return found, awaited_cycles(transfers)


@pytest.mark.parametrize(("cycles", "awaited"), [(0, 128), (100, 28), (128, 0), (500, 0)])
def test_what_is_computed_between_start_and_done_hides_a_transfer(cycles, awaited):
    assert play(START, work(cycles), DONE, work(50, "g")) == ({"all-gather": [awaited]}, awaited)


def test_a_loop_hides_as_much_as_all_its_turns_take():
    assert play(START, LOOP, DONE) == ({"all-gather": [128 - 4 * 30]}, 8)


def test_transfers_follow_one_another_on_the_links():
    # Both need 256 cycles of the links, of which 100 are hidden.
    assert play(START, START_2, work(100), DONE, DONE_2) == ({"all-gather": [28, 128]}, 156)


def test_a_synchronous_collective_is_awaited_and_holds_up_what_is_under_way():
    found, total = play(START, work(100), REDUCE, DONE)
    assert found == {"all-reduce": [32], "all-gather": [28]} and total == 60


def test_what_nothing_awaits_is_counted():
    assert play(START, work(100))[1] == 28


def test_chains_of_a_tpu_are_the_collectives_that_are_counted_elsewhere():
    """A chain of fusions without its last link, a fused scatter, and a pair of start and done."""
    module, mesh = parse(TPU), {"data": 2, "fsdp": 2}
    runs = executions(module)
    prices = {"splash_mha_fwd.2": price(500.0), "mystery.1": price(70.0), "known.1": price(30.0)}
    transfers = Schedule(module, runs, mesh, DEVICE, prices).transfers()
    by_kind = sorted((t.collective for t in transfers), key=lambda c: c.kind)
    assert by_kind == sorted(find_collectives(module, runs, mesh), key=lambda c: c.kind)
    awaited = {t.collective.kind: t.awaited for t in transfers}
    # It takes 2048 * 3 / 4 cycles, and what is computed after its start hides a part of them.
    assert awaited["reduce-scatter"] == 4096 * 3 / 4 and awaited["all-reduce"] == 32
    assert awaited["all-gather"] == 1536 - (40 + 1 + 500 + 64.5 + 70 + 30 + 1)
