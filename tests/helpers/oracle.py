"""An independent oracle: attention of a patched layer by loops over batch, head, query and key, in fp64 numpy.

It shares no code with the library: visibility and n are recomputed from the attention mask and document numbers, and
each swap's formula is written out again.
"""

import contextlib
import math
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers.modeling_utils import AttentionInterface


@dataclass
class Recorded:
    """What went into and came out of one attention module."""

    module: object
    hidden: np.ndarray
    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    out: np.ndarray
    scaling: float
    softcap: float | None
    sinks: np.ndarray | None
    weights: np.ndarray | None = None
    parameters: dict = field(default_factory=dict)


def _array(x):
    return x.detach().double().numpy()


@contextlib.contextmanager
def recording(model):
    """Records every call of the attention function under ``model``'s forward, by layer index."""
    calls: dict[int, Recorded] = {}
    hidden: dict[int, torch.Tensor] = {}
    original = AttentionInterface._global_mapping["attnswap"]

    def attention(module, query, key, value, mask, scaling=None, dropout=0.0, **kwargs):
        out, weights = original(module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs)
        sinks = kwargs.get("s_aux")
        calls[module.layer_idx] = Recorded(
            module,
            _array(hidden[module.layer_idx]),
            _array(query),
            _array(key),
            _array(value),
            _array(out),
            scaling,
            kwargs.get("softcap"),
            None if sinks is None else _array(sinks),
            None if weights is None else _array(weights),
        )
        return out, weights

    def before(module, args, kwargs):
        hidden[module.layer_idx] = kwargs.get("hidden_states", args[0] if args else None)

    hooks = []
    for module in model.modules():
        if type(module).__name__.endswith("Attention") and isinstance(getattr(module, "layer_idx", None), int):
            hooks.append(module.register_forward_pre_hook(before, with_kwargs=True, prepend=True))
    AttentionInterface._global_mapping["attnswap"] = attention
    try:
        yield calls
    finally:
        AttentionInterface._global_mapping["attnswap"] = original
        for hook in hooks:
            hook.remove()


def visible_keys(i, mask_row, documents_row, window):
    """The keys query ``i`` sees, by the definition: real, not later, of the same document, inside the window."""
    return [
        j
        for j in range(i + 1)
        if mask_row[j] and documents_row[i] == documents_row[j] and (window is None or i - j < window)
    ]


def softmax_row(s, sink):
    m = max(s.max(), -np.inf if sink is None else sink)
    e = np.exp(s - m)
    return e / (e.sum() + (0.0 if sink is None else np.exp(sink - m)))


def entmax_row(s: np.ndarray, sink: float | None, alpha: float) -> np.ndarray:
    """Weights ((alpha - 1) s - tau)_+ ^ (1 / (alpha - 1)), tau by bisection until they sum to 1."""
    if alpha == 1:
        return softmax_row(s, sink)
    x = (alpha - 1) * (s if sink is None else np.append(s, sink))
    low, high = x.max() - 1, x.max()
    for _ in range(100):
        tau = (low + high) / 2
        w = np.maximum(x - tau, 0) ** (1 / (alpha - 1))
        low, high = (tau, high) if w.sum() > 1 else (low, tau)
    return w[: len(s)]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def damped(w, swap, sink, lam):
    """Sigmoid's weights under a limit of their sum."""
    if swap.row_limit is None:
        return w
    rest = 0.0 if sink is None else np.exp(sink) / (1 + lam * np.exp(sink))
    return w / (1 + lam * (w.sum() + rest - 1) / swap.row_limit)


def gate(parameters, side, hidden, head):
    return hidden @ parameters[f"{side}weight"][head] + parameters[f"{side}bias"][head]


def predicted(p, head, x, n):
    inner = p["inner"] @ x + p["inner_bias"]
    gelu = inner * 0.5 * np.array([math.erfc(-v / math.sqrt(2)) for v in inner])
    return p["weight"][head] @ x + p["outer"][head] @ gelu + p["offset"][head] + p["slope"][head] * np.log(n)


