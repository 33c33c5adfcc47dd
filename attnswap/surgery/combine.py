"""One layer's attention when several swaps, and what was there before, share its heads."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnswap.attention import dense
from attnswap.attention.dispatch import compute
from attnswap.attention.problem import Problem, complete_features
from attnswap.attention.visibility import Visibility
from attnswap.surgery.spec import Slot
from attnswap.swaps.base import Swap

Before = Callable[[], tuple[Tensor, Tensor | None]]
"""Runs the previous implementation on all heads: output (batch, queries, heads, value_dim), weights or None."""


@dataclass(frozen=True)
class LayerInputs:
    """What a layer's attention is computed from; see :class:`attnswap.attention.problem.Problem`."""

    query: Tensor
    key: Tensor
    value: Tensor
    visibility: Visibility
    scaling: float
    softcap: float | None
    sinks: Tensor | None
    dropout: float


def attend(
    layer: LayerInputs, slots: dict[str, Slot], features: dict[str, dict[str, Tensor]], before: Before, weights: bool
) -> tuple[Tensor, Tensor | None]:
    """Computes a layer's attention.

    Args:
        layer: The inputs.
        slots: The swaps by slot name; their heads do not overlap.
        features: Each slot's features and ramp.
        before: The previous implementation, run at most once and only if some head needs it.
        weights: Whether the weights are wanted; the dense reference then computes everything.

    Returns:
        Output (batch, queries, heads, value_dim), and weights (batch, heads, queries, keys) or None.
    """
    layer = _as_autocast_would(layer)
    heads = layer.query.shape[1]
    active = {name: slot for name, slot in slots.items() if slot.phase != "before"}
    blends = any(slot.phase == "ramp" and not slot.swap.native_ramp for slot in active.values())
    partial = sum(slot.count(heads) for slot in active.values()) < heads
    # Evaluated at most once, and outside the region below, so that it runs exactly as it did before patching.
    was = before()[0].transpose(1, 2) if blends or partial else None
    with torch.autocast(layer.query.device.type, enabled=False):
        shares = softmax_weights(layer) if weights else None
        out = was
        for name, slot in active.items():
            problem = slot_problem(layer, slot, features[name])
            chosen = None if slot.heads is None else torch.tensor(slot.heads, device=layer.query.device)
            here = was if was is None or chosen is None else was[:, chosen]
            if shares is None:
                part = compute(problem, lambda here=here: here)  # type: ignore[misc]
            else:
                part, share = _dense_part(problem, here)
                shares = _place(shares, chosen, share.to(layer.value.dtype))
            out = part if chosen is None else _place(out, chosen, part.to(layer.value.dtype), heads)
    assert out is not None
    return out.transpose(1, 2).contiguous(), shares


def _place(whole: Tensor | None, heads: Tensor | None, part: Tensor, count: int = 0) -> Tensor:
    """Returns ``whole`` with some heads replaced; None stands for a tensor of ``count`` heads still to be filled."""
    if heads is None:
        return part
    if whole is None:
        whole = part.new_zeros(part.shape[0], count, *part.shape[2:])
    return whole.index_copy(1, heads, part.to(whole.dtype))


def slot_problem(layer: LayerInputs, slot: Slot, features: dict[str, Tensor]) -> Problem:
    """Returns the attention problem of one slot, cut down to its heads."""
    features = dict(features)
    ramp = features.pop("ramp")
    if slot.phase == "ramp":
        for name in features.keys() & set(
            slot.swap.fixed_in_ramp
        ):  # a gradient of 0, so that data-parallel training finds one
            features[name] = features[name].detach() + 0 * features[name]
    query, key, value, sinks = layer.query, layer.key, layer.value, layer.sinks
    visibility = layer.visibility
    if slot.heads is not None:
        heads = torch.tensor(slot.heads, device=query.device)
        key_heads = kv_heads_of(slot.heads, query.shape[1] // key.shape[1])
        query, sinks = query[:, heads], None if sinks is None else sinks[heads]
        key, value = key[:, key_heads], value[:, key_heads]
        masks = {name: getattr(visibility, name) for name in ("dense", "bias")}
        cut = {name: mask[:, heads] for name, mask in masks.items() if mask is not None and mask.shape[1] > 1}
        visibility = replace(visibility, **cut) if cut else visibility
    return Problem(
        swap=slot.swap,
        query=query,
        key=key,
        value=value,
        visibility=visibility,
        features=complete_features(slot.swap, features, query, key),
        scaling=layer.scaling,
        ramp=1.0 if slot.phase == "swap" else ramp,
        softcap=layer.softcap,
        sinks=sinks,
        dropout=layer.dropout,
    )


def kv_heads_of(heads: tuple[int, ...], groups: int) -> list[int]:
    """Returns the key/value heads for a choice of query heads.

    Args:
        heads: Query heads in the order wanted.
        groups: Query heads per key/value head in the whole layer.

    Returns:
        One key/value head per complete group where the choice consists of whole groups in order, else one per head.
    """
    owners = [h // groups for h in heads]
    whole = owners[::groups]
    if len(heads) % groups == 0 and owners == [g for g in whole for _ in range(groups)]:
        return whole
    return owners


def _as_autocast_would(layer: LayerInputs) -> LayerInputs:
    """Casts query, key and value to one dtype: autocast's inside an autocast region, else the values'."""
    device = layer.query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else layer.value.dtype
    if layer.query.dtype == layer.key.dtype == layer.value.dtype == dtype:
        return layer
    return replace(layer, query=layer.query.to(dtype), key=layer.key.to(dtype), value=layer.value.to(dtype))


def _dense_part(problem: Problem, was: Tensor | None) -> tuple[Tensor, Tensor]:
    """Computes a slot with its weights, blended as the ramp says."""
    if problem.swap.native_ramp or isinstance(problem.ramp, float):
        out, weights = dense.attend(problem, need_weights=True)
    else:
        full = replace(problem, ramp=1.0)
        (out, weights), plain = dense.attend(full, need_weights=True), replace(full, swap=Swap(), features={})
        share = problem.per_head(problem.ramp, 2)
        out = ((1 - share) * was + share * out).to(out.dtype)
        weights = (1 - share) * dense.attend(plain, need_weights=True)[1] + share * weights
    assert weights is not None
    return out, weights


def softmax_weights(layer: LayerInputs) -> Tensor:
    """Returns the weights of heads that keep softmax (with the model's own sinks and soft cap)."""
    plain = Problem(swap=Swap(), features={}, ramp=1.0, **layer.__dict__)
    weights = dense.attend(plain, need_weights=True)[1]
    assert weights is not None
    return weights.to(layer.value.dtype)
