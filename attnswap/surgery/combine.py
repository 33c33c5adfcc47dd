"""The attention of one layer whose heads are shared by several swaps and the previous implementation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from attnswap.attention.dispatch import compute, refuse_misfit, with_weights
from attnswap.attention.heads import in_order, kv_heads_of, pick
from attnswap.attention.problem import Problem, complete_features
from attnswap.attention.visibility import Visibility
from attnswap.surgery.spec import Slot
from attnswap.swaps.softmax import Softmax


@dataclass(frozen=True)
class LayerInputs:
    """The inputs of a layer's attention; see :class:`attnswap.attention.problem.Problem`."""

    query: Tensor
    key: Tensor
    value: Tensor
    visibility: Visibility
    scaling: float
    softcap: float | None
    sinks: Tensor | None
    dropout: float
    content: Tensor | None = None
    seed: Tensor | None = None


class PreviousAttention(Protocol):
    """The attention that a layer had before it was patched; see :class:`attnswap.surgery.previous.Previous`."""

    def some_heads(self, heads: Sequence[int]) -> Tensor:
        """Computes some heads, shape (batch, len(heads), queries, value_dim)."""

    def kernel(self, heads: Sequence[int] | None) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
        """Returns the model's own softmax kernel for some heads, or None where torch's is to be used."""


