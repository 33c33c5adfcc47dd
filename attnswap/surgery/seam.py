"""The two functions transformers calls, and the hooks around every attention module of a patched model.

Before a module's forward, :class:`GateHook` evaluates the gates and puts a :class:`LayerCall` into the kwargs; the
module hands it to :func:`attention_forward`; after the forward, :class:`ServedCheck` raises unless that happened. So a
patched module either computes its swaps or raises, whatever happened to the model's configuration in between.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from attnswap.attention.checks import ensure
from attnswap.attention.lazy import constant
from attnswap.attention.visibility import Visibility, split_mask
from attnswap.errors import CheckpointError, UnsupportedModelError
from attnswap.surgery import combine
from attnswap.surgery.arguments import refuse_unknown
from attnswap.surgery.call import LayerCall, Observing, Watching
from attnswap.surgery.masks import ForwardMask, compact_mask, refuse_soft_mask, with_lengths
from attnswap.surgery.module import LayerSwap
from attnswap.surgery.previous import Previous
from attnswap.surgery.spec import KEY
from attnswap.surgery.split import refuse_split
from attnswap.surgery.state import find_cache


@dataclass
class Route:
    """Where the attention of a model's layers went before, one for all of them.

    Attributes:
        before: The attention implementation the model had.
        dispatched: The layers call transformers' attention interface.
    """

    before: str
    dispatched: bool


class GateHook:
    """The pre-forward hook of an attention module.

    Args:
        route: The attention implementation the model had.
        unchecked: lambda is yet to be compared with what config.json says.

    Attributes:
        layer: Index of the layer.
        cross: It attends to another sequence: what is cached there are no tokens of this one.
        bypass: The layer computes its previous attention; see :func:`attnswap.bypassed`.
        disabled: The module runs as if it had never been patched, while a patch is being verified.
    """

    def __init__(self, route: Route, unchecked: bool = False) -> None:
        self.route = route
        self.layer, self.cross = 0, False
        self.bypass = False
        self.disabled = False
        self.unchecked = unchecked
        self.gains: Tensor | None = None
        self.watch: Watching | None = None
        self.observe: Observing | None = None

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Computes the layer's features and adds the call to the kwargs."""
        if self.disabled:
            return None
        self._follow(module)
        call = LayerCall(self.route.before, self.layer, gains=self.gains, cross=self.cross)
        call.watch, call.observe = self.watch, self.observe
        child = module._modules.get(KEY)
        if child is not None and not self.bypass:
            refuse_split(module, self.route.before)
            if self.unchecked:
                check_loaded(child)
                self.unchecked = torch.compiler.is_compiling()  # a graph checks whenever it runs
            config = getattr(module, "config", None)
            if config is not None and not isinstance(getattr(config, KEY, None), dict):
                raise CheckpointError(
                    f"the config of {type(module).__name__} has lost its attnswap entry, without which the model could "
                    "not be saved: was it edited or replaced? Call attnswap.patch on a fresh model"
                )
            hidden = _hidden(module, args, kwargs)
            call.features = child(hidden)
            call.slots, call.info = _own(child).slots_at(call.features), _own(child).info
            call.cache = None if self.cross else find_cache(args, kwargs)
        return args, {**kwargs, KEY: call}

    def _follow(self, module: nn.Module) -> None:
        """Follows a change of the model's attention implementation after patching.

        Whisper sets "eager" by itself when it is asked for token timestamps. Heads without a swap then run on it.
        """
        config = getattr(module, "config", None)
        name = getattr(config, "_attn_implementation", None)
        if not self.route.dispatched or name == KEY or config is None or torch.compiler.is_compiling():
            return
        if name in ("eager", "sdpa"):  # whose masks, made before this hook runs, say all there is to say
            self.route.before, config._attn_implementation_internal = name, KEY  # type: ignore[assignment]


class ServedCheck:
    """The post-forward hook of an attention module.

    Args:
        enter: The pre-forward hook.
    """

    def __init__(self, enter: GateHook) -> None:
        self.enter = enter

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Raises unless the attention function saw this call."""
        if not self.enter.disabled and not kwargs[KEY].served:
            raise UnsupportedModelError(
                f"{type(module).__name__} (layer {getattr(module, 'layer_idx', '?')}) computed attention without "
                "attnswap, so its swap had no effect. Was the attention implementation changed after patching? "
                "Call attnswap.unpatch(model), set the implementation, and patch again. (A model that computes "
                'attention itself wants "eager" or "sdpa".)'
            )


def route_of(modules: Iterable[nn.Module]) -> Route | None:
    """Returns the route that attention modules of one config share, if they are connected."""
    hooks = (gate_hook_of(module) for module in modules)
    return next((hook.route for hook in hooks if hook is not None), None)


def gate_hook_of(module: nn.Module) -> GateHook | None:
    """Returns the pre-forward hook of an attention module, if it has ours."""
    return next((hook for hook in module._forward_pre_hooks.values() if isinstance(hook, GateHook)), None)


def _hidden(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Returns the hidden states among the arguments of an attention module's forward."""
    named = (kwargs.get(name) for name in ("hidden_states", "query", "input"))
    found = next((x for x in (*named, *args[:1]) if isinstance(x, Tensor)), None)
    if found is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} is called without hidden states (its arguments: {', '.join(kwargs) or 'none'})"
        )
    return found


