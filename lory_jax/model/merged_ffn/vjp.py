"""The merged FFN with its gradient derived by hand, out of three products that each merge once.

A matrix of the experts joins the model's D and the FFN's F, and enters in three ways, with M_s the
matrix merged for segment s:

    to_hidden     [S, T, D] to [S, T, F]: gate and up forward, down backward
    from_hidden   [S, T, F] to [S, T, D]: down forward, gate and up backward
    gradients     of its experts and of the routing weights, from both sides' activations

`Products` holds one implementation of them. No product hands merged weights or their gradients out,
so each is free in how much of them it holds. What the backward pass keeps is x, the experts, the
routing weights, and the two hidden activations: what a dense FFN keeps. Under rematerialisation
the two are computed again, as a dense FFN's are.

Under a mesh all this runs inside `shard_map` and moves what must move itself: experts are gathered
over `fsdp`, one matrix at a time, activations travel over `tensor`, expert parameters and their
gradients never do (paper, section 6: expert-wise model parallelism).

Letters: S segments (B * N), T tokens per segment, D model, F FFN, E experts.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from lory_jax.model.merged_ffn.reference import Experts
from lory_jax.parallel import RULES, partition_spec


@dataclass(frozen=True)
class Products:
    """An implementation of the three products, and the layout of the experts that it takes.

    Attributes:
      lay_out: `(w [E, D, F] or [E, F, D], name)` to the layout of the products below; a linear map.
      take_back: its inverse, given E.
      d_axis: `name` to the axis of D in that layout.
      to_hidden: `(x [S, T, D], w, r [S, E], name)` to `[S, T, F]` in x's type.
      from_hidden: `(h [S, T, F], w, r, name)` to float32 `[S, T, D]`.
      gradients: `(x [S, T, D], h [S, T, F], w, r, name)` to the float32 gradients of w and r.
    """

    lay_out: Callable[[Array, str], Array]
    take_back: Callable[[Array, str, int], Array]
    d_axis: Callable[[str], int]
    to_hidden: Callable[[Array, Array, Array, str], Array]
    from_hidden: Callable[[Array, Array, Array, str], Array]
    gradients: Callable[[Array, Array, Array, Array, str], tuple[Array, Array]]


# Where the arguments lie under a mesh.
SEGMENTS = partition_spec(("moe_batch",))
HIDDEN = partition_spec(("moe_batch", "length", "mlp"))
EXPERTS = {
    "gate": partition_spec(("experts", "embed", "mlp")),
    "up": partition_spec(("experts", "embed", "mlp")),
    "down": partition_spec(("experts", "mlp", "embed")),
}
(FSDP,), (TENSOR,) = RULES["embed"], RULES["mlp"]
REPLICAS = "data"

Saved = tuple[Array, Experts, Array, Array, Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def products_ffn(products: Products, x_SxTxD: Array, experts: Experts, r_SxE: Array) -> Array:
    """The merged FFN by these products: `[S, T, D]` in x's type."""
    return _fwd(products, x_SxTxD, experts, r_SxE)[0]


def _fwd(products: Products, x_SxTxD: Array, experts: Experts, r_SxE: Array) -> tuple[Array, Saved]:
    run = _on_mesh(forward, products, (SEGMENTS, EXPERTS, SEGMENTS), (SEGMENTS, HIDDEN, HIDDEN))
    y_SxTxD, gate_SxTxF, up_SxTxF = run(x_SxTxD, experts, r_SxE)
    return y_SxTxD, (x_SxTxD, experts, r_SxE, gate_SxTxF, up_SxTxF)


def _bwd(
    products: Products, saved: Saved, dy_SxTxD: Array
) -> tuple[Array, dict[str, Array], Array]:
    specs_in = (SEGMENTS, EXPERTS, SEGMENTS, HIDDEN, HIDDEN, SEGMENTS)
    run = _on_mesh(backward, products, specs_in, (SEGMENTS, EXPERTS, SEGMENTS))
    dx_SxTxD, dexperts, dr_SxE = run(*saved, dy_SxTxD)
    experts, r_SxE = saved[1:3]
    dexperts = {name: dw.astype(experts[name].dtype) for name, dw in dexperts.items()}
    return dx_SxTxD, dexperts, dr_SxE.astype(r_SxE.dtype)


products_ffn.defvjp(_fwd, _bwd)


