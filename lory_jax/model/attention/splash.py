"""The Pallas flash attention that comes with JAX, for TPUs: grouped heads, documents, any width.

Letters: B batch, L sequence, H heads of queries, G heads of keys and values, K head width.
"""

from jax import Array, vmap
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from lory_jax.model.attention.names import SAVED_ATTENTION
from lory_jax.parallel import on_mesh, partition_spec

QUERIES = 512  # of a tile; the fewest that fill a v5e's matrix unit
KEYS = 1024
# The backward pass writes a partial gradient of all queries per block of keys, to be summed later.
KEYS_BACKWARD = 2048


def splash_attention(
    query: Array,
    key: Array,
    value: Array,
    batch_axis: str,
    heads_axis: str,
    starts_BxL: Array | None = None,
    interpret: bool = False,
) -> Array:
    """Causal attention of `[B, H, K, L]` over `[B, G, K, L]`: `[B, H, L, K]`.

    Under a mesh, each device runs it on its own sequences and heads. L is a multiple of 128. Tokens
    of one document have the same `starts_BxL`, which serves as the kernel's segment id.
    """
    L = query.shape[3]
    blocks = _blocks(L)

    def attend_here(
        query_BxHxKxL: Array, key_BxGxKxL: Array, value_BxGxKxL: Array, *starts: Array
    ) -> Array:
        heads = query_BxHxKxL.shape[1]
        kernel = splash.make_splash_mha(
            splash.MultiHeadMask([splash.CausalMask((L, L))] * heads),
            block_sizes=blocks,
            head_shards=1,
            q_seq_shards=1,
            residual_checkpoint_name=SAVED_ATTENTION,
            interpret=interpret,
        )
        # The kernel's interface has L before K and swaps them itself: both swaps vanish.
        rows = (x.swapaxes(2, 3) for x in (query_BxHxKxL, key_BxGxKxL, value_BxGxKxL))
        documents = [splash.SegmentIds(starts_BxL, starts_BxL) for starts_BxL in starts]
        return vmap(kernel)(*rows, *documents)

    spec = partition_spec((batch_axis, heads_axis, "head_dim", "length"))
    starts = () if starts_BxL is None else (starts_BxL,)
    starts_spec = partition_spec((batch_axis, "length"))
    run = on_mesh(attend_here, (spec,) * 3 + (starts_spec,) * len(starts), spec)
    return run(query * query.shape[2] ** -0.5, key, value, *starts)


def _blocks(L: int) -> splash.BlockSizes:
    def largest(limit: int) -> int:
        return next(size for size in (limit, 1024, 512, 256, 128) if size <= limit and not L % size)

    layout = splash.QKVLayout.SEQ_MINOR
    return splash.BlockSizes(
        block_q=largest(QUERIES),
        block_kv=largest(KEYS),
        block_kv_compute=largest(512),
        block_q_dkv=largest(QUERIES),
        block_kv_dkv=largest(KEYS_BACKWARD),
        block_kv_dkv_compute=largest(512),
        use_fused_bwd_kernel=True,
        q_layout=layout,
        k_layout=layout,
        v_layout=layout,
    )
