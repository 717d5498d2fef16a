"""The attention of a layer: its projections, and the implementation in the layout that it needs.

Letters: B batch, L sequence, D model, H heads of queries, G heads of keys and values, K head width.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from lory_jax.errors import ConfigError
from lory_jax.model.attention.blocked import blocked_attention
from lory_jax.model.attention.choice import LANES
from lory_jax.model.attention.names import SAVED_QKV
from lory_jax.model.parameters import Initializer
from lory_jax.model.rope import Rope, rotate, rotate_halves
from lory_jax.parallel import on_mesh, partition_spec

NAMES = ("query", "key", "value")


class Attention(nnx.Module):
    """Attention of a layer, or the parameters of a stack of them; the caller holds any cache."""

    def __init__(
        self,
        init: Initializer,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int,
        head_width: int,
        output_scale: float,
        bias: str = "none",
        heads_on_tensor: bool = False,
    ):
        """`bias` is "none", "qkv" (queries, keys and values) or "all" (the output, too)."""
        D, H, G, K = embed_dim, num_heads, num_kv_heads, head_width
        width = "embed" if heads_on_tensor else "attention_embed"
        heads = "tensor_heads" if heads_on_tensor else "heads"
        # Heads of keys have their own axis only if their number is a field that messages can name.
        kv_heads = "tensor_kv_heads" if heads_on_tensor and G != H else heads
        self.query = init.matrix((D, H, K), (width, heads, "head_dim"), fan_in=D)
        self.key = init.matrix((D, G, K), (width, kv_heads, "head_dim"), fan_in=D)
        self.value = init.matrix((D, G, K), (width, kv_heads, "head_dim"), fan_in=D)
        self.output = init.matrix(
            (H, K, D), (heads, "head_dim", width), fan_in=D, scale=output_scale
        )
        self.bias = bias
        if bias != "none":
            self.query_bias = init.constant((H, K), (heads, "head_dim"), 0.0)
            self.key_bias = init.constant((G, K), (kv_heads, "head_dim"), 0.0)
            self.value_bias = init.constant((G, K), (kv_heads, "head_dim"), 0.0)
        if bias == "all":
            self.output_bias = init.constant((D,), ("norm",), 0.0)
        self.batch_axis = "moe_batch" if heads_on_tensor else "batch"
        self.heads_axis = "tensor_heads" if heads_on_tensor else "heads"

    def __call__(
        self,
        x_BxLxD: Array,
        rope: Rope,
        implementation: str,
        starts_BxL: Array | None = None,
        interpret: bool = False,
    ) -> Array:
        """Causal self-attention, all projections included: `[B, L, D]`.

        Args:
          x_BxLxD: the normalised input.
          rope: the rotary embedding; positions count from the beginning of the row.
          implementation: "xla", "cudnn", "splash" or "paired".
          starts_BxL: `document_starts`, to stay inside documents.
          interpret: run the TPU's kernels, slowly, on any platform.

        Raises:
          ConfigError: L is not a multiple of 128, the lanes of a TPU, and a kernel of a TPU runs.
        """
        B, L, _ = x_BxLxD.shape
        if implementation in ("splash", "paired") and L % LANES:
            raise ConfigError(
                f"config.model.sequence_length: got {L}; must be a multiple of {LANES} with "
                f"config.model.attention={implementation}"
            )
        if implementation == "paired":
            if starts_BxL is not None:
                raise ValueError("implementation: got 'paired', which cannot mask documents")
            return self._paired(x_BxLxD, rope, interpret)
        if implementation == "splash":
            return self._splash(x_BxLxD, rope, starts_BxL, interpret)
        positions_BxL = jnp.broadcast_to(jnp.arange(L), (B, L))
        query, key, value = self.project(x_BxLxD, positions_BxL, rope)
        if implementation == "xla":
            return self.combine(blocked_attention(query, key, value, starts_BxL=starts_BxL))
        if implementation == "cudnn":
            if starts_BxL is not None:
                raise ValueError("implementation: got 'cudnn', which cannot mask documents")
            return self.combine(
                jax.nn.dot_product_attention(
                    query, key, value, is_causal=True, implementation="cudnn"
                )
            )
        raise ValueError(
            f"implementation: got {implementation!r}; must be xla, cudnn, splash or paired"
        )

    def project(self, x_BxLxD: Array, positions_BxL: Array, rope: Rope) -> tuple[Array, ...]:
        """Queries `[B, L, H, K]`, keys (both rotated) and values `[B, L, G, K]`."""
        query, key, value = (self._apply(name, x_BxLxD, "bld,dhk->blhk") for name in NAMES)
        return rotate(query, positions_BxL, rope), rotate(key, positions_BxL, rope), value

    def combine(self, values_BxLxHxK: Array) -> Array:
        """The output projection: `[B, L, H, K]` to `[B, L, D]`."""
        return self._combine(values_BxLxHxK, "blhk,hkd->bld")

    def _paired(self, x_BxLxD: Array, rope: Rope, interpret: bool) -> Array:
        """With heads side by side, in whole registers, from the projections to the output's."""
        # Pallas is imported where it is used: not every installation of JAX has it.
        from lory_jax.model.attention.paired import paired_attention

        def attend_here(query: Array, key: Array, value: Array) -> Array:
            return paired_attention(query, key, value, rope, interpret)

        spec = partition_spec((self.batch_axis, "length", "head_dim"))
        query, key, value = (self._apply(name, x_BxLxD, "bld,dk->blk") for name in NAMES)
        heads_BxLxD = on_mesh(attend_here, (spec,) * 3, spec)(query, key, value)
        return self._combine(heads_BxLxD, "blk,kd->bld")

    def _splash(
        self, x_BxLxD: Array, rope: Rope, starts_BxL: Array | None, interpret: bool
    ) -> Array:
        """With L on the lanes, where no head is padded and the halves of a rotation are rows."""
        from lory_jax.model.attention.splash import splash_attention

        L = x_BxLxD.shape[1]
        query, key, value = (self._apply(name, x_BxLxD, "bld,dhk->bhkl") for name in NAMES)
        cos_LxK2, sin_LxK2 = rope.rotation(jnp.arange(L), query.shape[2])
        cos, sin = cos_LxK2.T[None, None], sin_LxK2.T[None, None]
        query, key = (rotate_halves(x, cos, sin, axis=2) for x in (query, key))
        values_BxHxLxK = splash_attention(
            query, key, value, self.batch_axis, self.heads_axis, starts_BxL, interpret
        )
        return self._combine(values_BxHxLxK, "bhlk,hkd->bld")

    def _apply(self, name: str, x_BxLxD: Array, equation: str) -> Array:
        """Queries, keys or values in the layout of the equation; "k" alone is all heads of K."""
        w_DxHxK = getattr(self, name)[...].astype(x_BxLxD.dtype)
        w = w_DxHxK if "h" in equation else w_DxHxK.reshape(len(w_DxHxK), -1)
        y = jnp.einsum(equation, x_BxLxD, w)
        if self.bias != "none":
            bias_HxK = getattr(self, f"{name}_bias")[...].astype(x_BxLxD.dtype)
            by_layout = {
                "bld,dhk->blhk": bias_HxK[None, None],
                "bld,dhk->bhkl": bias_HxK[None, :, :, None],
                "bld,dk->blk": bias_HxK.reshape(1, 1, -1),
            }
            y = y + by_layout[equation]
        return checkpoint_name(y, SAVED_QKV)

    def _combine(self, values: Array, equation: str) -> Array:
        w_HxKxD = self.output[...].astype(values.dtype)
        w = w_HxKxD if "h" in equation else w_HxKxD.reshape(-1, w_HxKxD.shape[2])
        y_BxLxD = jnp.einsum(equation, values, w)
        if self.bias == "all":
            y_BxLxD = y_BxLxD + self.output_bias[...].astype(values.dtype)[None, None]
        return y_BxLxD
