"""Which texts an expert is chosen for, and which experts a text uses.

Letters: I instances, L sequence, T tokens per segment, N segments, Y layers with experts,
E experts.
"""

import codecs
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lory_jax.api import Model
from lory_jax.errors import InputError

BEST = 3  # texts per expert
LONGEST_TEXT = 300  # characters that are kept of each


def shown_layers(num_layers: int) -> list[int]:
    """The bottom, the middle and the top layer, as in section 5.4 of the paper."""
    return sorted({0, num_layers // 2, num_layers - 1})


def telling_texts(
    weights: Mapping[str, np.ndarray], sets: Mapping[str, np.ndarray], model: Model
) -> dict[str, list[list[dict[str, Any]]]]:
    """For each expert, the segments that give it its largest weights in the segment after them.

    Args:
      weights: `{domain: [Y, I, N, E]}`, routing weights of every segment.
      sets: `{domain: [I, L + 1]}`, the instances.
      model: the model that routed them.

    Returns:
      `{layer: [E][up to 3]}` for the bottom, middle and top layer with experts. Each entry has the
      `weight`, the `domain` and the `text`, which is the beginning of the segment whose mean
      decided the weight. The largest weight comes first; an instance appears at most once.
    """
    T = model.config.segment_length
    found: dict[str, list[list[dict[str, Any]]]] = {}
    numbers = model.config.layer_numbers
    for layer in shown_layers(len(numbers)):
        found[str(numbers[layer])] = []
        for expert in range(model.config.num_experts):
            best = []
            for domain, r_YxIxNxE in weights.items():
                # Entry n is the weight of segment n + 1, which segment n decided.
                r_IxN = r_YxIxNxE[layer, :, 1:, expert]
                n_I = r_IxN.argmax(axis=1)
                r_I = r_IxN[np.arange(len(n_I)), n_I]
                best += [(float(r_I[i]), domain, int(i), int(n_I[i])) for i in range(len(n_I))]
            best.sort(key=lambda item: -item[0])
            found[str(numbers[layer])].append(
                [
                    {
                        "weight": weight,
                        "domain": domain,
                        "text": beginning_of(model, sets[domain][i, n * T : (n + 1) * T]),
                    }
                    for weight, domain, i, n in best[:BEST]
                ]
            )
    return found


def text_segments(model: Model, text: str) -> tuple[list[str], np.ndarray]:
    """The segments of a text and their routing weights `[Y, N, E]`, as training would route them.

    A text longer than an instance is read in windows that overlap by one segment, so that every
    segment but the first is routed by the one before it.

    Raises:
      InputError: the model is dense, its instances have only one segment, or the text is empty.
    """
    T = model.config.segment_length
    whole = model.config.sequence_length // T
    if whole < 2:
        raise InputError("text: instances have only one segment, so none is routed by another")
    if not text:
        raise InputError("text: got an empty text, must have at least one character")
    tokens = np.array(model.encode(text), np.int32)
    parts = []
    for start in range(0, max(len(tokens) - T, 1), (whole - 1) * T):
        window = tokens[start : start + whole * T]
        r_YxNxE = model.routing_weights(window[None])[:, 0]
        parts.append(r_YxNxE if start == 0 else r_YxNxE[:, 1:])
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    bounds = range(0, len(tokens), T)
    texts = [decoder.decode(model.tokenizer.decode_bytes(tokens[s : s + T])) for s in bounds]
    texts[-1] += decoder.decode(b"", final=True)
    return texts, np.concatenate(parts, axis=1)


def beginning_of(model: Model, ids: Sequence[int] | np.ndarray) -> str:
    """The first characters of a segment."""
    return model.tokenizer.decode_bytes(ids).decode("utf-8", "replace")[:LONGEST_TEXT]


def strongest_experts(r_YxNxE: np.ndarray) -> str:
    """The strongest expert of each layer and its weight, one line per segment."""
    lines = ["segment  strongest expert of each layer, and its weight"]
    for n in range(r_YxNxE.shape[1]):
        best = [f"{r_E.argmax()} ({r_E.max():.2f})" for r_E in r_YxNxE[:, n]]
        lines.append(f"{n + 1:7}  " + "  ".join(best))
    return "\n".join(lines)
