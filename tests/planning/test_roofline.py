"""FLOPs and bytes of programs for GPUs, counted by hand, and of one that is really compiled."""

import importlib.util
import json
import re
import subprocess
import sys
import textwrap

import pytest

from lory_jax.errors import InputError
from lory_jax.model.flops import peak_flops
from lory_jax.planning import gpus
from lory_jax.planning.gpus import GPUS, Gpu, parse_gpus
from lory_jax.planning.hlo import executions, parse
from lory_jax.planning.roofline import roofline

# Two turns of: a product in a fusion, one of cuBLAS with workspace, and cuDNN's causal attention;
# once an elementwise fusion.
HLO = textwrap.dedent("""\
    HloModule m

    %product (p0: bf16[8,4], p1: bf16[4,16]) -> bf16[8,16] {
      %p0 = bf16[8,4]{1,0} parameter(0)
      %p1 = bf16[4,16]{1,0} parameter(1)
      ROOT %d = bf16[8,16]{1,0} dot(%p0, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={0}, metadata={op_name="jit(f)/attention/dot"}
    }

    %body (t: (bf16[8,4], bf16[4,16], bf16[2,3,32,8])) -> (bf16[8,4], bf16[4,16], bf16[2,3,32,8]) {
      %t = (bf16[8,4]{1,0}, bf16[4,16]{1,0}, bf16[2,3,32,8]{3,2,1,0}) parameter(0)
      %x = bf16[8,4]{1,0} get-tuple-element(%t), index=0
      %w = bf16[4,16]{1,0} get-tuple-element(%t), index=1
      %q = bf16[2,3,32,8]{3,2,1,0} get-tuple-element(%t), index=2
      %f = bf16[8,16]{1,0} fusion(%x, %w), kind=kCustom, calls=%product, metadata={op_name="jit(f)/attention/dot"}
      %b = (f32[2,8,16]{2,1,0}, s8[4096]{0}) custom-call(%x, %w), custom_call_target="__cublas$lt$matmul", metadata={op_name="jit(f)/dense_ffn/dot"}, backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"],"lhs_batch_dimensions":[]}}}
      %a = (bf16[2,3,32,8]{3,2,1,0}, f32[2,3,32]{2,1,0}, u8[0]{0}) custom-call(%q, %q, %q), custom_call_target="__cudnn$fmhaSoftmax", metadata={op_name="jit(f)/attention/cudnn"}, backend_config={"cudnn_fmha_backend_config": {"intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["2", "3", "32", "32"]}, "mask_type": "CAUSAL"}}
      ROOT %r = (bf16[8,4]{1,0}, bf16[4,16]{1,0}, bf16[2,3,32,8]{3,2,1,0}) tuple(%x, %w, %q)
    }

    %cond (t: (bf16[8,4], bf16[4,16], bf16[2,3,32,8])) -> pred[] {
      %t = (bf16[8,4]{1,0}, bf16[4,16]{1,0}, bf16[2,3,32,8]{3,2,1,0}) parameter(0)
      ROOT %p = pred[] constant(true)
    }

    %add (p0: f32[100]) -> f32[100] {
      %p0 = f32[100]{0} parameter(0)
      ROOT %s = f32[100]{0} add(%p0, %p0)
    }

    ENTRY %main (x: bf16[8,4], w: bf16[4,16], q: bf16[2,3,32,8], y: f32[100]) -> f32[100] {
      %x = bf16[8,4]{1,0} parameter(0)
      %w = bf16[4,16]{1,0} parameter(1)
      %q = bf16[2,3,32,8]{3,2,1,0} parameter(2)
      %y = f32[100]{0} parameter(3)
      %s = (bf16[8,4]{1,0}, bf16[4,16]{1,0}, bf16[2,3,32,8]{3,2,1,0}) tuple(%x, %w, %q)
      %l = (bf16[8,4]{1,0}, bf16[4,16]{1,0}, bf16[2,3,32,8]{3,2,1,0}) while(%s), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"2"}}
      %g = f32[100]{0} all-reduce(%y), replica_groups={{0,1}}, to_apply=%add
      ROOT %e = f32[100]{0} fusion(%g), kind=kLoop, calls=%add, metadata={op_name="jit(f)/optimizer/add"}
    }
    """)  # noqa: E501