def check_loaded(child: nn.Module) -> None:
    """Raises CheckpointError if a tensor of a swap was not read, or lambda differs from the config."""
    for name, parameter in child.named_parameters():
        ensure(
            parameter.is_meta or ~parameter.isnan().all(),
            f'the tensor "{name}" of the swap was not in the checkpoint: it is incomplete. (To train the config of a '
            "saved adapter afresh, set its spec to None)",
            error=CheckpointError,
        )
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


def _own(child: nn.Module) -> LayerSwap:
    # Wrappers of other libraries (modules_to_save, offloading) keep the original module's plain attributes reachable.
    while not hasattr(child, "slots"):
        child = next(child.children())
    return child  # type: ignore[return-value]


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
    previous = Previous(module, call.before, query, key, value, attention_mask, options)
    weights_wanted = attentions_wanted(kwargs)
    if not call.slots:
        kept = previous.all_heads()
        if kept[1] is not None or not weights_wanted:
            return kept
    refuse_unknown(module, kwargs)
    refuse_split(module, call.before, query, key, value)
    check_heads(module, call, query.shape[1])
    call.find_layer(key)
    visibility = as_visibility(module, attention_mask, query, key, call, kwargs.get("is_causal"))
    layer = combine.LayerInputs(
        query=query,
        key=key,
        value=value,
        visibility=with_bias(with_lengths(visibility, kwargs), kwargs.get("position_bias")),
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=kwargs.get("softcap"),
        sinks=sinks_of(kwargs),
        dropout=dropout,
        seed=combine.seed_for(call.slots, module.training, query.device),
    )
    if not call.slots:
        return kept[0], combine.softmax_weights(layer)
    features = call.all_features(layer.visibility)
    result = combine.attend(layer, call.slots, features, previous, weights_wanted, call.observed)
    if call.watch is not None:
        call.watch(call, query, result[0], 2)
    if call.gains is None:
        return result
    # Not on the model's own kernel: the probe is to compare ours with it.
    out = combine.attend(layer, *combine.as_softmax(call.slots), replace(previous, reusable=False), False)[0]
    return out * call.gains[:, None].to(out.dtype), None


def check_heads(module: nn.Module, call: LayerCall, heads: int) -> None:
    """Refuses swaps of single heads where the module has only a part of its heads, as under tensor parallelism.

    Raises:
        UnsupportedModelError: Heads were chosen by number, and the numbers mean other heads on this process.
    """
    if call.info is not None and heads != call.info.heads and any(s.heads is not None for s in call.slots.values()):
        raise UnsupportedModelError(
            f"{type(module).__name__} attends with {heads} of {call.info.heads} heads here (tensor parallelism?), so "
            "the heads that were chosen for a swap cannot be identified; swap all heads, or run without a tp_plan"
        )


def as_visibility(
    module: nn.Module,
    mask: ForwardMask | Tensor | None,
    query: Tensor,
    key: Tensor,
    call: LayerCall,
    is_causal: bool | None,
) -> Visibility:
    """Returns which keys each query sees, from whatever the model passed as its mask."""
    q_length, k_length = query.shape[2], key.shape[2]
    if isinstance(mask, ForwardMask):
        seen = mask.visibility
    elif mask is not None:
        dense, bias = split_mask(mask, (query.shape[0], query.shape[1], q_length, k_length))
        if bias is not None:
            refuse_soft_mask(module, bias)
        offset = call.offset(q_length, k_length)
        return Visibility(q_length, k_length, query.device, False, offset, dense=dense, bias=bias)
    else:
        causal = q_length > 1 and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
        causal = causal and not call.cross
        return Visibility(q_length, k_length, query.device, causal, q_offset=0)
    if (seen.q_length, seen.k_length) != (q_length, k_length):
        raise UnsupportedModelError(
            f"the attention mask is for {seen.q_length} queries and {seen.k_length} keys, but {type(module).__name__} "
            f"attends with {q_length} queries over {k_length} keys"
        )
    return seen


def sinks_of(kwargs: dict[str, Any]) -> Tensor | None:
    """Returns a model's sink logits: "s_aux" of each head, or "sinks" (batch, heads, queries, 1) of each query.

    Raises:
        UnsupportedModelError: They are of another shape.
    """
    sinks = kwargs.get("sinks")
    if sinks is None:
        return kwargs.get("s_aux")
    if sinks.ndim != 4 or sinks.shape[3] != 1 or kwargs.get("s_aux") is not None:
        raise UnsupportedModelError(f"sinks of shape {tuple(sinks.shape)} are not one logit for each query and head")
    return sinks[..., 0]


def with_bias(visibility: Visibility, bias: Tensor | None) -> Visibility:
    """Adds a model's own learned bias of positions, (batch or 1, heads, queries, keys), to what is added to scores."""
    if bias is None:
        return visibility
    return replace(visibility, bias=bias if visibility.bias is None else visibility.bias + bias)


def attentions_wanted(kwargs: dict[str, Any]) -> bool:
    """Whether this forward was asked for attention weights."""
    return bool(kwargs.get("output_attentions")) or _collected()


@constant
def _collected() -> bool:
    """Whether transformers collects the weights of all layers, of which a graph of one layer knows nothing."""
    from transformers.utils import output_capturing

    collected = output_capturing._active_collector.get()
    return collected is not None and "attentions" in collected


# Here, so that transformers knows the name wherever a model can be given it.
AttentionInterface.register(KEY, attention_forward)
AttentionMaskInterface.register(KEY, compact_mask)
