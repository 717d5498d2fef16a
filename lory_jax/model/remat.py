"""Rematerialisation by name: what of a layer is kept for its backward pass.

Everything else is computed again from the layer's input, which is always kept.
"""

from collections.abc import Callable
from typing import Any

import jax

from lory_jax.model.attention import SAVED_ATTENTION, SAVED_QKV
from lory_jax.model.merged_ffn import SAVED_HIDDEN

# What a part of a policy's name keeps: results by their checkpoint names.
PARTS = {"attention": SAVED_ATTENTION, "qkv": SAVED_QKV, "hidden": SAVED_HIDDEN}


def rematerialized(function: Callable[..., Any], policy: str) -> Callable[..., Any]:
    """The function, whose backward pass keeps only what `config.model.remat` says.

    Args:
      function: a layer.
      policy: "none" keeps everything; "full" keeps nothing; "dots" keeps the results of all matrix
        products and of the flash kernels; anything else keeps the parts that it joins by "+":
        "attention" (the flash kernels' result, so that they do not run again), "qkv" (queries, keys
        and values), "hidden" (the FFN's gate and up).

    Raises:
      ValueError: there is no such policy.
    """
    policies = jax.checkpoint_policies
    if policy == "none":
        return function
    if policy == "full":
        return jax.checkpoint(function)
    if policy == "dots":
        # Products inside the gradients of kernels and of the merged FFN are kept by name.
        kept = policies.save_from_both_policies(
            policies.dots_with_no_batch_dims_saveable,
            policies.save_only_these_names(*PARTS.values()),
        )
        return jax.checkpoint(function, policy=kept)
    parts = policy.split("+")
    if not set(parts) <= set(PARTS):
        raise ValueError(
            f"remat: got {policy!r}; must be none, full, dots, or parts joined by +: "
            + ", ".join(PARTS)
        )
    names = [PARTS[part] for part in parts]
    return jax.checkpoint(function, policy=policies.save_only_these_names(*names))
