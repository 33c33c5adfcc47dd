"""The two functions transformers calls, and the hooks around every attention module of a patched model.

Before a module's forward, :class:`Enter` evaluates the gates and puts a :class:`LayerCall` into the kwargs; the
module hands it to :func:`attention_forward`; after the forward, :class:`Leave` makes sure that it got there. So a
patched module either computes its swaps or raises, whatever happened to the model's configuration in between.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from attnswap.attention.checks import ensure
from attnswap.attention.visibility import Visibility, split_mask
from attnswap.errors import CheckpointError, UnsupportedModelError
from attnswap.surgery import combine
from attnswap.surgery.masks import ForwardMask, compact_mask
from attnswap.surgery.module import LayerSwap
from attnswap.surgery.previous import Previous
from attnswap.surgery.spec import KEY, Slot
from attnswap.surgery.state import append, find_cache

BENIGN = {
    "position_ids",
    "cache_position",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "logits_to_keep",
    "return_dict",
    "num_items_in_batch",
    "past_key_values",
    "encoder_hidden_states",
    "labels",
    "sliding_window",  # already part of the mask
    "softcap",
    "s_aux",
    "is_causal",
}
"""Keyword arguments that attention functions receive and that are either honoured here or change nothing."""


@dataclass
class LayerCall:
    """What travels from an attention module's pre-hook to the attention function.

    Attributes:
        before: The attention implementation the model had.
        slots: The static part of the layer's swaps by name; empty for a layer that was not selected.
        features: Each slot's features and ramp, of the new tokens.
        cache: The KV cache of this forward, if any.
        probe: Multiplies each head's output, shape (heads,), while a patch is being verified.
        alone: No swap runs on the model's own kernel, which would prove nothing of ours.
        served: Set by the attention function.
    """

    before: str
    slots: dict[str, Slot] = field(default_factory=dict)
    features: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    cache: Cache | None = None
    probe: Tensor | None = None
    alone: bool = False
    served: bool = False


class Enter:
    """The pre-forward hook of an attention module."""

    def __init__(self, before: str, unchecked: bool = False) -> None:
        self.before = before
        self.unchecked = unchecked
        self.probe: Tensor | None = None
        self.alone = False

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Computes the layer's features and adds the call to the kwargs."""
        call = LayerCall(self.before, probe=self.probe, alone=self.alone)
        child = module._modules.get(KEY)
        if child is not None:
            if self.unchecked:
                check_ramps(child)
                self.unchecked = torch.compiler.is_compiling()  # a graph checks whenever it runs
            hidden = kwargs.get("hidden_states")
            hidden = args[0] if hidden is None else hidden
            call.slots = _slots(child)
            call.features = child(hidden)
            call.cache = find_cache(args, kwargs)
        return args, {**kwargs, KEY: call}


class Leave:
    """The post-forward hook of an attention module."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Raises unless the attention function saw this call."""
        if not kwargs[KEY].served:
            raise UnsupportedModelError(
                f"{type(module).__name__} (layer {getattr(module, 'layer_idx', '?')}) computed attention without "
                "attnswap, so its swap had no effect. Was the attention implementation changed after patching? "
                "Call attnswap.unpatch(model), set the implementation, and patch again"
            )


def check_ramps(child: nn.Module) -> None:
    """Raises CheckpointError unless the lambda that was read from the weights is the one that config.json names."""
    for part in child.modules():
        for name, slot in part.slots.items() if isinstance(part, LayerSwap) else ():
            saved = part.get_submodule(name).get_buffer("ramp")
            if not saved.is_meta:
                ensure(
                    (saved == torch.tensor(slot.ramp, device=saved.device)).all(),
                    f'config.json says lambda {slot.ramp} for the swap "{name}", but the weights say another: one of '
                    "them was edited. Move lambda with attnswap.set_ramp and save again",
                    lambda saved=saved: f" (the weights say {saved.tolist()})",  # type: ignore[misc]
                    CheckpointError,
                )


