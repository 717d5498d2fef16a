"""Which experts a text uses, segment by segment: what the page's strip shows.

Letters: L sequence, N segments, Y layers, E experts.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from lory_jax.api import routed_by
from lory_jax.serving.engine import Engine
from lory_jax.serving.models import NAME
from lory_jax.serving.protocol import ApiError, model_name


def describe(engine: Engine, body: Mapping[str, Any]) -> dict[str, Any]:
    """Routing weights of a text and of its prompt.

    Args:
      engine: the model.
      body: the fields "model", "prompt" and "text", which the prompt continues with.

    Returns:
      `experts` E, `segment_length`, and `layers`, the numbers of the Y layers with experts; `used`,
      the weights by which the text's FFNs were merged (`[Y, E]`, those of the prompt or of the
      domain); and `segments`: for each, its `text` and the weights that routing by segment gives
      it (`[Y, E]`). A dense model has neither.

    Raises:
      ApiError: a field is missing, or the text does not fit into the context.
    """
    model, config = engine.model, engine.model.config
    name = model_name(engine, body.get("model"))
    prompt, text = body.get("prompt"), body.get("text")
    if not isinstance(prompt, str) or not isinstance(text, str):
        raise ApiError(400, "prompt, text: both must be texts", "text")
    ids, length = model.encode(prompt + text), len(model.encode(prompt))
    L, T = config.sequence_length, config.segment_length
    if len(ids) > L:
        message = f"the text has {len(ids)} tokens (BOS included); must have at most {L}"
        raise ApiError(400, message, "text", "context_length_exceeded")
    found: dict[str, Any] = {"experts": config.num_experts, "segment_length": T}
    found["layers"] = config.layer_numbers
    if not config.num_experts or config.routes_tokens:
        return found | {"used": None, "segments": []}
    # Padded to one length, for which the program is compiled once; padding routes nothing here.
    tokens_1xL = np.zeros((1, L), np.int32)
    tokens_1xL[0, : len(ids)] = ids
    r_YxNxE = routed_by(model, tokens_1xL, "segment", [len(ids)])[:, 0]
    if name == NAME:
        used_YxE = routed_by(model, tokens_1xL, "prompt", [length])[:, 0, 0]
    else:
        used_YxE = engine.domains[name.removeprefix(f"{NAME}:")]
    pieces = [ids[start : start + T] for start in range(0, len(ids), T)]
    return found | {
        "used": _rounded(used_YxE),
        "segments": [
            {"text": model.tokenizer.decode(piece), "weights": _rounded(r_YxNxE[:, n])}
            for n, piece in enumerate(pieces)
        ],
    }


def _rounded(r_YxE: np.ndarray) -> list[list[float]]:
    return [[round(float(weight), 4) for weight in row] for row in r_YxE]