def _on_mesh(
    function: Callable[..., Any], products: Products, in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    """`function` on this device's part of everything; without a mesh, on everything."""
    if jax.sharding.get_abstract_mesh().empty:
        return functools.partial(function, products, on_mesh=False)
    return jax.shard_map(
        functools.partial(function, products, on_mesh=True),
        in_specs=in_specs,
        out_specs=out_specs,
        check_vma=False,
    )


def forward(
    products: Products, x_SxTxD: Array, experts: Experts, r_SxE: Array, *, on_mesh: bool
) -> tuple[Array, Array, Array]:
    """The output, and gate and up before the activation function."""
    whole = functools.partial(_whole, products, experts, x_SxTxD, on_mesh)
    with jax.named_scope("expert_ffn"):
        gate_SxTxF = products.to_hidden(x_SxTxD, whole("gate"), r_SxE, "gate")
        up_SxTxF = products.to_hidden(x_SxTxD, whole("up"), r_SxE, "up")
        hidden_SxTxF = _hidden(gate_SxTxF, up_SxTxF)
        y_SxTxD = products.from_hidden(hidden_SxTxF, whole("down"), r_SxE, "down")
        y_SxTxD = y_SxTxD.astype(x_SxTxD.dtype)
        if on_mesh:
            y_SxTxD = jax.lax.psum(y_SxTxD, TENSOR)
    return y_SxTxD, gate_SxTxF, up_SxTxF


def _hidden(gate_SxTxF: Array, up_SxTxF: Array) -> Array:
    gate32_SxTxF = gate_SxTxF.astype(jnp.float32)
    return (jax.nn.silu(gate32_SxTxF) * up_SxTxF).astype(gate_SxTxF.dtype)


def backward(
    products: Products,
    x_SxTxD: Array,
    experts: Experts,
    r_SxE: Array,
    gate_SxTxF: Array,
    up_SxTxF: Array,
    dy_SxTxD: Array,
    *,
    on_mesh: bool,
) -> tuple[Array, dict[str, Array], Array]:
    """Gradients of x in its type, and of the experts and routing weights in float32."""
    dtype = x_SxTxD.dtype
    weights = {name: _whole(products, experts, x_SxTxD, on_mesh, name) for name in experts}
    with jax.named_scope("expert_ffn"):
        dhidden_SxTxF = products.to_hidden(dy_SxTxD, weights["down"], r_SxE, "down")
        # silu and its derivative, in float32
        gate32_SxTxF = gate_SxTxF.astype(jnp.float32)
        sigmoid_SxTxF = jax.nn.sigmoid(gate32_SxTxF)
        act_SxTxF = gate32_SxTxF * sigmoid_SxTxF
        dact_SxTxF = sigmoid_SxTxF + act_SxTxF * (1 - sigmoid_SxTxF)
        dup_SxTxF = (dhidden_SxTxF * act_SxTxF).astype(dtype)
        dgate_SxTxF = (dhidden_SxTxF * up_SxTxF * dact_SxTxF).astype(dtype)
        dx_SxTxD = products.from_hidden(dgate_SxTxF, weights["gate"], r_SxE, "gate")
        dx_SxTxD += products.from_hidden(dup_SxTxF, weights["up"], r_SxE, "up")
        dx_SxTxD = dx_SxTxD.astype(dtype)
        hidden_SxTxF = (act_SxTxF * up_SxTxF).astype(dtype)
        sides = {
            "gate": (x_SxTxD, dgate_SxTxF),
            "up": (x_SxTxD, dup_SxTxF),
            "down": (dy_SxTxD, hidden_SxTxF),
        }
        dexperts, dr_SxE = {}, jnp.zeros(r_SxE.shape, jnp.float32)
        for name, (on_d, on_f) in sides.items():
            dw, dr = products.gradients(on_d, on_f, weights[name], r_SxE, name)
            dexperts[name], dr_SxE = dw, dr_SxE + dr
    if on_mesh:
        dx_SxTxD = jax.lax.psum(dx_SxTxD, TENSOR)
        dr_SxE = jax.lax.psum(dr_SxE, TENSOR)
        for name, dw in dexperts.items():
            axis = products.d_axis(name)
            dw = jax.lax.psum_scatter(dw, FSDP, scatter_dimension=axis, tiled=True)
            dexperts[name] = jax.lax.psum(dw, REPLICAS)
    dexperts = {name: products.take_back(dw, name, r_SxE.shape[1]) for name, dw in dexperts.items()}
    return dx_SxTxD, dexperts, dr_SxE


def _whole(products: Products, experts: Experts, like: Array, on_mesh: bool, name: str) -> Array:
    """A matrix of every expert, in the compute type and the products' layout, whole in D.

    It is laid out before it is gathered: what moves is in the compute type, and what is copied is
    this device's part.
    """
    with jax.named_scope("merge"):
        w = products.lay_out(experts[name].astype(like.dtype), name)
        if on_mesh:
            w = jax.lax.all_gather(w, FSDP, axis=products.d_axis(name), tiled=True)
    return w
