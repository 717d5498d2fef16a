"""The model of the paper written as plain loops over numpy float64 arrays, to compare with.

Nothing here shares code with `lory_jax`. Arrays are small; clarity is everything. A stop-gradient
is modelled by `frozen`: routing weights of segment 1 that were computed before and do not move when
an input is nudged, so that central differences of these functions are the gradients of the paper.
"""

import numpy as np


def softmax(x):
    e = np.exp(x - np.max(x))
    return e / e.sum()


def silu(x):
    return x / (1.0 + np.exp(-x))


def segments(length, segment_length):
    """(start, end) of every segment; the last may be short."""
    starts = range(0, length, segment_length)
    return [(start, min(start + segment_length, length)) for start in starts]


def routing_weights(
    h_LxD,
    router,
    segment_length,
    kind,
    first_segment="self",
    prompt=0,
    frozen=None,
    source="last",
):
    """One distribution over the experts per segment of one sequence, as a list of arrays [E].

    `kind` is causal, prefix, uniform, segment or prompt (one weight for the whole sequence).
    """
    num_experts = router.shape[1]
    uniform = np.full(num_experts, 1.0 / num_experts)

    def mean(tokens):
        total = np.zeros(h_LxD.shape[1])
        for h in tokens:
            total += h / len(tokens)
        return total

    def pool(tokens):
        if source != "attention":
            return mean(tokens)
        query, others = tokens[0], tokens[1:]
        if not len(others):
            return np.zeros(len(query))
        return softmax(np.array([query @ h for h in others]) / len(query) ** 0.5) @ others

    def route(tokens):
        return softmax(mean(tokens) @ router)

    if kind == "prompt":
        return [route(h_LxD[:prompt]) if prompt else uniform]
    bounds = segments(len(h_LxD), segment_length)
    if kind == "uniform":
        return [uniform] * len(bounds)
    if kind == "segment":
        first = uniform
        if prompt:
            first = softmax(pool(h_LxD[: min(prompt, bounds[0][1])]) @ router)
    elif first_segment == "uniform":
        first = uniform
    else:
        first = softmax(pool(h_LxD[: bounds[0][1]]) @ router) if frozen is None else frozen
    weights, pools = [first], [pool(h_LxD[start:end]) for start, end in bounds]
    for k in range(1, len(bounds)):
        summary = pools[0 if kind == "prefix" else k - 1]
        if source == "cumulative":
            summary = mean(pools[:k])
        if source == "average":
            summary = pools[0]
            for later in pools[1:k]:
                summary = (summary + later) / 2
        weights.append(softmax(summary @ router))
    return weights


def merged_ffn(h_TxD, experts, weights):
    """Merges the experts with `weights`, matrix by matrix, and applies the SwiGLU to each token."""
    merged = {}
    for name in ("gate", "up", "down"):
        for part in (name, f"{name}_bias"):
            if part not in experts:
                merged[part] = 0.0
                continue
            merged[part] = np.zeros(experts[part].shape[1:])
            for i, weight in enumerate(weights):
                merged[part] += weight * experts[part][i]
    rows = []
    for h in h_TxD:
        gate, up = (h @ merged[name] + merged[f"{name}_bias"] for name in ("gate", "up"))
        rows.append((silu(gate) * up) @ merged["down"] + merged["down_bias"])
    return np.array(rows)


def lory_layer(
    h_BxLxD, params, segment_length, kind, first_segment, prompts=None, frozen=None, source="last"
):
    """The FFN layer of Lory: outputs [B, L, D] and routing weights [B, N, E]."""
    outputs, all_weights = [], []
    for b, h_LxD in enumerate(h_BxLxD):
        weights = routing_weights(
            h_LxD,
            params["router"],
            segment_length,
            kind,
            first_segment,
            0 if prompts is None else prompts[b],
            None if frozen is None else frozen[b],
            source,
        )
        length = len(h_LxD) if kind == "prompt" else segment_length
        bounds = segments(len(h_LxD), length)
        parts = [
            merged_ffn(h_LxD[start:end], params, w)
            for (start, end), w in zip(bounds, weights, strict=True)
        ]
        outputs.append(np.concatenate(parts))
        all_weights.append(weights)
    return np.array(outputs), np.array(all_weights)


