"""The names of the routing rules (`config.model.routing`) and of their variants.

This file imports nothing heavy.
"""

# Lory: expert parameters are merged. "causal" is the paper's rule, the others are baselines.
MERGED = ("causal", "prefix", "uniform")

# What routes a segment under "causal": "last" is the paper's, the others are beyond it.
SOURCES = ("last", "cumulative", "average", "attention")


def shortest_segment(source: str) -> int:
    """With attention, the first token of a segment attends to the others."""
    return 2 if source == "attention" else 1


# Which layers hold experts; "all" is the paper's.
EXPERT_LAYERS = ("all", "upper_half", "every_second")

# Baselines in which experts are chosen rather than merged (see sparse/capacity.py).
EXPERT_CHOICE = ("expert_choice_segment", "expert_choice_token")
DROPLESS = {"dropless_top1": 1, "dropless_top2": 2}  # without a limit on slots
TOKEN_CHOICE = {"top1": 1, "top2": 2} | DROPLESS  # experts that each token chooses
GATED = ("remoe", "expert_threshold")  # every token has a gate per expert (sparse/gated.py)
SPARSE = (*EXPERT_CHOICE, *TOKEN_CHOICE, *GATED)

# Parameters of a router that are adjusted without a gradient (see sparse/adaptation.py).
ADAPTED = ("choice_bias", "l1_weight", "threshold", "threshold_updates")
