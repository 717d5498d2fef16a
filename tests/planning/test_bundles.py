"""What kernels cost, and what programs move, on listings whose costs are known by hand."""

import textwrap

import pytest

from lory_jax.planning.bundles import (
    PartsDiffer,
    conditional_parts,
    count,
    parse_bundles,
    read_kernel,
)
from lory_jax.planning.hlo import executions, parse
from lory_jax.planning.traffic import hbm_bytes, moved_bytes, padded_bytes

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


# In the grid's loop of BUNDLES, the pipeline's part that awaits DMA and runs the kernel, with two
# conditional parts of the kernel inside; the first holds one bundle, the second two.
PARTS = BUNDLES.replace(
    "   0x5   : > { %s77 = smov (%p6), 3 }\n",
    textwrap.dedent("""\
           0x5   : > { %s77 = smov (%p6), 3 }
           0x5   : > { %30 = sbr.rel (%p1) target = $region36 }
           0x5   :  {}
           0x5   :  {}
           0x5   :  {}
           0x5   :  {}
           0x5   : > { %31 = sbr.rel (%p2) target = $region52 }
           0x5   :  {}
           0x5   :  {}
           0x5   :  {}
           0x5   :  {}
           0x5   : > { %v5 = vst %v4 }
           0x5 PF: > { %32 = sbr.rel (%p3) target = $region56 }
           0x5   :  {}
           0x5   :  {}
           0x5   :  {}
           0x5   :  {}
           0x5   : > { %v6 = vst %v4 }
           0x5   : > { %v7 = vst %v4 }
           0x5 PF: > { %s78 = smov 4 }
           0x5 PF: > { %s79 = smov 5 }
        """),
)
ORIGINAL = textwrap.dedent("""\
    $region0: #{k}
      $region34: #{k} parent=5 // pred_check_branch
        %30 = sbr.rel (%p1) target = $region36
      $region35: #{k} parent=5 // pred_region
        %1 = dma.done.wait [#allocation2]
        $region50: #{k} parent=35 // pred_check_branch
          %31 = sbr.rel (%p2) target = $region52
        $region51: #{k} parent=35 // pred_region
          %v5 = vst %v4
        $region52: #{k} parent=35 // pred_fallthru
        $region54: #{k} parent=35 // pred_check_branch
          %32 = sbr.rel (%p3) target = $region56
        $region55: #{k} parent=35 // pred_region
          %v6 = vst.msk %v4
        $region56: #{k} parent=35 // pred_fallthru
        $region58: #{k} parent=35 // pred_check_branch
          %33 = sbr.rel (%p4) target = $region60
        $region59: #{k} parent=35 // pred_region
          %2 = dma.vmem_to_hbm %v4
        $region60: #{k} parent=35 // pred_fallthru
      $region36: #{k} parent=5 // pred_fallthru
    """)


def slots_of(bundles):
    header = ["== CAPACTIY:", *SLOTS.splitlines()[1:3], "== UTILIZATION:"]
    return "\n".join(header + ["0 0 0"] * len(parse_bundles(bundles)))


def test_conditional_parts_count_as_often_as_they_run():
    assert conditional_parts(ORIGINAL) == [52, 56]
    always = count(PARTS, slots_of(PARTS))
    # Of 5 steps, the first part runs in one and the second in none.
    some = count(PARTS, slots_of(PARTS), ORIGINAL, (0.2, 0.0))
    assert always.bundles - some.bundles == pytest.approx(5 * (0.8 * 1 + 1.0 * 2))
    unknown = count(PARTS, slots_of(PARTS), ORIGINAL, (None, 0.0))
    assert always.bundles - unknown.bundles == pytest.approx(5 * 2)
    with pytest.raises(PartsDiffer, match=r"2 conditional parts .* expected 1"):
        count(PARTS, slots_of(PARTS), ORIGINAL, (0.5,))


