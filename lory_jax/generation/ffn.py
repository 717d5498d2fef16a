"""The FFN of a decoded token: of one merge, of its row's own merge, or of experts left unmerged.

An FFN is linear in its matrices before and after its activation, so merged and unmerged experts
compute the same function:

    x (sum_e r_e W_e)  =  sum_e (r_e x) W_e  =  [r_1 x, ..., r_E x] [W_1; ...; W_E]

The right-hand side is one matrix product for all rows of a batch, whatever their routing. It reads
E FFNs where merged rows read one each, and computes E times as much. `cost.py` chooses.

Letters: B batch, P padded prompt length, D model, F FFN, E experts, T tokens per segment, R FFNs
(B, or fewer if rows with the same routing share one), n rows that share an FFN.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lory_jax.model.experts import Experts
from lory_jax.model.ffn import DenseFFN, LowRankFFN, MergedFFN, SparseFFN
from lory_jax.model.merged_ffn import apply_ffn
from lory_jax.model.routing import Routing

MERGED, EXPERTS = "merged", "experts"


class Sharing(NamedTuple):
    """Which rows of a batch share which of R merged FFNs.

    rows_Rxn: the rows of every FFN; FFNs of fewer rows repeat their first.
    place_B: where a row is among all `R * n` of them.
    """

    rows_Rxn: Array
    place_B: Array


def share(owner_B: np.ndarray) -> Sharing:
    """`Sharing` of rows whose FFNs have these numbers; every number below the largest occurs."""
    groups = [np.flatnonzero(owner_B == ffn) for ffn in range(int(owner_B.max()) + 1)]
    n = max(map(len, groups))
    rows_Rxn = np.stack([np.pad(g, (0, n - len(g)), constant_values=g[0]) for g in groups])
    place_B = np.zeros(len(owner_B), np.int32)
    for ffn, group in enumerate(groups):
        place_B[group] = ffn * n + np.arange(len(group))
    return Sharing(jnp.asarray(rows_Rxn, jnp.int32), jnp.asarray(place_B))


# ---------------------------------------------------------------- a token of every row


def step_ffn(
    ffn: DenseFFN | MergedFFN, h_Bx1xD: Array, r_BxE: Array | None, sharing: Sharing | None
) -> Array:
    """The FFN's output `[B, 1, D]` for one token of every row.

    Args:
      ffn: a dense FFN, whose matrices may have a leading R; or experts.
      h_Bx1xD: what it reads.
      r_BxE: the routing weights of rows whose experts are not merged, or the probabilities by which
        rows of a sparse baseline choose; None elsewhere.
      sharing: which rows share an FFN; None if all do, or none do.
    """
    if isinstance(ffn, DenseFFN):
        # Without a leading R, the layer has held no experts.
        if sharing is None or ffn.gate[...].ndim == 2:
            return ffn(h_Bx1xD)
        return _shared_ffn(ffn, h_Bx1xD, sharing)
    if r_BxE is None:
        return ffn(h_Bx1xD, Routing("prompt"))[0]
    if isinstance(ffn, SparseFFN):
        return ffn.choose(h_Bx1xD, r_BxE[:, None])
    if isinstance(ffn, LowRankFFN):
        return ffn.merge_and_apply(h_Bx1xD, r_BxE[:, None], "prompt")
    return unmerged_ffn(h_Bx1xD[:, 0], ffn.experts(), r_BxE)[:, None]


def unmerged_ffn(x_BxD: Array, experts: Experts, r_BxE: Array) -> Array:
    """The FFN that merging the experts by `r_BxE` gives every row, without merging them: `[B, D]`.

    Args:
      x_BxD: hidden states.
      experts: as `merged_ffn` takes them, perhaps with biases.
      r_BxE: routing weights, float32.
    """
    dtype = x_BxD.dtype

    def product(x_BxM: Array, name: str) -> Array:
        weighted_BxExM = (r_BxE[:, :, None] * x_BxM.astype(jnp.float32)[:, None]).astype(dtype)
        y_BxN = jnp.einsum("bem,emn->bn", weighted_BxExM, experts[name].astype(dtype))
        bias_ExN = experts.get(f"{name}_bias")
        return y_BxN if bias_ExN is None else y_BxN + (r_BxE @ bias_ExN).astype(dtype)

    with jax.named_scope("expert_ffn"):
        hidden_BxF = jax.nn.silu(product(x_BxD, "gate")) * product(x_BxD, "up")
        return product(hidden_BxF, "down")


def _shared_ffn(ffn: DenseFFN, h_Bx1xD: Array, sharing: Sharing) -> Array:
    """R FFNs, each for its own rows."""
    y_RxnxD = ffn(h_Bx1xD[sharing.rows_Rxn, 0])
    return y_RxnxD.reshape(-1, y_RxnxD.shape[-1])[sharing.place_B][:, None]


# ---------------------------------------------------------------- prompts


def prompt_ffn(
    ffn: DenseFFN | MergedFFN,
    h_BxPxD: Array,
    kind: str,
    lengths_B: Array,
    is_merged: bool,
    given_E: Array | None,
) -> tuple[Array, Any]:
    """The FFN's output for prompts, and what the tokens after them need of their routing.

    Args:
      ffn: the FFN of a layer, as it was trained.
      h_BxPxD: what it reads.
      kind: "prompt" or "segment".
      lengths_B: tokens of each prompt.
      is_merged: whether the tokens after the prompt have merged FFNs.
      given_E: routing weights that replace those of the prompts (`kind` is "prompt").

    Returns:
      `[B, P, D]`, and `next_ffn`; None where there is nothing to keep.
    """
    if isinstance(ffn, DenseFFN):
        return ffn(h_BxPxD), None
    if ffn.config.routes_tokens:
        return ffn(h_BxPxD, Routing("prompt"))[0], None
    routing = Routing(kind, lengths_B)
    if kind == "segment":
        y_BxPxD, routed = ffn(h_BxPxD, routing)
        last_B = (lengths_B - 1) // ffn.config.segment_length
        r_BxE = routed.weights_BxNxE[jnp.arange(len(lengths_B)), last_B]
        return y_BxPxD, next_ffn(ffn, r_BxE, is_merged)
    if given_E is None:
        r_BxE = ffn.routing_weights(h_BxPxD, routing)[:, 0]
    else:
        r_BxE = jnp.broadcast_to(given_E, (len(lengths_B), len(given_E)))
    if isinstance(ffn, SparseFFN):
        return ffn.choose(h_BxPxD, r_BxE[:, None]), r_BxE
    if not is_merged:  # a part of F at a time, so that no more than that part is ever merged
        return ffn.merge_and_apply(h_BxPxD, r_BxE[:, None], kind), r_BxE
    merged = next_ffn(ffn, r_BxE, is_merged)
    return apply_ffn(h_BxPxD, merged), merged


def next_ffn(ffn: MergedFFN, r_RxE: Array, is_merged: bool) -> Any:
    """R merged FFNs in the compute type or, where experts stay unmerged, their weights `[R, E]`."""
    return ffn.merged(r_RxE) if is_merged else r_RxE
