"""Decodes with a tiny model on 8 faked devices and on one; prints one JSON object for the tests.

python -m tests.support.decode_worker
"""

import dataclasses
import json
import os
import sys

# What is tested is how programs are split, not how well they are compiled: save the time.
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from lory_jax.generation.loop import decode, mesh_of  # noqa: E402
from lory_jax.generation.programs import make_decoder  # noqa: E402
from lory_jax.model.transformer import build  # noqa: E402
from lory_jax.parallel import make_mesh, shardings  # noqa: E402
from tests.support.models import params_of, tiny_config  # noqa: E402

CONFIG = tiny_config(
    vocab_size=64, embed_dim=32, mlp_dim=64, num_heads=8, sequence_length=32, segment_length=4
)
OTHERS = {  # each with everything that is kept while decoding
    "beyond the paper": {
        "expert_layers": "every_second",
        "expert_rank": 8,
        "shared_expert": True,
        "token_deltas": 2,
        "routing_source": "attention",
    },
    "dropless_top2": {"routing": "dropless_top2", "grouped_product": "ragged"},
    "remoe": {"routing": "remoe", "document_mask": True},
}
PROMPTS = [[1, 5, 9], [2, 3, 4, 5, 6, 7]]  # neither divides over 8 devices


def logits(params, routing, ffn, config=CONFIG):
    seen = []

    def choose(logits_BxV, positions_B):
        seen.append(jax.device_get(logits_BxV))
        return jnp.argmax(logits_BxV, axis=-1)

    list(decode(config, params, PROMPTS, choose, max_new_tokens=7, routing=routing, ffn=ffn))
    return np.stack(seen)


def bytes_of_step(params, ffn):
    """Of weights and cache, on all devices and on one; and what a step needs beside them."""
    decoder = make_decoder(CONFIG, "prompt", mesh_of(params), ffn)
    tokens, lengths = np.ones((2, 8), np.int32), np.full(2, 8, np.int32)
    _, merged, cache = decoder.prefill(params, tokens, lengths, 32, None)
    weights = decoder.weights(params, merged)
    leaves = jax.tree.leaves((weights, cache))
    step = decoder.step.lower(weights, cache, tokens[:, 0]).compile()
    return {
        "whole": sum(leaf.nbytes for leaf in leaves),
        "one device": sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves),
        "temporaries": step.memory_analysis().temp_size_in_bytes,
    }


def on_meshes(config, shapes):
    return {
        shape: jax.device_put(params_of(config), shardings(build(config)[1], make_mesh(*shape)))
        for shape in shapes
    }


def error(got, expected) -> float:
    """Relative to the largest logit."""
    return float(np.max(np.abs(got - expected)) / np.max(np.abs(expected)))


def main() -> None:
    report, one_device = {}, jax.devices()[0]
    on = on_meshes(CONFIG, ((1, 8, 1), (1, 2, 4)))
    for ffn in ("merged", "experts"):
        for routing in ("prompt", "segment"):
            expected = logits(jax.device_put(params_of(CONFIG), one_device), routing, ffn)
            for shape, sharded in on.items():
                got = logits(sharded, routing, ffn)
                report[f"{routing} {ffn} {shape}"] = error(got, expected)
        report[f"bytes {ffn}"] = {
            str(shape): bytes_of_step(sharded, ffn) for shape, sharded in on.items()
        }
    for name, fields in OTHERS.items():
        config = dataclasses.replace(CONFIG, **fields)
        expected = logits(
            jax.device_put(params_of(config), one_device), "segment", "merged", config
        )
        for shape, sharded in on_meshes(config, ((1, 2, 4),)).items():
            got = logits(sharded, "segment", "merged", config)
            report[f"{name} {shape}"] = error(got, expected)
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
