"""Attach the swaps that a config names while transformers constructs the model, with parameters still to be loaded.

Parts of a model are constructed before the whole, from the same config, and cannot know whether they are the part that
was patched. So each part attaches the swaps that fit it, and the outer model removes those in the wrong place.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from attnswap.errors import AttnSwapError, CheckpointError, ConfigError
from attnswap.surgery.attach import attach
from attnswap.surgery.connect import unhook
from attnswap.surgery.entry import carrier_of, entries_of, forget, unsaved_configs
from attnswap.surgery.guard import guard
from attnswap.surgery.hooks import remove_hooks
from attnswap.surgery.module import SwapModule, child_of
from attnswap.surgery.patched import before_of, written_stacks
from attnswap.surgery.previous import check_implementation
from attnswap.surgery.select import fitting_heads
from attnswap.surgery.spec import KEY, PatchSpec, Slot, read_entry
from attnswap.surgery.stacks import AttentionStack
from attnswap.swaps.base import ModelInfo


def rebuild(model: PreTrainedModel) -> None:
    """Attaches the swaps a model's config names; called for every model under construction.

    Raises:
        CheckpointError: The config names layers or heads that the model does not have, or an implementation that
            transformers does not know.
    """
    if carrier_of(model.config) is None:
        return
    for _, entry, _ in entries_of(model, loading=True):
        read_entry(entry)  # a damaged entry is refused by every part of a model
    try:
        found = written_stacks(model, loading=True)
        for stack, spec in found:
            _check(stack, spec)
    except AttnSwapError as error:
        if type(model).__name__ in (model.config.architectures or ()):
            raise
        model.register_forward_pre_hook(Unresolved(str(error)))
        return
    remove_hooks(model.modules(), "_forward_pre_hooks", Unresolved)
    _leave_others(model, found)
    for config in unsaved_configs(model):  # a half's copy of the config; it gets the entry of its own stacks again
        forget(config)
    specs = [_rebuild(stack, spec) for stack, spec in found]
    guard(model, loaded=specs)
    if not isinstance(model._init_weights, _InitWeights):
        # An instance attribute: transformers calls it for each module whose weights were not in the checkpoint.
        model._init_weights = _InitWeights(model, model._init_weights)  # type: ignore[method-assign]


def _rebuild(stack: AttentionStack, spec: PatchSpec) -> PatchSpec:
    """Attaches the swaps of one stack, and returns its spec with the attention implementation that was asked for."""
    name = stack.config._attn_implementation
    if name == KEY:
        spec = replace(spec, before=before_of(stack, spec.before))  # a part of the model was built and connected first
    elif name is not None and not any(child_of(m) for _, m in stack.modules.values()):
        spec = replace(spec, before=name)  # asked for when loading
    check_implementation(spec.before)
    added = {i: slots for i, slots in spec.layers.items() if _slots_of(stack.module(i)) != slots}
    for layer in added:
        stack.module(layer)._modules.pop(KEY, None)
    attach(stack, spec, added, loading=True)
    return spec


def _slots_of(module: nn.Module) -> dict[str, Slot] | None:
    """Returns the slots that a part of the model attached when it was built."""
    child = child_of(module)
    return None if child is None else child.slots


def _check(stack: AttentionStack, spec: PatchSpec) -> None:
    """Refuses a spec that does not fit the attention it names."""
    missing = [layer for layer in spec.layers if layer not in stack.modules]
    if missing:
        raise CheckpointError(
            f"the attnswap entry of config.json names layer {missing[0]}, which the model does not have"
        )
    if spec.seam != stack.seam:
        raise CheckpointError(
            f'the attnswap entry of config.json says that the model was patched at its "{spec.seam}", which is not how '
            f"{type(stack.model).__name__} computes attention"
        )
    for layer, slots in spec.layers.items():
        info = stack.info(layer)
        for name, slot in slots.items():
            try:
                _check_fits(slot, info)
            except ConfigError as error:
                raise CheckpointError(
                    f'the attnswap entry of config.json gives layer {layer} a swap "{name}" that does not fit: {error}'
                ) from error


def _check_fits(slot: Slot, info: ModelInfo) -> None:
    """Raises ConfigError for a slot that no patch would have given a layer."""
    fitting_heads(slot.swap, slot.heads, info)
    count = slot.count(info.heads)
    if isinstance(slot.ramp, tuple):
        if len(slot.ramp) != count:
            raise ConfigError(f"lambda is {slot.ramp} for {count} heads")
        slot.swap.check_shared(slot.ramp, info.heads // info.kv_heads)
    if slot.swap.bind(info) != slot.swap:
        raise ConfigError(f"{slot.swap!r} lacks what depends on the model")


class Unresolved:
    """The hook before the forward of a model whose config names swaps that it has no place for."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def __call__(self, model: nn.Module, args: tuple[Any, ...] = ()) -> None:
        """Raises CheckpointError."""
        raise CheckpointError(
            f"the config names swaps that {type(model).__name__} alone has no place for, so that it would compute "
            f"softmax: {self.reason}. Load the whole model, or remove the attnswap entry of its config"
        )


def _leave_others(model: PreTrainedModel, found: list[tuple[AttentionStack, PatchSpec]]) -> None:
    """Removes swaps that parts of the model attached to other attention."""
    chosen = {id(module) for stack, _ in found for _, module in stack.modules.values()}
    configs = [model.config, *(stack.config for stack, _ in found)]
    every = [module for _, module in (*found[0][0].modules.values(), *found[0][0].others)]
    for module in every:
        if id(module) in chosen:
            continue
        module._modules.pop(KEY, None)
        own = getattr(module, "config", None)
        if own is not None and hasattr(own, KEY) and not any(own is config for config in configs):
            unhook(other for other in every if getattr(other, "config", None) is own)
            own._attn_implementation_internal = found[0][1].before
            forget(own)


class _InitWeights:
    """Gives swap modules their start, and leaves every other module to the model."""

    def __init__(self, model: PreTrainedModel, original: Callable[[nn.Module], None]) -> None:
        self.model, self.original = model, original

    def __call__(self, module: nn.Module) -> None:
        if not isinstance(module, SwapModule):
            self.original(module)
            return
        others = (p for n, p in self.model.named_parameters() if f".{KEY}." not in n)
        state = module.state_dict(keep_vars=True).items()
        # What stays on meta was found in the checkpoint, and is read from disk when it is needed.
        unset = [n for n, p in state if not p.is_meta and not getattr(p, "_is_hf_initialized", False)]
        if unset and any(getattr(p, "_is_hf_initialized", False) for p in others):
            raise CheckpointError(
                f'the checkpoint names the swap "{module.swap.name}" in its config but lacks its parameters '
                f"({', '.join(unset)}): it is incomplete. To start a swap afresh, load the original model and call "
                "attnswap.patch"
            )
        if unset:
            module.set_start(_start)


def _start(parameter: torch.Tensor, mean: float | torch.Tensor, std: float) -> None:
    if isinstance(mean, torch.Tensor):
        init.copy_(parameter, mean)
    elif std:
        init.normal_(parameter, mean, std)
    else:
        init.constant_(parameter, mean)
