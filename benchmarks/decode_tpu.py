"""What a decoding step costs on one TPU chip, by its compiler; requires libtpu, but no TPU.

    python benchmarks/decode_tpu.py [--json=FILE] [--topology=v5e-1] [--experts=8]
        [--batches=1,8,32,256] [--modes=merged,experts,dense] [--layers=2] [--cache=256]

Compiles the step of the 0.3B recipe with merged FFNs, with unmerged experts, and of our dense
model, and reads from each program the bytes that it moves between HBM and the chip and the
compiler's cycles. Only a few layers are compiled: with their head left out by compiling one layer
less, all layers cost the same. Other batches that FILE has, of the same settings, stay in it.
tools/decoding.py writes the table of docs/benchmarks.md.
"""

import argparse
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from lory_jax import recipes
from lory_jax.config import load_config
from lory_jax.generation.cost import step_costs
from lory_jax.generation.programs import make_decoder
from lory_jax.model.config import ModelConfig
from lory_jax.model.transformer import init_params
from lory_jax.planning.cycles import count_cycles
from lory_jax.planning.hlo import executions, parse
from lory_jax.planning.kernels import price_kernels
from lory_jax.planning.topology import Topology, parse_topology
from lory_jax.planning.traffic import hbm_bytes

MODES = ("merged", "experts", "dense")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--topology", default="v5e-1")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--batches", default="1,8,32,256")
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--cache", type=int, default=256, help="positions in the cache")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    topology = parse_topology(args.topology)
    recipe = load_config(recipes.resolve(f"lory_0_3b:experts={args.experts}"))
    config = ModelConfig.for_platform(recipe.model, "tpu")
    device = topology.device
    result: dict[str, Any] = {
        "model": "lory_0_3b",
        "experts": args.experts,
        "layers": config.num_layers,
        "topology": args.topology,
        "cache": args.cache,
        "per_layer": {},
        "ridge": device.flops_per_cycle * device.clock / device.hbm_bandwidth,
    }
    if args.json and args.json.is_file():
        before = json.loads(args.json.read_text())
        if result == before | {"per_layer": {}}:
            result["per_layer"] = before["per_layer"]
    for batch in map(int, args.batches.split(",")):
        found = {}
        for mode in args.modes.split(","):
            more, less = (
                read_step(config, topology, mode, layers, batch, args.cache)
                for layers in (args.layers, args.layers - 1)
            )
            found[mode] = {name: more[name] - less[name] for name in more}
        merged, experts = step_costs(
            result["ridge"], 2, rows=batch, ffns=batch, experts=args.experts, merges_per_step=0
        )
        ffn = 3 * config.embed_dim * config.mlp_dim
        found["expected"] = {"merged": merged * ffn, "experts": experts * ffn}
        result["per_layer"][str(batch)] = found
        print(batch, json.dumps(found), flush=True)
        if args.json:
            temporary = args.json.with_name(args.json.name + ".tmp")
            temporary.write_text(json.dumps(result, indent=1) + "\n")
            os.replace(temporary, args.json)


def read_step(
    config: ModelConfig, topology: Topology, mode: str, layers: int, batch: int, cache_length: int
) -> dict[str, float]:
    """HBM bytes, cycles and bytes of weights of one step."""
    is_dense = mode == "dense"
    config = dataclasses.replace(
        config, num_layers=layers, num_experts=0 if is_dense else config.num_experts
    )
    decoder = make_decoder(config, "prompt", None, "merged" if is_dense else mode)

    def start(key: jax.Array) -> Any:
        params = init_params(config, key)
        tokens, lengths = jnp.zeros((batch, 8), int), jnp.full(batch, 8)
        _, merged, cache = decoder.prefill(params, tokens, lengths, cache_length, None)
        return decoder.weights(params, merged), cache, lengths

    chip = SingleDeviceSharding(topology.devices()[0])
    weights, cache, tokens_B = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=chip),
        jax.eval_shape(start, jax.random.key(0)),
    )
    module = parse(decoder.step.lower(weights, cache, tokens_B).compile().as_text())
    runs, device = executions(module), topology.device
    prices = price_kernels(module, runs, device)
    sizes = [np.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(weights)]
    return {
        "hbm_bytes": hbm_bytes(module, runs),
        "cycles": count_cycles(module, runs, device, prices).compiler_total,
        "weight_bytes": float(sum(sizes)),
    }


if __name__ == "__main__":
    main()