# As PARTS, but the second part is the end of the first, and both continue at one bundle.
NESTED = BUNDLES.replace(
    "   0x5   : > { %s77 = smov (%p6), 3 }\n",
    textwrap.dedent("""\
           0x5   : > { %s77 = smov (%p6), 3 }
           0x5   : > { %31 = sbr.rel (%p2) target = $region52 }
           0x5   :  {}
           0x5   :  {}
           0x5   :  {}
           0x5   :  {}
           0x5   : > { %v5 = vst %v4 }
           0x5   : > { %32 = sbr.rel (%p3) target = $region56 }
           0x5   :  {}
           0x5   :  {}
           0x5   :  {}
           0x5   :  {}
           0x5   : > { %v6 = vst %v4 }
           0x5   : > { %v7 = vst %v4 }
           0x5 PF: > { %s78 = smov 4 } /* Start/End empty region 56 :: Start/End empty region 52 */
        """),
)
NESTED_ORIGINAL = textwrap.dedent("""\
    $region0: #{k}
      $region50: #{k} parent=35 // pred_check_branch
        %31 = sbr.rel (%p2) target = $region52
      $region51: #{k} parent=35 // pred_region
        %v5 = vst %v4
        $region54: #{k} parent=51 // pred_check_branch
          %32 = sbr.rel (%p3) target = $region56
        $region55: #{k} parent=51 // pred_region
          %v6 = vst %v4
        $region56: #{k} parent=51 // pred_fallthru
      $region52: #{k} parent=35 // pred_fallthru
    """)


def test_conditional_parts_that_end_together_are_told_apart():
    assert conditional_parts(NESTED_ORIGINAL) == [52, 56]
    always = count(NESTED, slots_of(NESTED))
    some = count(NESTED, slots_of(NESTED), NESTED_ORIGINAL, (0.5, 0.2))
    # Half of the time, the first part's 6 bundles run, and of that in a fifth the second's 2.
    assert always.bundles - some.bundles == pytest.approx(5 * (0.5 * 6 + 0.9 * 2))


def test_a_dump_is_read_by_the_beginning_of_the_calls_name(tmp_path):
    names = {"final_bundles": BUNDLES, "final_hlo-static-per-bundle-utilization": SLOTS}
    for i, (name, text) in enumerate((names | {"original": ORIGINAL}).items()):
        (tmp_path / f"17-ffi_call.1-{i}-{name}.txt").write_text(text)
    (tmp_path / "17-ffi_call.1-70-schedule-analysis_final_bundles.txt").write_text("")
    assert read_kernel(tmp_path, "ffi_call").bundles == count(BUNDLES, SLOTS).bundles
    with pytest.raises(ValueError, match="0 files"):
        read_kernel(tmp_path, "other")


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


@pytest.mark.parametrize(
    ("shape", "count_"),
    [
        ("bf16[4,16,4096,64]{3,2,1,0:T(8,128)(2,1)}", 4 * 16 * 4096 * 128 * 2),  # lanes: 128
        ("f32[4,4096,16,64]{3,1,2,0:T(8,128)}", 4 * 4096 * 16 * 128 * 4),  # 4096 is on the rows
        ("f32[4,4096,16,64]{1,3,2,0:T(8,128)S(1)}", 4 * 4096 * 16 * 64 * 4),
        ("f32[3,100]{1,0:T(4,128)}", 4 * 128 * 4),
        ("(f32[5]{0:T(1024)}, s32[])", 1024 * 4 + 4),
        ("bf16[3,5]{1,0}", 3 * 5 * 2),
    ],
)
def test_arrays_take_whole_tiles(shape, count_):
    assert padded_bytes(shape) == count_


def test_transfers_in_the_background_move_what_is_smaller():
    text = textwrap.dedent("""\
        HloModule m

        ENTRY %main (x: f32[4,8,128]) -> f32[1,8,128] {
          %x = f32[4,8,128]{2,1,0:T(8,128)} parameter(0)
          %s = ((f32[4,8,128]{2,1,0:T(8,128)}), f32[1,8,128]{2,1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[0:1], [0:8], [0:128]}
          %c = (f32[4,8,128]{2,1,0:T(8,128)}, f32[4,8,128]{2,1,0:T(8,128)}, u32[]) copy-start(%x)
          ROOT %d = f32[1,8,128]{2,1,0:T(8,128)S(1)} slice-done(%s)
        }
        """)  # noqa: E501
    module = parse(text)
    main = module.computations["main"]
    part = 8 * 128 * 4
    assert moved_bytes(main.instructions["s"], main, module).hbm == part  # read once
    assert moved_bytes(main.instructions["c"], main, module).hbm == 2 * 4 * part
    assert moved_bytes(main.instructions["d"], main, module).hbm == 0
