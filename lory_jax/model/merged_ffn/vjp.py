"""The merged FFN with its gradient derived by hand, out of three products that each merge once.

A matrix of the experts joins the model's D and the FFN's F, and enters in three ways, with M_s the
matrix merged for segment s:

    to_hidden     [S, T, D] to [S, T, F]: gate and up forward, down backward
    from_hidden   [S, T, F] to [S, T, D]: down forward, gate and up backward
    gradients     of its experts and of the routing weights, from both sides' activations

Elementwise work on `[S, T, F]` is passed to `to_hidden`, so that a kernel can do it next to its
products.

`Products` holds one implementation of them. No product hands merged weights or their gradients out,
so each implementation decides how much of them to hold. The backward pass keeps x, the experts, the
routing weights, and the two hidden activations, as that of a dense FFN does. Under
rematerialisation the two are computed again, as a dense FFN's are.

Under a mesh all this runs inside `shard_map` with explicit collectives: experts are gathered over
`fsdp`, one matrix at a time; activations travel over `tensor`; expert parameters and their
gradients never do (see model/experts.py).

Letters: S segments (B * N), T tokens per segment, D model, F FFN, E experts.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from lory_jax.model.experts import (
    BATCH_SPEC,
    EXPERT_SPECS,
    FSDP,
    HIDDEN_SPEC,
    REPLICAS,
    TENSOR,
    Experts,
)
from lory_jax.model.merged_ffn.reference import SAVED_HIDDEN
from lory_jax.parallel import has_mesh, on_mesh


@dataclass(frozen=True)
class Products:
    """An implementation of the three products, and the layout of the experts that it needs.

    Attributes:
      lay_out: `(w [E, D, F] or [E, F, D], name)` to the layout of the products below, in which F
        may be padded with zeros; a linear map.
      take_back: its inverse, given the shape to return.
      d_axis: `name` to the axis of D in that layout.
      to_hidden: `(x [S, T, D], weights, r [S, E], combine, *given [S, T, F])` to what `combine`
        makes of the products and of `given`, in x's type.
      from_hidden: `(hidden [S, T, F], weights, r)` to the sum of the products, `[S, T, D]` in the
        type of the activations; both by the matrix's name.
      gradients: `(x [S, T, D], h [S, T, F], w, r, name)` to the gradients of w, in its type, and of
        r, in float32, both summed in float32.
    """

    lay_out: Callable[[Array, str], Array]
    take_back: Callable[[Array, str, tuple[int, ...]], Array]
    d_axis: Callable[[str], int]
    to_hidden: Callable[..., tuple[Array, ...]]
    from_hidden: Callable[[Mapping[str, Array], Mapping[str, Array], Array], Array]
    gradients: Callable[[Array, Array, Array, Array, str], tuple[Array, Array]]


Combine = Callable[..., tuple[Array, ...]]  # elementwise, on float32 arrays

Saved = tuple[Array, Experts, Array, Array, Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def products_ffn(products: Products, x_SxTxD: Array, experts: Experts, r_SxE: Array) -> Array:
    """The merged FFN by these products: `[S, T, D]` in x's type."""
    return _fwd(products, x_SxTxD, experts, r_SxE)[0]


def _fwd(products: Products, x_SxTxD: Array, experts: Experts, r_SxE: Array) -> tuple[Array, Saved]:
    specs_in = (BATCH_SPEC, EXPERT_SPECS, BATCH_SPEC)
    specs_out = (BATCH_SPEC, HIDDEN_SPEC, HIDDEN_SPEC)
    run = on_mesh(functools.partial(forward, products), specs_in, specs_out)
    y_SxTxD, gate_SxTxF, up_SxTxF = run(x_SxTxD, experts, r_SxE)
    gate_SxTxF = checkpoint_name(gate_SxTxF, SAVED_HIDDEN)
    up_SxTxF = checkpoint_name(up_SxTxF, SAVED_HIDDEN)
    return y_SxTxD, (x_SxTxD, experts, r_SxE, gate_SxTxF, up_SxTxF)