def rotate(x_K, position, theta):
    """Rotary embedding of one head: the pair (i, i + K/2) turns by position * theta^(-2i/K)."""
    half = len(x_K) // 2
    out = np.empty_like(x_K)
    for i in range(half):
        angle = position * theta ** (-2.0 * i / len(x_K))
        a, b = x_K[i], x_K[i + half]
        out[i] = a * np.cos(angle) - b * np.sin(angle)
        out[i + half] = a * np.sin(angle) + b * np.cos(angle)
    return out


def causal_attention(query_LxK, key_LxK, value_LxK, starts=None):
    """One head: every query looks at the keys of its document up to its own position."""
    rows = []
    for i, q in enumerate(query_LxK):
        seen = slice(0 if starts is None else starts[i], i + 1)
        weights = softmax(np.array([q @ k for k in key_LxK[seen]]) / np.sqrt(len(q)))
        rows.append(weights @ value_LxK[seen])
    return np.array(rows)


def document_starts(tokens, bos_id):
    """Where the document of every token begins."""
    starts, start = [], 0
    for i, token in enumerate(tokens):
        start = i if token == bos_id else start
        starts.append(start)
    return starts


def attention(h_LxD, params, theta, starts=None):
    """Attention with rotary embeddings; weights are [D, H, K] (keys: [D, G, K]) and [H, K, D].

    Each of the G heads of keys and values serves as many neighbouring query heads.
    """
    out = np.zeros_like(h_LxD)
    group_size = params["query"].shape[1] // params["key"].shape[1]
    for head in range(params["query"].shape[1]):
        group = head // group_size
        query, key = (
            np.array([rotate(x @ params[name][:, h], p, theta) for p, x in enumerate(h_LxD)])
            for name, h in (("query", head), ("key", group))
        )
        mixed = causal_attention(query, key, h_LxD @ params["value"][:, group], starts)
        out += mixed @ params["output"][head]
    return out


def rms_norm(x_D, scale, epsilon):
    return x_D / np.sqrt(np.mean(x_D**2) + epsilon) * scale


def picked_delta(h_D, deltas):
    """What the most probable small FFN of a token adds, weighted with its probability."""
    p = softmax(h_D @ deltas["router"])
    j = int(np.argmax(p))
    hidden = silu(h_D @ deltas["gate"][j]) * (h_D @ deltas["up"][j])
    return p[j] * (hidden @ deltas["down"][j])


def full_experts(ffn):
    """Low-rank experts as full ones: routing weights sum to 1, so all may hold what they share."""
    full = {"router": ffn["router"]}
    for name in ("gate", "up", "down"):
        pairs = zip(ffn[f"{name}_a"], ffn[f"{name}_b"], strict=True)
        full[name] = np.array([ffn[name] + a @ b for a, b in pairs])
        if f"{name}_bias" in ffn:
            full[f"{name}_bias"] = np.array([ffn[f"{name}_bias"]] * len(full[name]))
    return full


def holds_experts(config, number):
    """Whether a layer, counted from 0, is one of those that hold experts."""
    if config.expert_layers == "upper_half":
        return number + 1 > config.num_layers / 2
    return config.expert_layers == "all" or number % 2 == 1


