"""Causal grouped-query attention with rotary position embeddings (LLaMA's).

Query head h reads the keys and values of head h // (H / G); G = H is multi-head attention. Keys and
values are never repeated.

`config.model.attention` picks an implementation, none of which holds all L x L scores of the
backward pass on an accelerator:

    "xla"     by blocks of queries, anywhere (blocked.py)
    "cudnn"   flash attention of cuDNN, on GPUs, in bfloat16 (layer.py)
    "splash"  the Pallas flash attention that comes with JAX, on TPUs (splash.py)
    "paired"  a Pallas flash attention for heads of 64, two at a time, on TPUs (paired.py)

Letters: B batch, L queries, M keys, D model, H heads of queries, G heads of keys and values, K head
width.
"""

from lory_jax.model.attention.blocked import (
    Branches,
    attend,
    blocked_attention,
    document_starts,
)
from lory_jax.model.attention.choice import AttentionShape, resolve_attention
from lory_jax.model.attention.layer import Attention
from lory_jax.model.attention.names import SAVED_ATTENTION, SAVED_QKV

__all__ = [
    "SAVED_ATTENTION",
    "SAVED_QKV",
    "Attention",
    "AttentionShape",
    "Branches",
    "attend",
    "blocked_attention",
    "document_starts",
    "resolve_attention",
]
