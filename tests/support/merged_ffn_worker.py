"""The merged FFN on 8 faked devices against one, for shapes that hypothesis finds; prints JSON.

python -m tests.support.merged_ffn_worker
"""

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
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from lory_jax.model.merged_ffn.blocks import whole_products  # noqa: E402
from lory_jax.model.merged_ffn.kernel_products import kernel_products  # noqa: E402
from lory_jax.model.merged_ffn.reference import einsum_ffn  # noqa: E402
from lory_jax.model.merged_ffn.vjp import products_ffn  # noqa: E402
from lory_jax.parallel import make_mesh  # noqa: E402

MESHES = [(2, 2, 2), (1, 1, 8)]
PRODUCTS = {"whole": whole_products(), "kernel": kernel_products(interpret=True)}
report = []


def value_and_gradients(run, x, experts, r, dy):
    def both(x, experts, r, dy):
        y, pull = jax.vjp(run, x, experts, r)
        return y, pull(dy)

    return jax.device_get(jax.jit(both)(x, experts, r, dy))


# Sizes that the meshes divide: S by data x fsdp, D by fsdp, F by tensor.
@settings(max_examples=2, deadline=None, derandomize=True, database=None)
@given(
    S=st.sampled_from([4, 12]),
    T=st.integers(1, 5),
    D=st.sampled_from([8, 24]),
    F=st.sampled_from([8, 40]),
    E=st.sampled_from([1, 3, 17]),
)
def compare(S, T, D, F, E):
    rng = np.random.default_rng(0)
    sizes = {"gate": (E, D, F), "up": (E, D, F), "down": (E, F, D)}
    experts = {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in sizes.items()}
    x, dy = jnp.asarray(rng.normal(size=(2, S, T, D)), jnp.float32)
    r = jax.nn.softmax(jnp.asarray(rng.normal(size=(S, E)), jnp.float32))
    expected = value_and_gradients(einsum_ffn, x, experts, r, dy)
    for mesh in MESHES:
        for name, products in PRODUCTS.items():
            with jax.set_mesh(make_mesh(*mesh)):
                got = value_and_gradients(
                    lambda *a, p=products: products_ffn(p, *a), x, experts, r, dy
                )
            errors = [
                float(np.max(np.abs(a - b)) / np.max(np.abs(b)))
                for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
            ]
            shape = {"S": S, "T": T, "D": D, "F": F, "E": E}
            report.append({"mesh": mesh, "by": name, "shape": shape, "error": max(errors)})


compare()
json.dump(report, sys.stdout)
