"""Small FFNs of which every token picks one (`config.model.token_deltas`), beyond the paper.

They stand beside the FFN of a layer, whatever it is: a segment merges the large FFN, and each token
corrects it. Delta j is a SwiGLU FFN of F / 16 hidden units, so what it adds has that rank:

    y  =  FFN(x) + p_j(x) delta_j(x),   p = softmax(x R),   j = argmax p

The probability of the picked delta is its weight, so the router learns from the loss alone, end to
end; there is no capacity, and no token is dropped. All deltas are computed, side by side in three
products, and all but one are masked: 6 k D F / 16 FLOPs per token, forward. A token reads only its
own hidden state, so decoding needs no state for them. Their last matrices start at zero.

Letters: B batch, L sequence, D model, k deltas, f hidden units of one.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from lory_jax.model.config import ModelConfig
from lory_jax.model.parameters import Initializer
from lory_jax.model.routing import route

AXES = {
    "gate": ("experts", "embed", "rank"),
    "up": ("experts", "embed", "rank"),
    "down": ("experts", "rank", "embed"),
}


class TokenDeltas(nnx.Module):
    """The deltas of a layer and the router that picks among them."""

    def __init__(self, init: Initializer, config: ModelConfig):
        D, k, f = config.embed_dim, config.token_deltas, config.delta_width
        self.router = init.matrix(
            (D, k), ("embed", "router_experts"), fan_in=D, scale=config.router_init_scale
        )
        self.gate = init.matrix((k, D, f), AXES["gate"], fan_in=D)
        self.up = init.matrix((k, D, f), AXES["up"], fan_in=D)
        self.down = init.constant((k, f, D), AXES["down"], 0.0)

    def __call__(self, x_BxLxD: Array) -> Array:
        """What the picked deltas add to every token, `[B, L, D]`."""
        matrices = {name: getattr(self, name)[...] for name in AXES}
        return picked_deltas(x_BxLxD, matrices, self.router[...])


def picked_deltas(x_BxLxD: Array, deltas: Mapping[str, Array], router_Dxk: Array) -> Array:
    """`p_j delta_j(x)` of every token, `[B, L, D]` in the type of x.

    Args:
      x_BxLxD: hidden states, in the compute type.
      deltas: `{"gate": [k, D, f], "up": [k, D, f], "down": [k, f, D]}`.
      router_Dxk: the router; its softmax is computed in float32.
    """
    dtype = x_BxLxD.dtype
    gate_kxDxf, up_kxDxf, down_kxfxD = (deltas[name].astype(dtype) for name in AXES)
    with jax.named_scope("router"):
        p_BxLxk = route(x_BxLxD, router_Dxk)
        is_picked_BxLxk = jax.nn.one_hot(jnp.argmax(p_BxLxk, axis=-1), p_BxLxk.shape[-1])
        weight_BxLxkx1 = (p_BxLxk * is_picked_BxLxk).astype(dtype)[..., None]
    with jax.named_scope("expert_ffn"):
        gate_BxLxkxf = jnp.einsum("bld,kdf->blkf", x_BxLxD, gate_kxDxf)
        up_BxLxkxf = jnp.einsum("bld,kdf->blkf", x_BxLxD, up_kxDxf)
        hidden_BxLxkxf = weight_BxLxkx1 * (jax.nn.silu(gate_BxLxkxf) * up_BxLxkxf)
        return jnp.einsum("blkf,kfd->bld", hidden_BxLxkxf, down_kxfxD)
