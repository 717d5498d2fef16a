"""The sparse baselines in which every token has a gate per expert, most of which are 0.

    remoe             the gates are relu(x R), and an L1 loss makes them sparse (ReMoE: Wang et al.
                      2024, arXiv 2412.14711)
    expert_threshold  an expert takes the tokens whose score x R exceeds its threshold, a running
                      mean of the cut-off by which it would choose its share of a batch; a gate is
                      the sigmoid of the score (Expert Threshold: Sun et al. 2026, arXiv 2603.11535)

No token depends on another: in training, only the values that are adjusted after a step do
(adaptation.py). The exception is the beginning of a run with thresholds, when experts take their
share of every batch (`config.train.threshold_warmup_fraction`). How many experts a token has
varies.
`config.model.grouped_product="blocks"` computes those whose gates are open (blocks.py). Otherwise
all experts are computed for all tokens, and most of their outputs are multiplied by 0, which costs
as much as E dense FFNs.

Letters: B batch, L sequence, n tokens of a group, C slots per expert, D model, E experts.
"""

import jax
import jax.numpy as jnp
from jax import Array

from lory_jax.model.experts import MATRICES, Experts
from lory_jax.model.merged_ffn import swiglu
from lory_jax.model.routing import segment_means
from lory_jax.model.sparse.blocks import open_gates_ffn
from lory_jax.model.sparse.capacity import capacity

BELOW_ALL = -1e30  # finite, so that running means of it are


def scores(h_BxLxD: Array, router_DxE: Array) -> Array:
    """What the router says of every token and expert, float32 `[B, L, E]`."""
    return jnp.matmul(
        h_BxLxD.astype(jnp.float32),
        router_DxE.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )


def l1_loss(gates_BxLxE: Array, experts_per_token: int) -> Array:
    """The L1 norm of a token's gates, by which ReMoE balances the load: the mean over the tokens.

    A gate counts as much as its expert is used, 1 where that is by its share of the tokens. That
    factor has no gradient.
    """
    E = gates_BxLxE.shape[-1]
    use_1x1xE = jnp.mean(gates_BxLxE > 0, axis=(0, 1), keepdims=True) * (E / experts_per_token)
    return jnp.mean(jnp.sum(use_1x1xE * gates_BxLxE, axis=-1))


def cutoffs(scores_BxLxE: Array, experts_per_token: int, group: int) -> Array:
    """Where expert choice would cut every expert off: float32 `[E]`, the mean over the groups.

    It is the largest score of an expert among the tokens that it does not choose, `BELOW_ALL` where
    it chooses all of them.
    """
    B, L, E = scores_BxLxE.shape
    n = (group or B) * L
    C = capacity(experts_per_token, 1, n, E)
    if n == C:
        return jnp.full(E, BELOW_ALL, jnp.float32)
    scores_GxExn = scores_BxLxE.reshape(-1, n, E).swapaxes(1, 2)
    largest_GxExC1, _ = jax.lax.top_k(jax.lax.stop_gradient(scores_GxExn), C + 1)
    return jnp.mean(largest_GxExC1[..., -1], axis=0)


def threshold_gates(scores_BxLxE: Array, threshold_E: Array) -> Array:
    """The sigmoid of the scores above the thresholds, 0 in place of the others."""
    is_taken_BxLxE = scores_BxLxE > jnp.broadcast_to(threshold_E, scores_BxLxE.shape)
    return jnp.where(is_taken_BxLxE, jax.nn.sigmoid(scores_BxLxE), 0.0)


def shares(gates_BxLxE: Array, segment_length: int) -> Array:
    """The mean gates of every segment, divided by their sum: float32 `[B, N, E]`."""
    means_BxNxE = segment_means(gates_BxLxE, segment_length)
    total_BxNx1 = jnp.sum(means_BxNxE, axis=-1, keepdims=True)
    return means_BxNxE / jnp.where(total_BxNx1 > 0, total_BxNx1, 1.0)


def gated_ffn(x_BxLxD: Array, gates_BxLxE: Array, experts: Experts, grouped_product: str) -> Array:
    """The sum of all experts' outputs, each multiplied by its gate: `[B, L, D]` in x's type.

    No gate may be below 0.
    """
    if grouped_product == "blocks":
        return open_gates_ffn(x_BxLxD, gates_BxLxE, experts)

    def add(sum_BxLxD: Array, expert: tuple[Array, dict[str, Array]]) -> tuple[Array, None]:
        gate_BxL, matrices = expert
        with jax.named_scope("expert_ffn"):
            y_BxLxD = swiglu(x_BxLxD, *(matrices[m].astype(x_BxLxD.dtype) for m in MATRICES))
        return sum_BxLxD + y_BxLxD.astype(jnp.float32) * gate_BxL[..., None], None

    by_expert = jnp.moveaxis(gates_BxLxE, -1, 0), {name: experts[name] for name in MATRICES}
    zeros_BxLxD = jnp.zeros(x_BxLxD.shape, jnp.float32)
    return jax.lax.scan(add, zeros_BxLxD, by_expert)[0].astype(x_BxLxD.dtype)
