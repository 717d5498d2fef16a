"""What kernels cost, and what programs move, on listings whose costs are known by hand."""

import textwrap

import pytest

from lory_jax.planning.bundles import base_name, count, read_kernel
from lory_jax.planning.hlo import executions, parse
from lory_jax.planning.traffic import hbm_bytes

# A grid of 5 steps (7 turns of its loop less 2), in each 3 bundles of its own, 4 after the branch,
# and an inner loop of 2 + 4 bundles that turns 64 / 2 times; 1 bundle before and 1 after.
BUNDLES = textwrap.dedent("""\
    = control target key start
    LB: loop body
    = control target key end

         0   :  { %s1 = smov 0 }
       0x1 LB: > { %s2 = sphi %s1, %s9 /* phi copy */ }
       0x2 LB: >> { %s3 = sshll.u32 %s4, 7  ;;  %s7 = sadd.s32 2, %s4  ;;  %p6 = scmp.ge.s32.totalorder %s7, 64 /* loop exit test */ }
       0x3   : >> { %20 = sbr.rel (!%p6) target = $region4 }
       0x4   : >> { %v1 = vmatmul.bf16.gmra.mxu0 %v0 }
       0x5   : > { %s77 = smov (%p6), 3 }
       0x6   :  {}
       0x7   :  {}
       0x8   : > { %s9 = sadd.s32 1, %s2  ;;  %p8 = scmp.ge.s32.totalorder %s9, 7 /* loop exit test */ }
       0x9   : > { %21 = sbr.rel (!%p8) target = $region2 }
       0xa   :  {}
       0xb   :  {}
       0xc   :  {}
       0xd   :  {}
       0xe   :  { %22 = vsyncpa [#allocation5], 1 }
    """)  # noqa: E501
SLOTS = "\n".join(
    ["== CAPACTIY:", "MXU, XLU, VLOAD", "    4     3     2", "== UTILIZATION:"]
    + [("4 0 1" if i == 4 else "0 0 0") for i in range(15)]
)


def test_loops_count_their_turns():
    cost = count(BUNDLES, SLOTS)
    assert cost.bundles == 1 + 5 * (1 + 32 * 6 + 2 + 4) + 1
    assert cost.slots == {"MXU": 5 * 32 * 4, "XLU": 0, "VLOAD": 5 * 32}
    assert cost.busy["MXU"] == pytest.approx(5 * 32 / cost.bundles)
    assert cost.limiting_slot == "MXU"


def test_a_loop_that_cannot_be_counted_is_refused():
    with pytest.raises(ValueError, match="not a sum"):
        count(BUNDLES.replace("%s7 = sadd.s32 2, %s4", "%s7 = smul.u32 2, %s4"), SLOTS)
    with pytest.raises(ValueError, match="1 loops have no exit test"):
        count(BUNDLES.replace("%p8 = scmp.ge", "%p8 = scmp.gt"), SLOTS)
    with pytest.raises(ValueError, match="15 bundles, but slots of 14"):
        count(BUNDLES, SLOTS.rsplit("\n", 1)[0])


def test_a_dump_is_read_by_the_name_of_the_call(tmp_path):
    def write(call, bundles):
        (tmp_path / f"17-{call}-71-final_bundles.txt").write_text(bundles)
        (tmp_path / f"17-{call}-70-schedule-analysis_final_bundles.txt").write_text("")
        (tmp_path / f"17-{call}-69-final_hlo-static-per-bundle-utilization.txt").write_text(SLOTS)

    write("merged.3", BUNDLES)
    assert base_name("merged.3.clone.1") == "merged"
    assert read_kernel(tmp_path, "merged.3") == read_kernel(tmp_path, "merged.4")
    write("merged.5", BUNDLES.replace("%s9, 7", "%s9, 8"))
    assert read_kernel(tmp_path, "merged.5").bundles > read_kernel(tmp_path, "merged.3").bundles
    for call, count_ in (("merged.4", 2), ("other.1", 0)):
        with pytest.raises(ValueError, match=f"{count_} different kernels"):
            read_kernel(tmp_path, call)


# Three turns of a loop whose fusion reads a slice of 8 of w's 32 rows and x, and updates 1 row of y
# in place; a product with an operand on the chip; a kernel with its own estimate.
HLO = textwrap.dedent("""\
    HloModule jit_f

    %inner (p0: f32[32,4], p1: f32[4], p2: f32[16,4]) -> f32[16,4] {
      %p0 = f32[32,4]{1,0} parameter(0)
      %p1 = f32[4]{0} parameter(1)
      %p2 = f32[16,4]{1,0} parameter(2)
      %s = f32[8,4]{1,0} slice(%p0), slice={[0:8], [0:4]}
      %r = f32[1,4]{1,0} reduce-window(%s, %p1)
      %z = s32[] constant(0)
      ROOT %u = f32[16,4]{1,0} dynamic-update-slice(%p2, %r, %z, %z)
    }

    %body (t: (s32[], f32[32,4], f32[4], f32[16,4])) -> (s32[], f32[32,4], f32[4], f32[16,4]) {
      %t = (s32[], f32[32,4]{1,0}, f32[4]{0}, f32[16,4]{1,0}) parameter(0)
      %w = f32[32,4]{1,0} get-tuple-element(%t), index=1
      %x = f32[4]{0} get-tuple-element(%t), index=2
      %y = f32[16,4]{1,0} get-tuple-element(%t), index=3
      %i = s32[] get-tuple-element(%t), index=0
      %f = f32[16,4]{1,0} fusion(%w, %x, %y), kind=kLoop, calls=%inner
      ROOT %o = (s32[], f32[32,4]{1,0}, f32[4]{0}, f32[16,4]{1,0}) tuple(%i, %w, %x, %f)
    }

    %cond (t: (s32[], f32[32,4], f32[4], f32[16,4])) -> pred[] {
      %t = (s32[], f32[32,4]{1,0}, f32[4]{0}, f32[16,4]{1,0}) parameter(0)
      ROOT %c = pred[] constant(true)
    }

    ENTRY %main (w: f32[32,4], x: f32[4], y: f32[16,4]) -> f32[16,4] {
      %w = f32[32,4]{1,0} parameter(0)
      %x = f32[4]{0} parameter(1)
      %y = f32[16,4]{1,0} parameter(2)
      %i = s32[] constant(0)
      %t = (s32[], f32[32,4]{1,0}, f32[4]{0}, f32[16,4]{1,0}) tuple(%i, %w, %x, %y)
      %l = (s32[], f32[32,4]{1,0}, f32[4]{0}, f32[16,4]{1,0}) while(%t), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"3"}}
      %g = f32[16,4]{1,0} get-tuple-element(%l), index=3
      %v = f32[16,4]{1,0:T(8,128)S(1)} copy(%g)
      %d = f32[16,4]{1,0} convolution(%v, %g), dim_labels=bf_io->bf
      ROOT %k = f32[16,4]{1,0} custom-call(%d), custom_call_target="tpu_custom_call", backend_config={"cost_estimate":{"flops":"1","bytes_accessed":"1000"}}
    }
    """)  # noqa: E501


def test_bytes_of_slices_updates_loops_and_kernels():
    module = parse(HLO)
    row = 4 * 4
    turn = 8 * row + row + row  # the slice, x, the updated row
    copy, product, kernel = 16 * row, 2 * 16 * row, 1000
    assert hbm_bytes(module, executions(module)) == 3 * turn + copy + product + kernel