def test_every_operation_takes_the_longer_of_its_two_times():
    module = parse(HLO)
    found = roofline(module, executions(module), Gpu("h100", 10.0, 1.0, 1.0))
    product, gemm = 2 * 8 * 16 * 4, 2 * 2 * 8 * 16 * 4
    attention = 2 * 2 * (2 * 3 * 32 * 32) * 8 / 2
    assert found.flops == 2 * (product + gemm + attention)
    operands = 8 * 4 * 2 + 4 * 16 * 2
    bytes_product = operands + 8 * 16 * 2
    bytes_gemm = operands + 2 * 8 * 16 * 4  # not its workspace
    bytes_attention = 4 * (2 * 3 * 32 * 8 * 2) + 2 * 3 * 32 * 4
    assert found.bytes == 2 * (bytes_product + bytes_gemm + bytes_attention) + 800
    # At 10 FLOP and 1 byte a second, attention waits for its products, all others for memory.
    assert found.seconds["attention"] == 2 * (bytes_product + max(attention / 10, bytes_attention))
    assert found.seconds["expert_ffn"] == 2 * bytes_gemm
    assert found.seconds["optimizer"] == 800 and found.seconds["other"] == 0
    assert found.total == sum(found.seconds.values())
    fast = roofline(module, executions(module), Gpu("h100", 1.0, 1e9, 1.0))
    assert fast.seconds["attention"] == 2 * (product + attention)


def test_every_gpu_has_a_target_that_agrees_with_its_sheet():
    for name, gpu in GPUS.items():
        text = gpu.target
        assert "cuda_compute_capability" in text and 'platform_name: "CUDA"' in text
        figures = [line for line in text.splitlines() if re.match(r"  \w+: ", line)]
        assert len(figures) == 17
        assert all("  # [" in line for line in figures if "block_dim_limit" not in line), name
        bandwidth = float(text.split("memory_bandwidth: ")[1].split()[0])
        assert bandwidth == pytest.approx(gpu.hbm_bandwidth, rel=0.01)
        kind = text.split('device_description_str: "')[1].split('"')[0]
        assert peak_flops(kind) == gpu.peak_flops
    assert 0.8 * 80e9 < GPUS["h100"].memory_limit < 80e9 < GPUS["h200"].memory_limit < 141e9


def test_a_missing_plug_in_is_named(monkeypatch):
    monkeypatch.setattr(gpus.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"jax_cuda12_plugin: not found.*requirements-cuda"):
        parse_gpus("h100-8").devices()
    assert parse_gpus("v5e-8") is None


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None, reason=f"needs {gpus.PIP}"
)
@pytest.mark.parametrize("name", ["h100-8", "a100-2"])
def test_a_tiny_step_compiles_for_gpus(name):
    from tests.planning.test_plan import TINY

    command = [sys.executable, "-m", "lory_jax.plan", "--json", f"--topology={name}", *TINY]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    devices = int(name.split("-")[1])
    for version in (result, result["dense"]):
        memory, estimate = version["bytes_per_device"], version["estimate"]
        assert memory["fits"] and memory["limit"] == GPUS[name.split("-")[0]].memory_limit
        assert set(axis for kind in version["collective_bytes"].values() for axis in kind) == {
            "fsdp"
        }
        assert estimate["loops_counted_once"] == []
        # Causal attention counts half; the rest is the model's own count for 16 rows of 256 tokens.
        tokens = 16 * 256 / devices
        attention = 12 * 2 * 128 * 256 / 2 * tokens
        assert estimate["flops"] == pytest.approx(
            result["flops_per_token"] * tokens - attention, rel=0.15
        )
        assert estimate["step_seconds_lower_bound"] >= estimate["roofline_seconds"]["total"]
