"""Compiles one Pallas kernel alone: `python -m lory_jax.planning.compile_kernel < REQUEST`.

The request is that of `kernels.request_of`. libtpu writes what it is told to by LIBTPU_INIT_ARGS,
which it reads only once; hence a process per kernel.
"""

import json
import sys
from typing import Any

import jax

from lory_jax.planning.topology import DEVICES, smallest_topology

DTYPES = {"pred": "bool", "s8": "int8", "u8": "uint8", "s16": "int16", "s32": "int32"}
DTYPES |= {"u32": "uint32", "bf16": "bfloat16", "f16": "float16", "f32": "float32"}


def compile_alone(request: dict[str, Any]) -> None:
    """Compiles a program that holds nothing but the call of this kernel."""
    jax.config.update("jax_enable_compilation_cache", False)
    device = smallest_topology(DEVICES[request["generation"]]).devices()[0]
    sharding = jax.sharding.SingleDeviceSharding(device)

    def described(array: list[str]) -> jax.ShapeDtypeStruct:
        kind, sizes = array
        shape = tuple(int(size) for size in filter(None, sizes.split(",")))
        return jax.ShapeDtypeStruct(shape, DTYPES[kind], sharding=sharding)

    def call(*operands: Any) -> Any:
        results = [
            jax.ShapeDtypeStruct(r.shape, r.dtype) for r in map(described, request["results"])
        ]
        return jax.ffi.ffi_call(
            "tpu_custom_call",
            results,
            has_side_effect=True,
            custom_call_api_version=1,
            legacy_backend_config=json.dumps(request["config"]),
        )(*operands)

    jax.jit(call).lower(*map(described, request["operands"])).compile()


if __name__ == "__main__":
    compile_alone(json.load(sys.stdin))
