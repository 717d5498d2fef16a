"""How far routing differs between domains, against the same documents with shuffled labels.

Documents of one origin (a package, a directory, a file) are routed alike, and a domain has few
origins. So the mean weights of domains differ even if routing ignores domains. Shuffling the labels
of the origins shows by how much. For a fair comparison, every origin counts alike, however many
instances it has, and labels change places among origins of similar size only: the weights of small
origins vary more, and a domain of a few large ones would otherwise become one of small ones. The
paper (section 5.4) shows the weights of domains alone.

Letters: I instances, O origins of all domains, D domains, P pairs of them, N shuffles, Y layers,
E experts.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lory_jax.errors import InputError

SHUFFLES = 400
BLOCK = 8  # origins of similar size, among which labels change places
HIGH = 0.95  # the quantile of shuffles that is shown


def routing_distances(
    weights: Mapping[str, np.ndarray], origins: Mapping[str, Sequence[str]], seed: int
) -> list[dict[str, Any]]:
    """How far the two domains that differ most are apart, layer by layer.

    An origin that is in several domains counts as several, which can only hide a difference.

    Args:
      weights: `{domain: [Y, I, E]}`, mean weights of every instance.
      origins: `{domain: [I]}`.
      seed: seed of the shuffles.

    Returns:
      For every layer: `between`, the largest total-variation distance between two `domains`, that
      is, between the means of their origins; `shuffled`, its mean under shuffled labels, and
      `shuffled_high`, what 5 % of the shuffles exceed. With one origin per domain, shuffling
      changes nothing, so all three are equal.

    Raises:
      InputError: fewer than two domains.
    """
    if len(weights) < 2:
        raise InputError(
            "test set: comparing routing requires at least 2 domains; got " + ", ".join(weights)
        )
    domains = list(weights)
    of_domain = [mean_by_origin(weights[d], origins[d]) for d in domains]
    weight_OxYxE = np.concatenate(of_domain)
    size_O = np.concatenate([np.unique(origins[d], return_counts=True)[1] for d in domains])
    label_O = np.repeat(np.arange(len(domains)), [len(w) for w in of_domain])
    found_PxY = label_distances(weight_OxYxE, label_O)
    rng = np.random.default_rng(seed)
    shuffled_NxY = np.stack(
        [
            label_distances(weight_OxYxE, shuffled(label_O, size_O, rng)).max(axis=0)
            for _ in range(SHUFFLES)
        ]
    )
    pairs = list(itertools.combinations(domains, 2))
    return [
        {
            "layer": layer,
            "between": float(distance_P.max()),
            "domains": list(pairs[int(distance_P.argmax())]),
            "shuffled": float(shuffled_NxY[:, layer].mean()),
            "shuffled_high": float(np.quantile(shuffled_NxY[:, layer], HIGH)),
        }
        for layer, distance_P in enumerate(found_PxY.T)
    ]


def shuffled(label_O: np.ndarray, size_O: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """`[O]`: the labels, dealt anew among origins of similar size."""
    found_O = label_O.copy()
    by_size = np.lexsort((rng.random(len(size_O)), size_O))  # equal ones in random order
    for block in np.array_split(by_size, max(1, len(by_size) // BLOCK)):
        found_O[block] = rng.permutation(label_O[block])
    return found_O


def mean_by_origin(w_YxIxE: np.ndarray, origins: Sequence[str]) -> np.ndarray:
    """`[O, Y, E]`: the mean weights of the instances of each origin, in the order of its name."""
    number_I = np.unique(origins, return_inverse=True)[1]
    share_OxI = (number_I == np.arange(number_I.max() + 1)[:, None]).astype(np.float64)
    share_OxI /= share_OxI.sum(axis=1, keepdims=True)
    return np.einsum("oi,yie->oye", share_OxI, w_YxIxE)


def label_distances(weight_OxE: np.ndarray, label_O: np.ndarray) -> np.ndarray:
    """The total variation between the mean weights of every two labels.

    It is half the sum of absolute differences: 0 for equal distributions, 1 for disjoint ones.

    Args:
      weight_OxE: `[O, ..., E]`, the mean weights of each origin.
      label_O: the label of each origin.

    Returns:
      `[P, ...]`, in the order of `itertools.combinations` of the sorted labels.
    """
    share_OxD = (label_O[:, None] == np.unique(label_O)).astype(np.float64)
    share_OxD /= share_OxD.sum(axis=0)
    mean_DxE = np.tensordot(share_OxD, weight_OxE, axes=(0, 0))
    pairs = itertools.combinations(mean_DxE, 2)
    return np.stack([0.5 * np.abs(a - b).sum(axis=-1) for a, b in pairs])


def distance_table(distances: Sequence[Mapping[str, Any]]) -> str:
    """Routing distances as an aligned table."""
    lines = ["layer  between domains  shuffled labels  95 % of these  most different"]
    for row in distances:
        lines.append(
            f"{row['layer']:5}  {row['between']:15.3f}  {row['shuffled']:15.3f}  "
            f"{row['shuffled_high']:13.3f}  " + " and ".join(row["domains"])
        )
    return "\n".join(lines)