def transformer(
    params, tokens_BxL, config, kind=None, prompts=None, frozen=None, mixture_of_experts=None
):
    """Logits [B, L, V] and routing weights [Y, B, N, E] (empty for a dense model).

    `mixture_of_experts` computes the layers with experts of another rule than Lory's from hidden
    states [B, L, D] and parameters; it has no routing weights.
    `frozen` is [Y, B, E], the weights of segment 1 of every layer. Where only some layers hold
    experts, Y counts those, and their parameters are apart from those of the others.
    """
    x_BxLxD = np.array([[params["embedding"][t] for t in row] for row in tokens_BxL])
    all_weights = []
    starts = [None] * len(tokens_BxL)
    if config.document_mask:
        starts = [document_starts(row, config.bos_id) for row in tokens_BxL]

    def norm(x_BxLxD, scale):
        return np.array([[rms_norm(x, scale, config.norm_epsilon) for x in r] for r in x_BxLxD])

    counts = {"layers": 0, "dense_layers": 0}
    for number in range(config.num_layers):
        is_first_kind = not config.num_experts or holds_experts(config, number)
        stack = "layers" if is_first_kind else "dense_layers"
        layers, y = params[stack], counts[stack]
        counts[stack] += 1
        attention_y = {name: w[y] for name, w in layers["attention"].items()}
        ffn_y = {name: w[y] for name, w in layers["ffn"].items()}
        h_BxLxD = norm(x_BxLxD, layers["attention_norm"][y])
        x_BxLxD = x_BxLxD + np.array(
            [
                attention(h, attention_y, config.rope_theta, s)
                for h, s in zip(h_BxLxD, starts, strict=True)
            ]
        )
        h_BxLxD = norm(x_BxLxD, layers["ffn_norm"][y])
        if "gate_a" in ffn_y:
            ffn_y = full_experts(ffn_y)
        if mixture_of_experts is not None and stack == "layers":
            out = mixture_of_experts(h_BxLxD, ffn_y)
        elif "router" in ffn_y:
            out, weights = lory_layer(
                h_BxLxD,
                ffn_y,
                config.segment_length,
                kind or config.routing,
                config.first_segment_routing,
                prompts,
                None if frozen is None else frozen[y],
                config.routing_source,
            )
            all_weights.append(weights)
        else:
            one = {name: w[None] for name, w in ffn_y.items()}
            out = np.array([merged_ffn(h, one, [1.0]) for h in h_BxLxD])
        if "shared" in layers:
            one = {name: w[y][None] for name, w in layers["shared"].items()}
            out = out + np.array([merged_ffn(h, one, [1.0]) for h in h_BxLxD])
        if "deltas" in layers:
            deltas_y = {name: w[y] for name, w in layers["deltas"].items()}
            out = out + np.array([[picked_delta(x, deltas_y) for x in row] for row in h_BxLxD])
        x_BxLxD = x_BxLxD + out
    head = params["head"] if "head" in params else params["embedding"].T
    logits_BxLxV = norm(x_BxLxD, params["final_norm"]) @ head
    return logits_BxLxV, np.array(all_weights)


def token_losses(logits_BxLxV, targets_BxL):
    """Negative log-likelihood of every target, nats."""
    rows = []
    for logits_LxV, targets_L in zip(logits_BxLxV, targets_BxL, strict=True):
        rows.append([-np.log(softmax(x)[t]) for x, t in zip(logits_LxV, targets_L, strict=True)])
    return np.array(rows)


def central_differences(function, x, step=1e-5):
    """The gradient of a scalar function at `x`, one entry after the other."""
    gradient = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[index] += step
        down[index] -= step
        gradient[index] = (function(up) - function(down)) / (2 * step)
    return gradient


def adamw(params, gradients, state, *, rate, beta1, beta2, epsilon, weight_decay):
    """One step of AdamW on a dict of arrays; `state` holds m, v and the count, and is changed."""
    state["count"] += 1
    new = {}
    for name, w in params.items():
        g = gradients[name]
        state["m"][name] = beta1 * state["m"][name] + (1 - beta1) * g
        state["v"][name] = beta2 * state["v"][name] + (1 - beta2) * g**2
        m = state["m"][name] / (1 - beta1 ** state["count"])
        v = state["v"][name] / (1 - beta2 ** state["count"])
        new[name] = w - rate * (m / (np.sqrt(v) + epsilon) + weight_decay[name] * w)
    return new
