"""Whether experts specialise: routing by domain against the same folders with shuffled labels.

The distances are those of lory_jax/analysis/distances.py, which says why folders are shuffled and
not instances, and only among those of similar size.

Letters: S seeds, O folders of all domains, N shuffles, Y layers, E experts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from lory_jax.analysis.distances import label_distances, shuffled
from tools.study.statistics import Effect, over_seeds

SHUFFLES = 4_999


def specialisation(
    weights: Sequence[Mapping[str, np.ndarray]], sizes: Mapping[str, np.ndarray]
) -> Effect:
    """The largest distance between two domains, minus its mean under shuffled labels.

    Distances are total variations of mean routing weights, the mean of the layers. The interval is
    that over seeds; `p` is the share of shuffles, which all seeds have in common, whose mean
    distance over the seeds is as large, and twice that, because the other p-values are two-sided.

    Args:
      weights: for every seed and domain `[O, Y, E]`, the mean weights of each of its folders.
      sizes: by domain `[O]`, the instances of each of its folders.
    """
    domains = sorted(sizes)
    weight_OxSxYxE = np.stack(
        [np.concatenate([of_seed[d] for d in domains]) for of_seed in weights], axis=1
    )
    size_O = np.concatenate([sizes[d] for d in domains])
    label_O = np.repeat(np.arange(len(domains)), [len(sizes[d]) for d in domains])
    found_S = _largest_distance(weight_OxSxYxE, label_O)
    rng = np.random.default_rng(0)
    shuffled_NxS = np.stack(
        [_largest_distance(weight_OxSxYxE, shuffled(label_O, size_O, rng)) for _ in range(SHUFFLES)]
    )
    as_large = np.count_nonzero(shuffled_NxS.mean(axis=1) >= found_S.mean())
    p = min(1.0, 2 * (1 + as_large) / (1 + SHUFFLES))
    return replace(over_seeds(list(found_S - shuffled_NxS.mean(axis=0))), p=p)


def _largest_distance(weight_OxSxYxE: np.ndarray, label_O: np.ndarray) -> np.ndarray:
    """`[S]`: the distance of the two labels that differ most in a layer, the mean of the layers."""
    return label_distances(weight_OxSxYxE, label_O).max(axis=0).mean(axis=-1)
