"""The sparse baselines: token-to-expert assignment and the grouped FFN.

    expert_choice_segment  experts choose segments, by Lory's causal routing weights
    expert_choice_token    experts choose tokens (Zhou et al. 2022, arXiv 2202.09368)
    top1                   tokens choose one expert (Switch: Fedus et al., arXiv 2101.03961)
    top2                   tokens choose two experts (GShard: Lepikhin et al., arXiv 2006.16668)
    dropless_top1, _top2   the same without slots: no token is dropped

In training with slots, what is routed (a *unit*: a token, or a segment of T tokens) competes
within a group of sequences for the experts' *slots*. There are as many slots per expert as its
capacity, so all shapes are static: tokens are gathered into the slots, one batched matrix product
serves all experts, and the results are added to where the tokens came from. A unit without a slot
gets 0, and passes through the residual alone.

At evaluation and inference, and in training without slots, every unit uses its own k most likely
experts, whatever else is in the batch: nothing is dropped and no unit depends on another
(dropless.py).

Letters: B batch, L sequence, G groups, n units of a group, T tokens per unit, C slots per expert,
k experts per unit, D model, F FFN, E experts.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from lory_jax.model.experts import MATRICES, Experts
from lory_jax.model.routing_rules import EXPERT_CHOICE, TOKEN_CHOICE


class Slots(NamedTuple):
    """The units that the experts of every group process.

    units_GxExC: which unit of the group is in the slot.
    weights_GxExC: what its output is multiplied by, float32; 0 in an empty slot.
    """

    units_GxExC: Array
    weights_GxExC: Array


def assign(
    p_BxUxE: Array, routing: str, factor: float, group: int, bias_E: Array | None = None
) -> tuple[Slots, Array | None, Array]:
    """Fills the slots in training.

    Args:
      p_BxUxE: the router's probabilities of U units (tokens or segments) of every sequence.
      routing: one of `SPARSE`.
      factor: the capacity factor.
      group: sequences that compete for slots; 0 is all of them.
      bias_E: what `choose_experts` adds to choose; only tokens choose with one.

    Returns:
      the slots, the load-balancing loss (None for expert choice), and the share of units that got
      none.

    Raises:
      ValueError: the batch is not a multiple of `group`.
    """
    B, U, E = p_BxUxE.shape
    group = group or B
    if B % group:
        raise ValueError(f"a batch of {B} sequences is not a multiple of routing_group={group}")
    n = group * U
    p_GxnxE = p_BxUxE.reshape(B // group, n, E)
    if routing in EXPERT_CHOICE:
        slots, balance = expert_choice(p_GxnxE, capacity(factor, 1, n, E)), None
    else:
        choices = TOKEN_CHOICE[routing]
        slots = token_choice(p_GxnxE, choices, capacity(factor, choices, n, E), bias_E)
        balance = load_balancing_loss(p_GxnxE)
    return slots, balance, dropped_share(slots, n)


def capacity(factor: float, choices: int, units: int, experts: int) -> int:
    """C: slots of an expert for `units` units that make `choices` choices each; at least 1."""
    return max(1, min(units, math.ceil(factor * choices * units / experts)))


# ---------------------------------------------------------------- assignment, in training


def expert_choice(p_GxnxE: Array, slots: int) -> Slots:
    """Every expert chooses the `slots` units that give it most weight (Zhou et al., equation 2).

    A unit may be chosen by several experts or by none.
    """
    weights_GxExC, units_GxExC = jax.lax.top_k(p_GxnxE.swapaxes(1, 2), slots)
    return Slots(units_GxExC, weights_GxExC)


def token_choice(p_GxnxE: Array, choices: int, slots: int, bias_E: Array | None = None) -> Slots:
    """Every unit asks for its `choices` best experts; what comes after the last slot is dropped.

    First choices are served before second ones, and within each, units in their order.
    """
    weights_Gxnxk, experts_Gxnxk = choose_experts(
        p_GxnxE, choices, is_shared=choices > 1, bias_E=bias_E
    )
    E = p_GxnxE.shape[-1]

    def of_group(weights_nxk: Array, experts_nxk: Array) -> Slots:
        n = len(weights_nxk)
        experts_A, weights_A = experts_nxk.T.reshape(-1), weights_nxk.T.reshape(-1)
        asks_AxE = jax.nn.one_hot(experts_A, E, dtype=jnp.int32)
        place_A = jnp.take_along_axis(jnp.cumsum(asks_AxE, axis=0), experts_A[:, None], 1)[:, 0] - 1
        units_A = jnp.tile(jnp.arange(n), choices)

        def put(values_A: Array) -> Array:
            empty_ExC = jnp.zeros((E, slots), values_A.dtype)
            return empty_ExC.at[experts_A, place_A].set(values_A, mode="drop")

        return Slots(put(units_A), put(weights_A))

    return jax.vmap(of_group)(weights_Gxnxk, experts_Gxnxk)


def choose_experts(
    p_xE: Array, choices: int, *, is_shared: bool, bias_E: Array | None = None
) -> tuple[Array, Array]:
    """The weights of every unit's most likely experts and those experts, both `[..., k]`.

    The weights are probabilities, as in Switch and Expert Choice; where they are shared, they are
    scaled to a sum of 1, as in GShard. A bias decides with the probabilities which experts are
    chosen; it changes no weight.
    """
    if bias_E is None:
        weights_xk, experts_xk = jax.lax.top_k(p_xE, choices)
    else:
        _, experts_xk = jax.lax.top_k(p_xE + jnp.broadcast_to(bias_E, p_xE.shape), choices)
        weights_xk = jnp.take_along_axis(p_xE, experts_xk, axis=-1)
    if is_shared:
        weights_xk = weights_xk / jnp.sum(weights_xk, axis=-1, keepdims=True)
    return weights_xk, experts_xk


def load_balancing_loss(p_GxnxE: Array) -> Array:
    """E * sum_e f_e * P_e, the mean over the groups: 1 if balanced, E if one expert gets all.

    f_e is the share of units whose first choice is e, which has no gradient; P_e the mean
    probability of e (Switch, equations 4 to 6; GShard counts first choices too).
    """
    E = p_GxnxE.shape[-1]
    share_GxE = jnp.mean(jax.nn.one_hot(jnp.argmax(p_GxnxE, axis=-1), E), axis=1)
    return E * jnp.mean(jnp.sum(share_GxE * jnp.mean(p_GxnxE, axis=1), axis=-1))


def load(experts_xk: Array, num_experts: int) -> Array:
    """The share of units that chose each expert: float32 `[E]`, whose sum is k."""
    is_chosen_xkE = jax.nn.one_hot(experts_xk, num_experts, dtype=jnp.int32)
    count_E = jnp.sum(is_chosen_xkE, axis=tuple(range(experts_xk.ndim)))
    return count_E.astype(jnp.float32) / (experts_xk.size // experts_xk.shape[-1])


def dropped_share(slots: Slots, units: int) -> Array:
    """The share of units without an expert."""

    def of_group(units_ExC: Array, weights_ExC: Array) -> Array:
        return jnp.zeros(units, bool).at[units_ExC].max(weights_ExC > 0)

    is_taken_Gxn = jax.vmap(of_group)(*slots)
    return jnp.mean(~is_taken_Gxn, dtype=jnp.float32)


# ---------------------------------------------------------------- the FFN of the slots


def slots_ffn(x_BxLxD: Array, slots: Slots, experts: Experts, unit_length: int = 1) -> Array:
    """The weighted sum of the outputs of a unit's experts; 0 where it has none.

    Args:
      x_BxLxD: hidden states, in the compute type.
      slots: the units of every expert; G divides B.
      experts: `{"gate": [E, D, F], "up": [E, D, F], "down": [E, F, D]}`.
      unit_length: T, 1 where the units are tokens; the last of a sequence may be shorter.

    Returns:
      `[B, L, D]` in the type of `x`; differentiable in `x`, the slots' weights and the experts.
    """
    B, L, D = x_BxLxD.shape
    padding = -L % unit_length
    x_BxLxD = jnp.pad(x_BxLxD, ((0, 0), (0, padding), (0, 0)))
    x_GxnxTxD = x_BxLxD.reshape(len(slots.units_GxExC), -1, unit_length, D)
    gate_ExDxF, up_ExDxF, down_ExFxD = (experts[m].astype(x_BxLxD.dtype) for m in MATRICES)
    taken_GxExCxTxD = jax.vmap(lambda x_nxTxD, units_ExC: x_nxTxD[units_ExC])(
        x_GxnxTxD, slots.units_GxExC
    )
    with jax.named_scope("expert_ffn"):
        gate_GxExCxTxF = jnp.einsum("gectd,edf->gectf", taken_GxExCxTxD, gate_ExDxF)
        up_GxExCxTxF = jnp.einsum("gectd,edf->gectf", taken_GxExCxTxD, up_ExDxF)
        hidden_GxExCxTxF = jax.nn.silu(gate_GxExCxTxF) * up_GxExCxTxF
        y_GxExCxTxD = jnp.einsum("gectf,efd->gectd", hidden_GxExCxTxF, down_ExFxD)
    weighted_GxExCxTxD = y_GxExCxTxD.astype(jnp.float32) * slots.weights_GxExC[..., None, None]

    def add_up(units_ExC: Array, weighted_ExCxTxD: Array) -> Array:
        zeros_nxTxD = jnp.zeros(x_GxnxTxD.shape[1:], jnp.float32)
        return zeros_nxTxD.at[units_ExC].add(weighted_ExCxTxD)

    summed_GxnxTxD = jax.vmap(add_up)(slots.units_GxExC, weighted_GxExCxTxD)
    return summed_GxnxTxD.astype(x_BxLxD.dtype).reshape(B, L + padding, D)[:, :L]