def row_weights(swap, p, z, n, lam, sink, head, kv_head, hidden, i, keys, real, raw):
    """Weights of one row over its visible keys, and the factor on each value."""
    ones = np.ones(len(keys))
    if swap.name == "ssmax":
        if swap.form == "affine":
            a = p["scale"][head] * np.log(n) + p["offset"][head]
        elif swap.form == "scale":
            a = p["scale"][head] * np.log(n)
        else:
            a = 1 + p["scale"][head] * max(0.0, np.log(n) - np.log(swap.train_length))
        return softmax_row((1 + lam * (a - 1)) * z, sink), ones
    if swap.name == "softpick":
        raised = 0.0 if swap.anchor is None else max(0.0, np.log(n / swap.anchor))
        z = z + raised + (1e3 if swap.keep_lone and n == 1 else 0.0)
        m = max(z.max(), 0.0, -np.inf if sink is None else sink)  # which cancels
        one = np.exp(-m)
        rest = 0.0 if sink is None else abs(np.exp(sink - m) - lam * one)
        total = np.abs(np.exp(z - m) - lam * one).sum() + rest + lam * swap.eps * one
        return np.maximum(np.exp(z - m) - lam * one, 0) / total, ones
    if swap.name == "softmax-1":
        rest = lam * np.exp(p["sink"][head]) + (0.0 if sink is None else np.exp(sink))
        return np.exp(z) / (np.exp(z).sum() + rest), ones
    if swap.name == "entmax":
        alpha = 1 + sigmoid(p["alpha_logit"][head]) if swap.alpha == "learned" else swap.alpha
        scale = np.exp(min(predicted(p, head, hidden[i], n), 2.0)) if swap.scale else 1.0
        return entmax_row((1 + lam * (scale - 1)) * z, sink, 1 + lam * (alpha - 1)), ones
    if swap.name == "sigmoid" and swap.bias == "predicted":
        known = np.log(np.exp(z).sum() + (0.0 if sink is None else np.exp(sink)))
        e = np.exp(z - (1 - lam) * known - lam * predicted(p, head, hidden[i], n))
        w = e / (1 + lam * e)
        if swap.keep_lone and n == 1:
            w = np.exp(z - known) / (1 - lam + lam * np.exp(z - known))
        return damped(w, swap, sink, lam), ones
    if swap.name == "sigmoid":
        bias = (
            p["bias"][head]
            if swap.bias == "learned"
            else -np.log(swap.max_positions)
            if swap.bias is None
            else swap.bias
        )
        w = sigmoid(z + bias + swap.bias_log_n * np.log(n)) / {False: 1, True: n, "sqrt": np.sqrt(n)}[swap.divide_by_n]
        w = ones if swap.keep_lone and n == 1 else w
        w = damped(w, swap, sink, 1.0)
        return (1 - lam) * softmax_row(z, sink) + lam * w, ones
    if swap.name == "selective-temperature":
        t = p["position_gain"][head] * np.log(n) + np.tanh(gate(p, "query_", hidden[i], head))
        u = np.array([np.tanh(gate(p, "value_", hidden[j], kv_head)) for j in keys])
        return softmax_row((1 + lam * t) * z, sink), 1 + lam * u
    if swap.name == "forgetting-gate":
        g = max(p["gain"][head], 0)
        logs = {j: -g * np.log1p(np.exp(-gate(p, "", hidden[j], head))) for j in range(i + 1) if real[j]}
        decay = [sum(logs[k] for k in range(j + 1, i + 1) if real[k]) for j in keys]
        return softmax_row(z + lam * np.array(decay), sink), ones
    distance = np.arange(len(keys) - 1.0, -1.0, -1.0)  # in tokens of the row's own document, padding left out
    ramped = ramped_row(swap, p, z, n, lam, sink, head, distance)
    if ramped is not None:
        return ramped, ones
    content = z
    if swap.name == "lssa":
        q, k, softcap = raw
        content = np.log(len(q)) * (k @ q) / np.linalg.norm(q) / np.linalg.norm(k, axis=1)
        content = content if softcap is None else np.tanh(content / softcap) * softcap
    seen = min(n, getattr(swap, "window", None) or n)
    w = stage_weights(swap, p, content, seen, sink, head, distance)
    return (1 - lam) * softmax_row(z, sink) + lam * w, ones