def _bwd(
    products: Products, saved: Saved, dy_SxTxD: Array
) -> tuple[Array, dict[str, Array], Array]:
    specs_in = (BATCH_SPEC, EXPERT_SPECS, BATCH_SPEC, HIDDEN_SPEC, HIDDEN_SPEC, BATCH_SPEC)
    specs_out = (BATCH_SPEC, EXPERT_SPECS, BATCH_SPEC)
    run = on_mesh(functools.partial(backward, products), specs_in, specs_out)
    dx_SxTxD, dexperts, dr_SxE = run(*saved, dy_SxTxD)
    experts, r_SxE = saved[1:3]
    dexperts = {name: dw.astype(experts[name].dtype) for name, dw in dexperts.items()}
    return dx_SxTxD, dexperts, dr_SxE.astype(r_SxE.dtype)


products_ffn.defvjp(_fwd, _bwd)


def forward(
    products: Products, x_SxTxD: Array, experts: Experts, r_SxE: Array
) -> tuple[Array, Array, Array]:
    """Returns the output and, before the activation function, gate and up."""
    whole = functools.partial(_whole, products, experts, x_SxTxD)
    with jax.named_scope("expert_ffn"):
        inwards = {name: whole(name) for name in ("gate", "up")}
        gate_SxTxF, up_SxTxF, hidden_SxTxF = products.to_hidden(x_SxTxD, inwards, r_SxE, activate)
        outwards = {"down": whole("down")}
        y_SxTxD = products.from_hidden({"down": hidden_SxTxF}, outwards, r_SxE)
        if has_mesh():
            y_SxTxD = jax.lax.psum(y_SxTxD, TENSOR)
    return y_SxTxD, gate_SxTxF, up_SxTxF


def activate(gate: Array, up: Array) -> tuple[Array, Array, Array]:
    return gate, up, jax.nn.silu(gate) * up


def activate_backward(dhidden: Array, gate: Array, up: Array) -> tuple[Array, Array, Array]:
    """Returns the gradients of gate and up, and the recomputed hidden activation."""
    sigmoid = jax.nn.sigmoid(gate)
    act = gate * sigmoid
    dgate = dhidden * up * (sigmoid + act * (1 - sigmoid))
    return dgate, dhidden * act, act * up


def backward(
    products: Products,
    x_SxTxD: Array,
    experts: Experts,
    r_SxE: Array,
    gate_SxTxF: Array,
    up_SxTxF: Array,
    dy_SxTxD: Array,
) -> tuple[Array, dict[str, Array], Array]:
    """Gradients of x and of the experts in x's type, and of the routing weights in float32."""
    weights = {name: _whole(products, experts, x_SxTxD, name) for name in experts}
    with jax.named_scope("expert_ffn"):
        dgate_SxTxF, dup_SxTxF, hidden_SxTxF = products.to_hidden(
            dy_SxTxD, {"down": weights["down"]}, r_SxE, activate_backward, gate_SxTxF, up_SxTxF
        )
        dinwards = {"gate": dgate_SxTxF, "up": dup_SxTxF}
        dx_SxTxD = products.from_hidden(dinwards, weights, r_SxE)
        sides = {
            "gate": (x_SxTxD, dgate_SxTxF),
            "up": (x_SxTxD, dup_SxTxF),
            "down": (dy_SxTxD, hidden_SxTxF),
        }
        dexperts, dr_SxE = {}, jnp.zeros(r_SxE.shape, jnp.float32)
        for name, (on_d, on_f) in sides.items():
            dw, dr = products.gradients(on_d, on_f, weights[name], r_SxE, name)
            dexperts[name], dr_SxE = dw, dr_SxE + dr
    if has_mesh():
        dx_SxTxD = jax.lax.psum(dx_SxTxD, TENSOR)
        dr_SxE = jax.lax.psum(dr_SxE, TENSOR)
        for name, dw in dexperts.items():
            axis = products.d_axis(name)
            dw = jax.lax.psum_scatter(dw, FSDP, scatter_dimension=axis, tiled=True)
            dexperts[name] = jax.lax.psum(dw, REPLICAS)
    dexperts = {
        name: products.take_back(dw, name, experts[name].shape) for name, dw in dexperts.items()
    }
    return dx_SxTxD, dexperts, dr_SxE


def _whole(products: Products, experts: Experts, like: Array, name: str) -> Array:
    """A matrix of every expert, in the compute type and the products' layout, complete along D.

    It is laid out before it is gathered: what moves is in the compute type, and what is copied is
    this device's part.
    """
    with jax.named_scope("merge"):
        w = products.lay_out(experts[name].astype(like.dtype), name)
        if has_mesh():
            w = jax.lax.all_gather(w, FSDP, axis=products.d_axis(name), tiled=True)
    return w
