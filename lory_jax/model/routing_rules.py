"""The names of the routing rules (`config.model.routing`). This file imports nothing heavy."""

# Lory: expert parameters are merged. "causal" is the paper's rule, "prefix" a baseline.
MERGED = ("causal", "prefix")

# Baselines in which experts are chosen rather than merged (see sparse/capacity.py).
EXPERT_CHOICE = ("expert_choice_segment", "expert_choice_token")
TOKEN_CHOICE = {"top1": 1, "top2": 2}  # experts that each token chooses
SPARSE = (*EXPERT_CHOICE, *TOKEN_CHOICE)