def ramped_row(swap, p, z, n, lam, sink, head, distance):
    """Weights of swaps whose ramp is in their formula; None for others."""
    if swap.name in ("softmax", "output-gate"):
        return softmax_row(z, sink)
    if swap.name == "gumbel-softmax":  # without noise, as in evaluation
        return softmax_row(z * (1 + lam * (1 / swap.temperature - 1)), sink)
    if swap.name == "scale-invariant":
        log = np.log1p(lam * distance / swap.tau)
        return softmax_row(z * np.sqrt(2 * log + 1) - 2 * log, sink)
    if swap.name == "elastic-softmax":
        bias = np.array([p["bias"][head][int(d)] if d < swap.distances else 0.0 for d in distance])
        share = softmax_row(z + lam * bias, sink)
        return share if swap.keep_single and n == 1 else np.maximum(share + lam * p["tau"][head] / n, 0)
    if swap.name == "clipped-softmax":
        low, high = lam * swap.gamma / (n if swap.over_n else 1), 1 + lam * (swap.eta - 1)
        return np.clip((high - low) * softmax_row(z, sink) + low, 0, 1)
    return None


def stage_weights(swap, p, z, n, sink, head, distance):
    """Weights at lambda 1 of swaps that are blended with softmax; LSSA's z is the cosine times ln d."""
    if swap.name == "top-k":
        return softmax_row(np.where(z >= np.sort(z)[-min(swap.k, len(z))], z, -np.inf), sink)
    if swap.name == "swat":
        slope = p["slope"][head] if swap.slope else 0.0
        return np.where(distance < swap.window, sigmoid(z - slope * distance), 0.0)
    if swap.name == "lssa":
        a = np.log1p(np.exp(np.log(n) * z))
        if swap.power is None:
            return a / a.sum()
        b = np.maximum(n * a / a.sum() - (n > 3), 0) ** swap.power
        return b / b.sum()
    if swap.name == "stick-breaking":
        z = z + swap.bias + swap.bias_log_n * np.log(n)
        share = sigmoid(z) if swap.own == "key" else np.where(distance > 0, sigmoid(z), 0.0)
        w = np.array([share[j] * np.prod(1 - share[j + 1 :]) for j in range(len(z))])
        return w + np.where(distance == 0, 1 - w.sum(), 0.0) if swap.own == "remainder" else w
    raise AssertionError(swap.name)


def gate_factor(swap, p, lam, head, hidden):
    """What an output gate multiplies a head's output by."""
    g = p["weight"][head] @ hidden
    if swap.start is None:
        return 1 + lam * (sigmoid(g) - 1)
    c = np.log(swap.start / (1 - swap.start))
    return 1 + lam * (sigmoid(g + c) - sigmoid(c)) / swap.start


def expected(call, slots, mask, documents, window):
    """Output (batch, queries, heads, value_dim) of a layer in which every head has a slot or keeps softmax.

    Args:
        call: The recorded call.
        slots: (swap, heads or None, lambda, parameters as arrays) for each slot.
        mask: Real tokens, (batch, tokens).
        documents: Document number of each token, (batch, tokens).
        window: Sliding window or None.
    """
    batch, heads, queries, _ = call.query.shape
    groups = heads // call.key.shape[1]
    out = np.zeros((batch, queries, heads, call.value.shape[3]))
    weights = np.zeros((batch, heads, queries, call.key.shape[2]))
    owner = {}
    for swap, chosen, lam, parameters in slots:
        for place, head in enumerate(range(heads) if chosen is None else chosen):
            owner[head] = (swap, place, lam, parameters, 0 if chosen is None else chosen[0] // groups)
    for b in range(batch):
        for h in range(heads):
            sink = None if call.sinks is None else call.sinks[h]
            for i in range(queries):
                keys = visible_keys(i, mask[b], documents[b], window)
                if not keys:
                    continue
                z = call.key[b, h // groups, keys] @ call.query[b, h, i] * call.scaling
                if call.softcap is not None:
                    z = np.tanh(z / call.softcap) * call.softcap
                if h in owner:
                    swap, place, lam, p, first_group = owner[h]
                    kv = h // groups - first_group
                    raw = call.query[b, h, i], call.key[b, h // groups, keys], call.softcap
                    hidden = call.hidden[b]
                    w, u = row_weights(swap, p, z, len(keys), lam, sink, place, kv, hidden, i, keys, mask[b], raw)
                else:
                    w, u = softmax_row(z, sink), np.ones(len(keys))
                weights[b, h, i, keys] = w
                out[b, i, h] = (w * u) @ call.value[b, h // groups, keys]
                if h in owner and owner[h][0].name == "output-gate":
                    out[b, i, h] *= gate_factor(swap, p, lam, place, call.hidden[b, i])
    return out, weights
