"""The sparse baselines written as plain loops over numpy float64 arrays, to compare with.

As in `reference.py`: nothing is shared with `lory_jax`, and `frozen` holds routing weights of
segment 1 that do not move when an input is nudged.
"""

import math
from dataclasses import dataclass

import numpy as np

from tests.support.reference import routing_weights, segments, silu, softmax

CHOICES = {"top1": 1, "top2": 2, "expert_choice_token": 1, "expert_choice_segment": 1}
CHOICES |= {"dropless_top1": 1, "dropless_top2": 2}


@dataclass
class Unit:
    """What is routed: tokens `start` to `end` of row `b`, and its distribution over the experts."""

    b: int
    start: int
    end: int
    p: np.ndarray


def units_of(h_BxLxD, router, routing, T, prompts=None, frozen=None):
    """The units of a batch in order; `prompts` None routes segments as in training."""
    found = []
    for b, h_LxD in enumerate(h_BxLxD):
        if routing != "expert_choice_segment":
            found += [Unit(b, i, i + 1, softmax(h @ router)) for i, h in enumerate(h_LxD)]
            continue
        kind, prompt = ("causal", 0) if prompts is None else ("segment", max(prompts[b], 1))
        known = None if frozen is None else frozen[b]
        weights = routing_weights(h_LxD, router, T, kind, "self", prompt, known)
        bounds = segments(len(h_LxD), T)
        found += [Unit(b, *bound, p) for bound, p in zip(bounds, weights, strict=True)]
    return found


def expert_output(h_D, params, e):
    gate, up, down = (params[name][e] for name in ("gate", "up", "down"))
    return (silu(h_D @ gate) * (h_D @ up)) @ down


def chosen(unit, params, choices):
    """The experts of a unit, best first: by probability, and by the bias where there is one."""
    return np.argsort(-(unit.p + params.get("choice_bias", 0.0)))[:choices]


def train(h_BxLxD, params, routing, T, factor, group=0, frozen=None, decided_by=None):
    """Output [B, L, D], load-balancing loss, share of units that no expert takes.

    Experts choose by the distributions of `decided_by` where it is given (units of the inputs
    before they were nudged): segments 1 and 2 of a row have the same one, and a nudge breaks ties.
    """
    group = group or len(h_BxLxD)
    units = units_of(h_BxLxD, params["router"], routing, T, frozen=frozen)
    rank = {(unit.b, unit.start): unit.p for unit in decided_by or units}
    num_experts = params["router"].shape[1]
    out = np.zeros_like(h_BxLxD)
    taken, balances = set(), []

    def add(unit, e, weight):
        taken.add((unit.b, unit.start))
        for i in range(unit.start, unit.end):
            out[unit.b, i] += weight * expert_output(h_BxLxD[unit.b, i], params, e)

    for first in range(0, len(h_BxLxD), group):
        mine = [unit for unit in units if first <= unit.b < first + group]
        slots = math.ceil(factor * CHOICES[routing] * len(mine) / num_experts)
        slots = max(1, min(slots, len(mine)))
        if routing.startswith("expert_choice"):
            for e in range(num_experts):
                by_weight = sorted(mine, key=lambda unit, e=e: -rank[unit.b, unit.start][e])
                for unit in by_weight[:slots]:
                    add(unit, e, unit.p[e])
            continue
        left = [len(mine) if routing.startswith("dropless") else slots] * num_experts
        for choice in range(CHOICES[routing]):
            for unit in mine:
                best = chosen(unit, params, CHOICES[routing])
                e = best[choice]
                weight = unit.p[e] / (sum(unit.p[best]) if len(best) > 1 else 1.0)
                if left[e]:
                    left[e] -= 1
                    add(unit, e, weight)
        balance = 0.0
        for e in range(num_experts):
            asked = sum(np.argmax(unit.p) == e for unit in mine) / len(mine)
            balance += num_experts * asked * sum(unit.p[e] for unit in mine) / len(mine)
        balances.append(balance)
    return out, np.mean(balances) if balances else None, 1 - len(taken) / len(units)


def gates(h_D, params, routing):
    """The gates of a token: of ReMoE, or by thresholds."""
    if routing == "remoe":
        return np.maximum(h_D @ params["router"], 0.0)
    scores = h_D @ params["router"]
    pairs = zip(scores, params["threshold"], strict=True)
    return np.array([1 / (1 + np.exp(-score)) if score > t else 0.0 for score, t in pairs])


def gated(h_BxLxD, params, routing, experts_per_token):
    """Output [B, L, D], ReMoE's L1 loss, share of tokens without experts, load per expert."""
    out, E = np.zeros_like(h_BxLxD), params["router"].shape[1]
    g = np.array([[gates(h, params, routing) for h in h_LxD] for h_LxD in h_BxLxD])
    for b, i, e in np.ndindex(g.shape):
        if g[b, i, e]:
            out[b, i] += g[b, i, e] * expert_output(h_BxLxD[b, i], params, e)
    tokens = g.reshape(-1, E)
    load = [np.mean([gate[e] > 0 for gate in tokens]) for e in range(E)]
    l1 = np.mean([sum(E / experts_per_token * load[e] * t[e] for e in range(E)) for t in tokens])
    dropped = np.mean([not any(gate > 0) for gate in tokens])
    return out, l1 if routing == "remoe" else None, dropped, load


def evaluate(h_BxLxD, params, routing, T, choices, prompts):
    """Every unit through its own `choices` experts: output [B, L, D]."""
    out = np.zeros_like(h_BxLxD)
    for unit in units_of(h_BxLxD, params["router"], routing, T, prompts):
        best = chosen(unit, params, choices)
        for e in best:
            weight = unit.p[e] / (sum(unit.p[best]) if routing.endswith("top2") else 1.0)
            for i in range(unit.start, unit.end):
                out[unit.b, i] += weight * expert_output(h_BxLxD[unit.b, i], params, e)
    return out