def _slots(child: nn.Module) -> dict[str, Slot]:
    # Wrappers of other libraries (modules_to_save, offloading) keep the original module's plain attributes reachable.
    while not hasattr(child, "slots"):
        child = next(child.children())
    return child.slots  # type: ignore[return-value]


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: ForwardMask | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function of patched models, registered with transformers' ``AttentionInterface``.

    Args:
        module: The attention module.
        query: Shape (batch, heads, queries, head_dim).
        key: Shape (batch, kv heads, keys, head_dim), cached ones included.
        value: Shape (batch, kv heads, keys, value_dim).
        attention_mask: What the mask function made, a user's own 4-D mask, or None.
        scaling: Multiplies the dot products.
        dropout: Probability of dropping a weight.
        **kwargs: What the model passes on; anything that is not known to be harmless is refused.

    Returns:
        Output (batch, queries, heads, value_dim) and, where asked for, weights (batch, heads, queries, keys).

    Raises:
        UnsupportedModelError: The call did not come through a patched module, or carries an unknown argument.
    """
    call = kwargs.pop(KEY, None)
    if not isinstance(call, LayerCall):
        raise UnsupportedModelError(
            f"{type(module).__name__} dispatches to attnswap but is not patched (its hooks are missing). "
            "Rebuild the model with attnswap.from_pretrained, or load it and call attnswap.patch again"
        )
    call.served = True

    options = {"scaling": scaling, "dropout": dropout, **kwargs}
    previous = Previous(module, call.before, query, key, value, attention_mask, options, lends=not call.alone)
    weights_wanted = attentions_wanted(kwargs)
    if not call.slots:
        kept = previous.everything()
        if kept[1] is not None or not weights_wanted:
            return kept
    for name in kwargs:
        if name not in BENIGN and kwargs[name] is not None:
            raise UnsupportedModelError(
                f'{type(module).__name__} passes "{name}" to its attention function; attnswap does not know what it '
                "changes and will not guess. Unpatch the layer, or report the architecture"
            )
    layer = combine.LayerInputs(
        query=query,
        key=key,
        value=value,
        visibility=as_visibility(module, attention_mask, query, key, call.cache, kwargs.get("is_causal")),
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux"),
        dropout=dropout,
    )
    if not call.slots:
        return kept[0], combine.softmax_weights(layer)
    features = {name: dict(values) for name, values in call.features.items()}
    if call.cache is not None:
        _extend_with_past(call, features, module, layer.visibility)
    return _probed(combine.attend(layer, call.slots, features, previous, weights_wanted), call.probe)


def _probed(result: tuple[Tensor, Tensor | None], probe: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return result if probe is None else (result[0] * probe[:, None].to(result[0].dtype), result[1])


def _extend_with_past(
    call: LayerCall, features: dict[str, dict[str, Tensor]], module: nn.Module, visibility: Visibility
) -> None:
    """Replaces the per-key features of the new tokens by those of all keys, past ones from beside the cache.

    Padding is blanked before it is stored, with a mark: later masks need not say which past tokens were padding.

    Raises:
        UnsupportedModelError: A mask shows a token that was stored as padding.
    """
    places = [
        (slot, name, feature.padding)
        for slot, static in call.slots.items()
        for name, feature in static.swap.features().items()
        if feature.per == "key"
    ]
    if not places or call.cache is None:
        return
    new = {f"{slot}.{name}": features[slot][name] for slot, name, _ in places}
    first = next(iter(new.values()))
    blank = torch.zeros_like(first[:, :1], dtype=torch.bool)
    if visibility.token_valid is not None:
        blank = ~visibility.token_valid[:, None, visibility.positions()].expand_as(blank)
        new = {key: new[key].masked_fill(blank, padding) for key, (_, _, padding) in zip(new, places, strict=True)}
    new["padding"] = blank.to(first.dtype)
    *full, was_blank = append(call.cache, module.layer_idx, new, visibility.k_length)  # type: ignore[arg-type]
    shown = visibility.dense is not None and visibility.shows(was_blank[:, 0] > 0)
    ensure(
        ~shown if isinstance(shown, Tensor) else not shown,
        "the attention mask shows a token that no query saw when it entered the KV cache, so that it was taken for "
        "padding. Let every token see itself, or run without a cache",
        error=UnsupportedModelError,
    )
    for (slot, name, _), part in zip(places, full, strict=True):
        features[slot][name] = part


def as_visibility(
    module: nn.Module,
    mask: ForwardMask | Tensor | None,
    query: Tensor,
    key: Tensor,
    cache: Cache | None,
    is_causal: bool | None,
) -> Visibility:
    """Returns which keys each query sees, from whatever the model passed as its mask."""
    q_length, k_length = query.shape[2], key.shape[2]
    if isinstance(mask, ForwardMask):
        seen = mask.visibility
    elif mask is not None:
        dense, bias = split_mask(mask, (query.shape[0], query.shape[1], q_length, k_length))
        # Static caches hand out keys that are not written yet; sliding ones have dropped the oldest.
        written: Any = k_length if cache is None else cache.get_seq_length(module.layer_idx)  # type: ignore[arg-type]
        if isinstance(written, Tensor) and torch.compiler.is_compiling():
            written = written.clamp(max=k_length)
        else:
            written = min(int(written), k_length)
        return Visibility(q_length, k_length, query.device, False, written - q_length, dense=dense, bias=bias)
    else:
        causal = q_length > 1 and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
        return Visibility(q_length, k_length, query.device, causal, q_offset=0)
    if (seen.q_length, seen.k_length) != (q_length, k_length):
        raise UnsupportedModelError(
            f"the attention mask is for {seen.q_length} queries and {seen.k_length} keys, but {type(module).__name__} "
            f"attends with {q_length} queries over {k_length} keys"
        )
    return seen


def attentions_wanted(kwargs: dict[str, Any]) -> bool:
    """Whether this forward was asked for attention weights."""
    if kwargs.get("output_attentions"):
        return True
    from transformers.utils import output_capturing

    collected = output_capturing._active_collector.get()
    return collected is not None and "attentions" in collected


def register() -> None:
    """Enters the attention and mask function into transformers' registries, under one name."""
    AttentionInterface.register(KEY, attention_forward)
    AttentionMaskInterface.register(KEY, compact_mask)