def attend(
    layer: LayerInputs,
    slots: dict[str, Slot],
    features: dict[str, dict[str, Tensor]],
    previous: PreviousAttention,
    weights: bool,
    observed: Callable[[str, Problem], None] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Computes a layer's attention: each head once, and twice where a ramp blends two outputs.

    Args:
        layer: The inputs.
        slots: The swaps by slot name; their heads do not overlap.
        features: Each slot's features and ramp.
        previous: The previous implementation, run at most once, for the heads that keep it or blend with it.
        weights: Whether the weights are wanted; the dense reference then computes every swap.
        observed: Called with the name and the problem of each slot, also of slots at lambda 0, which are not computed.

    Returns:
        Output (batch, queries, heads, value_dim), and weights (batch, heads, queries, keys) or None.
    """
    layer = _to_common_dtype(layer)
    active = {name: slot for name, slot in slots.items() if slot.phase != "before"}
    heads = {name: slot.heads or tuple(range(layer.query.shape[1])) for name, slot in active.items()}
    kept = set(range(layer.query.shape[1])).difference(*heads.values())
    blending = {h for name, slot in active.items() if _blends(slot) for h in heads[name]}
    before = sorted(kept | blending)
    # Outside of the region without autocast below, so that it runs exactly as it did before patching.
    was = previous.some_heads(before) if before else None
    unchanged = tuple(sorted(kept))

    def of(chosen: tuple[int, ...]) -> Tensor:
        assert was is not None
        return pick(was, [before.index(h) for h in chosen])

    parts = [(unchanged, of(unchanged))] if kept else []
    dtype = parts[0][1].dtype if parts else layer.value.dtype
    with torch.autocast(layer.query.device.type, enabled=False):
        shares = [(unchanged, softmax_weights(layer, unchanged))] if weights and kept else []
        observe_inactive(layer, slots, features, observed)
        for name, slot in active.items():
            problem = slot_problem(layer, slot, features[name], previous.kernel(slot.heads))
            if observed is not None:
                observed(name, problem)
            mine = heads[name]
            if weights:
                part, share = dense_part(problem, of(mine) if _blends(slot) else None)
                shares.append((mine, share.to(layer.value.dtype)))
            else:
                part = compute(problem, lambda mine=mine: of(mine))  # type: ignore[misc]
            parts.append((mine, part.to(dtype)))
        out = in_order([(chosen, part.transpose(1, 2)) for chosen, part in parts], 2).contiguous()
    return out, in_order(shares, 1) if weights else None


def seed_for(slots: dict[str, Slot], training: bool, device: torch.device) -> Tensor | None:
    """Draws the seed of a layer's random numbers, if it trains and a swap of it reads some.

    It comes from torch's generator, whose state activation checkpointing restores when it computes the layer again.
    """
    if not training or not any(slot.swap.random for slot in slots.values()):
        return None
    return torch.randint(1 << 62, (), device=device)


def as_softmax(slots: dict[str, Slot]) -> tuple[dict[str, Slot], dict[str, dict[str, Tensor]]]:
    """Returns slots of the same heads that compute our own softmax, and their features."""
    return {name: Slot(Softmax(), slot.heads) for name, slot in slots.items()}, {
        k: {"ramp": torch.ones(())} for k in slots
    }


def observe_inactive(
    layer: LayerInputs,
    slots: dict[str, Slot],
    features: dict[str, dict[str, Tensor]],
    observed: Callable[[str, Problem], None] | None,
) -> None:
    """Calls an observer with the problems of slots at lambda 0, which are not computed."""
    for name, slot in slots.items():
        if observed is not None and slot.phase == "before":
            observed(name, slot_problem(layer, slot, features[name]))


def _blends(slot: Slot) -> bool:
    """Whether a slot's output is a blend of the previous attention and the swap, so that both are computed."""
    return slot.phase == "ramp" and not slot.swap.native_ramp


def slot_problem(
    layer: LayerInputs, slot: Slot, features: dict[str, Tensor], stock: Callable[..., Tensor] | None = None
) -> Problem:
    """Returns the attention problem of one slot; ``stock`` is as in :class:`Problem`."""
    features = dict(features)
    ramp = features.pop("ramp")
    if slot.phase == "ramp":
        for name in features.keys() & set(
            slot.swap.fixed_in_ramp
        ):  # a gradient of 0: data-parallel training waits for one
            features[name] = features[name].detach() + 0 * features[name]
    part, kv_heads = _cut(layer, slot.heads)
    return Problem(
        swap=slot.swap,
        features=complete_features(slot.swap, features, part.query, part.key, part.value, kv_heads),
        ramp=1.0 if slot.phase == "swap" else ramp,
        kv_heads=kv_heads,
        stock=stock,
        **vars(part),
    )


def _cut(layer: LayerInputs, heads: tuple[int, ...] | None) -> tuple[LayerInputs, tuple[int, ...] | None]:
    """Returns the inputs of some heads, with all keys and values, and the key/value head that each head reads."""
    if heads is None:
        return layer, None
    visibility, sinks = layer.visibility, layer.sinks
    masks = {name: getattr(visibility, name) for name in ("dense", "bias")}
    own: dict[str, Any] = {k: pick(mask, heads) for k, mask in masks.items() if mask is not None and mask.shape[1] > 1}
    part = replace(
        layer,
        query=pick(layer.query, heads),
        visibility=replace(visibility, **own) if own else visibility,
        sinks=None if sinks is None else pick(sinks, heads, 0 if sinks.ndim == 1 else 1),
        content=None if layer.content is None else pick(layer.content, heads),
    )
    return part, kv_heads_of(heads, layer.query.shape[1] // layer.key.shape[1])


def _to_common_dtype(layer: LayerInputs) -> LayerInputs:
    """Casts query, key and value to one dtype: autocast's inside an autocast region, else the values'."""
    device = layer.query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else layer.value.dtype
    if layer.query.dtype == layer.key.dtype == layer.value.dtype == dtype:
        return layer
    return replace(layer, query=layer.query.to(dtype), key=layer.key.to(dtype), value=layer.value.to(dtype))


def dense_part(problem: Problem, was: Tensor | None) -> tuple[Tensor, Tensor]:
    """Computes the output and the attention weights of a slot, blended according to its ramp."""
    refuse_misfit(problem)
    if problem.swap.native_ramp or isinstance(problem.ramp, float):
        return with_weights(problem)
    full = replace(problem, ramp=1.0)
    (out, weights), (_, softmax) = with_weights(full), with_weights(replace(full, swap=Softmax(), features={}))
    share = problem.per_head(problem.ramp, 2)
    return ((1 - share) * was + share * out).to(out.dtype), (1 - share) * softmax + share * weights


def softmax_weights(layer: LayerInputs, heads: tuple[int, ...] | None = None) -> Tensor:
    """Returns the weights of heads that keep softmax (with the model's own sinks and soft cap); None: of all heads."""
    part, kv_heads = _cut(layer, heads)
    plain = Problem(swap=Softmax(), features={}, kv_heads=kv_heads, **vars(part))
    return with_weights(plain)[1].to(layer.value.dtype)
